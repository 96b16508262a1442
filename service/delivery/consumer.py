"""One handler's consumer of one partition: read, claim, acknowledge and dead-letter entries.

Every call is a script that checks the consumer's lease first (`leases`). Which entry is tried when,
and what becomes of it, is decided in `dispatcher` and `deliverer`.

How often an entry was tried must survive the worker. Redis keeps one number for each pending entry,
its delivery count. It holds two:

    count = failed * 1000 + unresolved          failed      unresolved

    an entry is read for the first time         0           1
    its call failed                             + 1         1
    another consumer claims it                  unchanged   + 1, up to QUARANTINE_AFTER
    the same consumer claims it again           unchanged   unchanged
    its call begins, in quarantine              unchanged   + 1
    that call ends                              unchanged   - 1
    a worker that stops had not begun it        unchanged   - 1, unless it is in quarantine

`failed` counts calls that ended in an error. `unresolved` counts the workers that had the entry
since then and have not said what became of it: each may have been killed by it. But a killed worker
leaves all its entries pending, and only one of them is to blame. So claiming counts up to
QUARANTINE_AFTER only. From there on the entry is in quarantine: its call runs alone in its process,
and only such calls are counted. That number grows for the guilty entry alone.

Pending entries are claimed before anything new is read, the oldest first: what a worker left behind
comes before what follows it in its session.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from ..storage.batching import Batcher
from ..storage.keys import Keys
from ..storage.scripts import Argument, Script
from ..transitions.transition import StatusTransition, is_selftest
from .leases import Lease
from .sources import Item, source_of
from .stream_watcher import StreamWatcher

MAX_PER_BATCH = 512
# An entry may have tens of kilobytes.
MAX_LOADED_PER_CALL = 64
MAX_CLAIMED_PER_CALL = 100
# Of one handler in one partition. At this number an entry stays pending instead of becoming one.
MAX_DEAD_LETTERS = 100_000
# Of one handler in one partition, about: what the timeline of a session is read from.
MAX_FINISHED_ATTEMPTS = 5000
# The first delivery, and two claims from workers that died.
QUARANTINE_AFTER = 3
FAILURE_WEIGHT = 1000

_READ = Script(__package__, "lua/read.lua")
_LOAD = Script(__package__, "lua/load.lua")
_CLAIM_PENDING = Script(__package__, "lua/claim_pending.lua")
_ACK = Script(__package__, "lua/ack.lua")
_RECORD_ATTEMPTS = Script(__package__, "lua/record_attempts.lua")
_DEAD_LETTER = Script(__package__, "lua/dead_letter.lua")


class Attempts(NamedTuple):
    """How often an entry was tried, as its delivery count says.

    Attributes:
        failed: Calls of the handler that ended in an error.
        unresolved: Workers that had the entry since then without an outcome, this one included; in
            quarantine, calls that began.
    """

    failed: int
    unresolved: int

    @property
    def is_quarantined(self) -> bool:
        """Whether the entry may have killed the workers that had it."""
        return self.unresolved >= QUARANTINE_AFTER


class Missing(StrEnum):
    """Why an entry holds no item."""

    GONE = "gone"
    UNREADABLE = "unreadable"


@dataclass(slots=True)
class Delivery:
    """One entry that was delivered to one handler.

    Attributes:
        entry_id: Its id in its stream.
        item: What it holds. None when it cannot be read, or when only its id is kept.
        attempts: How often it was tried.
        is_replay: Whether it is in the handler's stream of replays.
    """

    entry_id: str
    item: Item | None
    attempts: Attempts
    is_replay: bool = False


class Consumer:
    """Consumes one partition's stream of a handler's source, and the replays, for that handler.

    Args:
        lease: Taken and renewed elsewhere; names handler, partition and worker.
        keys: The layout.
        stream_watcher: That of the stream.
        replicas: How many replicas must know that an entry was delivered before a worker gets it.
            A fail-over that takes the entry back would deliver it again at another place in its
            session. The delivery is written behind the entry, so a replica that has the one has
            the other.
    """

    def __init__(
        self, lease: Lease, keys: Keys, stream_watcher: StreamWatcher, *, replicas: int = 0
    ) -> None:
        handler, partition = lease.assignment
        self.lease = lease
        self.handler = handler
        self._stream_watcher = stream_watcher
        self._replicas = replicas
        self._dead_letters = keys.dead_letters(partition, handler)
        finished = keys.finished_attempts(partition, handler)
        new, replays = source_of(handler).stream(keys, partition), keys.replays(partition, handler)
        self._new = _GroupStream(lease, new, finished, replicas)
        self._replays = _GroupStream(lease, replays, finished, replicas, is_replay=True)
        self._last_read: dict[str, str] = {}

    def has_lease(self) -> bool:
        """Say whether the lease is ours, by our clock."""
        return self.lease.is_held()

    async def claim_pending(self) -> AsyncIterator[list[Delivery]]:
        """Claim all pending entries, whichever consumer had them, the oldest first, in batches."""
        for stream in (self._new, self._replays):
            start = "-"
            while start:
                start, deliveries = await stream.claim_batch(start)
                if deliveries:
                    yield deliveries

    async def read(self, max_entries: int) -> list[Delivery]:
        """Return new deliveries, the oldest first; none when there is nothing new."""
        keys = [self._new.key, self._replays.key]
        arguments = (self.handler, self.lease.worker, max_entries)
        replayed, new, last_read = await self.lease.run(
            _READ, keys, *arguments, replicas=self._replicas
        )
        if last_read:
            self._last_read = dict(zip(keys, map(bytes.decode, last_read), strict=True))
        return [self._replays.make_delivery(*entry, count=1) for entry in replayed] + [
            self._new.make_delivery(*entry, count=1) for entry in new
        ]

    async def load(self, delivery: Delivery) -> Item | Missing:
        """Read again an entry of which only the id was kept; calls share round trips."""
        return await self._stream_of(delivery).loads.submit(delivery.entry_id)

    async def wait_for_entries(self) -> None:
        """Wait until a stream has an entry later than the last one that was read."""
        await self._stream_watcher.wait_after(self._last_read)

    async def ack(self, delivery: Delivery) -> None:
        """Acknowledge a delivery that its handler has taken; calls share round trips."""
        done = (delivery.entry_id, _event_to_note(delivery), delivery.attempts.failed + 1)
        await self._stream_of(delivery).acks.submit(done)

    async def record_attempts(
        self, delivery: Delivery, attempts: Attempts, *, error: str = "", place: str = ""
    ) -> None:
        """Keep in Redis how often a delivery was tried; calls share round trips.

        Where the last attempt has failed, *error* says with which class, and *place* where.
        """
        count = attempts.failed * FAILURE_WEIGHT + attempts.unresolved
        event = _event_to_note(delivery) if error else ""
        await self._stream_of(delivery).counts.submit(
            (delivery.entry_id, count, event, attempts.failed, error, place)
        )

    async def dead_letter(
        self, delivery: Delivery, *, reason: str, error: str, attempts: int, place: str = ""
    ) -> int | None:
        """Move a delivery to the dead letters, and acknowledge it.

        Returns how many dead letters there are now; None when there are too many for another one,
        and the delivery is still pending.
        """
        stream = self._stream_of(delivery)
        letter = (delivery.entry_id, reason, error, place, attempts, _event_to_note(delivery))
        return await stream.dead_letter(self._dead_letters, letter)

    def _stream_of(self, delivery: Delivery) -> _GroupStream:
        return self._replays if delivery.is_replay else self._new


class _GroupStream:
    """One stream, as the handler's consumer group reads it under a lease."""

    def __init__(
        self, lease: Lease, key: str, finished: str, replicas: int, *, is_replay: bool = False
    ) -> None:
        source = source_of(lease.handler)
        self.key = key
        self.acks = Batcher(self._ack, max_items=MAX_PER_BATCH, waits_for_more=True)
        self.counts = Batcher(self._record_attempts, max_items=MAX_PER_BATCH)
        self.loads: Batcher[str, Item | Missing]
        self.loads = Batcher(self._load, max_items=MAX_LOADED_PER_CALL)
        self._lease = lease
        self._finished = finished
        self._replicas = replicas
        self._unpack = source.unpack
        self._is_replay = is_replay
        self._noting = (int(is_replay), MAX_FINISHED_ATTEMPTS)
        # A replay is a copy made for this handler alone.
        self._delete_on_ack = int(is_replay or source.delete_on_ack)

    def make_delivery(self, entry_id: bytes, fields: list[bytes], *, count: int) -> Delivery:
        """Return an entry of this stream with its delivery count."""
        found = self._item(fields)
        item = None if isinstance(found, Missing) else found
        return Delivery(entry_id.decode(), item, _attempts(count), is_replay=self._is_replay)

    async def claim_batch(self, start: str) -> tuple[str, list[Delivery]]:
        """Claim pending entries from an id on; return the next id, empty at the end, and them."""
        limits = (MAX_CLAIMED_PER_CALL, start, FAILURE_WEIGHT, QUARANTINE_AFTER)
        arguments = (self._lease.handler, self._lease.worker, *limits, int(self._is_replay))
        next_start, entries = await self._lease.run(
            _CLAIM_PENDING, [self.key], *arguments, replicas=self._replicas
        )
        # An entry without fields was deleted from the stream: there is nothing to deliver.
        return next_start.decode(), [
            self.make_delivery(entry_id, fields, count=count)
            for entry_id, count, fields in entries
            if fields is not None
        ]

    async def dead_letter(self, dead_letters: str, letter: Sequence[Argument]) -> int | None:
        """Move an entry to *dead_letters*; return their number, None when there is no room."""
        limits = (self._delete_on_ack, MAX_DEAD_LETTERS)
        arguments = (self._lease.handler, *limits, *letter, *self._noting)
        keys = [self.key, self._finished, dead_letters]
        return await self._lease.run(_DEAD_LETTER, keys, *arguments) or None

    async def _load(self, entry_ids: list[str]) -> Sequence[Item | Missing]:
        return [
            Missing.GONE if fields is None else self._item(fields)
            for fields in await self._lease.run(_LOAD, [self.key], *entry_ids)
        ]

    async def _ack(self, done: list[tuple[Argument, ...]]) -> Sequence[None]:
        arguments = (self._lease.handler, self._delete_on_ack, *self._noting, *chain(*done))
        await self._lease.run(_ACK, [self.key, self._finished], *arguments)
        return [None] * len(done)

    async def _record_attempts(self, counts: list[tuple[Argument, ...]]) -> Sequence[None]:
        arguments = (self._lease.handler, self._lease.worker, *self._noting, *chain(*counts))
        await self._lease.run(_RECORD_ATTEMPTS, [self.key, self._finished], *arguments)
        return [None] * len(counts)

    def _item(self, fields: list[bytes]) -> Item | Missing:
        try:
            return self._unpack(dict(zip(fields[::2], fields[1::2], strict=True)))
        except ValueError:
            return Missing.UNREADABLE


def _event_to_note(delivery: Delivery) -> str:
    """Return the event id under which a finished attempt is noted, or nothing.

    A session's timeline looks for the attempts of its transitions. It has none of a notification,
    whose event has another id, and a self-test shall leave nothing.
    """
    item = delivery.item
    if isinstance(item, StatusTransition) and not is_selftest(item.session_id):
        return item.event_id
    return ""


@lru_cache(maxsize=1024)
def _attempts(count: int) -> Attempts:
    """Return what a delivery count says.

    Entries share the result, which would be a third of the memory of an entry kept by its id.
    """
    return Attempts(*divmod(count, FAILURE_WEIGHT))
