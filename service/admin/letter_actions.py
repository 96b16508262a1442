"""Replays and drops of dead letters that were started on the page, and how far each has come.

An action runs in the process that got its form, in chunks, one at a time. After each chunk it
writes to Redis how far it has come, so that any process can show it. If its process dies, that does
not move any more. Whatever was done by then is done, and the rest can be chosen again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import msgspec
import structlog
from redis.exceptions import RedisError

from ..delivery import dead_letters
from ..delivery.dead_letters import Chunk, EntryFilter
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.redis_errors import unavailable_reason
from ..telemetry import metrics

KEPT_S = 86_400

Verb = Literal["replay", "drop"]
_PAST: Mapping[Verb, str] = {"replay": "replayed", "drop": "dropped"}
_EVENTS: Mapping[Verb, str] = {"replay": "dead_letters.replayed", "drop": "dead_letters.dropped"}

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Action(NamedTuple):
    """What is to be done.

    Attributes:
        verb: What is done with each letter.
        handler: The handler whose letters these are.
        ids: The letters' ids; empty for all that the filter covers.
        wanted: The filter.
        by: The name of the token that it was started with.
        total: How many letters are expected; None where they were not all counted.
    """

    verb: Verb
    handler: str
    ids: Collection[str]
    wanted: EntryFilter
    by: str
    total: int | None


class Progress(msgspec.Struct):
    """How far an action has come.

    Attributes:
        id: The action's name; the messages of a replay carry it.
        verb: As in `Action`.
        handler: As in `Action`.
        by: As in `Action`.
        total: As in `Action`.
        started_at: When it was started.
        moved_at: When this was written.
        state: `running`, or how it ended.
        found: How many letters were found.
        done: How many of those were replayed or dropped. The others were gone by then, or cannot be
            replayed because they cannot be read.
        error: Why it failed: the word for what is wrong with Redis; empty for a fault of ours.
    """

    id: str
    verb: Verb
    handler: str
    by: str
    total: int | None
    started_at: datetime
    moved_at: datetime
    state: Literal["running", "done", "interrupted", "failed"] = "running"
    found: int = 0
    done: int = 0
    error: str = ""


class LetterActions:
    """The actions of this process, and the progress of those of any process."""

    def __init__(self, connections: Connections, keys: Keys) -> None:
        self._connections = connections
        self._keys = keys
        self._stopping = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether an action is running here, or none may be started any more."""
        return self._stopping.is_set() or not (self._running is None or self._running.done())

    async def start(self, action: Action) -> str | None:
        """Start an action and return its id; None, and nothing is started, while this is busy.

        Raises:
            RedisError: Its progress could not be written, so it was not started.
        """
        async with self._starting:
            if self.is_busy:
                return None
            now = datetime.now(UTC)
            asked = (action.verb, action.handler, action.by, action.total)
            progress = Progress(dead_letters.new_name(), *asked, started_at=now, moved_at=now)
            await self._write(progress)
            self._running = asyncio.create_task(self._run(action, progress))
            return progress.id

    async def wait(self, seconds: float) -> None:
        """Wait for the end of the running action, but not longer than this."""
        if self._running is not None:
            await asyncio.wait({self._running}, timeout=seconds)

    async def stop(self) -> None:
        """Start no more actions, and let a running one end with the chunk that it is at."""
        self._stopping.set()
        async with self._starting:
            if self._running is not None:
                await asyncio.wait({self._running})

    async def read(self, action_id: str) -> Progress | None:
        """Return the progress of an action of any process; None if there was none within a day.

        That of an action of another version of this service may be unreadable: then None too.

        Raises:
            RedisError: Redis refused or did not answer.
        """
        found = await self._connections.client.get(self._keys.action(action_id))
        with suppress(msgspec.MsgspecError):
            return None if found is None else msgspec.json.decode(found, type=Progress)
        return None

    async def _run(self, action: Action, progress: Progress) -> None:
        chunks = dead_letters.letter_chunks(
            self._connections, self._keys, action.handler, action.wanted, action.ids
        )

        async def act(chunk: Chunk) -> None:
            if chunk:
                progress.done += await self._act(progress, chunk)
                progress.found += len(chunk)
            await self._write(progress)

        try:
            is_complete = await dead_letters.run_in_chunks(chunks, act, self._stopping)
            progress.state = "done" if is_complete else "interrupted"
            await self._write(progress)
        except Exception as error:
            # Whatever it is: raised, it would leave the action running for ever, as it seems.
            progress.state = "failed"
            if isinstance(error, RedisError | OSError):
                progress.error = unavailable_reason(error)
            else:
                log.exception("dead_letters.crashed")
            # Most likely this fails as well; then the page says that the action does not move.
            with suppress(RedisError, OSError):
                await self._write(progress)
        metrics.ADMIN_ACTIONS.labels(action.verb, progress.state).inc()
        _log(action, progress)

    async def _act(self, progress: Progress, chunk: Chunk) -> int:
        """Replay or drop letters of one partition; return with how many that was possible."""
        at = self._connections, self._keys, progress.handler, chunk
        if progress.verb == "drop":
            return await dead_letters.drop(*at)
        return (await dead_letters.replay(*at, name=progress.id)).replayed

    async def _write(self, progress: Progress) -> None:
        progress.moved_at = datetime.now(UTC)
        key, value = self._keys.action(progress.id), msgspec.json.encode(progress)
        await self._connections.client.set(key, value, ex=KEPT_S)


def _log(action: Action, progress: Progress) -> None:
    """Log what was done, by whom, and what was asked for."""
    fields: dict[str, Any] = {
        "handler": action.handler,
        "action": progress.id,
        _PAST[action.verb]: progress.done,
        "by": action.by,
        "outcome": progress.state,
    }
    asked = {"error": progress.error, "chosen": len(action.ids), **action.wanted._asdict()}
    fields |= {name: str(value) for name, value in asked.items() if value}
    log.warning(_EVENTS[action.verb], **fields)
