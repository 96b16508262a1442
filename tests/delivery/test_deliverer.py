"""Tests of what becomes of one entry, in virtual time: failures, dead letters, quarantine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from enum import Enum
from itertools import pairwise
from typing import NoReturn

import pytest
import structlog.testing
from redis.exceptions import ResponseError

from service.delivery.consumer import QUARANTINE_AFTER, Attempts, Missing
from service.delivery.deliverer import MAX_DELIVERIES_WITHOUT_OUTCOME, DeadLetterReason
from service.delivery.leases import LeaseLostError
from service.errors import Undeliverable
from service.telemetry import metrics
from service.transitions.transition import StatusTransition
from tests.support import virtual_time
from tests.support.dispatching import (
    HANDLER,
    POLICY,
    FakeConsumer,
    Handle,
    RecordingHandler,
    deliver_all,
    dispatching,
    entry,
    failing,
    new_dispatcher,
    sleeping,
)
from tests.support.virtual_time import in_virtual_time
from tests.support.waiting import until


@in_virtual_time
async def test_sessions_of_a_selftest_are_acknowledged_without_a_call() -> None:
    """Transitions of self-tests are acknowledged and counted, but not given to the handler."""
    consumer = FakeConsumer(
        [("a", 1), ("selftest_x", 1), ("selftestx", 1), ("selftest_x", 2), ("a", 2)]
    )
    before = metrics.DELIVERIES.labels(HANDLER, "selftest")._value.get()
    handler = RecordingHandler(sleeping(1))
    await deliver_all(consumer, handler)

    assert handler.entries == [("a", 1), ("selftestx", 1), ("a", 2)]
    assert sorted(consumer.acked) == sorted(map(entry, consumer.stream))
    assert metrics.DELIVERIES.labels(HANDLER, "selftest")._value.get() == before + 2


@in_virtual_time
async def test_retries_come_after_delays_that_double() -> None:
    """Retries come after random delays, with a bound that doubles up to a maximum."""
    consumer = FakeConsumer((str(n), 1) for n in range(50))
    handler = RecordingHandler(failing(ValueError()))
    await deliver_all(consumer, handler, POLICY._replace(concurrency=1000, max_attempts=6))

    longest = [0.0] * 5
    for n in range(50):
        times = handler.times((str(n), 1))
        delays = [after - before for before, after in pairwise(times)]
        longest = [max(pair) for pair in zip(longest, delays, strict=True)]
    for delay_s, bound_s in zip(longest, [1, 2, 4, 8, 8], strict=True):
        assert bound_s * 0.7 < delay_s <= bound_s + 0.001


@in_virtual_time
async def test_undeliverable_becomes_a_dead_letter_at_once() -> None:
    """`Undeliverable` is not retried: a dead letter with its reason, then the next entry."""
    consumer = FakeConsumer([("a", 1), ("a", 2)])
    with structlog.testing.capture_logs() as logs:
        await deliver_all(consumer, failing(Undeliverable("message_too_large"), 1))

    assert consumer.dead_letters == [(("a", 1), "message_too_large", "Undeliverable", 1)]
    assert consumer.acked == [("a", 2)]
    assert [(line["event"], line["reason"], line["attempt"]) for line in logs] == [
        ("delivery.dead_lettered", "message_too_large", 1)
    ]


@in_virtual_time
async def test_undeliverable_may_say_that_its_destination_is_unreachable() -> None:
    """The dead letter names both words, and the circuit opens."""
    consumer = FakeConsumer([("a", 1), ("a", 2)])
    with structlog.testing.capture_logs() as logs:
        await deliver_all(consumer, failing(Undeliverable("too_old", unreachable="refused"), 1))

    assert consumer.dead_letters == [(("a", 1), "too_old", "refused", 1)]
    assert [(line["event"], line.get("reason")) for line in logs] == [
        ("circuit.opened", "refused"),
        ("delivery.dead_lettered", "too_old"),
        ("circuit.closed", "nothing_waits"),
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
@in_virtual_time
async def test_any_exception_of_a_handler_is_a_failure(error: BaseException) -> None:
    """Any exception is retried, also a cancellation by the handler itself."""
    consumer = FakeConsumer([("a", 1), ("b", 1)])
    await deliver_all(consumer, failing(error, 2, only="a"))

    assert sorted(consumer.acked) == [("a", 1), ("b", 1)]
    assert consumer.recorded == [(("a", 1), Attempts(n, 1)) for n in (1, 2)]


@in_virtual_time
async def test_a_slow_call_is_canceled_and_retried() -> None:
    """A call that exceeds the time limit is canceled where it waits; that counts as a failure."""
    consumer = FakeConsumer([("a", 1), ("b", 1)])
    handler = RecordingHandler(sleeping(10.5))
    await deliver_all(consumer, handler)

    assert {one[1:] for one in consumer.dead_letters} == {
        (DeadLetterReason.EXHAUSTED, "TimeoutError", 4)
    }
    assert all(" act, " in place and place.endswith(" sleep") for place in consumer.places)
    assert all(start % 10 != 0 or start == 0 for start in handler.times(("a", 1)))


class Reason(Enum):
    """An enum of reasons, as the author of a handler may have one."""

    GOOD = "no_user"
    NUMBER = 7


class Careless(Undeliverable):
    """A subclass that does not call its parent's `__init__`."""

    def __init__(self) -> None:
        pass


class Broken(Careless):
    """A subclass whose reason cannot be read."""

    @property
    def reason(self) -> str:  # type: ignore[override]
        """Fail."""
        raise LookupError


def careless(reason: object) -> Undeliverable:
    """Return an error whose reason was assigned later."""
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
@in_virtual_time
async def test_a_wrong_reason_affects_one_entry(case: str) -> None:
    """With any misuse of `Undeliverable` the entry is a dead letter and the rest is delivered."""
    error, word = REASONS[case]

    async def act(taken: StatusTransition) -> None:
        if entry(taken) == ("bad", 1):
            raise error()

    consumer = FakeConsumer([("bad", 1), ("bad", 2)])
    consumer.add(*[(f"good{n}", 1) for n in range(200)])
    await deliver_all(consumer, act)
    assert [(one, reason) for one, reason, *_ in consumer.dead_letters] == [(("bad", 1), word)]
    assert len(consumer.acked) == 201


@pytest.mark.parametrize("method", ["load", "record_attempts", "dead_letter"])
@in_virtual_time
async def test_an_error_of_ours_affects_one_entry(method: str) -> None:
    """An unexpected error of ours about one entry makes a dead letter and a log line."""
    consumer = FakeConsumer([("bad", 1), *((f"good{n}", 1) for n in range(50))])
    left = 1

    def faulty(name: str) -> None:
        nonlocal left
        if name == method and left:
            left -= 1
            raise TypeError("ours")

    consumer.fail = faulty
    policy = POLICY._replace(max_attempts=1 if method == "dead_letter" else 4)
    with structlog.testing.capture_logs() as lines:
        await deliver_all(consumer, failing(ValueError(), only="bad"), policy)
    assert [one[:3] for one in consumer.dead_letters] == [
        (("bad", 1), DeadLetterReason.INTERNAL_ERROR, "TypeError")
    ]
    assert len(consumer.acked) == 50
    assert [one["event"] for one in lines if one["log_level"] == "error"] == [
        "delivery.broken",
        "delivery.dead_lettered",
    ]


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
    """Cancel the own task and return before the cancellation takes effect."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def canceling_itself_later(_: StatusTransition) -> None:
    """Leave a timer behind that cancels the own task later."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_later(0.01, task.cancel)


UNTIDY = [half_canceled, half_canceled_and_well, canceling_itself, canceling_itself_later]


@pytest.mark.parametrize("act", UNTIDY)
@in_virtual_time
async def test_a_handler_may_leave_its_task_in_any_state(act: Handle) -> None:
    """If a handler leaves its task half canceled, its result counts, and the others go on."""
    consumer = FakeConsumer([("a", 1), ("a", 2), ("a", 3)])
    consumer.latency_s = 0.1
    await deliver_all(consumer, act)
    fails = act is half_canceled
    assert len(consumer.dead_letters) == (3 if fails else 0)
    assert len(consumer.acked) == (0 if fails else 3)


@in_virtual_time
async def test_a_stuck_call_is_logged_and_not_overlapped() -> None:
    """A handler that goes on after the time limit is logged as stuck; its session waits."""
    consumer = FakeConsumer([("stuck", 1), ("stuck", 2), ("good", 1)])
    leave = asyncio.Event()

    async def act(taken: StatusTransition) -> None:
        while entry(taken)[0] == "stuck" and not leave.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await leave.wait()

    handler = RecordingHandler(act)
    async with dispatching(consumer, handler):
        with structlog.testing.capture_logs() as lines:
            await asyncio.sleep(2.5 * POLICY.timeout_s)
        assert [one["event"] for one in lines] == ["handler.stuck"]
        assert consumer.acked == [("good", 1)]
        assert handler.max_running == 2
        leave.set()
        await until(lambda: len(consumer.acked) == 3)
    assert handler.entries.count(("stuck", 1)) == 1


@in_virtual_time
async def test_unreadable_and_missing_entries() -> None:
    """An unreadable entry is logged and counted as a dead letter; a missing one is acknowledged."""
    consumer = FakeConsumer([("a", 1), ("b", 1), ("c", 1), ("c", 2)])
    consumer.missing = {1: Missing.UNREADABLE, 2: Missing.GONE}
    before = metrics.DELIVERIES.labels(HANDLER, "dead_lettered")._value.get()
    handler = RecordingHandler()
    with structlog.testing.capture_logs() as lines:
        await deliver_all(consumer, handler)

    assert consumer.dead_letters == [(("b", 1), DeadLetterReason.UNREADABLE, "", 0)]
    assert sorted(consumer.acked) == [("a", 1), ("c", 1), ("c", 2)]
    assert sorted(handler.entries) == [("a", 1), ("c", 2)]
    assert metrics.DELIVERIES.labels(HANDLER, "dead_lettered")._value.get() == before + 1
    logged = {one["event"]: one for one in lines}
    assert logged["delivery.dead_lettered"]["reason"] == DeadLetterReason.UNREADABLE
    assert logged["delivery.gone"]["entry_id"] == "2"


def refuse_dead_letters(name: str) -> None:
    """Fail as Redis does if the key of the dead letters has another type."""
    if name == "dead_letter":
        raise ResponseError("WRONGTYPE")


@pytest.mark.parametrize("fault", ["unreadable", "undeliverable", "refused by Redis"])
@in_virtual_time
async def test_full_dead_letters_delay_one_session(fault: str) -> None:
    """Without room for a dead letter its session waits; the handler is not called again."""
    consumer = FakeConsumer([("bad", 1), ("bad", 2), ("good", 1)])
    consumer.max_dead_letters = 0
    if fault == "unreadable":
        consumer.missing = {0: Missing.UNREADABLE}
    if fault == "refused by Redis":
        consumer.max_dead_letters = 1
        consumer.fail = refuse_dead_letters
    handler = RecordingHandler(failing(Undeliverable("no_user"), int(fault != "unreadable")))
    async with dispatching(consumer, handler):
        with structlog.testing.capture_logs() as lines:
            await asyncio.sleep(3 * POLICY.max_delay_s)
            assert ("good", 1) in consumer.acked
            consumer.max_dead_letters = 1
            consumer.fail = lambda _: None
            await until(lambda: len(consumer.dead_letters) == 1 and len(consumer.acked) == 2)
    assert [one["event"] for one in lines].count("delivery.dead_letters_full") == 3
    assert handler.entries.count(("bad", 1)) == (fault != "unreadable")


@in_virtual_time
async def test_an_entry_delivered_too_often_becomes_a_dead_letter() -> None:
    """After too many deliveries without an outcome the handler is not called again."""
    consumer = FakeConsumer(
        [("a", 1), ("a", 2)], pending={0: Attempts(0, MAX_DELIVERIES_WITHOUT_OUTCOME + 1)}
    )
    handler = RecordingHandler()
    await deliver_all(consumer, handler)

    assert consumer.dead_letters == [(("a", 1), DeadLetterReason.KILLED_WORKER, "", 0)]
    assert handler.entries == [("a", 2)]


@in_virtual_time
async def test_entries_in_quarantine_run_alone() -> None:
    """Entries in quarantine run one at a time; each delivery is recorded before its call."""
    entries = [(str(n), 1) for n in range(10)]
    consumer = FakeConsumer(
        entries, pending=dict.fromkeys(range(10), Attempts(1, QUARANTINE_AFTER))
    )
    handler = RecordingHandler(sleeping(1))
    await deliver_all(consumer, handler)

    assert handler.max_running == 1
    assert sorted(consumer.recorded) == [
        (one, Attempts(1, QUARANTINE_AFTER + 1)) for one in entries
    ]
    assert len(consumer.acked) == 10


@in_virtual_time
async def test_failures_name_their_place() -> None:
    """Log lines, dead letters and the recorded failures name file and function."""
    consumer = FakeConsumer([("a", 1), ("b", 1)])

    async def act(taken: StatusTransition) -> None:
        if entry(taken)[0] == "a":
            raise Undeliverable("no_user")
        raise ValueError("canary")

    with structlog.testing.capture_logs() as lines:
        await deliver_all(consumer, act, POLICY._replace(max_attempts=2))
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
    assert consumer.failures == [("ValueError", places["delivery.retried", "ValueError"])]
    assert "canary" not in str(lines)


def test_system_exit_ends_the_process() -> None:
    """`SystemExit` of a handler ends the event loop, and the entry stays pending."""
    consumer: list[FakeConsumer] = []

    async def law() -> None:
        consumer.append(FakeConsumer([("a", 1)]))
        await new_dispatcher(consumer[0], failing(SystemExit(3))).run()

    with pytest.raises(SystemExit):
        virtual_time.run(law())
    assert consumer[0].pending == {0: Attempts(0, 1)}


@in_virtual_time
async def test_a_canceled_run_ends_although_handlers_swallow_it() -> None:
    """A handler that turns its cancellation into an error, or success, is not called again."""

    async def act(taken: StatusTransition) -> None:
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            if entry(taken)[0] == "a":
                raise ValueError from None

    consumer = FakeConsumer([("a", 1), ("a", 2), ("b", 1), ("b", 2)])
    handler = RecordingHandler(act)
    running = asyncio.create_task(new_dispatcher(consumer, handler).run())
    await until(lambda: len(handler.running) == 2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert len(handler.calls) == 2
    assert not consumer.acked
    assert not consumer.recorded


@in_virtual_time
async def test_no_call_begins_without_the_lease() -> None:
    """A session that waited for a slot is not delivered after the lease has ended."""
    consumer = FakeConsumer([("a", 1), ("b", 1)])
    consumer.latency_s = 1.0

    async def act(_: StatusTransition) -> None:
        consumer.is_lease_held = False

    handler = RecordingHandler(act)
    with pytest.raises(ExceptionGroup) as raised:
        await new_dispatcher(consumer, handler, POLICY._replace(concurrency=1)).run()

    assert raised.group_contains(LeaseLostError)
    assert handler.entries == [("a", 1)]


@in_virtual_time
async def test_an_error_of_destination_is_a_failure() -> None:
    """An error of the handler's `destination` counts as a failed attempt."""

    class FailingDestination(RecordingHandler):
        def destination(self, _: StatusTransition) -> str:
            raise LookupError

    consumer = FakeConsumer([("a", 1)])
    handler = FailingDestination()
    await deliver_all(consumer, handler)
    assert consumer.dead_letters == [(("a", 1), DeadLetterReason.EXHAUSTED, "LookupError", 4)]
    assert not handler.calls
