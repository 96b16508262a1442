"""Laws of the way out: order per session, retries, dead letters, stopping; in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections import defaultdict
from collections.abc import Callable, Coroutine
from enum import Enum
from itertools import pairwise
from random import Random
from typing import Any, NoReturn
from unittest import mock

import pytest
import structlog.testing
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from service.delivery import dispatcher as dispatcher_module
from service.delivery.consumer import QUARANTINE_AFTER, Attempts, Delivery, LeaseLostError, Missing
from service.delivery.deliverer import MAX_DELIVERIES_WITHOUT_OUTCOME, DeadLetterReason
from service.delivery.dispatcher import MAX_PER_READ, WINDOW, Dispatcher
from service.delivery.retries import MAX_PROBE_DELAY_S, CircuitBreakers, RetryPolicy
from service.errors import Undeliverable, Unreachable
from service.telemetry import metrics
from service.transitions.transition import StatusTransition
from tests.support import virtual_time
from tests.support.fake_consumer import Entry, FakeConsumer, entry
from tests.support.harness import takes_long

POLICY = RetryPolicy(concurrency=4, timeout_s=10, initial_delay_s=1, max_delay_s=8, max_attempts=4)
# What has failed rests for longer than anybody waits.
PATIENT = POLICY._replace(initial_delay_s=10**6, max_delay_s=10**6)

Handle = Callable[[StatusTransition], Coroutine[Any, Any, None]]


class Journal:
    """A handler that writes down what it is given, and then does what it is told to.

    Attributes:
        starts: Every call, as (time, entry).
        most: The most calls that ever ran at the same time.
    """

    def __init__(self, act: Handle | None = None) -> None:
        self.starts: list[tuple[float, Entry]] = []
        self.running: list[Entry] = []
        self.most = 0
        self._act = act

    @property
    def entries(self) -> list[Entry]:
        """What was given, in order."""
        return [one for _, one in self.starts]

    def times(self, wanted: Entry) -> list[float]:
        """Return when one entry was given."""
        return [at for at, one in self.starts if one == wanted]

    async def __call__(self, taken: StatusTransition, /) -> None:
        """Take a transition."""
        one = entry(taken)
        self.starts.append((asyncio.get_running_loop().time(), one))
        self.running.append(one)
        self.most = max(self.most, len(self.running))
        try:
            if self._act is not None:
                await self._act(taken)
        finally:
            self.running.remove(one)


def dispatcher(
    consumer: FakeConsumer,
    handler: Handle,
    policy: RetryPolicy = POLICY,
    *,
    circuits: CircuitBreakers | None = None,
) -> Dispatcher:
    """Return a dispatcher with its own quarantine, and circuit breakers unless given."""
    circuits = circuits or CircuitBreakers("journal", initial_delay_s=policy.initial_delay_s)
    return Dispatcher(
        "journal", handler, consumer, policy, circuits=circuits, quarantine=asyncio.Lock()
    )


async def until(condition: Callable[[], bool], *, within_s: float = 10_000) -> None:
    """Wait for *condition* in virtual time."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what is waited for knows no event
            await asyncio.sleep(0.1)


async def work_off(consumer: FakeConsumer, handler: Handle, policy: RetryPolicy = POLICY) -> None:
    """Dispatch until everything is settled or buried, then stop."""
    dispatching = dispatcher(consumer, handler, policy)
    running = asyncio.create_task(dispatching.run())
    await until(
        lambda: (
            running.done() or len(consumer.settled) + len(consumer.buried) == len(consumer.stream)
        )
    )
    dispatching.stop()
    async with asyncio.timeout(1000):
        await running


def in_virtual_time(law: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in a loop whose clock jumps."""

    def test() -> None:
        virtual_time.run(law())

    test.__name__, test.__doc__ = law.__name__, law.__doc__
    return test


def failing(error: BaseException, times: int = 10**9, *, only: str = "") -> Handle:
    """Return a handler that raises *error* so many times, for one session or for all."""
    left = times

    async def act(taken: StatusTransition) -> None:
        nonlocal left
        if left and entry(taken)[0].startswith(only):
            left -= 1
            raise error

    return act


def sleeping(seconds: float) -> Handle:
    """Return a handler that takes its time."""

    async def act(_: StatusTransition) -> None:
        await asyncio.sleep(seconds)

    return act


@in_virtual_time
async def test_one_session_is_delivered_in_order_one_at_a_time() -> None:
    """A session's transitions are handed over in order, each after the one before is settled."""
    consumer = FakeConsumer(("a", n) for n in range(1, 301))
    journal = Journal(sleeping(1))
    await work_off(consumer, journal)

    assert journal.entries == [("a", n) for n in range(1, 301)]
    assert consumer.settled == journal.entries
    assert journal.most == 1


@in_virtual_time
async def test_sessions_of_a_selftest_are_settled_and_shown_to_no_handler() -> None:
    """What is a self-test's is settled without a call, and counted; everybody else's is handed."""
    consumer = FakeConsumer(
        [("a", 1), ("selftest_x", 1), ("selftestx", 1), ("selftest_x", 2), ("a", 2)]
    )
    before = metrics.DELIVERIES.labels("journal", "selftest")._value.get()
    journal = Journal(sleeping(1))
    await work_off(consumer, journal)

    assert journal.entries == [("a", 1), ("selftestx", 1), ("a", 2)]
    assert sorted(consumer.settled) == sorted(map(entry, consumer.stream))
    assert metrics.DELIVERIES.labels("journal", "selftest")._value.get() == before + 2


@in_virtual_time
async def test_sessions_run_side_by_side_up_to_the_concurrency() -> None:
    """Different sessions are delivered at the same time, but never more than `concurrency`."""
    consumer = FakeConsumer((str(n), 1) for n in range(40))
    journal = Journal(sleeping(1))
    await work_off(consumer, journal)

    assert journal.most == POLICY.concurrency
    assert asyncio.get_running_loop().time() < 40 / POLICY.concurrency + 1


@in_virtual_time
async def test_pending_entries_come_before_new_ones() -> None:
    """What a predecessor left pending is delivered before anything new of the same session."""
    consumer = FakeConsumer(
        [("a", 1), ("a", 2), ("a", 3)], pending={0: Attempts(0, 2), 1: Attempts(0, 1)}
    )
    journal = Journal()
    await work_off(consumer, journal)

    assert journal.entries == [("a", 1), ("a", 2), ("a", 3)]


@in_virtual_time
async def test_a_failure_is_retried_after_a_pause_within_bounds() -> None:
    """Each retry comes after a random pause that doubles its bound and stays under the ceiling."""
    consumer = FakeConsumer((str(n), 1) for n in range(50))
    journal = Journal(failing(ValueError()))
    await work_off(consumer, journal, POLICY._replace(concurrency=1000, max_attempts=6))

    longest = [0.0] * 5
    for n in range(50):
        times = journal.times((str(n), 1))
        pauses = [after - before for before, after in pairwise(times)]
        longest = [max(pair) for pair in zip(longest, pauses, strict=True)]
    for pause_s, bound_s in zip(longest, [1, 2, 4, 8, 8], strict=True):
        assert bound_s * 0.7 < pause_s <= bound_s + 0.001


@in_virtual_time
async def test_a_failure_is_written_down_before_the_retry() -> None:
    """The count of failures is in Redis before the pause begins, so that a restart keeps it."""
    consumer = FakeConsumer([("a", 1)])
    seen: list[list[tuple[Entry, Attempts]]] = []

    async def act(_: StatusTransition) -> None:
        seen.append(list(consumer.counts))
        raise ValueError

    await work_off(consumer, act)

    counts = [(("a", 1), Attempts(n, 1)) for n in (1, 2, 3)]
    assert seen == [counts[:n] for n in range(4)]
    assert consumer.buried == [(("a", 1), DeadLetterReason.EXHAUSTED, "ValueError", 4)]


@in_virtual_time
async def test_a_failure_is_written_down_before_the_pause() -> None:
    """A worker killed while an entry rests before its retry leaves the failure counted."""
    consumer = FakeConsumer([("a", 1)])
    slow = POLICY._replace(initial_delay_s=10**6, max_delay_s=10**6)
    running = asyncio.create_task(dispatcher(consumer, failing(ValueError()), slow).run())
    await asyncio.sleep(1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert consumer.pending == {0: Attempts(1, 1)}


@in_virtual_time
async def test_failures_of_a_predecessor_count() -> None:
    """Attempts made before a restart are not made again."""
    consumer = FakeConsumer([("a", 1)], pending={0: Attempts(3, 1)})
    journal = Journal(failing(ValueError()))
    await work_off(consumer, journal)

    assert len(journal.starts) == 1
    assert consumer.buried == [(("a", 1), DeadLetterReason.EXHAUSTED, "ValueError", 4)]


@in_virtual_time
async def test_undeliverable_is_buried_at_once_with_its_word() -> None:
    """`Undeliverable` is never retried; its word is the dead letter's, and the next one follows."""
    consumer = FakeConsumer([("a", 1), ("a", 2)])
    with structlog.testing.capture_logs() as logs:
        await work_off(consumer, failing(Undeliverable("message_too_large"), 1))

    assert consumer.buried == [(("a", 1), "message_too_large", "Undeliverable", 1)]
    assert consumer.settled == [("a", 2)]
    assert [(line["event"], line["reason"], line["attempt"]) for line in logs] == [
        ("delivery.dead_lettered", "message_too_large", 1)
    ]


@pytest.mark.parametrize(
    "error",
    [
        ValueError(),
        TimeoutError(),
        asyncio.CancelledError(),
        BaseExceptionGroup("a group", [asyncio.CancelledError()]),
        type("OddError", (BaseException,), {})(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_handler_raises_is_a_failure(error: BaseException) -> None:
    """An error of any kind, a cancellation of its own making included, is retried like another."""

    async def law() -> None:
        consumer = FakeConsumer([("a", 1), ("b", 1)])
        await work_off(consumer, failing(error, 2, only="a"))

        assert sorted(consumer.settled) == [("a", 1), ("b", 1)]
        assert consumer.counts == [(("a", 1), Attempts(n, 1)) for n in (1, 2)]

    virtual_time.run(law())


@in_virtual_time
async def test_a_slow_call_is_ended_and_retried() -> None:
    """A call that takes longer than the time limit is canceled and counts as a failure."""
    consumer = FakeConsumer([("a", 1), ("b", 1)])
    journal = Journal(sleeping(10.5))
    await work_off(consumer, journal)

    assert {one[1:] for one in consumer.buried} == {(DeadLetterReason.EXHAUSTED, "TimeoutError", 4)}
    assert all(start % 10 != 0 or start == 0 for start in journal.times(("a", 1)))


@in_virtual_time
async def test_retrying_sessions_hold_no_slot() -> None:
    """More sessions than slots may rest before a retry, and the others go on meanwhile."""
    consumer = FakeConsumer(
        [*((f"bad{n}", 1) for n in range(20)), *((f"good{n}", 1) for n in range(20))]
    )
    journal = Journal(failing(ValueError(), only="bad"))
    dispatching = dispatcher(
        consumer, journal, POLICY._replace(initial_delay_s=1000, max_delay_s=1000)
    )
    running = asyncio.create_task(dispatching.run())
    await until(lambda: len(consumer.settled) == 20, within_s=1)
    dispatching.stop()
    await running

    assert all(session.startswith("good") for session, _ in consumer.settled)


async def others_are_delivered(
    consumer: FakeConsumer, act: Handle, policy: RetryPolicy = PATIENT, *, count: int = 25
) -> None:
    """Assert that *count* further sessions are delivered soon, behind what *consumer* has."""
    good = [(f"good{n}", 1) for n in range(count)]
    consumer.add(*good)
    dispatching = dispatcher(consumer, act, policy)
    running = asyncio.create_task(dispatching.run())
    await until(lambda: running.done() or {*good} <= {*consumer.settled}, within_s=60)
    dispatching.stop()
    await running
    assert {*good} <= {*consumer.settled}


BEHIND = {
    "one session": [("bad", n) for n in range(1, 601)],
    "many sessions": [(f"bad{n}", 1) for n in range(600)],
}


@pytest.mark.parametrize("is_pending", [False, True], ids=["new", "pending"])
@pytest.mark.parametrize("bad", BEHIND)
def test_what_fails_takes_no_place_of_what_does_not(bad: str, is_pending: bool) -> None:
    """More failing entries than the window holds rest, read or claimed, and others are served."""

    async def law() -> None:
        entries = BEHIND[bad]
        pending = dict.fromkeys(range(len(entries) + 25), Attempts(0, 1)) if is_pending else {}
        consumer = FakeConsumer(entries, pending=pending)
        await others_are_delivered(consumer, failing(ValueError(), only="bad"))

    virtual_time.run(law())


@in_virtual_time
async def test_a_session_that_rested_goes_on_in_order_and_whole() -> None:
    """Of a session that rests nothing is kept but ids: it goes on with every entry, in order."""
    consumer = FakeConsumer(("a", n) for n in range(1, 601))
    journal = Journal(failing(ValueError(), 3))
    await work_off(consumer, journal)

    assert consumer.settled == [("a", n) for n in range(1, 601)]
    assert journal.entries == [("a", 1)] * 3 + consumer.settled


@in_virtual_time
async def test_what_comes_to_a_session_that_rests_waits_behind_it() -> None:
    """An entry that arrives while its session rests is not delivered before those of before."""
    consumer = FakeConsumer([("a", 1), ("a", 2)])
    journal = Journal(failing(ValueError(), 1))
    dispatching = dispatcher(consumer, journal, PATIENT._replace(initial_delay_s=1000))
    running = asyncio.create_task(dispatching.run())
    await until(lambda: bool(consumer.counts))
    consumer.add(("a", 3), ("b", 1))
    await until(lambda: len(consumer.settled) == 4)
    dispatching.stop()
    await running

    assert consumer.settled == [("b", 1), ("a", 1), ("a", 2), ("a", 3)]


@in_virtual_time
async def test_retries_leave_half_of_the_slots_to_others() -> None:
    """However many retries are due, others do not wait for them."""
    consumer = FakeConsumer((f"bad{n}", 1) for n in range(100))
    loop = asyncio.get_running_loop()
    tried: set[Entry] = set()

    async def act(taken: StatusTransition) -> None:
        one = entry(taken)
        if one[0].startswith("bad") and one not in tried:
            tried.add(one)
            raise ValueError
        if one[0].startswith("bad"):
            await asyncio.sleep(9)

    dispatching = dispatcher(consumer, act)
    running = asyncio.create_task(dispatching.run())
    await until(lambda: len(tried) == 100)
    await asyncio.sleep(POLICY.initial_delay_s)
    for n in range(10):
        begun = loop.time()
        consumer.add((f"good{n}", 1))
        await until(lambda n=n: (f"good{n}", 1) in consumer.settled)  # type: ignore[misc]
        assert loop.time() < begun + 1
    dispatching.stop()
    await running


@in_virtual_time
async def test_what_is_kept_by_id_is_bounded_and_said() -> None:
    """At the bound reading stops, with an error line, until there is room again."""
    consumer = FakeConsumer((f"bad{n}", 1) for n in range(300))
    gate = True

    async def act(taken: StatusTransition) -> None:
        if gate and entry(taken)[0].startswith("bad"):
            raise ValueError

    small = mock.patch.multiple(dispatcher_module, MAX_PARKED=50, MAX_PER_READ=10, WINDOW=10)
    with small, structlog.testing.capture_logs() as lines:
        dispatching = dispatcher(consumer, act)
        running = asyncio.create_task(dispatching.run())
        await until(lambda: dispatching.parked >= 50)
        consumer.add(("good", 1))
        await asyncio.sleep(0.2)
        assert 50 <= len(consumer.pending) < 60
        assert not consumer.settled
        assert [one["event"] for one in lines if one["log_level"] == "error"] == ["reading.paused"]
        gate = False
        await until(lambda: len(consumer.settled) == 301)
        dispatching.stop()
        await running
    assert dispatching.parked == 0


@in_virtual_time
async def test_what_is_parked_is_given_back() -> None:
    """After a stop the entries that rest, and those behind them, are marked as not started."""
    consumer = FakeConsumer(("a", n) for n in range(1, 101))
    dispatching = dispatcher(consumer, failing(ValueError()), PATIENT)
    running = asyncio.create_task(dispatching.run())
    await until(lambda: bool(consumer.counts))
    dispatching.stop()
    await running

    assert consumer.pending == {0: Attempts(1, 0), **dict.fromkeys(range(1, 100), Attempts(0, 0))}


@in_virtual_time
async def test_what_was_given_back_already_is_not_given_back_twice() -> None:
    """A worker that takes a partition again, and gives it up again, leaves the counts as they are.

    One less would be read as nearly a thousand starts, and be the mark of a killed worker.
    """
    consumer = FakeConsumer([("a", 1), ("a", 2)], pending={0: Attempts(2, 0), 1: Attempts(0, 0)})
    dispatching = dispatcher(consumer, failing(ValueError()), PATIENT)
    consumer.latency_s = 1.0
    running = asyncio.create_task(dispatching.run())
    await asyncio.sleep(1.5)
    dispatching.stop()
    await running

    assert consumer.pending == {0: Attempts(2, 0), 1: Attempts(0, 0)}


class Reason(Enum):
    """Words as somebody may keep them."""

    GOOD = "no_user"
    NUMBER = 7


class Careless(Undeliverable):
    """A subclass that forgets its parent."""

    def __init__(self) -> None:
        pass


class Broken(Careless):
    """A subclass that cannot even be asked."""

    @property
    def reason(self) -> str:  # type: ignore[override]
        """Fail."""
        raise LookupError


def careless(reason: object) -> Undeliverable:
    """Return an error whose reason was set by hand."""
    error = Undeliverable()
    error.reason = reason  # type: ignore[assignment]
    return error


REASONS: dict[str, tuple[Callable[[], Undeliverable], str]] = {
    "member": (lambda: Undeliverable(Reason.GOOD), "no_user"),
    "text member": (lambda: Undeliverable(DeadLetterReason.EXHAUSTED), "exhausted"),
    "number": (lambda: Undeliverable(Reason.NUMBER), "undeliverable"),
    "nothing": (lambda: Undeliverable(None), "undeliverable"),
    "mapping": (lambda: Undeliverable({"user": "canary"}), "undeliverable"),
    "surrogate": (lambda: Undeliverable("\ud800"), "undeliverable"),
    "empty": (lambda: Undeliverable(""), "undeliverable"),
    "words": (lambda: Undeliverable("two words"), "undeliverable"),
    "long": (lambda: Undeliverable("x" * 65), "undeliverable"),
    "longest": (lambda: Undeliverable("x" * 64), "x" * 64),
    "no parent": (Careless, "undeliverable"),
    "set by hand": (lambda: careless(None), "undeliverable"),
    "mapping by hand": (lambda: careless({}), "undeliverable"),
    "unaskable": (Broken, DeadLetterReason.INTERNAL_ERROR),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_wrong_reason_is_one_entrys_trouble(case: str) -> None:
    """Whatever a handler makes of `Undeliverable`, the entry is buried and the rest delivered."""
    error, word = REASONS[case]

    async def law() -> None:
        async def act(taken: StatusTransition) -> None:
            if entry(taken) == ("bad", 1):
                raise error()

        consumer = FakeConsumer([("bad", 1), ("bad", 2)])
        consumer.add(*[(f"good{n}", 1) for n in range(200)])
        await work_off(consumer, act)
        assert [(one, reason) for one, reason, *_ in consumer.buried] == [(("bad", 1), word)]
        assert len(consumer.settled) == 201

    virtual_time.run(law())


@pytest.mark.parametrize("method", ["load", "record_attempts", "dead_letter"])
def test_our_own_trouble_with_one_entry_is_that_entrys(method: str) -> None:
    """What goes wrong in our own work on one entry makes a dead letter, a line, and no more."""

    async def law() -> None:
        consumer = FakeConsumer([("bad", 1), *((f"good{n}", 1) for n in range(50))])
        left = 1

        def faulty(name: str) -> None:
            nonlocal left
            if name == method and left:
                left -= 1
                raise TypeError("ours")

        consumer.faulty = faulty
        policy = POLICY._replace(max_attempts=1 if method == "dead_letter" else 4)
        with structlog.testing.capture_logs() as lines:
            await work_off(consumer, failing(ValueError(), only="bad"), policy)
        assert [one[:3] for one in consumer.buried] == [
            (("bad", 1), DeadLetterReason.INTERNAL_ERROR, "TypeError")
        ]
        assert len(consumer.settled) == 50
        assert [one["event"] for one in lines if one["log_level"] == "error"] == [
            "delivery.broken",
            "delivery.dead_lettered",
        ]

    virtual_time.run(law())


async def half_canceled(taken: StatusTransition) -> None:
    """Fail in a task group, which leaves its task half canceled before Python 3.13."""

    async def child() -> NoReturn:
        raise ValueError

    async with asyncio.TaskGroup() as group:
        group.create_task(child())


async def half_canceled_and_well(taken: StatusTransition) -> None:
    """Catch the same, and return."""
    with contextlib.suppress(ExceptionGroup):
        await half_canceled(taken)


async def canceling_itself(_: StatusTransition) -> None:
    """Cancel the own task and return before that has any effect."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def canceling_itself_later(_: StatusTransition) -> None:
    """Leave a timer behind that cancels the own task, as careless time limits do."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_later(0.01, task.cancel)


UNTIDY = [half_canceled, half_canceled_and_well, canceling_itself, canceling_itself_later]


@pytest.mark.parametrize("act", UNTIDY)
def test_what_a_handler_does_to_its_task_stays_there(act: Handle) -> None:
    """Sessions whose handler leaves its task half canceled are delivered, or retried and buried."""

    async def law() -> None:
        consumer = FakeConsumer([("a", 1), ("a", 2), ("a", 3)])
        consumer.latency_s = 0.1
        await work_off(consumer, act)
        fails = act is half_canceled
        assert len(consumer.buried) == (3 if fails else 0)
        assert len(consumer.settled) == (0 if fails else 3)

    virtual_time.run(law())


@in_virtual_time
async def test_many_half_canceled_calls_stop_nobody() -> None:
    """Sessions that fail once each in a task group are retried, and others served meanwhile."""
    failed: set[Entry] = set()

    async def act(taken: StatusTransition) -> None:
        if entry(taken)[0].startswith("bad") and entry(taken) not in failed:
            failed.add(entry(taken))
            await half_canceled(taken)

    consumer = FakeConsumer((f"bad{n}", 1) for n in range(600))
    await others_are_delivered(consumer, act, count=20)
    consumer = FakeConsumer((f"bad{n}", 1) for n in range(600))
    failed.clear()
    await work_off(consumer, act)
    assert len(consumer.settled) == 600


@in_virtual_time
async def test_a_call_that_will_not_end_is_said_and_not_overlapped() -> None:
    """A handler that goes on after its time is said to be stuck; its session waits for it."""
    consumer = FakeConsumer([("deaf", 1), ("deaf", 2), ("good", 1)])
    leave = asyncio.Event()

    async def act(taken: StatusTransition) -> None:
        while entry(taken)[0] == "deaf" and not leave.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await leave.wait()

    journal = Journal(act)
    dispatching = dispatcher(consumer, journal)
    running = asyncio.create_task(dispatching.run())
    with structlog.testing.capture_logs() as lines:
        await asyncio.sleep(2.5 * POLICY.timeout_s)
    assert [one["event"] for one in lines] == ["handler.stuck"]
    assert consumer.settled == [("good", 1)]
    assert journal.most == 2
    leave.set()
    await until(lambda: len(consumer.settled) == 3)
    dispatching.stop()
    await running
    assert journal.entries.count(("deaf", 1)) == 1


@in_virtual_time
async def test_unreadable_entries_are_treated_as_any_dead_letter() -> None:
    """An entry that cannot be read is buried, with a line and a count; one that is gone passes."""
    consumer = FakeConsumer([("a", 1), ("b", 1), ("c", 1), ("c", 2)])
    consumer.missing = {1: Missing.UNREADABLE, 2: Missing.GONE}
    before = metrics.DELIVERIES.labels("journal", "dead_lettered")._value.get()
    journal = Journal()
    with structlog.testing.capture_logs() as lines:
        await work_off(consumer, journal)

    assert consumer.buried == [(("b", 1), DeadLetterReason.UNREADABLE, "", 0)]
    assert sorted(consumer.settled) == [("a", 1), ("c", 1), ("c", 2)]
    assert sorted(journal.entries) == [("a", 1), ("c", 2)]
    assert metrics.DELIVERIES.labels("journal", "dead_lettered")._value.get() == before + 1
    said = {one["event"]: one for one in lines}
    assert said["delivery.dead_lettered"]["reason"] == DeadLetterReason.UNREADABLE
    assert said["delivery.gone"]["entry_id"] == "2"


@pytest.mark.parametrize("fault", ["unreadable", "refused"])
def test_what_finds_no_room_among_the_dead_letters_stops_nobody(fault: str) -> None:
    """At the bound an entry rests, said each time, and is buried once there is room; not tried."""

    async def law() -> None:
        consumer = FakeConsumer([("bad", 1), ("bad", 2), ("good", 1)])
        consumer.room = 0
        if fault == "unreadable":
            consumer.missing = {0: Missing.UNREADABLE}
        journal = Journal(failing(Undeliverable("no_user"), int(fault == "refused")))
        dispatching = dispatcher(consumer, journal)
        running = asyncio.create_task(dispatching.run())
        with structlog.testing.capture_logs() as lines:
            await asyncio.sleep(3 * POLICY.max_delay_s)
            assert ("good", 1) in consumer.settled
            consumer.room = 1
            await until(lambda: len(consumer.buried) == 1 and len(consumer.settled) == 2)
        dispatching.stop()
        await running
        assert [one["event"] for one in lines].count("delivery.dead_letters_full") == 3
        assert journal.entries.count(("bad", 1)) == (fault == "refused")

    virtual_time.run(law())


@in_virtual_time
async def test_dead_letters_that_redis_refuses_stop_nobody() -> None:
    """When Redis answers with an error to a dead letter, as when its key is no stream, it rests."""
    consumer = FakeConsumer([("bad", 1), ("good", 1)])
    is_refusing = True

    def faulty(name: str) -> None:
        if name == "dead_letter" and is_refusing:
            raise ResponseError("WRONGTYPE")

    consumer.faulty = faulty
    dispatching = dispatcher(consumer, failing(Undeliverable("no_user"), 1))
    running = asyncio.create_task(dispatching.run())
    await until(lambda: bool(consumer.settled))
    is_refusing = False
    await until(lambda: bool(consumer.buried))
    dispatching.stop()
    await running
    assert consumer.settled == [("good", 1)]


@in_virtual_time
async def test_entries_in_hand_are_bounded() -> None:
    """No more than the window is read while nothing is settled, and reading goes on after."""
    consumer = FakeConsumer((str(n), 1) for n in range(3 * WINDOW))
    gate = asyncio.Event()

    async def act(_: StatusTransition) -> None:
        await gate.wait()

    dispatching = dispatcher(consumer, act, POLICY._replace(timeout_s=10**6))
    running = asyncio.create_task(dispatching.run())
    await asyncio.sleep(1000)
    assert len(consumer.pending) == WINDOW
    assert max(consumer.reads) <= MAX_PER_READ

    gate.set()
    await until(lambda: len(consumer.settled) == 3 * WINDOW)
    dispatching.stop()
    await running


@in_virtual_time
async def test_what_is_taken_over_waits_for_room_too() -> None:
    """A large remainder of a predecessor exceeds the window by no more than one batch."""
    entries = [(str(n), 1) for n in range(3 * WINDOW)]
    consumer = FakeConsumer(entries, pending=dict.fromkeys(range(3 * WINDOW), Attempts(0, 1)))
    dispatching = dispatcher(consumer, sleeping(10**6), POLICY._replace(timeout_s=10**7))
    running = asyncio.create_task(dispatching.run())
    await asyncio.sleep(1000)
    assert WINDOW <= dispatching._backlog.loaded < WINDOW + MAX_PER_READ
    assert not consumer.reads
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


@in_virtual_time
async def test_an_entry_that_kills_the_process_is_buried_before_it_runs_again() -> None:
    """Too many starts without an outcome bury an entry without another call; innocents follow."""
    consumer = FakeConsumer(
        [("a", 1), ("a", 2)], pending={0: Attempts(0, MAX_DELIVERIES_WITHOUT_OUTCOME + 1)}
    )
    journal = Journal()
    await work_off(consumer, journal)

    assert consumer.buried == [(("a", 1), DeadLetterReason.KILLED_WORKER, "", 0)]
    assert journal.entries == [("a", 2)]


@in_virtual_time
async def test_suspects_run_alone_and_their_start_is_written_down() -> None:
    """Entries that two processes ended with are tried one at a time, each start counted first."""
    entries = [(str(n), 1) for n in range(10)]
    consumer = FakeConsumer(
        entries, pending=dict.fromkeys(range(10), Attempts(1, QUARANTINE_AFTER))
    )
    journal = Journal(sleeping(1))
    await work_off(consumer, journal)

    assert journal.most == 1
    assert sorted(consumer.counts) == [(one, Attempts(1, QUARANTINE_AFTER + 1)) for one in entries]
    assert len(consumer.settled) == 10


@in_virtual_time
async def test_an_outage_burns_no_attempts_and_is_probed_by_one_call_at_a_time() -> None:
    """While every call ends in ConnectionError nothing is counted or buried; then all follows."""
    consumer = FakeConsumer([(str(n), sequence) for sequence in (1, 2) for n in range(100)])
    loop = asyncio.get_running_loop()

    async def act(_: StatusTransition) -> None:
        if loop.time() < 3600:
            raise ConnectionRefusedError

    journal = Journal(act)
    await work_off(consumer, journal, POLICY._replace(max_delay_s=300))

    assert not consumer.buried
    assert not consumer.counts
    assert len(consumer.settled) == 200
    calls = sum(1 for at, _ in journal.starts if at < 3600)
    # Each session's own probes grow rarer, so their number grows with the logarithm of the time.
    assert 3600 / 30 < calls < 100 * 8
    assert loop.time() < 3600 + 31


@in_virtual_time
async def test_an_outage_of_one_session_is_its_own() -> None:
    """A ConnectionError while others reach the queue is a failure like another, and buried."""
    consumer = FakeConsumer([("bad", 1), ("bad", 2)])

    async def act(taken: StatusTransition) -> None:
        if entry(taken) == ("bad", 1):
            raise ConnectionResetError

    dispatching = dispatcher(consumer, act)
    running = asyncio.create_task(dispatching.run())
    for n in range(400):
        consumer.add((f"good{n}", 1))
        await asyncio.sleep(0.5)
    dispatching.stop()
    await running

    assert consumer.buried == [(("bad", 1), DeadLetterReason.EXHAUSTED, "ConnectionResetError", 4)]
    assert len(consumer.settled) == 401


class Routing(Journal):
    """A handler with a destination for each letter that sessions begin with."""

    def destination(self, taken: StatusTransition) -> str:
        """Say where a transition goes."""
        return entry(taken)[0][0]


@in_virtual_time
async def test_a_destination_that_is_away_stops_no_other() -> None:
    """More sessions than the window holds wait for one destination; others are served meanwhile."""
    loop = asyncio.get_running_loop()
    consumer = FakeConsumer((f"x{n}", sequence) for sequence in (1, 2) for n in range(700))

    async def act(taken: StatusTransition) -> None:
        if entry(taken)[0].startswith("x") and loop.time() < 600:
            raise Unreachable("no_such_queue")

    journal = Routing(act)
    dispatching = dispatcher(consumer, journal)
    running = asyncio.create_task(dispatching.run())
    for n in range(50):
        await asyncio.sleep(10)
        begun = loop.time()
        consumer.add((f"y{n}", 1))
        await until(lambda n=n: (f"y{n}", 1) in consumer.settled)  # type: ignore[misc]
        assert loop.time() < begun + 1
    await until(lambda: len(consumer.settled) == len(consumer.stream))
    dispatching.stop()
    await running

    assert not consumer.counts
    sessions = [one for one in consumer.settled if one[0].startswith("x")]
    for n in range(700):
        assert [one for one in sessions if one[0] == f"x{n}"] == [(f"x{n}", 1), (f"x{n}", 2)]


@in_virtual_time
async def test_a_success_elsewhere_says_nothing_about_a_destination() -> None:
    """What waits for its destination is not to blame because sessions of others get through."""
    consumer = FakeConsumer([("x", 1)])
    loop = asyncio.get_running_loop()

    async def act(taken: StatusTransition) -> None:
        if entry(taken)[0] == "x" and loop.time() < 3600:
            raise Unreachable

    dispatching = dispatcher(consumer, Routing(act))
    running = asyncio.create_task(dispatching.run())
    for n in range(400):
        consumer.add((f"y{n}", 1))
        await asyncio.sleep(10)
    dispatching.stop()
    await running
    assert not consumer.counts
    assert len(consumer.settled) == 401


@in_virtual_time
async def test_a_destination_that_cannot_be_told_is_an_attempt() -> None:
    """An error of `destination` is counted like one of the call, and its place is told."""

    class Lost(Journal):
        def destination(self, _: StatusTransition) -> str:
            raise LookupError

    consumer = FakeConsumer([("a", 1)])
    journal = Lost()
    await work_off(consumer, journal)
    assert consumer.buried == [(("a", 1), DeadLetterReason.EXHAUSTED, "LookupError", 4)]
    assert not journal.starts


@in_virtual_time
async def test_every_failed_call_tells_its_place() -> None:
    """The line of a retry, that of a dead letter, and the letter itself name file and function."""
    consumer = FakeConsumer([("a", 1), ("b", 1)])

    async def act(taken: StatusTransition) -> None:
        if entry(taken)[0] == "a":
            raise Undeliverable("no_user")
        raise ValueError("canary")

    with structlog.testing.capture_logs() as lines:
        await work_off(consumer, act, POLICY._replace(max_attempts=2))
    places = {(one["event"], one["error"]): one["place"] for one in lines}
    assert places.keys() == {
        ("delivery.retried", "ValueError"),
        ("delivery.dead_lettered", "ValueError"),
        ("delivery.dead_lettered", "Undeliverable"),
    }
    line = act.__code__.co_firstlineno
    assert places["delivery.dead_lettered", "Undeliverable"] == f"{__file__}:{line + 2} act"
    assert places["delivery.retried", "ValueError"] == f"{__file__}:{line + 3} act"
    assert consumer.places == [
        places["delivery.dead_lettered", each] for each in ("Undeliverable", "ValueError")
    ]
    assert "canary" not in str(lines)


@pytest.mark.parametrize(
    "error",
    [Unreachable("unroutable"), socket.gaierror(), ssl.SSLError(), OSError(errno.EHOSTUNREACH, "")],
    ids=repr,
)
def test_what_counts_as_unreachable_is_waited_for(error: Exception) -> None:
    """Whatever means that the destination is away costs no attempt, for as long as it lasts."""

    async def law() -> None:
        consumer = FakeConsumer([("a", 1), ("b", 1)])
        loop = asyncio.get_running_loop()

        async def act(_: StatusTransition) -> None:
            if loop.time() < 3600:
                raise error

        await work_off(consumer, act)
        assert not consumer.counts
        assert len(consumer.settled) == 2

    virtual_time.run(law())


@in_virtual_time
async def test_a_call_out_of_time_closes_no_circuit() -> None:
    """A probe that hangs is a failed attempt of its session, and proves nothing about the queue."""
    consumer = FakeConsumer((str(n), 1) for n in range(20))
    loop = asyncio.get_running_loop()

    async def act(taken: StatusTransition) -> None:
        if loop.time() < 600:
            if entry(taken) == ("7", 1) and loop.time() > 0:
                await asyncio.sleep(100)
            raise ConnectionRefusedError

    journal = Journal(act)
    with structlog.testing.capture_logs() as lines:
        await work_off(consumer, journal)

    assert [one["event"] for one in lines if one["event"].startswith("circuit")] == [
        "circuit.opened",
        "circuit.closed",
    ]
    # Those that did not hang took turns: no burst of calls followed any of the hanging ones.
    assert sum(1 for at, _ in journal.starts if 0 < at < 600) < 200
    assert len(consumer.settled) == 19
    assert consumer.buried == [(("7", 1), DeadLetterReason.EXHAUSTED, "TimeoutError", 4)]


class Rival:
    """A second dispatcher on the same circuit, with one session that waits for its turn."""

    def __init__(self, circuits: CircuitBreakers) -> None:
        self.consumer = FakeConsumer([("rival", 1)])
        self.journal = Journal(self._act)
        self.is_away = True
        self.dispatcher = dispatcher(self.consumer, self.journal, circuits=circuits)
        self.running = asyncio.create_task(self.dispatcher.run())

    async def _act(self, _: StatusTransition) -> None:
        if self.is_away:
            raise ConnectionRefusedError

    async def is_served(self) -> None:
        """Assert that it has its turn to probe, soon, and everything after it."""
        self.is_away = False
        await until(lambda: bool(self.consumer.settled), within_s=2 * MAX_PROBE_DELAY_S)
        self.dispatcher.stop()
        await self.running


@pytest.mark.parametrize("end", ["stop", "cancel", "lose"])
@pytest.mark.parametrize("moment", ["waits for its turn", "probes"])
def test_the_turn_to_probe_is_not_kept(moment: str, end: str) -> None:
    """Whenever and however a dispatcher ends, another's sessions probe, and the circuit closes."""

    async def law() -> None:
        circuits = CircuitBreakers("journal", initial_delay_s=1)
        circuit = circuits.for_destination("")
        is_slow = False

        async def act(_: StatusTransition) -> None:
            if is_slow:
                await asyncio.sleep(9)
            raise ConnectionRefusedError

        consumer = FakeConsumer([("a", 1)])
        journal = Journal(act)
        dispatching = dispatcher(consumer, journal, circuits=circuits)
        running = asyncio.create_task(dispatching.run())
        await until(lambda: circuit.is_open)
        rival = Rival(circuits)
        await until(lambda: circuit.probes > 3)
        if moment == "probes":
            is_slow = True
            await until(lambda: bool(journal.running))
        match end:
            case "stop":
                dispatching.stop()
            case "cancel":
                running.cancel()
            case "lose":
                consumer.ours = False
                consumer.add(("b", 1))
        await rival.is_served()
        dispatching.stop()
        await asyncio.wait([running])

    virtual_time.run(law())


@in_virtual_time
async def test_a_poison_that_looks_like_an_outage_is_buried_and_delays_nobody() -> None:
    """One session that never reaches the queue, alone for long, is not probed for ever."""
    consumer = FakeConsumer([("poison", 1), ("poison", 2)])
    loop = asyncio.get_running_loop()

    async def act(taken: StatusTransition) -> None:
        if entry(taken) == ("poison", 1):
            raise ConnectionResetError

    dispatching = dispatcher(consumer, act)
    running = asyncio.create_task(dispatching.run())
    for n in range(20):
        await asyncio.sleep(300)
        begun = loop.time()
        consumer.add((f"good{n}", 1))
        await until(lambda n=n: (f"good{n}", 1) in consumer.settled)  # type: ignore[misc]
        assert loop.time() <= begun + POLICY.initial_delay_s + 0.2
    dispatching.stop()
    await running

    assert consumer.buried == [
        (("poison", 1), DeadLetterReason.EXHAUSTED, "ConnectionResetError", 4)
    ]
    assert ("poison", 2) in consumer.settled


@pytest.mark.parametrize(
    "method", ["claim_pending", "read", "ack", "record_attempts", "dead_letter"]
)
@pytest.mark.parametrize(
    "error", [RedisConnectionError(), LeaseLostError()], ids=["redis", "lease"]
)
def test_an_error_of_the_mailbox_ends_everything(method: str, error: Exception) -> None:
    """Any failing call to the consumer ends the run with that error, and no handler runs on."""

    async def law() -> None:
        consumer = FakeConsumer([("slow", 1), ("retried", 1), ("settled", 1), ("refused", 1)])

        def faulty(name: str) -> None:
            if name == method:
                raise error

        async def act(taken: StatusTransition) -> None:
            match entry(taken)[0]:
                case "slow":
                    await asyncio.sleep(9)
                case "retried":
                    raise ValueError
                case "refused":
                    raise Undeliverable

        consumer.faulty = faulty
        journal = Journal(act)
        with pytest.raises(ExceptionGroup) as raised:
            await dispatcher(consumer, journal).run()

        assert set(raised.value.exceptions) == {error}
        assert not journal.running
        assert asyncio.get_running_loop().time() < 9

    virtual_time.run(law())


@in_virtual_time
async def test_no_call_begins_without_the_lease() -> None:
    """The lease is looked at before every call of the handler, a retry included."""
    consumer = FakeConsumer([("a", 1)])

    def lost_in_the_pause(name: str) -> None:
        if name == "record_attempts":
            consumer.ours = False

    consumer.faulty = lost_in_the_pause
    journal = Journal(failing(ValueError()))
    with pytest.raises(ExceptionGroup) as raised:
        await dispatcher(consumer, journal).run()

    assert raised.group_contains(LeaseLostError)
    assert len(journal.starts) == 1


@in_virtual_time
async def test_no_call_that_waited_for_a_slot_begins_without_the_lease() -> None:
    """A lease that ran out by our own clock stops what is already in memory, too."""
    consumer = FakeConsumer([("a", 1), ("b", 1)])
    consumer.latency_s = 1.0

    async def act(_: StatusTransition) -> None:
        consumer.ours = False

    journal = Journal(act)
    with pytest.raises(ExceptionGroup) as raised:
        await dispatcher(consumer, journal, POLICY._replace(concurrency=1)).run()

    assert raised.group_contains(LeaseLostError)
    assert journal.entries == [("a", 1)]


@in_virtual_time
async def test_a_mailbox_that_cancels_itself_is_noticed() -> None:
    """A cancellation nobody asked for ends the run with an error, never one chain in silence."""

    def canceled(name: str) -> None:
        if name == "ack":
            raise asyncio.CancelledError

    consumer = FakeConsumer([("a", 1), ("a", 2)])
    consumer.faulty = canceled
    with pytest.raises(ExceptionGroup):
        await dispatcher(consumer, Journal()).run()


@in_virtual_time
async def test_a_mailbox_that_keeps_a_cancellation_to_itself_starts_nothing() -> None:
    """A read that ends well although it was canceled brings nothing into a run that is ending."""

    class Deaf(FakeConsumer):
        async def read(self, most: int) -> list[Delivery]:
            if self.reads:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(1000)
            return await super().read(1)

    def failing_settle(name: str) -> None:
        if name == "ack":
            raise lost

    lost = RedisConnectionError()
    consumer = Deaf([("a", 1), ("b", 1)])
    consumer.faulty = failing_settle
    journal = Journal(sleeping(1))
    with pytest.raises(ExceptionGroup) as raised:
        await dispatcher(consumer, journal).run()

    assert raised.value.exceptions == (lost,)
    assert journal.entries == [("a", 1)]
    assert set(consumer.pending) == {0, 1}


@in_virtual_time
async def test_cancellation_ends_handlers_that_keep_it_to_themselves() -> None:
    """A handler that turns its cancellation into an error, or into success, is not called again."""

    async def act(taken: StatusTransition) -> None:
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            if entry(taken)[0] == "a":
                raise ValueError from None

    consumer = FakeConsumer([("a", 1), ("a", 2), ("b", 1), ("b", 2)])
    journal = Journal(act)
    running = asyncio.create_task(dispatcher(consumer, journal).run())
    await until(lambda: len(journal.running) == 2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert len(journal.starts) == 2
    assert not consumer.settled
    assert not consumer.counts


def test_system_exit_ends_the_process() -> None:
    """A handler that exits is not swallowed: the loop ends, and the entry stays pending."""
    consumer: list[FakeConsumer] = []

    async def law() -> None:
        consumer.append(FakeConsumer([("a", 1)]))
        await dispatcher(consumer[0], failing(SystemExit(3))).run()

    with pytest.raises(SystemExit):
        virtual_time.run(law())
    assert consumer[0].pending == {0: Attempts(0, 1)}


@in_virtual_time
async def test_stop_before_run_and_during_take_over_ends_at_once() -> None:
    """Told to stop before it runs, while it takes over, or while it waits, a run ends."""
    stopped = dispatcher(FakeConsumer([("a", 1)]), Journal())
    stopped.stop()
    await stopped.run()

    for delay_s in (0, 0.5, 1.5, 2.5, 3.5):
        consumer = FakeConsumer([("a", 1), ("a", 2)], pending={0: Attempts(0, 1)})
        consumer.latency_s = 1.0
        dispatching = dispatcher(consumer, Journal())
        running = asyncio.create_task(dispatching.run())
        await asyncio.sleep(delay_s)
        dispatching.stop()
        async with asyncio.timeout(5):
            await running


@in_virtual_time
async def test_stop_finishes_what_is_started_and_starts_nothing() -> None:
    """After stop the running calls end and are settled; what waits, rests or queues is left."""
    consumer = FakeConsumer(
        [("resting", 1), *((str(n), sequence) for n in range(9) for sequence in (1, 2))]
    )
    fail = failing(ValueError(), only="resting")

    async def act(taken: StatusTransition) -> None:
        await fail(taken)
        await asyncio.sleep(5)

    journal = Journal(act)
    dispatching = dispatcher(
        consumer, journal, POLICY._replace(initial_delay_s=1000, max_delay_s=1000)
    )
    running = asyncio.create_task(dispatching.run())
    await asyncio.sleep(1)
    started = [one for one in journal.entries if one[0] != "resting"]
    dispatching.stop()
    await running

    assert len(started) == POLICY.concurrency
    assert sorted(consumer.settled) == sorted(started)
    assert len(journal.starts) == len(started) + 1
    assert asyncio.get_running_loop().time() < 6


@in_virtual_time
async def test_what_is_left_unstarted_is_given_back_without_suspicion() -> None:
    """After a stop what was not started is marked so, its failures kept; quarantine stay."""
    consumer = FakeConsumer(
        [("a", 1), ("a", 2), ("b", 1)], pending={2: Attempts(2, QUARANTINE_AFTER)}
    )
    consumer.pending |= {0: Attempts(1, 2), 1: Attempts(0, 1)}
    dispatching = dispatcher(consumer, sleeping(5), POLICY._replace(concurrency=1))
    running = asyncio.create_task(dispatching.run())
    await asyncio.sleep(1)
    dispatching.stop()
    await running

    assert consumer.settled == [("a", 1)]
    assert consumer.pending == {1: Attempts(0, 0), 2: Attempts(2, QUARANTINE_AFTER)}


@in_virtual_time
async def test_stop_during_an_outage_ends_at_once() -> None:
    """Neither the probing call nor those behind it outlast a stop."""
    consumer = FakeConsumer([(str(n), 1) for n in range(30)])
    dispatching = dispatcher(
        consumer, failing(ConnectionError()), POLICY._replace(initial_delay_s=1000)
    )
    running = asyncio.create_task(dispatching.run())
    await asyncio.sleep(100)
    dispatching.stop()
    await running

    assert asyncio.get_running_loop().time() == 100
    assert len(consumer.pending) == 30


class Simulation:
    """Workers that come and go over one consumer, whose calls fail at random.

    The checker knows only what a consumer sees: the journal of calls and the consumer's end.
    """

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        sessions = {f"s{n}": self.random.randint(1, 12) for n in range(self.random.randint(1, 12))}
        waiting = [(name, 1) for name in sessions]
        entries: list[Entry] = []
        while waiting:
            name, sequence = waiting.pop(self.random.randrange(len(waiting)))
            entries.append((name, sequence))
            if sequence < sessions[name]:
                waiting.append((name, sequence + 1))
        self.entries = entries
        self.consumer = FakeConsumer()
        self.consumer.latency_s = self.random.choice([0, 0.01, 0.5])
        self.consumer.faulty = self._faulty
        self.calm = False
        self.journal = Journal(self._act)

    def _faulty(self, _: str) -> None:
        if not self.calm and self.random.random() < 0.02:
            raise self.random.choice([RedisConnectionError(), LeaseLostError()])

    async def _act(self, taken: StatusTransition) -> None:
        await asyncio.sleep(self.random.choice([0, 0, 0.1, 3]))
        fate = self.random.random()
        if fate < 0.05:
            raise Undeliverable
        if fate < 0.25:
            raise self.random.choice(
                [ValueError(), asyncio.CancelledError(), ConnectionResetError(), TimeoutError()]
            )
        if fate < 0.27:
            await asyncio.sleep(60)

    async def run(self) -> None:
        """Let workers follow each other until all is done, the last of them in calm weather."""
        growing = asyncio.create_task(self._grow())
        for term in range(1000):
            self.calm = term > 20
            self.consumer.ours = True
            if await self._serve():
                break
        await growing

    async def _grow(self) -> None:
        for one in self.entries:
            await asyncio.sleep(self.random.choice([0, 0, 0.2, 2]))
            self.consumer.add(one)

    async def _serve(self) -> bool:
        """Work for one term, which ends by an error, a stop, a kill or a lost lease."""
        policy = POLICY._replace(concurrency=self.random.randint(1, 4))
        dispatching = dispatcher(self.consumer, self.journal, policy)
        running = asyncio.create_task(dispatching.run())
        term_s = self.random.choice([0, 0.1, 1, 5, 30]) if not self.calm else 10_000
        with contextlib.suppress(TimeoutError):
            await until(lambda: running.done() or self.is_done, within_s=max(term_s, 0.001))
        end = "stop" if self.is_done else self.random.choice(["stop", "cancel", "lose"])
        if end == "cancel":
            running.cancel()
        else:
            self.consumer.ours = end == "stop"
            dispatching.stop()
        async with asyncio.timeout(1000):
            await asyncio.wait([running])
        assert not self.journal.running
        assert running.cancelled() or self._is_meant(running.exception())
        return self.is_done

    @property
    def is_done(self) -> bool:
        """Whether everything is settled or buried."""
        return len(self.consumer.settled) + len(self.consumer.buried) == len(self.entries)

    @staticmethod
    def _is_meant(error: BaseException | None) -> bool:
        meant = (RedisConnectionError, LeaseLostError)
        return error is None or isinstance(error, meant) or error.split(meant)[1] is None  # type: ignore[attr-defined]

    def check(self) -> None:
        """Assert what a consumer may rely on."""
        assert self.is_done
        assert not self.consumer.pending
        first: dict[str, list[int]] = defaultdict(list)
        last: dict[str, int] = defaultdict(int)
        for session, sequence in self.journal.entries:
            if sequence > last[session]:
                first[session].append(sequence)
            last[session] = max(last[session], sequence)
        done = {*self.consumer.settled, *(one for one, *_ in self.consumer.buried)}
        assert done == set(self.entries)
        for session, sequences in first.items():
            assert sequences == list(range(1, len(sequences) + 1)), session


@pytest.mark.parametrize("block", [0, *(pytest.param(n, marks=takes_long) for n in (1, 2, 3))])
def test_no_seed_finds_loss_or_disorder(block: int) -> None:
    """Whatever fails and whoever ends whenever: nothing is lost, first deliveries are in order."""

    async def law(seed: int) -> None:
        simulation = Simulation(seed)
        await simulation.run()
        simulation.check()

    for seed in range(block * 100, block * 100 + 100):
        try:
            virtual_time.run(law(seed))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


def test_a_hang_is_an_error() -> None:
    """The virtual loop says so when everything waits for ever."""

    async def law() -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(RuntimeError, match="nothing will ever happen"):
        virtual_time.run(law())
