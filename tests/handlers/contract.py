"""The contract of every queue: one suite, inherited by each handler, against a real broker.

A queue's test module provides the broker and inherits the tests:

    @pytest.fixture(scope="module")
    def broker() -> Iterator[Broker]: ...

    class TestNats(QueueContract):
        opener = "service.handlers.nats:open"

`tests.support.brokers.broker.Broker` is what a broker must provide.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import traceback
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib import import_module
from typing import ClassVar

import msgspec
import pytest
import structlog.testing

from service.delivery.dispatcher import Dispatcher
from service.delivery.retries import RetryPolicy
from service.errors import ConfigError, Undeliverable, Unreachable
from service.handlers import Handler, loading, shared_connection
from service.transitions.cloudevents import message
from service.transitions.transition import StatusTransition
from tests.support.brokers.broker import Broker, Received, Refused, transition
from tests.support.depth import takes_long
from tests.support.dispatching import FakeConsumer, dispatching
from tests.support.proxy import Proxy, proxy_to
from tests.support.servers import free_port
from tests.support.waiting import PATIENCE_S, until

CANARY = "canary-5f2c"
# Far above all time limits of the handlers, so that only a call without one exceeds it.
BOUND_S = 2 * PATIENCE_S
DOWN_S = 1.5
PATIENT_LIMITS = {
    "CONNECT_TIMEOUT_S": PATIENCE_S / 2,
    "PUBLISH_TIMEOUT_S": PATIENCE_S,
    "REQUEST_TIMEOUT_MS": int(PATIENCE_S * 500),
}
POLICY = RetryPolicy(
    concurrency=32, timeout_s=30, initial_delay_s=0.1, max_delay_s=0.5, max_attempts=3
)


async def check(handler: Handler) -> None:
    """Call the handler's `check`."""
    await handler.check()  # type: ignore[attr-defined]


async def deliver(handler: Handler, taken: StatusTransition) -> None:
    """Call the handler until it returns; only an unreachable queue may fail a call."""
    while True:
        try:
            async with asyncio.timeout(BOUND_S):
                await handler(taken)
        except ConnectionError:
            await asyncio.sleep(0.05)
        else:
            return


def sequences_of(received: Iterable[Received]) -> dict[str, list[int]]:
    """Return each session's sequence numbers in the queue's order, without repeats."""
    found: dict[str, dict[int, None]] = {}
    for one in received:
        sent = msgspec.json.decode(one.body)
        found.setdefault(sent["subject"], {})[int(sent["sessionsequence"])] = None
    return {session: list(sequences) for session, sequences in found.items()}


def steps(name: str, sessions: int, sequences: Iterable[int]) -> Iterator[tuple[str, int]]:
    """Yield entries for a `FakeConsumer`: each sequence number for all sessions."""
    return ((f"{name}{n}", sequence) for sequence in sequences for n in range(sessions))


class QueueContract:
    """The tests. A subclass names `opener`, and its module has a fixture `broker`."""

    opener: ClassVar[str]

    @pytest.fixture(autouse=True)
    def _patience(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give handlers longer time limits, for a busy machine."""
        for module in (shared_connection, import_module(self.opener.partition(":")[0])):
            for name, limit in PATIENT_LIMITS.items():
                monkeypatch.setattr(module, name, limit, raising=False)

    @pytest.fixture
    def own_limits(self, _patience: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give handlers their own time limits, for tests about them."""
        monkeypatch.undo()

    @pytest.fixture(autouse=True)
    async def _emptied(self, broker: Broker) -> None:
        await broker.empty()

    def opened(self, environ: Mapping[str, str]) -> AbstractAsyncContextManager[Handler]:
        """Return the context of an open handler."""
        return loading.find([self.opener])[self.opener](environ)

    @asynccontextmanager
    async def proxied(self, broker: Broker) -> AsyncIterator[tuple[Handler, Proxy]]:
        """Yield a handler that reaches the broker through a proxy."""
        async with (
            proxy_to(f"tcp://127.0.0.1:{broker.port}") as proxy,
            self.opened(broker.environ(proxy.port)) as handler,
        ):
            yield handler, proxy
        # Reports what was left open here, and not in a later test.
        gc.collect()

    async def test_a_delivered_message_is_on_the_queue(self, broker: Broker) -> None:
        """Every message is on the queue once, with its exact bytes, id, key and headers."""
        sent = [
            transition("a", 1),
            transition("a", 2, metadata={f"key{n}": "x" * 500 for n in range(50)}),
            transition("b", 1, account=None, livemode=None, metadata=None, previous=None),
        ]
        async with self.opened(broker.environ()) as handler:
            for one in sent:
                await handler(one)

        received = {one.body: one for one in await broker.received()}
        assert len(received) == len(sent)
        for wanted in map(message, sent):
            found = received[wanted.body]
            assert found.id in (wanted.id, None)
            assert found.key in (wanted.key, None)
            assert found.headers == dict(wanted.headers)

    async def test_concurrent_calls_do_not_wait_for_each_other(self, broker: Broker) -> None:
        """Over a slow network, 32 calls take far less than 32 times as long; each sends once."""
        async with self.proxied(broker) as (handler, proxy):
            await handler(transition("first", 1))
            proxy.delay_s = 0.7
            async with asyncio.timeout(32 * proxy.delay_s / 2):
                await asyncio.gather(*(handler(transition(f"s{n}", 1)) for n in range(32)))

        assert len(await broker.received()) == 33

    async def test_a_repeat_has_the_same_id(self, broker: Broker) -> None:
        """A repeated delivery is the same message, and dropped by a queue that deduplicates."""
        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            await handler(transition("a", 1))
        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            await handler(transition("a", 2))

        received = await broker.received()
        repeats = [one for one in received if one.body == message(transition("a", 1)).body]
        assert len(repeats) == (1 if broker.deduplicates else 3)
        assert len(set(map(str, repeats))) == 1
        assert sequences_of(received) == {"vs_a": [1, 2]}

    async def test_later_calls_survive_a_canceled_one(self, broker: Broker) -> None:
        """After calls have run into the dispatcher's time limit, the next ones deliver."""
        async with self.proxied(broker) as (handler, proxy):
            await handler(transition("a", 1))
            proxy.delay_s = 0.2
            calls = [asyncio.create_task(handler(transition(f"b{n}", 1))) for n in range(10)]
            await asyncio.sleep(0.05)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            proxy.delay_s = 0.0
            await deliver(handler, transition("a", 2))

        assert sequences_of(await broker.received())["vs_a"] == [1, 2]

    async def test_reset_connections_lose_nothing(self, broker: Broker) -> None:
        """While connections are reset under load, every message is on the queue, in order."""
        consumer = FakeConsumer(steps("c", 20, range(1, 25)))
        async with self.proxied(broker) as (handler, proxy):

            async def handle(taken: StatusTransition) -> None:
                # So that some calls are under way at each reset.
                await asyncio.sleep(0.005)
                await handler(taken)

            patient = POLICY._replace(max_attempts=10)
            async with dispatching(consumer, handle, patient) as dispatcher:
                for n in range(1, 7):
                    await until(lambda: len(consumer.acked) >= 60 * n)  # noqa: B023
                    proxy.cut()
                proxy.refusing = True
                proxy.cut()
                await self.outage_noticed(dispatcher)
                proxy.refusing = False
                await until(lambda: consumer.is_done)

        assert consumer.dead_letters == []
        received = await broker.received()
        assert {one.body for one in received} == {message(one).body for one in consumer.stream}
        assert sequences_of(received) == {f"vs_c{n}": list(range(1, 25)) for n in range(20)}

    async def outage_noticed(self, dispatcher: Dispatcher) -> None:
        """Wait until a call has found the queue unreachable."""
        await until(lambda: dispatcher._circuits.is_open)

    async def test_an_idle_connection_may_be_closed(self, broker: Broker) -> None:
        """A connection that is closed between calls is replaced without a failed call."""
        async with self.proxied(broker) as (handler, proxy):
            for sequence in range(1, 4):
                await handler(transition("a", sequence))
                proxy.cut()
                # Several turns of the event loop, for the client to notice.
                for _ in range(10):
                    await asyncio.sleep(0.01)

        assert sequences_of(await broker.received()) == {"vs_a": [1, 2, 3]}

    @pytest.mark.usefixtures("own_limits")
    async def test_a_crashed_broker_loses_nothing(self, broker: Broker) -> None:
        """A broker killed under load causes no dead letter, and no session is out of order."""
        consumer = FakeConsumer()
        async with self.opened(broker.environ()) as handler, dispatching(consumer, handler, POLICY):
            consumer.add(*steps("k", 40, [1]))
            await until(lambda: len(consumer.acked) == 40)
            before = await broker.received()
            consumer.add(*steps("k", 40, range(2, 11)))
            await until(lambda: len(consumer.acked) >= 60)
            await asyncio.to_thread(broker.kill)
            try:
                await asyncio.sleep(DOWN_S)
            finally:
                await asyncio.to_thread(broker.start)
            consumer.add(*steps("k", 40, range(11, 13)))
            await until(
                lambda: len(consumer.acked) == len(consumer.stream), deadline_s=2 * PATIENCE_S
            )

        assert consumer.dead_letters == []
        # A call under way when the broker died may count; waiting for the broker does not.
        assert all(attempts.failed <= 1 for _, attempts in consumer.recorded)
        received = sequences_of(await broker.received())
        if broker.is_durable:
            assert received == {f"vs_k{n}": list(range(1, 13)) for n in range(40)}
        else:
            assert sequences_of(before) == {f"vs_k{n}": [1] for n in range(40)}
            for sequences in received.values():
                assert sequences == list(range(sequences[0], 13))

    @takes_long
    @pytest.mark.usefixtures("own_limits")
    async def test_a_frozen_broker_is_unreachable(self, broker: Broker) -> None:
        """With an open connection and without one, calls end in time, and later ones deliver."""
        async with self.opened(broker.environ()) as handler, self.opened(broker.environ()) as fresh:
            await handler(transition("a", 1))
            with broker.frozen():
                async with asyncio.timeout(BOUND_S):
                    outcomes = await asyncio.gather(
                        handler(transition("a", 2)),
                        handler(transition("b", 1)),
                        fresh(transition("c", 1)),
                        check(fresh),
                        return_exceptions=True,
                    )
            assert all(isinstance(outcome, ConnectionError) for outcome in outcomes), outcomes
            for one in (transition("a", 2), transition("b", 1)):
                await deliver(handler, one)
            await deliver(fresh, transition("c", 1))

        received = sequences_of(await broker.received())
        assert received == {"vs_a": [1, 2], "vs_b": [1], "vs_c": [1]}

    async def test_refusals_have_their_reasons(self, broker: Broker) -> None:
        """A refused message is `Undeliverable`, a refusing destination `Unreachable`."""
        for expected, refusals in (
            (Undeliverable, broker.undeliverable_messages()),
            (Unreachable, broker.refusing_destinations()),
        ):
            for reason, environ, refused in refusals:
                async with self.opened(environ) as handler:
                    for _ in range(2):
                        with pytest.raises(expected, match=f"^{reason}$"):
                            await handler(refused)

    async def test_a_removed_queue_is_waited_for(self, broker: Broker) -> None:
        """A queue that is deleted and made anew opens the circuit and counts no attempt."""
        consumer = FakeConsumer()
        policy = POLICY._replace(max_attempts=1, initial_delay_s=0.05)
        with structlog.testing.capture_logs() as lines:
            async with (
                self.opened(broker.environ()) as handler,
                dispatching(consumer, handler, policy) as dispatcher,
            ):
                async with broker.queue_removed() as reason:
                    if reason:
                        consumer.add(*steps("g", 20, [1, 2]))
                        await until(lambda: dispatcher._circuits.for_destination("").probes >= 3)
                await until(lambda: len(consumer.acked) == len(consumer.stream))
        if not reason:
            pytest.skip("this broker cannot remove its queue")

        assert (consumer.dead_letters, consumer.recorded) == ([], [])
        assert sequences_of(await broker.received()) == {f"vs_g{n}": [1, 2] for n in range(20)}
        opened = [one["reason"] for one in lines if one["event"] == "circuit.opened"]
        assert opened[0] == reason

    async def test_a_refused_message_fails_no_other(self, broker: Broker) -> None:
        """Messages under way beside a refused one are delivered."""
        refused = [
            one for one in broker.undeliverable_messages() if one.environ == broker.environ()
        ]
        good = [transition(f"s{n}", 1) for n in range(20)]
        async with self.opened(broker.environ()) as handler:

            async def call(one: Refused) -> None:
                while True:
                    with pytest.raises((Undeliverable, ConnectionError)) as raised:
                        await handler(one.transition)
                    if isinstance(raised.value, Undeliverable):
                        assert raised.value.reason == one.reason
                        return

            async with asyncio.timeout(BOUND_S), asyncio.TaskGroup() as tasks:
                for one in good[:10]:
                    tasks.create_task(deliver(handler, one))
                for unwanted in refused:
                    tasks.create_task(call(unwanted))
                for one in good[10:]:
                    tasks.create_task(deliver(handler, one))

        received = {one.body for one in await broker.received()}
        assert received == {message(one).body for one in good}

    async def test_a_check_of_a_good_queue_passes(self, broker: Broker) -> None:
        """A check finds nothing wrong, and sends nothing."""
        async with self.opened(broker.environ()) as handler:
            await check(handler)
            await check(handler)

        assert await broker.received() == []

    async def test_a_check_finds_wrong_settings(self, broker: Broker) -> None:
        """A wrong configuration is a ConfigError that names the variable, every time."""
        for setting, environ in broker.wrong_settings():
            async with self.opened(environ) as handler:
                for _ in range(2):
                    with pytest.raises(ConfigError, match=f"^{setting}: "):
                        await check(handler)

    async def test_a_closed_port_is_unreachable(self, broker: Broker) -> None:
        """Without a broker the handler opens, and calls and checks raise ConnectionError."""
        async with self.opened(broker.environ(free_port())) as handler:
            for _ in range(2):
                for call in (handler(transition("a", 1)), check(handler)):
                    with pytest.raises(ConnectionError):
                        async with asyncio.timeout(BOUND_S):
                            await call

    async def test_closing_leaves_no_task(self, broker: Broker) -> None:
        """After closing there is no task left, whatever state the connection was in."""
        before = asyncio.all_tasks()
        for cut in (False, True):
            async with self.proxied(broker) as (handler, proxy):
                await handler(transition("a", 1))
                if cut:
                    proxy.refusing = True
                    proxy.cut()
        async with self.opened(broker.environ()):
            pass
        await until(lambda: asyncio.all_tasks() <= before)

    async def test_closing_is_bounded(self, broker: Broker) -> None:
        """A frozen broker does not keep the handler from closing."""
        async with AsyncExitStack() as closing:
            handler = await closing.enter_async_context(self.opened(broker.environ()))
            await handler(transition("a", 1))
            with broker.frozen():
                async with asyncio.timeout(BOUND_S):
                    await closing.aclose()

    async def test_credentials_are_not_shown(
        self, broker: Broker, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """No log line, output, repr or exception contains the password."""
        caplog.set_level(logging.DEBUG)
        shown: list[str] = []
        async with proxy_to(f"tcp://127.0.0.1:{broker.port}") as proxy:
            for port in (free_port(), proxy.port):
                environ = broker.environ(port, credentials=f"someone:{CANARY}")
                async with self.opened(environ) as handler:
                    shown.append(repr(handler) + repr(vars(handler)))
                    for call in (check(handler), handler(transition("a", 1))):
                        try:
                            await call
                        except Exception as error:  # noqa: BLE001 - any error is looked at
                            shown += traceback.format_exception(error)
                    proxy.cut()
                    await asyncio.sleep(0.05)

        output = capfd.readouterr()
        everything = [*shown, caplog.text, output.out, output.err]
        assert not [text for text in everything if CANARY in text]
