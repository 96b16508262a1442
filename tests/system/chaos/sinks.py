"""The two handlers of a chaos run, named by dotted path: each journals its calls to a file.

`honest` takes everything. `wayward` does what the file `mood` in CHAOS_DIRECTORY says, at each
call. What a journal says was taken is on the disk before the call returns.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any
from zlib import crc32

import orjson

from service.errors import Undeliverable
from service.handlers import Handler
from service.transitions.transition import StatusTransition
from tests.system.chaos.evidence import Mark

LAG_S = 0.4
EXITS, EXIT_CODE = 2, 9
# One session in so many is refused while the mood is to refuse.
REFUSED_ONE_IN = 7
# One session in so many is taken while the mood is to fail most.
TAKEN_ONE_IN = 5


class Mood(StrEnum):
    """How the wayward sink behaves."""

    FINE = "fine"
    DOWN = "down"
    RAISING = "raising"
    REFUSING = "refusing"
    HANGING = "hanging"
    LAGGING = "lagging"
    EXITING = "exiting"
    POISONED = "poisoned"
    FAILING_MOST = "failing_most"
    FAILING_IN_GROUPS = "failing_in_groups"
    REFUSING_ODDLY = "refusing_oddly"


class Journal:
    """One sink's file: a line for each mark, from all workers together."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, mark: Mark, transition: StatusTransition) -> None:
        """Write one line."""
        line = {
            "mark": mark,
            "at": time.time(),
            "event_id": transition.event_id,
            "session_id": transition.session_id,
            "epoch": transition.epoch,
            "sequence": transition.sequence,
            "current": transition.current,
        }
        os.write(self._file, orjson.dumps(line) + b"\n")

    async def take(self, transition: StatusTransition) -> None:
        """Write that a transition was taken, and wait until that is on the disk."""
        self.note(Mark.TOOK, transition)
        await asyncio.to_thread(os.fdatasync, self._file)


def _handler(journal: Journal, act: Callable[[StatusTransition], Awaitable[None]]) -> Handler:
    """Return a handler that takes what *act* lets pass."""

    async def handle(transition: StatusTransition) -> None:
        journal.note(Mark.BEGAN, transition)
        try:
            await act(transition)
        except Undeliverable:
            journal.note(Mark.REFUSED, transition)
            raise
        except BaseException:
            journal.note(Mark.FAILED, transition)
            raise
        await journal.take(transition)

    return handle


@asynccontextmanager
async def honest(environ: Mapping[str, str]) -> AsyncIterator[Handler]:
    """Yield a sink that takes everything."""

    async def act(transition: StatusTransition) -> None:
        await asyncio.sleep(0)

    yield _handler(Journal(Path(environ["CHAOS_DIRECTORY"], "honest.journal")), act)


@asynccontextmanager
async def wayward(environ: Mapping[str, str]) -> AsyncIterator[Handler]:
    """Yield a sink that behaves as its mood is."""
    directory = Path(environ["CHAOS_DIRECTORY"])
    journal = Journal(directory / "wayward.journal")

    async def act(transition: StatusTransition) -> None:
        if _is_to_exit(directory, transition, mood := _mood(directory)):
            journal.note(Mark.EXITED, transition)
            os._exit(EXIT_CODE)
        await _behave(mood, transition)

    yield _handler(journal, act)


async def _behave(mood: Mood, transition: StatusTransition) -> None:
    """Do to one call what *mood* does."""
    match mood:
        case Mood.DOWN:
            raise ConnectionError
        case Mood.RAISING:
            raise RuntimeError
        case Mood.HANGING:
            await asyncio.Event().wait()
        case Mood.LAGGING:
            await asyncio.sleep(LAG_S)
        case Mood.REFUSING if _share(transition, REFUSED_ONE_IN) == 0:
            raise Undeliverable("refused")
        case Mood.REFUSING_ODDLY if _share(transition, REFUSED_ONE_IN) == 0:
            raise odd_refusals()[_share(transition, len(odd_refusals()))]
        case Mood.FAILING_MOST if _share(transition, TAKEN_ONE_IN):
            raise RuntimeError
        case Mood.FAILING_IN_GROUPS:
            await _fail_in_a_group(is_caught=_share(transition, 2) == 0)


class _Bare(Undeliverable):
    """A refusal whose author forgot the word."""

    def __init__(self) -> None:
        pass


def odd_refusals() -> list[Undeliverable]:
    """Return refusals with anything but a word, as authors of handlers make them."""
    odd: list[Any] = [Mood.DOWN, None, {"reason": "refused"}, "\ud800", "", "x" * 10_000, 7]
    return [*map(Undeliverable, odd), _Bare()]


async def _fail_in_a_group(*, is_caught: bool) -> None:
    """Let a child of a task group fail, and maybe catch that and go on.

    In Python 3.11 that leaves the handler's task with a request to be canceled.
    """

    async def fail() -> None:
        await asyncio.sleep(0)
        raise RuntimeError

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
    except* RuntimeError:
        if not is_caught:
            raise


def _share(transition: StatusTransition, of: int) -> int:
    """Return which of so many shares a session belongs to, the same in every process."""
    return crc32(transition.session_id.encode()) % of


def _mood(directory: Path) -> Mood:
    return Mood((directory / "mood").read_text())


def _is_to_exit(directory: Path, transition: StatusTransition, mood: Mood) -> bool:
    """Say whether this call is to end the process: the first few ones, or each of one event's."""
    with (directory / "exits").open("a+") as exits:
        exits.seek(0)
        before = exits.read().splitlines()
        if mood is Mood.EXITING and len(before) < EXITS:
            exits.write("any\n")
            return True
        poisoned = [one for one in before if one != "any"]
        if mood is Mood.POISONED and not poisoned:
            exits.write(f"{transition.event_id}\n")
            return True
    return transition.event_id in poisoned
