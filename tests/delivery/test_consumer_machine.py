"""The law of the way out, searched: whoever does what in whatever order, Redis holds the model's.

Hypothesis makes up admissions, workers with and without the lease, lost replies, replays, trimming
and an operator's hand; after every step all that Redis holds is compared. `depth` says how to
search further, and how a failure is repeated.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar
from unittest import mock

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.exceptions import RedisError

from service.config import Settings
from service.delivery import consumer as way_out
from service.delivery.consumer import Attempts, Consumer, Delivery, LeaseLostError
from service.delivery.consumer_groups import create_groups, retire
from service.delivery.dead_letters import Entry, Wanted, drop, letters, past, replay
from service.delivery.leases import lease
from service.delivery.retention import trim
from service.delivery.stream_watcher import StreamWatcher
from service.storage.layout import Keys
from tests.support.delivery_model import Box, Given, Id, Item, Letter, Partition, Pile
from tests.support.depth import SEARCH_TIMEOUT_S, searching
from tests.support.tapped import Tapped, tapped

KEYS = Keys("idv", 1)
STREAM = KEYS.transitions(0)
HANDLERS = ("log", "audit")
WORKERS = ("w1", "w2", "w3")
# Small, so that a few entries are more than one batch and a few letters more than there is room.
BATCH, ROOM = 2, 2
RETENTION_S = 3600
MAX_PARTITION_TASKS = 8
# Nothing runs out by itself here: the machine says when.
TTL_S = 10_000.0
OLD_MS = int(time.time() * 1000) - 10 * RETENTION_S * 1000

Reply = TypeVar("Reply")

FAULTS = st.sampled_from(["", "", "", "request", "reply"])
HANDLER = st.sampled_from(HANDLERS)
INDEX = st.integers(0, 10**6)


def change(number: int) -> bytes:
    """Return the stored form of one change."""
    return (
        b'{"event_id":"evt_%d","event_type":"identity.verification_session.processing",'
        b'"occurred_at":"2026-01-01T00:00:00Z","session_id":"vs_%d","current":"processing"}'
        % (number, number)
    )


def pair(entry_id: bytes | str) -> Id:
    """Return an entry's id as two numbers."""
    text = entry_id if isinstance(entry_id, str) else entry_id.decode()
    ms, number = text.split("-")
    return int(ms), int(number)


def text_of(entry: Id) -> str:
    """Return an entry's id as Redis writes it."""
    return f"{entry[0]}-{entry[1]}"


class PartitionTask:
    """A consumer of one worker, and what it believes.

    Attributes:
        fresh: Whether it still may take a lease: it never had one.
        believes: Whether it takes the lease for its own.
        hand: All it was ever given.
    """

    def __init__(self, consumer: Consumer, worker: str, handler: str) -> None:
        self.consumer = consumer
        self.worker = worker
        self.handler = handler
        self.fresh = True
        self.believes = False
        self.hand: list[tuple[Delivery, Given]] = []


class Delivering(RuleBasedStateMachine):
    """Lets workers work, and holds what they are given and what is stored against the model."""

    tenures: Bundle[PartitionTask] = Bundle("tenures")

    def __init__(self, runner: asyncio.Runner, tap: Tapped) -> None:
        super().__init__()
        self.run = runner.run
        self.tap = tap
        self.client = tap.client
        self.stream_watcher = StreamWatcher(tap, 0)
        self.model = Partition()
        self.numbers = itertools.count(1)
        self.gone: set[int | None] = set()
        self.all: list[PartitionTask] = []
        self.run(self.client.flushall())
        self.run(create_groups(tap, KEYS, HANDLERS))
        self.model.open(*HANDLERS)

    @property
    def has_mail_in_hand(self) -> bool:
        """Whether any worker was ever given anything."""
        return any(tenure.hand for tenure in self.all)

    def box(self, tenure: PartitionTask) -> Box:
        """Return the model of the handler a tenure is of."""
        return self.model.boxes[tenure.handler]

    def call(self, fault: str, asked: Awaitable[Reply]) -> Reply | None:
        """Make one call of a worker; return None when its reply, or it itself, is lost."""
        if fault:
            self.tap.faults.append(fault)
        try:
            reply = self.run(_awaited(asked))
        except RedisError:
            assert fault
            return None
        assert not self.tap.faults
        return reply

    def fenced(
        self, tenure: PartitionTask, fault: str, asked: Awaitable[Reply]
    ) -> tuple[bool, Any]:
        """Make a call that only the owner may make; say whether the model does it too."""
        owns = self.box(tenure).owner is tenure
        if owns or fault:
            return owns and fault != "request", self.call(fault, asked)
        with pytest.raises(LeaseLostError):
            self.call(fault, asked)
        tenure.fresh = tenure.believes = False
        return False, None

    @precondition(lambda self: len(self.all) < MAX_PARTITION_TASKS)
    @rule(target=tenures, worker=st.sampled_from(WORKERS), handler=HANDLER)
    def begin(self, worker: str, handler: str) -> PartitionTask:
        """A worker turns to a handler's consumer, still without the lease."""
        return self.tenure(worker, handler)

    def tenure(self, worker: str, handler: str) -> PartitionTask:
        """Return a new consumer."""
        consumer = Consumer(self.tap, KEYS, self.stream_watcher, handler=handler, worker=worker)
        self.all.append(PartitionTask(consumer, worker, handler))
        return self.all[-1]

    @rule(tenure=tenures, fault=FAULTS)
    def lease(self, tenure: PartitionTask, fault: str) -> None:
        """A worker takes the lease, or renews it: it has one owner, and is never had twice."""
        box = self.box(tenure)
        if fault:
            self.tap.faults.append(fault)
        [answer] = self.run(lease(self.tap, [tenure.consumer], TTL_S))
        ours = box.owner is tenure or (tenure.fresh and box.owner is None)
        if ours and fault != "request":
            box.owner = tenure
        if fault:
            assert isinstance(answer, RedisError)
            return
        assert (answer == 0) == ours
        tenure.fresh, tenure.believes = False, ours

    @precondition(lambda self: len(self.all) < MAX_PARTITION_TASKS)
    @rule(target=tenures, worker=st.sampled_from(WORKERS), handler=HANDLER)
    def succeed(self, worker: str, handler: str) -> PartitionTask:
        """A lease runs out; another worker has it at once and takes over, unknown to the first."""
        self.run_out(handler)
        tenure = self.tenure(worker, handler)
        self.lease(tenure, "")
        self.claim_pending(tenure, "")
        return tenure

    @rule(handler=HANDLER)
    def run_out(self, handler: str) -> None:
        """A lease runs out, by Redis's clock: its owner was paused and knows nothing of it."""
        self.run(self.client.delete(KEYS.lease(0, handler)))
        self.model.boxes[handler].owner = None

    @rule(tenure=tenures)
    def release(self, tenure: PartitionTask) -> None:
        """A worker gives up the lease, if it is its own."""
        self.run(tenure.consumer.release())
        box = self.box(tenure)
        box.owner = None if box.owner is tenure else box.owner
        tenure.fresh = tenure.believes = False

    @initialize(target=tenures, handler=HANDLER)
    def begin_with_mail_in_hand(self, handler: str) -> PartitionTask:
        """Something was admitted, and a first worker has it in hand."""
        self.admit(3, old=True, readable=True)
        tenure = self.tenure("w1", handler)
        self.lease(tenure, "")
        self.read(tenure, 2, "")
        return tenure

    @rule(handlers=st.sampled_from([["log"], ["audit"], ["log", "audit"], ["audit", "log"]]))
    def work_off(self, handlers: list[str]) -> None:
        """Calm workers take over, read and settle everything, after an operator has made room."""
        for handler in handlers:
            self.drop_letters(handler)
            self.run_out(handler)
            tenure = self.tenure("w1", handler)
            self.lease(tenure, "")
            self.claim_pending(tenure, "")
            for _ in self.model.entries:
                self.drop_letters(handler)
                self.read(tenure, 4, "")
            self.settle_all(tenure)
            self.release(tenure)

    @rule(
        count=st.integers(1, 3),
        old=st.sampled_from([True, True, False]),
        readable=st.sampled_from([True] * 4 + [False]),
    )
    def admit(self, count: int, *, old: bool, readable: bool) -> None:
        """Transitions are admitted, and what is not ours appears on the stream."""
        for number in itertools.islice(self.numbers, count):
            early = (OLD_MS + number, 0)
            fields = {"change": change(number), "previous": "", "sequence": number, "epoch": 1}
            entry = text_of(early) if old and early > self.model.last else "*"
            fields = fields if readable else {"nothing": "ours"}
            found = self.run(self.client.xadd(STREAM, fields, id=entry))
            self.model.admit(pair(found), Item(number if readable else None))
            if not readable:
                self.gone.add(number)

    @rule(tenure=tenures, most=st.integers(1, 4), fault=FAULTS)
    def read(self, tenure: PartitionTask, most: int, fault: str) -> None:
        """A worker reads what is new."""
        done, found = self.fenced(tenure, fault, tenure.consumer.read(most))
        if done:
            box = self.box(tenure)
            given = box.read(most, tenure.worker, heard=not fault)
            self.give(tenure, found or [], given)

    @rule(tenure=tenures, fault=FAULTS)
    def claim_pending(self, tenure: PartitionTask, fault: str) -> None:
        """A worker claims what is pending, whoever had it."""

        async def all_batches() -> list[Delivery]:
            return [one async for batch in tenure.consumer.claim_pending() for one in batch]

        done, found = self.fenced(tenure, fault, all_batches())
        if done:
            box = self.box(tenure)
            given = box.claim_pending(tenure.worker, batch=BATCH, heard=not fault)
            self.give(tenure, found or [], given)

    def give(self, tenure: PartitionTask, found: list[Delivery], given: list[Given]) -> None:
        """Hold that a worker was given what the model says."""
        assert [Given(pair(one.entry_id), read_as(one), *one.attempts) for one in found] == given
        tenure.hand += zip(found, given, strict=True)

    def chosen(self, which: int) -> tuple[PartitionTask, Delivery, Given, Pile]:
        """Return one of the deliveries that any worker has, or had, in hand."""
        hands = [(tenure, *one) for tenure in self.all for one in tenure.hand]
        tenure, delivery, given = hands[which % len(hands)]
        return tenure, delivery, given, self.box(tenure).pile_of(given.item)

    @precondition(lambda self: self.has_mail_in_hand)
    @rule(which=INDEX, fault=FAULTS)
    def ack(self, which: int, fault: str) -> None:
        """A worker settles a delivery, perhaps not for the first time."""
        tenure, delivery, given, pile = self.chosen(which)
        done, _ = self.fenced(tenure, fault, tenure.consumer.ack(delivery))
        if done:
            self.box(tenure).ack(pile, given.entry)

    @rule(tenure=tenures)
    def settle_all(self, tenure: PartitionTask) -> None:
        """A worker settles everything it has in hand at once, or nothing of it."""
        if not tenure.hand:
            return
        box = self.box(tenure)

        async def all_at_once() -> None:
            settling = [tenure.consumer.ack(delivery) for delivery, _ in tenure.hand]
            for answer in await asyncio.gather(*settling, return_exceptions=True):
                if answer is not None:
                    raise answer

        done, _ = self.fenced(tenure, "", all_at_once())
        for _, given in tenure.hand if done else ():
            box.ack(box.pile_of(given.item), given.entry)

    @precondition(lambda self: self.has_mail_in_hand)
    @rule(which=INDEX, failed=st.integers(0, 3), started=st.integers(0, 5), fault=FAULTS)
    def count(self, which: int, failed: int, started: int, fault: str) -> None:
        """A worker writes down how often a delivery was tried."""
        tenure, delivery, given, pile = self.chosen(which)
        counting = tenure.consumer.record_attempts(delivery, Attempts(failed, started))
        done, _ = self.fenced(tenure, fault, counting)
        if done:
            self.box(tenure).count(pile, given.entry, failed * 1000 + started, tenure.worker)

    @precondition(lambda self: self.has_mail_in_hand)
    @rule(which=INDEX, attempts=st.integers(1, 9), fault=FAULTS)
    def dead_letter(self, which: int, attempts: int, fault: str) -> None:
        """A worker buries a delivery, perhaps not for the first time, if there is room."""
        tenure, delivery, given, pile = self.chosen(which)
        words = {"reason": "exhausted", "error": "ValueError", "attempts": attempts}
        burying = tenure.consumer.dead_letter(delivery, **words)  # type: ignore[arg-type]
        done, held = self.fenced(tenure, fault, burying)
        if done:
            letter = Letter(given.item, given.entry, "exhausted", "ValueError", attempts)
            expected = self.box(tenure).dead_letter(pile, given.entry, letter, ROOM)
            assert fault or held == expected

    @rule(handler=HANDLER, first=st.integers(0, 2), number=st.integers(1, 99))
    def replay_the_past(self, handler: str, first: int, number: int) -> None:
        """An operator has the past handed to a handler again: what its group has settled."""
        chosen = self.run(self.entries_of(handler, dead=False))[first::2]
        pile = self.model.boxes[handler].new
        items = [self.model.entries[pair(one.entry_id)] for one in chosen]
        settled = [pile.is_settled(pair(one.entry_id)) for one in chosen]
        self.replay(handler, chosen, items, settled, f"r{number}")

    @precondition(lambda self: any(box.dead for box in self.model.boxes.values()))
    @rule(first=st.integers(0, 1), number=st.integers(1, 99))
    def replay_letters(self, first: int, number: int) -> None:
        """An operator has dead letters handed to their handler again: they are none any more."""
        handler = next(name for name, box in self.model.boxes.items() if box.dead)
        box = self.model.boxes[handler]
        chosen = self.run(self.entries_of(handler, dead=True))[first::2]
        dead = {key: box.dead[key].item for key in [*box.dead][first::2]}
        for key, item in dead.items():
            if readable(item):
                del box.dead[key]
        self.replay(handler, chosen, [*dead.values()], [True] * len(dead), f"r{number}")

    def replay(
        self,
        handler: str,
        chosen: list[Entry],
        items: Sequence[Item | None],
        settled: Sequence[bool],
        name: str,
    ) -> None:
        """Have entries replayed; the model gets those that are readable and settled."""
        if not chosen:
            return
        put, left_out = self.run(replay(self.tap, KEYS, handler, chosen, name=name))
        ours = [one for one in zip(items, settled, strict=True) if readable(one[0])]
        numbers = [item.number for item, is_settled in ours if item and is_settled]
        assert (put, left_out) == (len(numbers), len(ours) - len(numbers))
        if not put:
            return
        box = self.model.boxes[handler]
        box.replays = box.replays or Pile()
        latest = self.run(self.client.xrevrange(KEYS.replays(0, handler), count=max(1, put)))
        for (entry_id, _), n in zip(reversed(latest[:put]), numbers, strict=True):
            box.replays.entries[pair(entry_id)] = Item(n, name)

    async def entries_of(self, handler: str, *, dead: bool) -> list[Entry]:
        """Return a handler's dead letters, or the past."""
        every = Wanted()
        found = letters(self.tap, KEYS, handler, every) if dead else past(self.tap, KEYS, every)
        return [entry async for entry in found]

    @rule(handler=HANDLER)
    def drop_letters(self, handler: str) -> None:
        """An operator drops a handler's dead letters."""
        found = self.run(self.entries_of(handler, dead=True))
        if found:
            assert self.run(drop(self.tap, KEYS, handler, found)) == len(found)
        dead = self.model.boxes[handler].dead
        self.gone |= {letter.item and letter.item.number for letter in dead.values()}
        dead.clear()

    @rule(which=INDEX)
    def delete_entry(self, which: int) -> None:
        """An operator deletes an entry from the stream."""
        if self.model.entries:
            entry = sorted(self.model.entries)[which % len(self.model.entries)]
            self.gone.add(self.model.entries.pop(entry).number)
            self.run(self.client.xdel(STREAM, text_of(entry)))

    @rule()
    def trim(self) -> None:
        """The janitor removes what every group has settled and what is old enough."""
        removed, names = self.run(trim(self.tap, KEYS, [0], retention_s=RETENTION_S))
        assert names == {*HANDLERS}
        assert removed == self.model.trim(time.time_ns() // 10**6, RETENTION_S)

    @rule()
    def retire(self) -> None:
        """An operator retires a handler; named again, it begins at the end."""
        assert self.run(retire(self.tap, KEYS, "audit")) == 1
        del self.model.boxes["audit"]
        assert self.run(create_groups(self.tap, KEYS, HANDLERS)) == ["audit"]
        self.model.open("audit")

    @invariant()
    def all_is_the_models(self) -> None:
        """Stream, places, pending lists, leases, replays and dead letters are the model's."""
        entries, groups, *rest = self.run(self.everything())
        assert [pair(entry_id) for entry_id, _ in entries] == sorted(self.model.entries)
        places = {one["name"].decode(): pair(one["last-delivered-id"]) for one in groups}
        assert places == {name: box.new.read_to for name, box in self.model.boxes.items()}
        for n, handler in enumerate(HANDLERS):
            self.check_box(self.model.boxes[handler], rest[n * 5 : n * 5 + 5])

    async def everything(self) -> list[Any]:
        """Return all that Redis holds."""
        pipeline = self.client.pipeline(transaction=False)
        pipeline.xrange(STREAM)
        pipeline.xinfo_groups(STREAM)
        for handler in HANDLERS:
            pipeline.get(KEYS.lease(0, handler))
            pipeline.xpending_range(STREAM, handler, "-", "+", 1000)
            pipeline.xrange(KEYS.replays(0, handler))
            pipeline.xpending_range(KEYS.replays(0, handler), handler, "-", "+", 1000)
            pipeline.xrange(KEYS.dead(0, handler))
        found: list[Any] = await pipeline.execute(raise_on_error=False)
        return found

    @staticmethod
    def check_box(box: Box, found: list[Any]) -> None:
        """Hold that what Redis has of one handler is what the model has."""
        token, pending, replays, replayed, dead = found
        assert isinstance(box.owner, PartitionTask | None)
        assert token == (box.owner and box.owner.consumer._fence.token.encode())
        assert held(pending) == box.new.pending
        if box.replays is not None:
            assert held(replayed) == box.replays.pending
            assert {pair(i): item_of(fields) for i, fields in replays} == box.replays.entries
        assert [letter_of(fields) for _, fields in dead] == [*box.dead.values()]
        for one in box.new.pending:
            assert one <= box.new.read_to

    @invariant()
    def nobody_is_told_otherwise(self) -> None:
        """A worker takes the lease for its own until it is told, and no longer."""

        async def told() -> list[bool]:
            return [tenure.consumer.is_ours() for tenure in self.all]

        assert self.run(told()) == [tenure.believes for tenure in self.all]

    def teardown(self) -> None:
        """Hold that a calm worker finds everything that is neither settled nor buried."""
        self.work_off(["log"])
        box = self.model.boxes["log"]
        self.all_is_the_models()
        replays = {item.number for item in (box.replays or Pile()).entries.values()}
        assert {*range(1, next(self.numbers))} <= box.settled | self.gone | replays


def readable(item: Item | None) -> bool:
    """Say whether an entry, or what is left of it, can be handed to anybody."""
    return item is not None and item.number is not None


def read_as(delivery: Delivery) -> Item:
    """Return what a delivery holds."""
    transition = delivery.transition
    if transition is None:
        return Item(None)
    assert delivery.is_replay == (transition.replay is not None)
    return Item(transition.sequence, transition.replay)


async def _awaited(asked: Awaitable[Reply]) -> Reply:
    return await asked


def held(pending: Any) -> dict[Id, tuple[str, int]]:
    """Return a pending list as the model has it."""
    return {
        pair(one["message_id"]): (one["consumer"].decode(), one["times_delivered"])
        for one in pending
    }


def item_of(fields: dict[bytes, bytes]) -> Item | None:
    """Return what an entry is; None when only its id was left."""
    if b"change" in fields:
        name = fields.get(b"replay")
        return Item(int(fields[b"sequence"]), name.decode() if name else None)
    return Item(None) if b"nothing" in fields else None


def letter_of(fields: dict[bytes, bytes]) -> Letter:
    """Return a dead letter as the model has it."""
    return Letter(
        item_of(fields),
        pair(fields[b"entry_id"]),
        fields[b"reason"].decode(),
        fields[b"error"].decode(),
        int(fields[b"attempts"]),
    )


@pytest.mark.timeout(SEARCH_TIMEOUT_S)
def test_the_way_out_is_what_the_model_says(make_settings: Callable[..., Settings]) -> None:
    """Leases exclude, fences hold, nothing pending is lost, letters are exact, at every step."""
    small = mock.patch.multiple(way_out, MAX_CLAIMED_PER_CALL=BATCH, MAX_DEAD_LETTERS=ROOM)
    with small, tapped(make_settings().redis_url) as (runner, tap):
        # Any factory does at run time, whatever the annotation says.
        machine: Any = partial(Delivering, runner, tap)
        run_state_machine_as_test(machine, settings=searching(40, steps=50))
