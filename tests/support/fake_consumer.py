"""A consumer in memory, for tests that need a dispatcher but no Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import UTC, datetime

from service.delivery.consumer import Attempts, Delivery, LeaseLostError, Missing
from service.delivery.dispatcher import MAX_PER_READ
from service.transitions.transition import StatusTransition

Entry = tuple[str, int]


def transition(session: str, sequence: int) -> StatusTransition:
    """Return the *sequence*-th transition of a session."""
    return StatusTransition(
        event_id=f"evt_{session}_{sequence}",
        event_type="identity.verification_session.processing",
        occurred_at=datetime(2026, 1, 1, tzinfo=UTC),
        session_id=f"vs_{session}",
        current="processing",
        sequence=sequence,
        epoch=1,
        expected=True,
    )


def entry(taken: StatusTransition) -> Entry:
    """Return a transition as the entries of these tests are written: session and sequence."""
    return taken.session_id.removeprefix("vs_"), taken.sequence


class FakeConsumer:
    """A consumer in memory that remembers everything, and fails when told to.

    Attributes:
        pending: What was read and is neither settled nor buried, with the attempts written down.
        missing: Entries that cannot be read, or are gone, by their place in the stream.
        room: How many dead letters there may be.
        places: Where the errors of those were raised.
        faulty: Asked before every call with its name; raises, to let it fail.
    """

    def __init__(
        self, entries: Iterable[Entry] = (), *, pending: dict[int, Attempts] | None = None
    ) -> None:
        self.stream = [transition(*one) for one in entries]
        self.pending: dict[int, Attempts] = dict(pending or {})
        self.at = max(self.pending, default=-1) + 1
        self.ours = True
        self.settled: list[Entry] = []
        self.buried: list[tuple[Entry, str, str, int]] = []
        self.counts: list[tuple[Entry, Attempts]] = []
        self.reads: list[int] = []
        self.latency_s = 0.0
        self.missing: dict[int, Missing] = {}
        self.room = 10**9
        self.places: list[str] = []
        self.faulty: Callable[[str], None] = lambda _: None
        self.grown = asyncio.Event()

    def add(self, *entries: Entry) -> None:
        """Append to the stream."""
        self.stream += [transition(*one) for one in entries]
        self.grown.set()

    def is_ours(self) -> bool:
        """Say what the test has decided."""
        return self.ours

    async def claim_pending(self) -> AsyncIterator[list[Delivery]]:
        """Yield what pends."""
        await self._call("claim_pending")
        found = [self._delivery(i) for i in sorted(self.pending)]
        for i in range(0, len(found), MAX_PER_READ):
            yield found[i : i + MAX_PER_READ]

    async def read(self, most: int) -> list[Delivery]:
        """Return what is new."""
        await self._call("read")
        assert most > 0
        new = range(self.at, min(self.at + most, len(self.stream)))
        self.at = new.stop
        self.pending |= dict.fromkeys(new, Attempts(0, 1))
        self.reads.append(len(new))
        return [self._delivery(i) for i in new]

    async def load(self, delivery: Delivery) -> StatusTransition | Missing:
        """Return what an entry holds."""
        await self._call("load")
        return self._content(delivery)

    async def ack(self, delivery: Delivery) -> None:
        """Settle, and perhaps lose the reply."""
        await self._call("ack")
        self._take_off(delivery)
        self.settled.append(self._entry(delivery))
        await self._reply("ack")

    async def record_attempts(self, delivery: Delivery, attempts: Attempts) -> None:
        """Write attempts down."""
        await self._call("record_attempts")
        self.pending[int(delivery.entry_id)] = attempts
        self.counts.append((self._entry(delivery), attempts))

    async def dead_letter(
        self, delivery: Delivery, *, reason: str, error: str, attempts: int, place: str = ""
    ) -> int | None:
        """Bury, if there is room."""
        await self._call("dead_letter")
        if len(self.buried) >= self.room:
            return None
        self._take_off(delivery)
        self.buried.append((self._entry(delivery), reason, error, attempts))
        self.places.append(place)
        return len(self.buried)

    async def wait_for_entries(self) -> None:
        """Wait until the stream has grown past what was read."""
        self.grown.clear()
        if self.at >= len(self.stream):
            await self.grown.wait()

    def _take_off(self, delivery: Delivery) -> None:
        assert int(delivery.entry_id) in self.pending, "settled or buried twice"
        del self.pending[int(delivery.entry_id)]

    def _delivery(self, i: int) -> Delivery:
        transition = None if i in self.missing else self.stream[i]
        return Delivery(str(i), transition, self.pending[i])

    def _content(self, delivery: Delivery) -> StatusTransition | Missing:
        i = int(delivery.entry_id)
        return self.missing.get(i) or self.stream[i]

    def _entry(self, delivery: Delivery) -> Entry:
        return entry(self.stream[int(delivery.entry_id)])

    async def _call(self, name: str) -> None:
        await asyncio.sleep(self.latency_s)
        if not self.ours:
            raise LeaseLostError
        self.faulty(name)

    async def _reply(self, name: str) -> None:
        """Lose the reply of a call that was executed."""
        self.faulty(f"{name}_reply")
