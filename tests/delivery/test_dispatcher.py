"""Tests of dispatching, in virtual time: order, bounds, retries, stopping."""

from __future__ import annotations

import asyncio
import contextlib
from unittest import mock

import pytest
import structlog.testing
from redis.exceptions import ConnectionError as RedisConnectionError

from service.delivery import dispatcher as dispatcher_module
from service.delivery.consumer import QUARANTINE_AFTER, Attempts, Delivery
from service.delivery.dispatcher import MAX_PER_READ, WINDOW
from service.delivery.leases import LeaseLostError
from service.errors import Undeliverable
from service.transitions.transition import StatusTransition
from tests.support.dispatching import (
    LONG_DELAYS,
    POLICY,
    Entry,
    FakeConsumer,
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
async def test_sessions_run_concurrently_up_to_the_limit() -> None:
    """Sessions are delivered at the same time, but at most `concurrency` of them."""
    consumer = FakeConsumer((str(n), 1) for n in range(40))
    handler = RecordingHandler(sleeping(1))
    await deliver_all(consumer, handler)

    assert handler.max_running == POLICY.concurrency
    assert asyncio.get_running_loop().time() < 40 / POLICY.concurrency + 1


FAILING = {
    "one session": [("bad", n) for n in range(1, 601)],
    "many sessions": [(f"bad{n}", 1) for n in range(600)],
}


@pytest.mark.parametrize("is_pending", [False, True], ids=["new", "pending"])
@pytest.mark.parametrize("bad", FAILING)
@in_virtual_time
async def test_failing_sessions_take_no_slots_of_the_window(bad: str, is_pending: bool) -> None:
    """More failing entries than the window holds wait for a retry; the others are delivered."""
    entries = FAILING[bad]
    pending = dict.fromkeys(range(len(entries) + 25), Attempts(0, 1)) if is_pending else {}
    consumer = FakeConsumer(entries, pending=pending)
    good = {(f"good{n}", 1) for n in range(25)}
    consumer.add(*sorted(good))
    async with dispatching(consumer, failing(ValueError(), only="bad"), LONG_DELAYS):
        await until(lambda: good <= {*consumer.acked}, deadline_s=60)


@in_virtual_time
async def test_retries_use_half_of_the_concurrency() -> None:
    """However many retries are due, new sessions do not wait for them."""
    consumer = FakeConsumer((f"bad{n}", 1) for n in range(100))
    tried: set[Entry] = set()

    async def act(taken: StatusTransition) -> None:
        one = entry(taken)
        if one[0].startswith("bad") and one not in tried:
            tried.add(one)
            raise ValueError
        if one[0].startswith("bad"):
            await asyncio.sleep(9)

    async with dispatching(consumer, act):
        await until(lambda: len(tried) == 100)
        await asyncio.sleep(POLICY.initial_delay_s)
        for n in range(10):
            consumer.add((f"good{n}", 1))
            await until(lambda: (f"good{n}", 1) in consumer.acked, deadline_s=1)  # noqa: B023


@in_virtual_time
async def test_parked_entries_are_bounded() -> None:
    """With too many parked entries reading pauses, with one error line, until there are fewer."""
    consumer = FakeConsumer((f"bad{n}", 1) for n in range(300))
    is_failing = True

    async def act(taken: StatusTransition) -> None:
        if is_failing and entry(taken)[0].startswith("bad"):
            raise ValueError

    small = mock.patch.multiple(dispatcher_module, MAX_PARKED=50, MAX_PER_READ=10, WINDOW=10)
    with small, structlog.testing.capture_logs() as lines:
        async with dispatching(consumer, act, POLICY._replace(max_attempts=1000)) as dispatcher:
            await until(lambda: dispatcher.parked >= 50)
            consumer.add(("good", 1))
            await asyncio.sleep(0.2)
            assert 50 <= len(consumer.pending) < 60
            assert not consumer.acked
            errors = [line["event"] for line in lines if line["log_level"] == "error"]
            assert errors == ["reading.paused"]
            is_failing = False
            await until(lambda: len(consumer.acked) == 301)
    assert dispatcher.parked == 0


@in_virtual_time
async def test_parked_entries_are_recorded_as_not_started() -> None:
    """After a stop no delivery counts of the parked entries; failures do."""
    consumer = FakeConsumer(("a", n) for n in range(1, 101))
    async with dispatching(consumer, failing(ValueError()), LONG_DELAYS):
        await until(lambda: bool(consumer.recorded))

    assert consumer.pending == {0: Attempts(1, 0), **dict.fromkeys(range(1, 100), Attempts(0, 0))}


@in_virtual_time
async def test_reading_stops_at_the_window() -> None:
    """No more entries than the window holds are read until some are acknowledged."""
    consumer = FakeConsumer((str(n), 1) for n in range(3 * WINDOW))
    gate = asyncio.Event()

    async def act(_: StatusTransition) -> None:
        await gate.wait()

    async with dispatching(consumer, act, POLICY._replace(timeout_s=10**6)):
        await asyncio.sleep(1000)
        assert len(consumer.pending) == WINDOW
        assert max(consumer.reads) <= MAX_PER_READ

        gate.set()
        await until(lambda: len(consumer.acked) == 3 * WINDOW)


@in_virtual_time
async def test_claiming_stops_at_the_window() -> None:
    """Claimed entries exceed the window by one batch at most."""
    entries = [(str(n), 1) for n in range(3 * WINDOW)]
    consumer = FakeConsumer(entries, pending=dict.fromkeys(range(3 * WINDOW), Attempts(0, 1)))
    one = new_dispatcher(consumer, sleeping(10**6), POLICY._replace(timeout_s=10**7))
    running = asyncio.create_task(one.run())
    await asyncio.sleep(1000)
    assert WINDOW <= one._backlog.loaded < WINDOW + MAX_PER_READ
    assert not consumer.reads
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


@pytest.mark.parametrize(
    "method", ["claim_pending", "read", "ack", "record_attempts", "dead_letter"]
)
@pytest.mark.parametrize(
    "error", [RedisConnectionError(), LeaseLostError()], ids=["redis", "lease"]
)
@in_virtual_time
async def test_an_error_of_the_consumer_ends_the_run(method: str, error: Exception) -> None:
    """If a call to the consumer fails, the run ends with that error, and no handler runs on."""
    consumer = FakeConsumer([("slow", 1), ("retried", 1), ("acked", 1), ("undeliverable", 1)])

    def faulty(name: str) -> None:
        if name == method:
            raise error

    async def act(taken: StatusTransition) -> None:
        match entry(taken)[0]:
            case "slow":
                await asyncio.sleep(9)
            case "retried":
                raise ValueError
            case "undeliverable":
                raise Undeliverable

    consumer.fail = faulty
    handler = RecordingHandler(act)
    with pytest.raises(ExceptionGroup) as raised:
        await new_dispatcher(consumer, handler).run()

    assert set(raised.value.exceptions) == {error}
    assert not handler.running
    assert asyncio.get_running_loop().time() < 9


@in_virtual_time
async def test_a_cancellation_by_the_consumer_is_an_error() -> None:
    """A cancellation that we did not ask for ends the run, instead of one session silently."""

    def canceled(name: str) -> None:
        if name == "ack":
            raise asyncio.CancelledError

    consumer = FakeConsumer([("a", 1), ("a", 2)])
    consumer.fail = canceled
    with pytest.raises(ExceptionGroup):
        await new_dispatcher(consumer, RecordingHandler()).run()


@in_virtual_time
async def test_nothing_starts_after_a_swallowed_cancellation() -> None:
    """If a read succeeds although it was canceled, its entries are not started."""

    class SwallowingConsumer(FakeConsumer):
        async def read(self, most: int) -> list[Delivery]:
            if self.reads:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(1000)
            return await super().read(1)

    def failing_ack(name: str) -> None:
        if name == "ack":
            raise lost

    lost = RedisConnectionError()
    consumer = SwallowingConsumer([("a", 1), ("b", 1)])
    consumer.fail = failing_ack
    handler = RecordingHandler(sleeping(1))
    with pytest.raises(ExceptionGroup) as raised:
        await new_dispatcher(consumer, handler).run()

    assert raised.value.exceptions == (lost,)
    assert handler.entries == [("a", 1)]
    assert set(consumer.pending) == {0, 1}


@in_virtual_time
async def test_stop_ends_a_run_at_any_moment() -> None:
    """A run ends if stopped before it begins, while it claims, reads or waits."""
    stopped = new_dispatcher(FakeConsumer([("a", 1)]), RecordingHandler())
    stopped.stop()
    await stopped.run()

    for delay_s in (0, 0.5, 1.5, 2.5, 3.5):
        consumer = FakeConsumer([("a", 1), ("a", 2)], pending={0: Attempts(0, 1)})
        consumer.latency_s = 1.0
        async with dispatching(consumer, RecordingHandler()):
            await asyncio.sleep(delay_s)


@in_virtual_time
async def test_stop_finishes_running_calls_and_begins_no_others() -> None:
    """After stop the running calls end and are acknowledged; all other entries are left pending."""
    consumer = FakeConsumer(
        [("failing", 1), *((str(n), sequence) for n in range(9) for sequence in (1, 2))]
    )
    fail = failing(ValueError(), only="failing")

    async def act(taken: StatusTransition) -> None:
        await fail(taken)
        await asyncio.sleep(5)

    handler = RecordingHandler(act)
    async with dispatching(
        consumer, handler, POLICY._replace(initial_delay_s=1000, max_delay_s=1000)
    ):
        await asyncio.sleep(1)
        started = [one for one in handler.entries if one[0] != "failing"]

    assert len(started) == POLICY.concurrency
    assert sorted(consumer.acked) == sorted(started)
    assert len(handler.calls) == len(started) + 1
    assert asyncio.get_running_loop().time() < 6


@in_virtual_time
async def test_unstarted_entries_keep_failures_and_quarantine() -> None:
    """After a stop no delivery counts of what was not started, unless it is in quarantine.

    What a worker before has recorded as not started stays as it is: a negative count of deliveries
    would be read back as nearly a thousand deliveries.
    """
    consumer = FakeConsumer(
        [("a", 1), ("a", 2), ("b", 1), ("c", 1)],
        pending={
            0: Attempts(1, 2),
            1: Attempts(0, 1),
            2: Attempts(2, QUARANTINE_AFTER),
            3: Attempts(2, 0),
        },
    )
    async with dispatching(consumer, sleeping(5), POLICY._replace(concurrency=1)):
        await asyncio.sleep(1)

    assert consumer.acked == [("a", 1)]
    assert consumer.pending == {
        1: Attempts(0, 0),
        2: Attempts(2, QUARANTINE_AFTER),
        3: Attempts(2, 0),
    }
