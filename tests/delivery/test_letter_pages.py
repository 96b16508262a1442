"""Dead letters are shown in pages: newest first, each once, however few of them a filter covers."""

from __future__ import annotations

from datetime import UTC, datetime
from random import Random
from typing import Any

import pytest

from service.delivery.dead_letters import (
    Entry,
    EntryFilter,
    find_one,
    letter_chunks,
    read_dead_letters,
)
from service.delivery.letter_pages import MAX_SCANNED, LetterPage, read_page
from service.storage.connections import Connections
from service.storage.keys import Keys
from tests.support.transitions import stored_entry

HANDLER = "log"
LETTER = {"entry_id": "1-0", "reason": "exhausted", "error": "ValueError", "attempts": 3}


class Letters:
    """Dead letters on an empty server, with ids of the test's choice."""

    def __init__(self, connections: Connections, keys: Keys) -> None:
        self.connections = connections
        self.keys = keys
        self.client: Any = connections.client

    async def add(self, *letters: tuple[int, str], reason: str = "exhausted") -> None:
        """Add letters, each by its partition and the id of its entry."""
        pipeline = self.client.pipeline(transaction=False)
        for partition, entry_id in letters:
            stream = self.keys.dead_letters(partition, HANDLER)
            fields = stored_entry("vs_a", 1) | LETTER | {"reason": reason}
            pipeline.xadd(stream, fields, id=entry_id)
        await pipeline.execute()

    async def page(self, before: str = "", size: int = 50, **wanted: Any) -> LetterPage:
        """Return a page."""
        return await read_page(
            self.connections, self.keys, HANDLER, EntryFilter(**wanted), before=before, size=size
        )

    async def pages(self, size: int, **wanted: Any) -> list[LetterPage]:
        """Return all pages, each from where the one before it ended."""
        found = [await self.page(size=size, **wanted)]
        while found[-1].goes_on_at is not None:
            found.append(await self.page(found[-1].goes_on_at, size, **wanted))
        return found


@pytest.fixture
def letters(connections: Connections, keys: Keys) -> Letters:
    """Return an empty server."""
    return Letters(connections, keys)


def ids(*pages: LetterPage) -> list[str]:
    """Return the ids of all letters on pages."""
    return [letter.id for page in pages for letter in page.letters]


@pytest.mark.parametrize("size", [1, 7, 40, 41, 1000])
async def test_each_letter_is_on_one_page_the_newest_first(letters: Letters, size: int) -> None:
    """All partitions are merged by time, also where letters of several have one id."""
    random = Random(7)
    chosen = {(random.randrange(8), f"{random.randrange(1, 9)}-{n % 2}") for n in range(90)}
    ordered = sorted(chosen, key=lambda one: (*map(int, one[1].split("-")), one[0]))
    await letters.add(*ordered)

    pages = await letters.pages(size)

    assert ids(*pages) == [f"{partition}-{entry_id}" for partition, entry_id in ordered[::-1]]
    assert [len(page.letters) for page in pages[:-1]] == [size] * (len(pages) - 1)
    assert len(pages[-1].letters) <= size
    assert pages[-1].letters


async def test_a_page_looks_at_a_bounded_number_of_letters(letters: Letters) -> None:
    """Where a filter covers few letters, a page may be empty, and goes on where it stopped."""
    await letters.add((3, "1-0"), reason="refused")
    await letters.add(*((n % 8, f"{n + 2}-0") for n in range(2 * MAX_SCANNED + 10)))

    pages = await letters.pages(50, reason="refused")

    assert [(len(page.letters), page.scanned) for page in pages] == [
        (0, MAX_SCANNED),
        (0, MAX_SCANNED),
        (1, 11),
    ]
    assert ids(*pages) == ["3-1-0"]


async def test_times_bound_a_page_to_the_millisecond(letters: Letters) -> None:
    """Both ends are included; letters outside are not looked at."""
    await letters.add((0, "1000-0"), (1, "1001-5"), (2, "1500-0"), (0, "2000-9"), (1, "2001-0"))
    since, until = (datetime.fromtimestamp(ms / 1000, UTC) for ms in (1001, 2000))

    page = await letters.page(since=since, until=until)
    [second, *_] = await letters.pages(1, since=since, until=until)
    all_of_them = read_dead_letters(
        letters.connections, letters.keys, HANDLER, EntryFilter(since=since, until=until)
    )

    assert (ids(page), page.scanned) == (["0-2000-9", "2-1500-0", "1-1001-5"], 3)
    assert second.goes_on_at == "0-2000-9"
    assert {entry.id async for entry in all_of_them} == {*ids(page)}


async def test_one_letter_is_found_by_its_id(letters: Letters) -> None:
    """Any other id, whatever it is, finds nothing."""
    await letters.add((3, "1-0"), (3, "1-1"))
    found = await find_one(letters.connections, letters.keys, HANDLER, "3-1-1")
    others = [
        *("3-1-2", "2-1-1", "3-1", "3-1-1-1", "8-1-1", "300-1-1", "3-0-0", "x", "", "3-1-*"),
        *("3--1-1", "3-1-\N{ARABIC-INDIC DIGIT ONE}", f"3-{2**64}-0", "3-1-1\n", "3-" + "9" * 400),
    ]

    assert isinstance(found, Entry)
    assert (found.id, found.reason, found.attempts) == ("3-1-1", "exhausted", 3)
    for other in others:
        assert await find_one(letters.connections, letters.keys, HANDLER, other) is None


@pytest.mark.parametrize("before", ["x", "3-1", "8-1-1", "3-0-0", f"3-{2**64}-0", "3-1-1 "])
async def test_a_page_begins_at_a_letter(letters: Letters, before: str) -> None:
    """What cannot be the place of a letter is refused before Redis is asked."""
    with pytest.raises(ValueError, match="not an id"):
        await letters.page(before)


async def test_letters_are_chosen_by_id_and_filter(letters: Letters) -> None:
    """Of the letters named, those come that exist and are covered, each once, in their order.

    The second part of an id is a number: as a text, 10 would come before 9.
    """
    await letters.add((1, "1-0"), (2, "1-0"), (0, "5-0"), (3, "7-9"), (3, "7-10"))
    await letters.add((1, "2-0"), reason="refused")
    chosen = ["3-7-10", "2-1-0", "1-2-0", "0-9-0", "x", "1-1-0", "1-1-0", "3-7-9", "0-5-0"]

    async def find_ids(**wanted: Any) -> list[str]:
        filtered = EntryFilter(**wanted)
        found = letter_chunks(letters.connections, letters.keys, HANDLER, filtered, chosen)
        return [entry.id async for chunk in found for entry in chunk]

    assert await find_ids() == ["1-1-0", "2-1-0", "1-2-0", "0-5-0", "3-7-9", "3-7-10"]
    assert await find_ids(reason="refused") == ["1-2-0"]
    assert await find_ids(until=datetime.fromtimestamp(0.001, UTC)) == ["1-1-0", "2-1-0"]
