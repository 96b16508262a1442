"""The two handlers of a chaos run, named by dotted path: each logs its calls to a file.

`steady` accepts everything. `faulty` behaves at each call as the file `behavior` in CHAOS_DIRECTORY
says. A call that is logged as accepted is on disk before it returns.
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
# The share of sessions that are refused by REFUSING.
REFUSED_ONE_IN = 7
# The share of sessions that are accepted by FAILING_MOST.
TAKEN_ONE_IN = 5


class Behavior(StrEnum):
    """How the faulty sink behaves."""

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


class CallLog:
    """One sink's file, written by all workers: a line for each stage of a call."""

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
        """Log that a transition was accepted, and wait until that is on disk."""
        self.note(Mark.TOOK, transition)
        await asyncio.to_thread(os.fdatasync, self._file)


def _handler(call_log: CallLog, act: Callable[[StatusTransition], Awaitable[None]]) -> Handler:
    """Return a handler that accepts what *act* returns from."""

    async def handle(transition: StatusTransition) -> None:
        call_log.note(Mark.BEGAN, transition)
        try:
            await act(transition)
        except Undeliverable:
            call_log.note(Mark.REFUSED, transition)
            raise
        except BaseException:
            call_log.note(Mark.FAILED, transition)
            raise
        await call_log.take(transition)

    return handle


@asynccontextmanager
async def steady(environ: Mapping[str, str]) -> AsyncIterator[Handler]:
    """Yield a sink that accepts everything."""

    async def act(transition: StatusTransition) -> None:
        await asyncio.sleep(0)

    yield _handler(CallLog(Path(environ["CHAOS_DIRECTORY"], "steady.calls")), act)


@asynccontextmanager
async def faulty(environ: Mapping[str, str]) -> AsyncIterator[Handler]:
    """Yield a sink whose behavior can be set."""
    directory = Path(environ["CHAOS_DIRECTORY"])
    call_log = CallLog(directory / "faulty.calls")

    async def act(transition: StatusTransition) -> None:
        if _is_to_exit(directory, transition, behavior := _behavior(directory)):
            call_log.note(Mark.EXITED, transition)
            os._exit(EXIT_CODE)
        await _behave(behavior, transition)

    yield _handler(call_log, act)


async def _behave(behavior: Behavior, transition: StatusTransition) -> None:
    """Let one call end as *behavior* says."""
    match behavior:
        case Behavior.DOWN:
            raise ConnectionError
        case Behavior.RAISING:
            raise RuntimeError
        case Behavior.HANGING:
            await asyncio.Event().wait()
        case Behavior.LAGGING:
            await asyncio.sleep(LAG_S)
        case Behavior.REFUSING if _share(transition, REFUSED_ONE_IN) == 0:
            raise Undeliverable("refused")
        case Behavior.REFUSING_ODDLY if _share(transition, REFUSED_ONE_IN) == 0:
            raise odd_refusals()[_share(transition, len(odd_refusals()))]
        case Behavior.FAILING_MOST if _share(transition, TAKEN_ONE_IN):
            raise RuntimeError
        case Behavior.FAILING_IN_GROUPS:
            await _fail_in_a_group(is_caught=_share(transition, 2) == 0)


class _Bare(Undeliverable):
    """A refusal without a reason."""

    def __init__(self) -> None:
        pass


def odd_refusals() -> list[Undeliverable]:
    """Return refusals whose reason is anything but a word, as authors of handlers make them."""
    odd: list[Any] = [Behavior.DOWN, None, {"reason": "refused"}, "\ud800", "", "x" * 10_000, 7]
    return [*map(Undeliverable, odd), _Bare()]


async def _fail_in_a_group(*, is_caught: bool) -> None:
    """Let a child of a task group fail, and maybe catch the error.

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


def _behavior(directory: Path) -> Behavior:
    return Behavior((directory / "behavior").read_text())


def _is_to_exit(directory: Path, transition: StatusTransition, behavior: Behavior) -> bool:
    """Say whether this call is to end the process: the first few ones, or each of one event's."""
    with (directory / "exits").open("a+") as exits:
        exits.seek(0)
        before = exits.read().splitlines()
        if behavior is Behavior.EXITING and len(before) < EXITS:
            exits.write("any\n")
            return True
        poisoned = [one for one in before if one != "any"]
        if behavior is Behavior.POISONED and not poisoned:
            exits.write(f"{transition.event_id}\n")
            return True
    return transition.event_id in poisoned
