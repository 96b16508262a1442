"""A model of one partition's consumers in plain Python; `test_consumer_machine` compares with it.

Shares no line with the service. Entry ids are pairs of numbers here, in the order of Redis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

FAILURE_WEIGHT = 1000
QUARANTINE_AFTER = 3
FETCH = "fetch"

Id = tuple[int, int]
START: Id = (0, 0)


class Item(NamedTuple):
    """What an entry is: a transition or notification by its number, or unreadable; or a replay."""

    number: int | None
    replay: str | None = None


class Pending(NamedTuple):
    """A pending entry: its owner and its delivery count."""

    owner: str
    times: int


class DeadLetter(NamedTuple):
    """A dead letter; of a deleted entry there is no item."""

    item: Item | None
    entry: Id
    reason: str
    error: str
    attempts: int


class Finished(NamedTuple):
    """A finished attempt to deliver a transition, by its number."""

    number: int
    outcome: str
    attempt: int
    is_replay: bool
    error: str = ""


class Delivered(NamedTuple):
    """An entry as a worker gets it."""

    entry: Id
    item: Item
    failed: int
    delivery_count: int


@dataclass
class GroupStream:
    """One stream as one group reads it; `is_shared` says whether other groups read it, too."""

    entries: dict[Id, Item] = field(default_factory=dict)
    is_shared: bool = False
    pending: dict[Id, Pending] = field(default_factory=dict)
    read_to: Id = START

    def read(self, most: int, owner: str) -> list[Id]:
        """Deliver the oldest entries that the group has not read."""
        found = sorted(i for i in self.entries if i > self.read_to)[: max(most, 0)]
        self.pending |= dict.fromkeys(found, Pending(owner, 1))
        self.read_to = found[-1] if found else self.read_to
        return found

    def is_acked(self, entry: Id) -> bool:
        """Say whether an entry was read and is not pending."""
        return entry <= self.read_to and entry not in self.pending

    def claim(self, entry: Id, owner: str) -> Pending | None:
        """Claim a pending entry; one that was deleted from the stream is pending no more."""
        held = self.pending[entry]
        if entry not in self.entries:
            del self.pending[entry]
            return None
        counts = held.owner != owner and held.times % FAILURE_WEIGHT < QUARANTINE_AFTER
        self.pending[entry] = Pending(owner, held.times + counts)
        return self.pending[entry]


@dataclass
class HandlerState:
    """Everything of one handler.

    Attributes:
        owner: The lease's owner.
        replays: None until anything was replayed.
        acked: The numbers of all transitions that were ever acknowledged.
        finished: Every finished attempt.
    """

    new: GroupStream
    owner: object = None
    replays: GroupStream | None = None
    dead: dict[int, DeadLetter] = field(default_factory=dict)
    dead_letters_made: int = 0
    acked: set[int | None] = field(default_factory=set)
    finished: list[Finished] = field(default_factory=list)

    def streams(self) -> list[GroupStream]:
        """Return the streams in the order in which they are claimed."""
        return [self.new, *([self.replays] if self.replays else [])]

    def stream_of(self, item: Item) -> GroupStream:
        """Return the stream that an item is in."""
        return (self.replays or GroupStream()) if item.replay else self.new

    def read(self, most: int, worker: str, *, is_answered: bool) -> list[Delivered]:
        """Read new entries, up to half of them replays; without a reply the worker gets none."""
        replayed = self.replays.read(math.ceil(most / 2), worker) if self.replays else []
        new = self.new.read(most - len(replayed), worker)
        found = [(self.replays, i) for i in replayed] + [(self.new, i) for i in new]
        return [
            delivered(stream, i, Pending(worker, 1))
            for stream, i in found
            if stream and is_answered
        ]

    def claim_pending(self, worker: str, *, batch: int, is_answered: bool) -> list[Delivered]:
        """Claim all pending entries, the oldest first; without a reply only the first batch."""
        claimed = []
        for stream in self.streams():
            left = sorted(stream.pending)
            for entry in left if is_answered else left[:batch]:
                held = stream.claim(entry, worker)
                if held and is_answered:
                    claimed.append(delivered(stream, entry, held))
            if not is_answered:
                break
        return claimed

    def ack(self, stream: GroupStream, entry: Id, attempt: Finished | None) -> None:
        """Acknowledge an entry; it is deleted unless other groups read it."""
        if stream.pending.pop(entry, None):
            self.finished += [attempt] if attempt else []
            self.acked |= {stream.entries[entry].number} if entry in stream.entries else set()
        if not stream.is_shared:
            stream.entries.pop(entry, None)

    def record_attempts(
        self, stream: GroupStream, entry: Id, held: Pending, attempt: Finished | None
    ) -> None:
        """Set the delivery count of an entry, if it is pending."""
        if entry not in stream.pending:
            return
        if attempt and stream.pending[entry].times != held.times:
            self.finished.append(attempt)
        if stream.claim(entry, held.owner):
            stream.pending[entry] = held

    def dead_letter(
        self,
        stream: GroupStream,
        entry: Id,
        letter: DeadLetter,
        room: int,
        attempt: Finished | None,
    ) -> int | None:
        """Dead-letter an entry, if it is pending and there is room."""
        if len(self.dead) >= room:
            return None
        if stream.pending.pop(entry, None):
            self.dead[self.dead_letters_made] = letter._replace(item=stream.entries.get(entry))
            self.dead_letters_made += 1
            self.finished += [attempt] if attempt else []
        if not stream.is_shared:
            stream.entries.pop(entry, None)
        return max(1, len(self.dead))


def delivered(stream: GroupStream, entry: Id, held: Pending) -> Delivered:
    """Return an entry as a worker gets it."""
    return Delivered(entry, stream.entries[entry], *divmod(held.times, FAILURE_WEIGHT))


@dataclass
class Partition:
    """The streams of one partition, and the state of each handler on its own.

    Attributes:
        entries: The transitions, which every handler but `fetch` reads.
        notifications: What `fetch` reads.
        last: The id of the last transition.
    """

    entries: dict[Id, Item] = field(default_factory=dict)
    notifications: dict[Id, Item] = field(default_factory=dict)
    handlers: dict[str, HandlerState] = field(default_factory=dict)
    last: Id = START

    def open(self, *handlers: str) -> None:
        """Create the missing groups: at the start if there is none yet, else at the end."""
        read_to = self.last if self.handlers else START
        for name in handlers:
            stream = GroupStream(self.entries, is_shared=True, read_to=read_to)
            if name == FETCH:
                stream = GroupStream(self.notifications)
            self.handlers.setdefault(name, HandlerState(stream))

    def admit(self, entry: Id, item: Item) -> None:
        """Append a transition."""
        self.entries[entry] = item
        self.last = entry

    def trim(self, now_ms: int, retention_s: int) -> int:
        """Delete what every group has acknowledged and what is old enough."""
        kept = (max(0, now_ms // 1000 - retention_s) * 1000, 0)
        for stream in (state.new for state in self.handlers.values() if state.new.is_shared):
            ms, number = stream.read_to
            kept = min(kept, min(stream.pending, default=(ms, number + 1)))
        gone = [entry for entry in self.entries if entry < kept]
        for entry in gone:
            del self.entries[entry]
        return len(gone)
