"""Redis, the way out: one handler's mail in one partition, under a lease.

Reading, settling and burying are fenced: a worker that was paused past its lease can do none of
it. When to try again, and how often, is decided in `dispatch`; who holds which lease, in `worker`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from . import tasks, wire
from .coalesce import Coalescer
from .connections import BLOCK_S, Connections, Script, ScriptCall
from .layout import Keys
from .transitions import StatusTransition

MOST_PER_FLIGHT = 512
MOST_TAKEN_OVER_PER_CALL = 100
UNREADABLE = "unreadable"
# In the hands of a third process, since two have ended with it: from here on it is tried alone.
SUSPECT = 3

_LEASE = Script("lease")
_RELEASE = Script("release")
_READ = Script("read")
_TAKE_OVER = Script("take_over")
_SETTLE = Script("settle")
_COUNT = Script("count")
_BURY = Script("bury")
_ANNOUNCE = Script("announce")
_LAG = Script("lag")

# Redis keeps one number per pending entry, the delivery count. Failures count in thousands, so
# that a start without an outcome (the mark of a killed worker) can be told from a failure.
_FAILURE = 1000


class LeaseLostError(Exception):
    """The partition is no longer ours, or may not be: everything in hand is void."""


class Tries(NamedTuple):
    """How often an entry was tried, as the group's pending list remembers it.

    Attributes:
        failed: Attempts that ended in an error.
        started: How many processes have had it in hand since then, this one included, without
            anybody seeing the end; from `SUSPECT` on, every single start counts.
    """

    failed: int
    started: int

    @property
    def is_suspect(self) -> bool:
        """Whether this may be what ended the processes that had it."""
        return self.started >= SUSPECT


class Delivery(NamedTuple):
    """One transition in the hand of one handler."""

    entry_id: str
    transition: StatusTransition
    tries: Tries


class Mailbox:
    """One handler's mail in one partition; its lease is taken with `lease` and kept by it too."""

    def __init__(
        self,
        connections: Connections,
        keys: Keys,
        arrivals: Arrivals,
        *,
        handler: str,
        worker: str,
    ) -> None:
        partition = arrivals.partition
        self.partition = partition
        self.handler = handler
        self._connections = connections
        self._arrivals = arrivals
        self._worker = worker
        self._stream = keys.transitions(partition)
        self._lease = keys.lease(partition, handler)
        self._dead = keys.dead(partition, handler)
        self._token = secrets.token_hex(16)
        self._deadline: float | None = None
        self._last_read = "0-0"
        self._settling = Coalescer(self._settle, most=MOST_PER_FLIGHT)
        self._counting = Coalescer(self._count, most=MOST_PER_FLIGHT)

    def is_ours(self) -> bool:
        """Say whether the lease holds, by a clock that started before it was asked for."""
        return self._deadline is not None and asyncio.get_running_loop().time() < self._deadline

    def lease_call(self, ttl_s: float) -> ScriptCall:
        """Return the call that takes the lease, or renews it once taken."""
        verb = "take" if self._deadline is None else "renew"
        return ScriptCall(_LEASE, [self._lease], [self._token, int(ttl_s * 1000), verb])

    def lag_call(self) -> ScriptCall:
        """Return the call that measures what is not settled."""
        return ScriptCall(_LAG, [self._stream], [self.handler])

    def leased(self, until: float) -> None:
        """Note that the lease is ours *until* then, in the event loop's time."""
        self._deadline = until

    def lost(self) -> None:
        """Note that the lease is not, or no longer, ours."""
        self._deadline = 0.0

    async def release(self) -> None:
        """Give the lease up, if it is still ours, so that another may take it at once."""
        self.lost()
        await self._connections.run_one(_RELEASE, [self._lease], [self._token])

    async def take_over(self) -> AsyncIterator[list[Delivery]]:
        """Claim what was left pending by whoever had it, oldest first, in batches."""
        first = "-"
        while first:
            most = MOST_TAKEN_OVER_PER_CALL
            reply = await self._fenced(
                _TAKE_OVER, self.handler, self._worker, most, first, _FAILURE, SUSPECT
            )
            first = reply[0].decode()
            yield [
                delivery
                for entry_id, count, fields in reply[1]
                if fields is not None
                and (delivery := await self._delivery(entry_id, fields, count)) is not None
            ]

    async def read(self, most: int) -> list[Delivery]:
        """Return up to *most* new deliveries, oldest first; none when there is nothing new."""
        reply = await self._fenced(_READ, self.handler, self._worker, most)
        if isinstance(reply, bytes):
            self._last_read = reply.decode()
            return []
        found = [await self._delivery(entry_id, fields, 1) for entry_id, fields in reply]
        return [delivery for delivery in found if delivery is not None]

    async def arrival(self) -> None:
        """Wait until there is something later than what was last read."""
        await self._arrivals.after(self._last_read)

    async def settle(self, delivery: Delivery) -> None:
        """Settle a delivery its handler has taken; settlements travel together."""
        await self._settling.submit(delivery.entry_id)

    async def count(self, delivery: Delivery, tries: Tries) -> None:
        """Write down how often a delivery was tried, where it survives us."""
        number = tries.failed * _FAILURE + tries.started
        await self._counting.submit((delivery.entry_id, number))

    async def bury(self, delivery: Delivery, *, reason: str, error: str, attempts: int) -> int:
        """Move a delivery to the dead letters and settle it; return how many are there now."""
        return await self._bury(delivery.entry_id, reason, error, attempts)

    async def _bury(self, entry_id: str, reason: str, error: str, attempts: int) -> int:
        arguments = (self._token, self.handler, entry_id, reason, error, attempts)
        keys = [self._stream, self._lease, self._dead]
        return int(self._ours(await self._connections.run_one(_BURY, keys, arguments)))

    async def _settle(self, entry_ids: list[str]) -> Sequence[None]:
        await self._fenced(_SETTLE, self.handler, *entry_ids)
        return [None] * len(entry_ids)

    async def _count(self, counts: list[tuple[str, int]]) -> Sequence[None]:
        flat = [value for count in counts for value in count]
        await self._fenced(_COUNT, self.handler, self._worker, *flat)
        return [None] * len(counts)

    async def _fenced(self, script: Script, *arguments: str | int) -> Any:
        reply = await self._connections.run_one(
            script, [self._stream, self._lease], [self._token, *arguments]
        )
        return self._ours(reply)

    def _ours(self, reply: Any) -> Any:
        """Return *reply*, unless it says that the lease is somebody else's."""
        if reply is None:
            self.lost()
            raise LeaseLostError
        return reply

    async def _delivery(self, entry_id: bytes, fields: list[bytes], count: int) -> Delivery | None:
        """Read one entry; one that is not ours is buried at once."""
        try:
            transition = wire.unpack(dict(zip(fields[::2], fields[1::2], strict=True)))
        except ValueError:
            await self._bury(entry_id.decode(), UNREADABLE, "ValueError", 0)
            return None
        return Delivery(entry_id.decode(), transition, Tries(*divmod(count, _FAILURE)))


class Arrivals:
    """Tells when a partition's stream has grown: one blocking read for all its handlers."""

    def __init__(self, connections: Connections, keys: Keys, partition: int) -> None:
        self.partition = partition
        self._client = connections.blocking_client
        self._stream = keys.transitions(partition)
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._watch: asyncio.Task[None] | None = None
        self._watched_from = "0-0"

    async def after(self, entry_id: str) -> None:
        """Wait until the stream holds an entry later than *entry_id*.

        Raises:
            RedisError: The stream cannot be watched.
        """
        loop = asyncio.get_running_loop()
        arrival: asyncio.Future[None] = loop.create_future()
        self._waiting.append((entry_id, arrival))
        try:
            if self._watch is None:
                self._watch = loop.create_task(self._watch_while_waited_for())
            # A watch that looks only at what comes later would pass this one by.
            elif _order(entry_id) < _order(self._watched_from) and await self._found(entry_id):
                return
            await arrival
        finally:
            arrival.cancel()

    async def close(self) -> None:
        """Stop watching; whoever still waits is on his own."""
        if self._watch is not None:
            await tasks.end(self._watch)

    async def _watch_while_waited_for(self) -> None:
        try:
            while self._waiting:
                await self._one_read()
                self._waiting = [waiter for waiter in self._waiting if not waiter[1].done()]
        finally:
            self._watch = None

    async def _one_read(self) -> None:
        """Block from the earliest place anybody waits at, and wake everybody."""
        self._watched_from = min((entry_id for entry_id, _ in self._waiting), key=_order)
        try:
            found = await self._found(self._watched_from, "BLOCK", int(BLOCK_S * 1000))
        except Exception as error:  # noqa: BLE001 - whoever waits receives it
            for _, arrival in self._waiting:
                if not arrival.done():
                    arrival.set_exception(error)
            return
        if found:
            for _, arrival in self._waiting:
                if not arrival.done():
                    arrival.set_result(None)

    async def _found(self, entry_id: str, *block: str | int) -> bool:
        return bool(
            await self._client.execute_command(
                "XREAD", *block, "COUNT", 1, "STREAMS", self._stream, entry_id
            )
        )


class Lag(NamedTuple):
    """What one handler has not settled in one partition.

    Attributes:
        entries: How many; None when Redis does not know.
        oldest_s: Seconds since the oldest of them was admitted; 0 when there is none.
    """

    entries: int | None
    oldest_s: float


async def lease(
    connections: Connections, mailboxes: Sequence[Mailbox], ttl_s: float
) -> list[float | Exception]:
    """Take or renew the leases of *mailboxes* in one round trip.

    Returns, for each, 0 when its lease is ours, else the seconds until it may be free. Where Redis
    did not answer, the error; that leaves a lease as it was: its deadline goes on running.
    """
    before = asyncio.get_running_loop().time()
    replies = await connections.run([mailbox.lease_call(ttl_s) for mailbox in mailboxes])
    waits: list[float | Exception] = []
    for mailbox, reply in zip(mailboxes, replies, strict=True):
        if isinstance(reply, Exception):
            waits.append(reply)
            continue
        if reply == 0:
            mailbox.leased(before + ttl_s)
        else:
            mailbox.lost()
        waits.append(reply / 1000)
    return waits


async def lags(connections: Connections, mailboxes: Sequence[Mailbox]) -> list[Lag | Exception]:
    """Measure, for each of *mailboxes*, what is not settled, in one round trip."""
    replies = await connections.run([mailbox.lag_call() for mailbox in mailboxes])
    return [
        reply
        if isinstance(reply, Exception)
        else Lag(entries=None if reply[0] < 0 else reply[0], oldest_s=reply[1] / 1000)
        for reply in replies
    ]


async def announce(
    connections: Connections, keys: Keys, *, handler: str, worker: str, ttl_s: float
) -> int:
    """Say that *worker* lives (or, with 0, that it leaves); return how many workers live."""
    arguments = (worker, int(ttl_s * 1000))
    return int(await connections.run_one(_ANNOUNCE, [keys.workers(handler)], arguments))


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)
