"""The way out written once more: what the consumers of one partition must hold, by plain Python.

Shares no line with the service. Holds no test; `test_consumer_machine` asks it. Ids of entries are
pairs of numbers here, as Redis orders them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

FAILURE = 1000
QUARANTINE_AFTER = 3

Id = tuple[int, int]
START: Id = (0, 0)


class Item(NamedTuple):
    """What an entry is: a transition by its number, or nothing readable; perhaps a replay's."""

    number: int | None
    replay: str | None = None


class Held(NamedTuple):
    """A pending entry: who has it, and its delivery count."""

    owner: str
    times: int


class Letter(NamedTuple):
    """A dead letter; of an entry that was gone there is no item."""

    item: Item | None
    entry: Id
    reason: str
    error: str
    attempts: int


class Given(NamedTuple):
    """An entry in the hand of a worker."""

    entry: Id
    item: Item
    failed: int
    started: int


@dataclass
class Pile:
    """One stream as one group reads it."""

    entries: dict[Id, Item] = field(default_factory=dict)
    pending: dict[Id, Held] = field(default_factory=dict)
    read_to: Id = START

    def read(self, most: int, owner: str) -> list[Id]:
        """Hand out the oldest that nobody was given yet."""
        found = sorted(i for i in self.entries if i > self.read_to)[: max(most, 0)]
        self.pending |= dict.fromkeys(found, Held(owner, 1))
        self.read_to = found[-1] if found else self.read_to
        return found

    def is_settled(self, entry: Id) -> bool:
        """Say whether an entry was read and is not pending any more."""
        return entry <= self.read_to and entry not in self.pending

    def claim(self, entry: Id, owner: str) -> Held | None:
        """Make a pending entry somebody's; one that is gone from the stream is not pending."""
        held = self.pending[entry]
        if entry not in self.entries:
            del self.pending[entry]
            return None
        strange = held.owner != owner and held.times % FAILURE < QUARANTINE_AFTER
        self.pending[entry] = Held(owner, held.times + strange)
        return self.pending[entry]


@dataclass
class Box:
    """Everything of one handler.

    Attributes:
        owner: Who has the lease.
        replays: None until anything was replayed.
        settled: The numbers of all transitions ever settled.
    """

    new: Pile
    owner: object = None
    replays: Pile | None = None
    dead: dict[int, Letter] = field(default_factory=dict)
    letters: int = 0
    settled: set[int | None] = field(default_factory=set)

    def piles(self) -> list[Pile]:
        """Return what there is to read from, in the order of taking over."""
        return [self.new, *([self.replays] if self.replays else [])]

    def pile_of(self, item: Item) -> Pile:
        """Return the pile an item is of."""
        return (self.replays or Pile()) if item.replay else self.new

    def read(self, most: int, worker: str, *, heard: bool) -> list[Given]:
        """Read what is new: up to half of it replays. Unheard, nothing is given."""
        replayed = self.replays.read(math.ceil(most / 2), worker) if self.replays else []
        new = self.new.read(most - len(replayed), worker)
        found = [(self.replays, i) for i in replayed] + [(self.new, i) for i in new]
        return [given(pile, i, Held(worker, 1)) for pile, i in found if pile and heard]

    def claim_pending(self, worker: str, *, batch: int, heard: bool) -> list[Given]:
        """Claim all that is pending, oldest first; unheard, only the first batch."""
        claimed = []
        for pile in self.piles():
            left = sorted(pile.pending)
            for entry in left if heard else left[:batch]:
                held = pile.claim(entry, worker)
                if held and heard:
                    claimed.append(given(pile, entry, held))
            if not heard:
                break
        return claimed

    def ack(self, pile: Pile, entry: Id) -> None:
        """Settle an entry; a replay's goes with it."""
        if pile.pending.pop(entry, None) and entry in pile.entries:
            self.settled.add(pile.entries[entry].number)
        if pile is not self.new:
            pile.entries.pop(entry, None)

    def count(self, pile: Pile, entry: Id, count: int, worker: str) -> None:
        """Write down how often an entry was tried, if it pends."""
        if entry in pile.pending and pile.claim(entry, worker):
            pile.pending[entry] = Held(worker, count)

    def dead_letter(self, pile: Pile, entry: Id, letter: Letter, room: int) -> int | None:
        """Bury an entry, if it pends and there is room."""
        if len(self.dead) >= room:
            return None
        if pile.pending.pop(entry, None):
            self.dead[self.letters] = letter._replace(item=pile.entries.get(entry))
            self.letters += 1
        if pile is not self.new:
            pile.entries.pop(entry, None)
        return max(1, len(self.dead))


def given(pile: Pile, entry: Id, held: Held) -> Given:
    """Return what a worker gets of an entry."""
    return Given(entry, pile.entries[entry], *divmod(held.times, FAILURE))


@dataclass
class Partition:
    """One stream of transitions and the boxes of all handlers on it."""

    entries: dict[Id, Item] = field(default_factory=dict)
    boxes: dict[str, Box] = field(default_factory=dict)
    last: Id = START

    def open(self, *handlers: str) -> None:
        """Create the groups that are missing: at the beginning if there is none, else the end."""
        read_to = self.last if self.boxes else START
        for name in handlers:
            pile = Pile(self.entries, read_to=read_to)
            self.boxes.setdefault(name, Box(pile))

    def admit(self, entry: Id, item: Item) -> None:
        """Append a transition."""
        self.entries[entry] = item
        self.last = entry

    def trim(self, now_ms: int, retention_s: int) -> int:
        """Remove what every group has settled and what is old enough."""
        kept = (max(0, now_ms // 1000 - retention_s) * 1000, 0)
        for box in self.boxes.values():
            ms, number = box.new.read_to
            kept = min(kept, min(box.new.pending, default=(ms, number + 1)))
        gone = [entry for entry in self.entries if entry < kept]
        for entry in gone:
            del self.entries[entry]
        return len(gone)
