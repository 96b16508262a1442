"""Pages of dead letters: what is shown of one, the filter, going on, and nothing but ids."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import httpx2
import orjson
import pytest

from service.admin.letter_filter import read_filter
from service.admin.page import PageError
from service.storage.connections import Connections
from service.storage.keys import Keys
from tests.admin.conftest import AddLetter
from tests.support.logins import ACTING, TOKENS, OpenPage
from tests.support.shown import HOSTILE_TEXTS, Shown
from tests.support.transitions import stored_notification

# The texts of a change that are shown.
CHANGE = (
    *("event_id", "event_type", "session_id", "session_type", "current", "stripe_status"),
    *("last_error_code", "redaction_status", "report_id", "account", "account_name", "context"),
    *("origin", "endpoint"),
)


async def test_one_letter(client: httpx2.AsyncClient, add_letter: AddLetter) -> None:
    """It shows why it was given up and ids and statuses of its item, and no metadata."""
    letter_id = await add_letter()

    listed = Shown((await client.get("/dead-letters/log")).text)
    shown = Shown((await client.get(f"/dead-letters/log/{letter_id}")).text)

    assert f"/dead-letters/log/{letter_id}" in listed.links
    assert {"/sessions/vs_1", "/dead-letters/log"} <= {*shown.links}
    for text in ("exhausted", "ValueError", "my_handler.py:41 in post", "evt_vs_1_1", "processing"):
        assert text in shown.text
    assert "canary4711" not in shown.text + listed.text
    assert (await client.get("/dead-letters")).text.count(">1<") == 1


async def test_what_cannot_be_read_and_what_was_not_fetched(
    client: httpx2.AsyncClient, connections: Connections, keys: Keys, add_letter: AddLetter
) -> None:
    """A letter of other fields is shown as such, and so is a notification."""
    unreadable = await add_letter(change="{", reason="unreadable")
    raw: Any = connections.client
    await raw.xadd(keys.notifications(0), stored_notification("vs_1", 1))
    notification = await add_letter(handler="fetch", attempts=0)

    one = Shown((await client.get(f"/dead-letters/log/{unreadable}")).text)
    thin = Shown((await client.get(f"/dead-letters/fetch/{notification}")).text)
    lists = [Shown((await client.get(f"/dead-letters/{name}")).text) for name in ("log", "fetch")]

    assert "It cannot be read." in one.text
    assert "processing of vs_1 : a thin event, not fetched" in thin.text
    assert ["cannot be read" in found.text for found in lists] == [True, False]


async def test_the_filter(client: httpx2.AsyncClient, add_letter: AddLetter) -> None:
    """Letters are found by reason, session and time; the form keeps what was asked."""
    ids = {
        name: await add_letter(session, reason=reason)
        for name, session, reason in (
            ("a", "vs_a", "exhausted"), ("b", "vs_a", "too_large"), ("c", "vs_c", "too_large"),
        )
    }  # fmt: skip

    async def found(**asked: str) -> str:
        shown = Shown((await client.get("/dead-letters/log", params=asked)).text)
        assert all(text in shown.text for text in asked.values())
        linked = {link.rpartition("/")[2] for link in shown.links}
        return "".join(name for name, letter_id in ids.items() if letter_id in linked)

    assert await found() == "abc"
    assert await found(reason="too_large") == "bc"
    assert await found(reason="too_large", session="vs_a") == "b"
    assert await found(since="1980-01-01T00:00", until="9999-12-30T00:00") == "abc"
    assert await found(since="2100-01-01T00:00") == ""
    assert await found(until="2020-01-01T00:00") == ""


def test_times_of_the_filter_are_local() -> None:
    """A time without a zone is the server's own."""
    wanted = read_filter({"since": "2026-07-31T14:05"}).wanted

    assert wanted.since == datetime(2026, 7, 31, 14, 5).astimezone()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("reason", "two words"), ("reason", "<b>"), ("session", "evt_1"), ("session", "vs_-"),
        ("since", "yesterday"), ("until", "2026-13-01T00:00"), ("until", "14:06"),
        ("since", "0001-01-01T00:00"),
    ],
)  # fmt: skip
async def test_what_no_filter_can_mean(client: httpx2.AsyncClient, name: str, text: str) -> None:
    """It is refused with a page that says what is expected, without repeating it."""
    refused = await client.get("/dead-letters/log", params={name: text})

    assert refused.status_code == 400
    assert "Expected" in refused.text
    assert text not in Shown(refused.text).text
    with pytest.raises(PageError):
        read_filter({name: text})


async def test_fifty_a_page(client: httpx2.AsyncClient, add_letter: AddLetter) -> None:
    """The newest fifty are shown first, and a link leads to the others, with the same filter."""
    ids = [await add_letter(f"vs_{number}") for number in range(60)]

    first = Shown((await client.get("/dead-letters/log?reason=exhausted")).text)
    [on] = [link for link in first.links if "before=" in link]
    second = Shown((await client.get(on)).text)

    linked = [{link.rpartition("/")[2] for link in shown.links} for shown in (first, second)]
    pages = [[each for each in ids if each in found] for found in linked]
    assert [len(page) for page in pages] == [50, 10]
    assert sorted(pages[0] + pages[1]) == sorted(ids)
    assert "reason=exhausted" in on


async def test_who_may_act_is_offered_to(open_page: OpenPage, add_letter: AddLetter) -> None:
    """Buttons to replay and drop are there for those with a login that may, and for no one else."""
    await add_letter()
    for settings in ({}, {**TOKENS, "admin_read_tokens": ()}):
        async with open_page(**settings) as client:
            assert "formaction" not in (await client.get("/dead-letters/log")).text
    async with open_page(**TOKENS) as client:
        await client.post("/login", data={"token": ACTING})
        shown = Shown((await client.get("/dead-letters/log")).text)

    assert {"/dead-letters/log/replay", "/dead-letters/log/drop"} <= {*shown.links}


@pytest.mark.parametrize("hostile", HOSTILE_TEXTS)
async def test_hostile_texts_stay_texts(
    client: httpx2.AsyncClient,
    connections: Connections,
    keys: Keys,
    add_letter: AddLetter,
    hostile: str,
) -> None:
    """Whatever a letter holds, its pages have the elements and attributes of any other letter."""

    async def look(text: str) -> list[Shown]:
        change = dict.fromkeys(CHANGE, text) | {"occurred_at": "2026-01-01T00:00:00Z"}
        letter_id = await add_letter(
            change=orjson.dumps(change), previous=text, error=text, place=text, reason=text
        )
        addresses = (f"/dead-letters/log/{letter_id}", "/dead-letters/log")
        shown = [Shown((await client.get(address)).text) for address in addresses]
        await connections.client.delete(keys.dead_letters(keys.partition("vs_1"), "log"))
        return shown

    expected, found = await look("harmless"), await look(hostile)

    assert [one.tags for one in found] == [one.tags for one in expected]
    for one in found:
        assert " ".join(hostile.split()) in one.text
