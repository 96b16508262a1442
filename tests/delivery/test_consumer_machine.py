"""Random search: whatever workers and operators do in whatever order, Redis holds what it should.

Hypothesis makes up admissions, workers with and without the lease, lost replies, replays, trimming
and what an operator does. After every step everything in Redis is compared with
`delivery_model`. `depth` says how to search further, and how to repeat a failure.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any
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
from service.delivery.consumer import Attempts, Consumer, Delivery
from service.delivery.consumer_groups import Lag, create_groups, measure_lags, retire
from service.delivery.dead_letters import (
    Entry,
    EntryFilter,
    drop,
    history_chunks,
    letter_chunks,
    replay,
)
from service.delivery.leases import Lease, LeaseLostError, take_or_renew
from service.delivery.retention import trim
from service.delivery.stream_watcher import StreamWatcher
from service.storage.keys import Keys
from service.transitions.thin_notification import Notification, unpack
from tests.support.delivery_model import (
    FETCH,
    DeadLetter,
    Delivered,
    Finished,
    GroupStream,
    HandlerState,
    Id,
    Item,
    Partition,
    Pending,
)
from tests.support.depth import SEARCH_TIMEOUT_S, searching
from tests.support.tapped import Tapped, tapped
from tests.support.transitions import stored_entry, stored_notification

KEYS = Keys("idv", 1)
STREAM, NOTIFICATIONS = KEYS.transitions(0), KEYS.notifications(0)
HANDLERS = ("log", "audit", FETCH)
WORKERS = ("w1", "w2", "w3")
# Small, so that a few entries are several batches, and a few dead letters are too many.
BATCH, ROOM = 2, 2
RETENTION_S = 3600
MAX_TASKS = 8
FIRST_NOTED = 1001
REPLAY_OF_NOTIFICATION = "r"
# No lease expires by itself: the machine deletes it.
TTL_S = 10_000.0
OLD_MS = int(time.time() * 1000) - 10 * RETENTION_S * 1000

FAULTS = st.sampled_from(["", "", "", "request", "reply"])
HANDLER = st.sampled_from(HANDLERS)
INDEX = st.integers(0, 10**6)


def pair(entry_id: bytes | str) -> Id:
    """Return an entry's id as two numbers."""
    text = entry_id if isinstance(entry_id, str) else entry_id.decode()
    ms, number = text.split("-")
    return int(ms), int(number)


def text_of(entry: Id) -> str:
    """Return an entry's id as Redis writes it."""
    return f"{entry[0]}-{entry[1]}"


class WorkerTask:
    """One worker's lease and consumer, with what the model says of them.

    Attributes:
        can_take: Whether it may still take the lease: it never asked for it.
        believes_held: Whether it should believe that it has the lease.
        deliveries: Everything it was ever given.
    """

    def __init__(self, lease: Lease, consumer: Consumer) -> None:
        self.lease = lease
        self.consumer = consumer
        self.worker = lease.worker
        self.handler = lease.handler
        self.can_take = True
        self.believes_held = False
        self.deliveries: list[tuple[Delivery, Delivered]] = []


class Delivering(RuleBasedStateMachine):
    """Lets workers work, and compares what they get and what Redis holds with the model."""

    tasks: Bundle[WorkerTask] = Bundle("tasks")

    def __init__(self, runner: asyncio.Runner, tap: Tapped) -> None:
        super().__init__()
        self.run = runner.run
        self.tap = tap
        self.client = tap.client
        self.stream_watcher = StreamWatcher(tap)
        self.model = Partition()
        self.numbers = itertools.count(1)
        self.noted_numbers = itertools.count(FIRST_NOTED)
        self.gone: set[int | None] = set()
        self.all: list[WorkerTask] = []
        self.run(self.client.flushall())
        self.run(create_groups(tap, KEYS, HANDLERS))
        self.model.open(*HANDLERS)

    @property
    def has_deliveries(self) -> bool:
        """Whether any worker was ever given an entry."""
        return any(task.deliveries for task in self.all)

    def state(self, task: WorkerTask) -> HandlerState:
        """Return the model of a task's handler."""
        return self.model.handlers[task.handler]

    def fenced(self, task: WorkerTask, fault: str, asked: Awaitable[Any]) -> tuple[bool, Any]:
        """Make a call that needs the lease; say whether the model has to do the same.

        Where the request or the reply is lost, the call returns None.
        """
        owns = self.state(task).owner is task
        self.tap.faults.extend([fault] if fault else [])
        try:
            reply = self.run(_awaited(asked))
        except RedisError:
            assert fault
            return owns and fault != "request", None
        except LeaseLostError:
            assert not owns
            task.can_take = task.believes_held = False
            return False, None
        assert owns
        assert not fault
        return True, reply

    @precondition(lambda self: len(self.all) < MAX_TASKS)
    @rule(target=tasks, worker=st.sampled_from(WORKERS), handler=HANDLER)
    def begin(self, worker: str, handler: str) -> WorkerTask:
        """A worker makes a consumer of a handler, without the lease so far."""
        return self.task(worker, handler)

    def task(self, worker: str, handler: str) -> WorkerTask:
        """Return a new task."""
        lease = Lease(self.tap, KEYS, handler=handler, partition=0, worker=worker)
        consumer = Consumer(lease, KEYS, self.stream_watcher)
        self.all.append(WorkerTask(lease, consumer))
        return self.all[-1]

    @rule(task=tasks, fault=FAULTS)
    def lease(self, task: WorkerTask, fault: str) -> None:
        """A worker takes or renews the lease, which never has two owners."""
        state = self.state(task)
        if fault:
            self.tap.faults.append(fault)
        [answer] = self.run(take_or_renew(self.tap, [task.lease], TTL_S))
        ours = state.owner is task or (task.can_take and state.owner is None)
        if ours and fault != "request":
            state.owner = task
        if fault:
            assert isinstance(answer, RedisError)
            return
        assert (answer == 0) == ours
        task.can_take, task.believes_held = False, ours

    @precondition(lambda self: len(self.all) < MAX_TASKS)
    @rule(target=tasks, worker=st.sampled_from(WORKERS), handler=HANDLER)
    def succeed(self, worker: str, handler: str) -> WorkerTask:
        """A lease expires; another worker takes it and claims, before its owner notices."""
        self.expire_lease(handler)
        task = self.task(worker, handler)
        self.lease(task, "")
        self.claim_pending(task, "")
        return task

    @rule(handler=HANDLER)
    def expire_lease(self, handler: str) -> None:
        """A lease expires in Redis; its owner was paused and does not know."""
        self.run(self.client.delete(KEYS.lease(0, handler)))
        self.model.handlers[handler].owner = None

    @rule(task=tasks)
    def release(self, task: WorkerTask) -> None:
        """A worker releases the lease, if it has it."""
        self.run(task.lease.release())
        state = self.state(task)
        state.owner = None if state.owner is task else state.owner
        task.can_take = task.believes_held = False

    @initialize(target=tasks, handler=HANDLER)
    def begin_with_deliveries(self, handler: str) -> WorkerTask:
        """Transitions were admitted, notifications noted, and a first worker has read some."""
        self.admit(3, old=True, readable=True)
        self.note(3, readable=True)
        task = self.task("w1", handler)
        self.lease(task, "")
        self.read(task, 2, "")
        return task

    @rule(
        handlers=st.sampled_from([["log"], ["audit"], [FETCH], ["log", "audit"], [*HANDLERS]]),
        worker=st.sampled_from(WORKERS),
    )
    def finish_everything(self, handlers: list[str], worker: str) -> None:
        """Undisturbed workers claim, read and acknowledge everything; dead letters are dropped."""
        for handler in handlers:
            self.drop_dead_letters(handler)
            self.expire_lease(handler)
            task = self.task(worker, handler)
            self.lease(task, "")
            self.claim_pending(task, "")
            for _ in [*self.model.handlers[handler].new.entries]:
                self.drop_dead_letters(handler)
                self.read(task, 4, "")
            self.ack_all(task)
            self.release(task)

    @rule(
        count=st.integers(1, 3),
        old=st.sampled_from([True, True, False]),
        readable=st.sampled_from([True] * 4 + [False]),
    )
    def admit(self, count: int, *, old: bool, readable: bool) -> None:
        """Transitions, or entries that are not ours, are appended to the stream."""
        for number in itertools.islice(self.numbers, count):
            early = (OLD_MS + number, 0)
            fields = stored_entry(f"vs_{number}", number)
            entry = text_of(early) if old and early > self.model.last else "*"
            fields = fields if readable else {"nothing": "ours"}
            found = self.run(self.client.xadd(STREAM, fields, id=entry))
            self.model.admit(pair(found), Item(number if readable else None))
            if not readable:
                self.gone.add(number)

    @rule(count=st.integers(1, 3), readable=st.sampled_from([True] * 4 + [False]))
    def note(self, count: int, *, readable: bool) -> None:
        """Notifications, or entries that are not ours, are appended to their stream."""
        for number in itertools.islice(self.noted_numbers, count):
            fields = stored_notification(f"vs_{number}", number)
            fields = fields if readable else {"nothing": "ours"}
            found = self.run(self.client.xadd(NOTIFICATIONS, fields))
            self.model.notifications[pair(found)] = Item(number if readable else None)
            if not readable:
                self.gone.add(number)

    @rule(task=tasks, most=st.integers(1, 4), fault=FAULTS)
    def read(self, task: WorkerTask, most: int, fault: str) -> None:
        """A worker reads new entries."""
        done, found = self.fenced(task, fault, task.consumer.read(most))
        if done:
            state = self.state(task)
            delivered = state.read(most, task.worker, is_answered=not fault)
            self.give(task, found or [], delivered)

    @rule(task=tasks, fault=FAULTS)
    def claim_pending(self, task: WorkerTask, fault: str) -> None:
        """A worker claims all pending entries."""

        async def all_batches() -> list[Delivery]:
            return [one async for batch in task.consumer.claim_pending() for one in batch]

        done, found = self.fenced(task, fault, all_batches())
        if done:
            state = self.state(task)
            delivered = state.claim_pending(task.worker, batch=BATCH, is_answered=not fault)
            self.give(task, found or [], delivered)

    def give(self, task: WorkerTask, found: list[Delivery], delivered: list[Delivered]) -> None:
        """Compare what a worker was given with the model."""
        assert [
            Delivered(pair(one.entry_id), read_as(one), *one.attempts) for one in found
        ] == delivered
        task.deliveries += zip(found, delivered, strict=True)

    def chosen(self, which: int) -> tuple[WorkerTask, Delivery, Delivered, GroupStream]:
        """Return one of the deliveries that any worker was ever given."""
        every = [(task, *one) for task in self.all for one in task.deliveries]
        task, delivery, delivered = every[which % len(every)]
        return task, delivery, delivered, self.state(task).stream_of(delivered.item)

    @precondition(lambda self: self.has_deliveries)
    @rule(which=INDEX, fault=FAULTS)
    def ack(self, which: int, fault: str) -> None:
        """A worker acknowledges a delivery, perhaps not for the first time."""
        task, delivery, delivered, stream = self.chosen(which)
        done, _ = self.fenced(task, fault, task.consumer.ack(delivery))
        if done:
            attempt = finished(task, delivered, "delivered", delivered.failed + 1)
            self.state(task).ack(stream, delivered.entry, attempt)

    @rule(task=tasks)
    def ack_all(self, task: WorkerTask) -> None:
        """A worker acknowledges all its deliveries at once: all of them, or none."""
        if not task.deliveries:
            return
        state = self.state(task)

        async def all_at_once() -> None:
            acks = [task.consumer.ack(delivery) for delivery, _ in task.deliveries]
            for answer in await asyncio.gather(*acks, return_exceptions=True):
                if answer is not None:
                    raise answer

        done, _ = self.fenced(task, "", all_at_once())
        for _, delivered in task.deliveries if done else ():
            attempt = finished(task, delivered, "delivered", delivered.failed + 1)
            state.ack(state.stream_of(delivered.item), delivered.entry, attempt)

    @precondition(lambda self: self.has_deliveries)
    @rule(
        which=INDEX,
        failed=st.integers(0, 3),
        delivery_count=st.integers(0, 5),
        error=st.sampled_from(["", "ValueError"]),
        fault=FAULTS,
    )
    def record_attempts(
        self, which: int, failed: int, delivery_count: int, error: str, fault: str
    ) -> None:
        """A worker records how often a delivery was tried, perhaps not for the first time."""
        task, delivery, delivered, stream = self.chosen(which)
        recording = task.consumer.record_attempts(
            delivery, Attempts(failed, delivery_count), error=error
        )
        done, _ = self.fenced(task, fault, recording)
        if done:
            held = Pending(task.worker, failed * 1000 + delivery_count)
            attempt = finished(task, delivered, "failed", failed, error) if error else None
            self.state(task).record_attempts(stream, delivered.entry, held, attempt)

    @precondition(lambda self: self.has_deliveries)
    @rule(which=INDEX, attempts=st.integers(1, 9), fault=FAULTS)
    def dead_letter(self, which: int, attempts: int, fault: str) -> None:
        """A worker dead-letters a delivery, perhaps not for the first time, if there is room."""
        task, delivery, delivered, stream = self.chosen(which)
        words = {"reason": "exhausted", "error": "ValueError", "attempts": attempts}
        calling = task.consumer.dead_letter(delivery, **words)  # type: ignore[arg-type]
        done, held = self.fenced(task, fault, calling)
        if done:
            letter = DeadLetter(
                delivered.item, delivered.entry, "exhausted", "ValueError", attempts
            )
            attempt = finished(task, delivered, "dead_lettered", attempts, "ValueError")
            expected = self.state(task).dead_letter(stream, delivered.entry, letter, ROOM, attempt)
            assert fault or held == expected

    @rule(
        handler=st.sampled_from(["log", "audit"]),
        first=st.integers(0, 2),
        number=st.integers(1, 99),
    )
    def replay_history(self, handler: str, first: int, number: int) -> None:
        """An operator replays history to a handler: what its group has acknowledged."""
        chosen = self.run(self.entries_of(handler, dead=False))[first::2]
        stream = self.model.handlers[handler].new
        items = [self.model.entries[pair(one.entry_id)] for one in chosen]
        acked = [stream.is_acked(pair(one.entry_id)) for one in chosen]
        self.replay(handler, chosen, items, acked, f"r{number}")

    @precondition(lambda self: any(state.dead for state in self.model.handlers.values()))
    @rule(first=st.integers(0, 1), number=st.integers(1, 99))
    def replay_dead_letters(self, first: int, number: int) -> None:
        """An operator replays dead letters to their handler: they are moved."""
        handler = next(name for name, state in self.model.handlers.items() if state.dead)
        state = self.model.handlers[handler]
        chosen = self.run(self.entries_of(handler, dead=True))[first::2]
        dead = {key: state.dead[key].item for key in [*state.dead][first::2]}
        for key, item in dead.items():
            if readable(item):
                del state.dead[key]
        self.replay(handler, chosen, [*dead.values()], [True] * len(dead), f"r{number}")

    def replay(
        self,
        handler: str,
        chosen: list[Entry],
        items: Sequence[Item | None],
        acked: Sequence[bool],
        name: str,
    ) -> None:
        """Replay entries; the model replays those that are readable and acknowledged."""
        if not chosen:
            return
        # A notification does not hold the name, so that all its replays have the same here.
        name = REPLAY_OF_NOTIFICATION if handler == FETCH else name
        put, left_out = self.run(replay(self.tap, KEYS, handler, chosen, name=name))
        ours = [one for one in zip(items, acked, strict=True) if readable(one[0])]
        numbers = [item.number for item, is_acked in ours if item and is_acked]
        assert (put, left_out) == (len(numbers), len(ours) - len(numbers))
        if not put:
            return
        state = self.model.handlers[handler]
        state.replays = state.replays or GroupStream()
        latest = self.run(self.client.xrevrange(KEYS.replays(0, handler), count=max(1, put)))
        for (entry_id, _), n in zip(reversed(latest[:put]), numbers, strict=True):
            state.replays.entries[pair(entry_id)] = Item(n, name)

    async def entries_of(self, handler: str, *, dead: bool) -> list[Entry]:
        """Return a handler's dead letters, or the history."""
        every = EntryFilter()
        found = (
            letter_chunks(self.tap, KEYS, handler, every)
            if dead
            else history_chunks(self.tap, KEYS, every)
        )
        return [entry async for chunk in found for entry in chunk]

    @rule(handler=HANDLER)
    def drop_dead_letters(self, handler: str) -> None:
        """An operator drops a handler's dead letters."""
        found = self.run(self.entries_of(handler, dead=True))
        if found:
            assert self.run(drop(self.tap, KEYS, handler, found)) == len(found)
        dead = self.model.handlers[handler].dead
        self.gone |= {letter.item and letter.item.number for letter in dead.values()}
        dead.clear()

    @rule(which=INDEX, is_noted=st.booleans())
    def delete_entry(self, which: int, *, is_noted: bool) -> None:
        """An operator deletes an entry from a stream."""
        entries = self.model.notifications if is_noted else self.model.entries
        if entries:
            entry = sorted(entries)[which % len(entries)]
            self.gone.add(entries.pop(entry).number)
            stream = NOTIFICATIONS if is_noted else STREAM
            self.run(self.client.xdel(stream, text_of(entry)))

    @rule()
    def trim(self) -> None:
        """What every group has acknowledged and what is old enough is trimmed."""
        removed, names = self.run(trim(self.tap, KEYS, [0], retention_s=RETENTION_S))
        assert names == {*HANDLERS} - {FETCH}
        assert removed == self.model.trim(time.time_ns() // 10**6, RETENTION_S)

    @rule(handler=st.sampled_from(["audit", FETCH]))
    def retire(self, handler: str) -> None:
        """An operator retires a handler; it begins at the end, `fetch` with what comes."""
        if handler == FETCH:
            self.gone |= {item.number for item in self.model.notifications.values()}
            self.gone |= self.waiting_for(FETCH) | self.model.handlers[FETCH].acked
            self.model.notifications.clear()
        assert self.run(retire(self.tap, KEYS, handler)) == 1
        del self.model.handlers[handler]
        assert self.run(create_groups(self.tap, KEYS, HANDLERS)) == [handler]
        self.model.open(handler)

    def waiting_for(self, handler: str) -> set[int | None]:
        """Return the numbers of a handler's replays and dead letters."""
        state = self.model.handlers[handler]
        replays = {item.number for item in (state.replays or GroupStream()).entries.values()}
        return replays | {letter.item and letter.item.number for letter in state.dead.values()}

    @invariant()
    def what_waits_for_fetch_is_known(self) -> None:
        """The number of its notifications is exact, whatever was deleted or is pending."""
        [lag] = self.run(measure_lags(self.tap, KEYS, [(FETCH, 0)]))
        assert isinstance(lag, Lag)
        assert lag.new == len(self.model.notifications)

    @invariant()
    def all_is_the_models(self) -> None:
        """Streams, groups, pending lists, leases, attempts, dead letters are those of the model."""
        entries, noted, groups, fetchers, *rest = self.run(self.everything())
        assert [pair(entry_id) for entry_id, _ in entries] == sorted(self.model.entries)
        assert [pair(entry_id) for entry_id, _ in noted] == sorted(self.model.notifications)
        assert [one["name"] for one in fetchers] == [FETCH.encode()]
        assert {one["name"].decode() for one in groups} == {*HANDLERS} - {FETCH}
        all_groups = groups + fetchers
        places = {one["name"].decode(): pair(one["last-delivered-id"]) for one in all_groups}
        assert places == {name: state.new.read_to for name, state in self.model.handlers.items()}
        for n, handler in enumerate(HANDLERS):
            self.check_handler(self.model.handlers[handler], rest[n * 6 : n * 6 + 6])

    async def everything(self) -> list[Any]:
        """Return everything that Redis holds."""
        pipeline = self.client.pipeline(transaction=False)
        pipeline.xrange(STREAM)
        pipeline.xrange(NOTIFICATIONS)
        pipeline.xinfo_groups(STREAM)
        pipeline.xinfo_groups(NOTIFICATIONS)
        for handler in HANDLERS:
            pipeline.get(KEYS.lease(0, handler))
            stream = NOTIFICATIONS if handler == FETCH else STREAM
            pipeline.xpending_range(stream, handler, "-", "+", 1000)
            pipeline.xrange(KEYS.replays(0, handler))
            pipeline.xpending_range(KEYS.replays(0, handler), handler, "-", "+", 1000)
            pipeline.xrange(KEYS.dead_letters(0, handler))
            pipeline.xrange(KEYS.finished_attempts(0, handler))
        found: list[Any] = await pipeline.execute(raise_on_error=False)
        return found

    @staticmethod
    def check_handler(state: HandlerState, found: list[Any]) -> None:
        """Compare what Redis holds of one handler with the model."""
        token, pending, replays, replayed, dead, attempts = found
        assert isinstance(state.owner, WorkerTask | None)
        assert token == (state.owner and state.owner.lease.token.encode())
        assert held(pending) == state.new.pending
        expected = state.replays or GroupStream()
        assert {pair(i): item_of(fields) for i, fields in replays} == expected.entries
        if state.replays is not None:
            assert held(replayed) == state.replays.pending
        assert [dead_letter_of(fields) for _, fields in dead] == [*state.dead.values()]
        assert [finished_in(fields) for _, fields in attempts] == state.finished
        for one in state.new.pending:
            assert one <= state.new.read_to

    @invariant()
    def each_worker_believes_what_it_was_told(self) -> None:
        """A worker believes that it has the lease until a reply says otherwise."""

        async def beliefs() -> list[bool]:
            return [task.lease.is_held() for task in self.all]

        assert self.run(beliefs()) == [task.believes_held for task in self.all]

    def teardown(self) -> None:
        """Nothing was lost: an undisturbed worker finds everything that was not acknowledged."""
        # What is still pending for one handler must survive trimming.
        self.finish_everything(["audit"], WORKERS[0])
        self.trim()
        self.all_is_the_models()
        self.finish_everything(["log", FETCH], WORKERS[-1])
        self.all_is_the_models()
        assert not self.model.notifications
        for handler, first, numbers in (
            ("log", 1, self.numbers),
            (FETCH, FIRST_NOTED, self.noted_numbers),
        ):
            done = self.model.handlers[handler].acked | self.waiting_for(handler)
            assert {*range(first, next(numbers))} <= done | self.gone


def readable(item: Item | None) -> bool:
    """Say whether an entry, or what is left of it, can be delivered."""
    return item is not None and item.number is not None


def read_as(delivery: Delivery) -> Item:
    """Return what a delivery holds."""
    item = delivery.item
    if item is None:
        return Item(None)
    if isinstance(item, Notification):
        replay = REPLAY_OF_NOTIFICATION if delivery.is_replay else None
        return Item(number_of(item.event_id), replay)
    assert delivery.is_replay == (item.replay is not None)
    return Item(item.sequence, item.replay)


def finished(
    task: WorkerTask, delivered: Delivered, outcome: str, attempt: int, error: str = ""
) -> Finished | None:
    """Return a finished attempt of a delivery; None where none is noted."""
    number, replay = delivered.item
    if task.handler == FETCH or number is None:
        return None
    return Finished(number, outcome, attempt, replay is not None, error)


def finished_in(fields: dict[bytes, bytes]) -> Finished:
    """Return a finished attempt as the model has it."""
    return Finished(
        number_of(fields[b"event"].decode()),
        fields[b"outcome"].decode(),
        int(fields[b"attempt"]),
        b"replay" in fields,
        fields.get(b"error", b"").decode(),
    )


def number_of(event_id: str) -> int:
    """Return the number of a transition or notification."""
    return int(event_id.rpartition("_")[2])


async def _awaited(asked: Awaitable[Any]) -> Any:
    return await asked


def held(pending: Any) -> dict[Id, tuple[str, int]]:
    """Return a pending list as the model has it."""
    return {
        pair(one["message_id"]): (one["consumer"].decode(), one["times_delivered"])
        for one in pending
    }


def item_of(fields: dict[bytes, bytes]) -> Item | None:
    """Return what an entry is; None when only its id is left."""
    if b"change" in fields:
        return Item(int(fields[b"sequence"]), replay_in(fields))
    if b"notification" in fields:
        return Item(number_of(unpack(fields).event_id), replay_in(fields))
    return Item(None) if b"nothing" in fields else None


def replay_in(fields: dict[bytes, bytes]) -> str | None:
    """Return the replay's name in an entry."""
    return fields[b"replay"].decode() if b"replay" in fields else None


def dead_letter_of(fields: dict[bytes, bytes]) -> DeadLetter:
    """Return a dead letter as the model has it."""
    return DeadLetter(
        item_of(fields),
        pair(fields[b"entry_id"]),
        fields[b"reason"].decode(),
        fields[b"error"].decode(),
        int(fields[b"attempts"]),
    )


@pytest.mark.timeout(SEARCH_TIMEOUT_S)
def test_redis_holds_what_the_model_says(make_settings: Callable[..., Settings]) -> None:
    """One owner at a time, fenced calls, nothing lost, exact dead letters: at every step."""
    small = mock.patch.multiple(way_out, MAX_CLAIMED_PER_CALL=BATCH, MAX_DEAD_LETTERS=ROOM)
    with small, tapped(make_settings().redis_url) as (runner, tap):
        # At run time any factory will do, although the annotation asks for a class.
        machine: Any = partial(Delivering, runner, tap)
        run_state_machine_as_test(machine, settings=searching(40, steps=50))
