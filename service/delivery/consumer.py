"""Redis, the way out: one handler's mail in one partition, under a lease.

Reading, settling and burying are fenced: a worker that was paused past its lease can do none of
it. When to try again, and how often, is decided in `dispatch`; who holds which lease, in `worker`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

from ..storage.batching import Batcher, ScriptBatcher
from ..storage.connections import Connections
from ..storage.layout import Keys
from ..storage.scripts import Argument, Needs, Script, ScriptCall
from ..transitions import stream_entry
from ..transitions.transition import StatusTransition
from .stream_watcher import StreamWatcher

MAX_PER_BATCH = 512
# An entry may have tens of kilobytes.
MAX_LOADED_PER_CALL = 64
MAX_CLAIMED_PER_CALL = 100
# Per handler and partition. Where there is no room, what should be buried stays where it is.
MAX_DEAD_LETTERS = 100_000
# In the hands of a third process, since two have ended with it: from here on it is tried alone.
QUARANTINE_AFTER = 3

_LEASE = Script(__package__, "lua/lease.lua")
_RELEASE = Script(__package__, "lua/release.lua")
_READ = Script(__package__, "lua/read.lua")
_LOAD = Script(__package__, "lua/load.lua")
_CLAIM_PENDING = Script(__package__, "lua/claim_pending.lua")
_ACK = Script(__package__, "lua/ack.lua")
_RECORD_ATTEMPTS = Script(__package__, "lua/record_attempts.lua")
_DEAD_LETTER = Script(__package__, "lua/dead_letter.lua")

# Redis keeps one number per pending entry, the delivery count. Failures count in thousands, so
# that a start without an outcome (the mark of a killed worker) can be told from a failure.
FAILURE = 1000


# A handler and a partition.
Assignment = tuple[str, int]


class LeaseLostError(Exception):
    """The partition is no longer ours, or may not be: everything in hand is void."""


class Attempts(NamedTuple):
    """How often an entry was tried, as the group's pending list remembers it.

    Attributes:
        failed: Attempts that ended in an error.
        deliveries: How many processes have had it in hand since then, this one included, without
            anybody seeing the end; from `QUARANTINE_AFTER` on, every single start counts.
    """

    failed: int
    deliveries: int

    @property
    def is_quarantined(self) -> bool:
        """Whether this may be what ended the processes that had it."""
        return self.deliveries >= QUARANTINE_AFTER


class Missing(StrEnum):
    """Why there is no transition in an entry."""

    GONE = "gone"
    UNREADABLE = "unreadable"


@dataclass(slots=True)
class Delivery:
    """One entry in the hand of one handler.

    Attributes:
        entry_id: Its id in its stream.
        transition: What it holds. None when it cannot be read, or when only the id is kept.
        attempts: How often it was tried.
        is_replay: Whether it is in the handler's stream of replays.
    """

    entry_id: str
    transition: StatusTransition | None
    attempts: Attempts
    is_replay: bool = False


class Consumer:
    """One handler's mail in one partition; its lease is taken and renewed by `leases`."""

    def __init__(
        self,
        connections: Connections | ScriptBatcher,
        keys: Keys,
        stream_watcher: StreamWatcher,
        *,
        handler: str,
        worker: str,
        replicas: int = 0,
    ) -> None:
        partition = stream_watcher.partition
        self.partition = partition
        self.handler = handler
        self._stream_watcher = stream_watcher
        self._worker = worker
        token = f"{worker}:{secrets.token_hex(16)}"
        self._fence = _Fence(connections, keys.lease(partition, handler), token, replicas)
        self._new = _Pile(
            self._fence, keys.transitions(partition), group=handler, worker=worker, goes=False
        )
        self._replays = _Pile(
            self._fence, keys.replays(partition, handler), group=handler, worker=worker, goes=True
        )
        self._piles = (self._new, self._replays)
        self._dead = keys.dead(partition, handler)
        self._read: dict[str, str] = {}

    @property
    def assignment(self) -> Assignment:
        """The handler and the partition."""
        return self.handler, self.partition

    def is_ours(self) -> bool:
        """Say whether the lease holds, by a clock that started before it was asked for."""
        deadline = self._fence.deadline
        return deadline is not None and asyncio.get_running_loop().time() < deadline

    def lease_call(self, ttl_s: float, dead: bytes) -> ScriptCall:
        """Return the call that takes the lease, from its *dead* owner too, or renews it."""
        fence = self._fence
        verb = "take" if fence.deadline is None else "renew"
        return ScriptCall(_LEASE, [fence.lease], [fence.token, int(ttl_s * 1000), verb, dead])

    def leased(self, until: float) -> None:
        """Note that the lease is ours *until* then, in the event loop's time."""
        self._fence.deadline = until

    def lost(self) -> None:
        """Note that the lease is not, or no longer, ours."""
        self._fence.deadline = 0.0

    async def release(self) -> None:
        """Give the lease up, if it is still ours, so that another may take it at once."""
        self.lost()
        await self._fence.connections.run_one(_RELEASE, [self._fence.lease], [self._fence.token])

    async def claim_pending(self) -> AsyncIterator[list[Delivery]]:
        """Claim what was left pending by whoever had it, oldest first, in batches."""
        for pile in self._piles:
            first = "-"
            while first:
                following, entries = await pile.claim_pending(first)
                first = following.decode()
                if entries:
                    yield [
                        pile.delivery(entry_id, fields, count=count)
                        for entry_id, count, fields in entries
                        if fields is not None
                    ]

    async def read(self, most: int) -> list[Delivery]:
        """Return up to *most* new deliveries, oldest first; none when there is nothing new."""
        streams = [pile.stream for pile in self._piles]
        replayed, new, read = await self._fence.take(
            _READ, streams, self.handler, self._worker, most
        )
        if read:
            self._read = dict(zip(streams, map(bytes.decode, read), strict=True))
        return [self._replays.delivery(*entry, count=1) for entry in replayed] + [
            self._new.delivery(*entry, count=1) for entry in new
        ]

    async def load(self, delivery: Delivery) -> StatusTransition | Missing:
        """Read again what an entry holds of which only the id was kept; loads travel together."""
        return await self._pile_of(delivery).loading.submit(delivery.entry_id)

    async def wait_for_entries(self) -> None:
        """Wait until there is something later than what was last read."""
        await self._stream_watcher.wait_after(self._read)

    async def ack(self, delivery: Delivery) -> None:
        """Settle a delivery its handler has taken; settlements travel together."""
        await self._pile_of(delivery).settling.submit(delivery.entry_id)

    async def record_attempts(self, delivery: Delivery, attempts: Attempts) -> None:
        """Write down how often a delivery was tried, where it survives us."""
        number = attempts.failed * FAILURE + attempts.deliveries
        counting = self._pile_of(delivery).counting
        await counting.submit((delivery.entry_id, number))

    async def dead_letter(
        self, delivery: Delivery, *, reason: str, error: str, attempts: int, place: str = ""
    ) -> int | None:
        """Move a delivery to the dead letters and settle it.

        Returns how many dead letters there are now; None when there is no room for another, and
        the delivery is where it was.
        """
        letter = (delivery.entry_id, reason, error, place, attempts)
        return await self._pile_of(delivery).dead_letter(self._dead, letter)

    def _pile_of(self, delivery: Delivery) -> _Pile:
        return self._replays if delivery.is_replay else self._new


class _Fence:
    """Runs scripts that act only while a lease is ours."""

    def __init__(
        self, connections: Connections | ScriptBatcher, lease: str, token: str, replicas: int
    ) -> None:
        self.connections = connections
        self.lease = lease
        self.token = token
        self._replicas = replicas
        self.deadline: float | None = None

    async def run(self, script: Script, keys: Sequence[str], *arguments: Argument) -> Any:
        """Run *script* with the lease as first key and its token as first argument.

        Raises:
            LeaseLostError: The lease is somebody else's.
            RedisError: Nobody knows.
        """
        return await self._run(script, keys, arguments, replicas=0)

    async def take(self, script: Script, keys: Sequence[str], *arguments: Argument) -> Any:
        """Run a script that hands out entries, once the replicas asked for have them too.

        What a handler was given and a fail-over takes back would come again at another place in
        its session. To read is to write to the group, behind the entries: whoever has that write
        has the entries.

        Raises:
            LeaseLostError: The lease is somebody else's.
            RedisError: Nobody knows, or no replica has said so.
        """
        return await self._run(script, keys, arguments, replicas=self._replicas)

    async def _run(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Argument], *, replicas: int
    ) -> Any:
        reply = await self.connections.run_one(
            script, [self.lease, *keys], [self.token, *arguments], needs=Needs(replicas)
        )
        if reply is None:
            self.deadline = 0.0
            raise LeaseLostError
        return reply


class _Pile:
    """One stream a handler takes its mail from: what is new, or what is replayed to it.

    What is replayed was copied for this one handler, so it goes when it is settled.
    """

    def __init__(self, fence: _Fence, stream: str, *, group: str, worker: str, goes: bool) -> None:
        self.stream = stream
        self._worker = worker
        self.settling = Batcher(self._settle, max_items=MAX_PER_BATCH, waits_for_more=True)
        self.counting = Batcher(self._count, max_items=MAX_PER_BATCH)
        self.loading: Batcher[str, StatusTransition | Missing]
        self.loading = Batcher(self._load, max_items=MAX_LOADED_PER_CALL)
        self._fence = fence
        self._group = group
        self._goes = int(goes)

    def delivery(self, entry_id: bytes, fields: list[bytes], *, count: int) -> Delivery:
        """Return an entry of this stream as a delivery."""
        transition = _transition(fields)
        return Delivery(
            entry_id.decode(),
            None if isinstance(transition, Missing) else transition,
            _attempts(count),
            is_replay=bool(self._goes),
        )

    async def claim_pending(self, first: str) -> Any:
        most = MAX_CLAIMED_PER_CALL
        arguments = (self._group, self._worker, most, first, FAILURE, QUARANTINE_AFTER, self._goes)
        return await self._fence.take(_CLAIM_PENDING, [self.stream], *arguments)

    async def dead_letter(self, dead: str, letter: Sequence[Argument]) -> int | None:
        arguments = (self._group, self._goes, MAX_DEAD_LETTERS, *letter)
        held = int(await self._fence.run(_DEAD_LETTER, [self.stream, dead], *arguments))
        return held or None

    async def _load(self, entry_ids: list[str]) -> Sequence[StatusTransition | Missing]:
        return [
            Missing.GONE if fields is None else _transition(fields)
            for fields in await self._fence.run(_LOAD, [self.stream], *entry_ids)
        ]

    async def _settle(self, entry_ids: list[str]) -> Sequence[None]:
        await self._fence.run(_ACK, [self.stream], self._group, self._goes, *entry_ids)
        return [None] * len(entry_ids)

    async def _count(self, counts: list[tuple[str, int]]) -> Sequence[None]:
        flat = [value for count in counts for value in count]
        await self._fence.run(_RECORD_ATTEMPTS, [self.stream], self._group, self._worker, *flat)
        return [None] * len(counts)


def _transition(fields: list[bytes]) -> StatusTransition | Missing:
    try:
        return stream_entry.unpack(dict(zip(fields[::2], fields[1::2], strict=True)))
    except ValueError:
        return Missing.UNREADABLE


@lru_cache(maxsize=1024)
def _attempts(count: int) -> Attempts:
    """Return what Redis's delivery count says; many entries share one."""
    return Attempts(*divmod(count, FAILURE))
