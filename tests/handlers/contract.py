"""The laws of every queue: one suite, inherited by each handler, against a real broker.

A queue's test module says what its subject is and inherits the laws:

    @pytest.fixture(scope="module")
    def broker() -> Iterator[Broker]: ...       # started here, ended here, by process id

    class TestNats(QueueLaws):
        opener = "service.handlers.nats:open"

What a subject has to provide is `Broker`, below. How brokers are run is in `brokers`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
)
from datetime import UTC, datetime
from importlib import import_module
from typing import Any, ClassVar, NamedTuple, Protocol

import msgspec
import pytest
import structlog.testing

from service.delivery.dispatcher import Dispatcher
from service.delivery.retries import CircuitBreakers, RetryPolicy
from service.errors import ConfigError, Undeliverable, Unreachable
from service.handlers import Handler, loading, shared_connection
from service.transitions.cloudevents import Message, message
from service.transitions.transition import StatusTransition
from tests.support.dispatching import FakeConsumer
from tests.support.harness import takes_long
from tests.support.proxy import Proxy, proxy_to
from tests.support.servers import PATIENCE_S, free_port, until

CANARY = "canary-5f2c"
# Far more than any of our limits, far less than for ever.
BOUND_S = 2 * PATIENCE_S
DOWN_S = 3.0
PATIENT_LIMITS = {
    "CONNECT_TIMEOUT_S": PATIENCE_S / 2,
    "PUBLISH_TIMEOUT_S": PATIENCE_S,
    "REQUEST_TIMEOUT_MS": int(PATIENCE_S * 500),
}
POLICY = RetryPolicy(
    concurrency=32, timeout_s=30, initial_delay_s=0.2, max_delay_s=1.0, max_attempts=3
)


class Received(NamedTuple):
    """One message as a consumer finds it on the queue.

    Attributes:
        body: The bytes.
        id: What the broker calls the message's or the deduplication's id; None if it has none.
        key: What the broker keeps order by or routes by session; None if it has none.
        headers: Headers, properties or attributes as text, without those of the transport.
    """

    body: bytes
    id: str | None
    key: str | None
    headers: Mapping[str, str]


class Refused(NamedTuple):
    """A call that the broker refuses, and the word for it.

    Attributes:
        word: The reason of the `Undeliverable`, or of the `Unreachable`.
        environ: What to open the handler with, `environ()` with something changed.
        transition: What to hand over.
    """

    word: str
    environ: Mapping[str, str]
    transition: StatusTransition


class Misconfigured(NamedTuple):
    """A configuration that `check()` finds wrong.

    Attributes:
        setting: The variable that the problem must begin with.
        environ: What to open the handler with.
    """

    setting: str
    environ: Mapping[str, str]


class Broker(Protocol):
    """A broker of the test's own on 127.0.0.1, with one queue that the handler is to write to.

    The plain methods block and may take seconds; the suite calls them in threads where it must
    not wait. The asynchronous ones connect and disconnect within the call, in any event loop.

    Attributes:
        port: Where it listens; the same after a restart.
        keeps: Whether what it confirmed is still there after `kill` and `start`. If False (a
            broker in memory), `kill` must first remember what is on the queue, or the suite
            looks only at what was confirmed after the restart.
        drops_repeats: Whether a second message with the same id does not come to the queue.
    """

    @property
    def port(self) -> int: ...  # noqa: D102 - above

    @property
    def keeps(self) -> bool: ...  # noqa: D102 - above

    @property
    def drops_repeats(self) -> bool: ...  # noqa: D102 - above

    def environ(self, port: int | None = None, *, credentials: str = "") -> dict[str, str]:
        """Return what `open` needs to reach the queue.

        Args:
            port: Another port to connect to, where a proxy or nobody listens.
            credentials: `user:password` to put into the URL, wrong or not needed here; a queue
                without URLs puts the password wherever its own goes.
        """

    def refused(self) -> Iterable[Refused]:
        """Return messages it refuses for good, one for each word of the handler."""

    def refusing(self) -> Iterable[Refused]:
        """Return destinations that refuse every message, or are not there."""

    def away(self) -> AbstractAsyncContextManager[str]:
        """Take the queue away for the length of the block; yield the word for it.

        The word is empty where that cannot be done.
        """

    def misconfigured(self) -> Iterable[Misconfigured]:
        """Return what `check()` must find: no such queue, refused credentials."""

    async def empty(self) -> None:
        """Take everything off the queue. Called before each test."""

    async def received(self) -> list[Received]:
        """Return everything on the queue now; what shares a key stands in the queue's order."""

    def kill(self) -> None:
        """End the process at once, as a crash would."""

    def start(self) -> None:
        """Start it again after `kill`, on the same port and files; return when it serves."""

    def frozen(self) -> AbstractContextManager[None]:
        """Stop the process for the length of the block (`servers.frozen`)."""


def transition(session: str, sequence: int, **changes: Any) -> StatusTransition:
    """Return the *sequence*-th transition of a session, with everything in it that may be."""
    made = StatusTransition(
        event_id=f"evt_{session}_{sequence}",
        event_type="identity.verification_session.processing",
        occurred_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        livemode=True,
        account="acct_1",
        session_id=f"vs_{session}",
        session_type="document",
        current="processing",
        client_reference_id="Ünïcode ☃ \U0001f600 \x7f",
        metadata={"order": "6735", "näme": "\u2028"},
        previous="requires_input",
        sequence=sequence,
        epoch=1_790_000_000_000,
        expected=True,
    )
    return msgspec.structs.replace(made, **changes)


async def persist(
    handler: Handler, taken: StatusTransition, failed: Callable[[], object] = lambda: None
) -> None:
    """Call until it returns, as the dispatcher would; only an unreachable queue is forgiven."""
    while True:
        try:
            async with asyncio.timeout(BOUND_S):
                await handler(taken)
        except ConnectionError:
            failed()
            await asyncio.sleep(0.05)
        else:
            return


class Load:
    """Sessions side by side, each sending its transitions one after the other.

    Attributes:
        confirmed: What the handler has returned from.
        failures: How often the queue could not be reached.
    """

    def __init__(self, handler: Handler, sessions: int, name: str) -> None:
        self.confirmed: list[StatusTransition] = []
        self.failures = 0
        self._handler = handler
        self._names = [f"{name}{n}" for n in range(sessions)]
        self._stopping = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send for the length of the block; what was begun then is finished."""
        async with asyncio.timeout(4 * PATIENCE_S), asyncio.TaskGroup() as tasks:
            for name in self._names:
                tasks.create_task(self._session(name))
            try:
                yield
            finally:
                self._stopping = True

    async def more(self, count: int) -> None:
        """Wait until so many more are confirmed."""
        goal = len(self.confirmed) + count
        await until(lambda: len(self.confirmed) >= goal)

    def _failed(self) -> None:
        self.failures += 1

    async def _session(self, name: str) -> None:
        sequence = 0
        while not self._stopping:
            sequence += 1
            one = transition(name, sequence)
            await persist(self._handler, one, self._failed)
            self.confirmed.append(one)
            await asyncio.sleep(0.005)


def in_order(received: Iterable[Received]) -> dict[str, list[int]]:
    """Return each session's sequence numbers in the queue's order, repeats left out."""
    found: dict[str, dict[int, None]] = {}
    for one in received:
        sent = msgspec.json.decode(one.body)
        found.setdefault(sent["subject"], {})[int(sent["sessionsequence"])] = None
    return {session: list(sequences) for session, sequences in found.items()}


def expected(message: Message) -> Received:
    """Return the message as every queue shows it."""
    return Received(message.body, message.id, message.key, dict(message.headers))


class QueueLaws:
    """The laws. A subclass names `opener`, and its module has a fixture `broker`."""

    opener: ClassVar[str]

    @pytest.fixture(autouse=True)
    def _patience(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let handlers wait for a busy machine, where that is not what a law is about."""
        for module in (shared_connection, import_module(self.opener.partition(":")[0])):
            for name, seconds in PATIENT_LIMITS.items():
                monkeypatch.setattr(module, name, seconds, raising=False)

    @pytest.fixture
    def own_limits(self, _patience: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let handlers wait no longer than in service."""
        monkeypatch.undo()

    @pytest.fixture(autouse=True)
    async def _emptied(self, broker: Broker) -> None:
        await broker.empty()

    def opened(self, environ: Mapping[str, str]) -> AbstractAsyncContextManager[Handler]:
        """Return the open handler."""
        return loading.find([self.opener])[self.opener](environ)

    @asynccontextmanager
    async def proxied(self, broker: Broker) -> AsyncIterator[tuple[Handler, Proxy]]:
        """Yield a handler that reaches the broker through a proxy."""
        async with (
            proxy_to(f"tcp://127.0.0.1:{broker.port}") as proxy,
            self.opened(broker.environ(proxy.port)) as handler,
        ):
            yield handler, proxy
        # What was left open is found here, and not in whatever test the collector comes by.
        gc.collect()

    async def test_what_is_returned_from_is_on_the_queue(self, broker: Broker) -> None:
        """Every message is there once, with exactly our bytes, id, key and headers."""
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
        for one in sent:
            wanted = expected(message(one))
            found = received[wanted.body]
            assert found.id in (wanted.id, None)
            assert found.key in (wanted.key, None)
            assert found.headers == wanted.headers

    async def test_order_holds_per_session_side_by_side(self, broker: Broker) -> None:
        """Many sessions at once, each one after the other: every session is in order."""
        async with self.opened(broker.environ()) as handler:

            async def session(name: str) -> None:
                for sequence in range(1, 11):
                    await handler(transition(name, sequence))

            await asyncio.gather(*(session(f"s{n}") for n in range(50)))

        received = await broker.received()
        assert len(received) == 500
        assert in_order(received) == {f"vs_s{n}": list(range(1, 11)) for n in range(50)}

    async def test_calls_side_by_side_do_not_wait_for_each_other(self, broker: Broker) -> None:
        """Over a slow wire, many calls take about as long as one."""
        async with self.proxied(broker) as (handler, proxy):
            await handler(transition("first", 1))
            proxy.delay_s = 0.7
            async with asyncio.timeout(32 * proxy.delay_s / 2):
                await asyncio.gather(*(handler(transition(f"s{n}", 1)) for n in range(32)))

    async def test_a_repeat_carries_the_same_id(self, broker: Broker) -> None:
        """Handed over twice, it is the same message, and there once where the queue can tell."""
        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            await handler(transition("a", 1))
        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            await handler(transition("a", 2))

        received = await broker.received()
        repeats = [one for one in received if one.body == message(transition("a", 1)).body]
        assert len(repeats) == (1 if broker.drops_repeats else 3)
        assert len(set(map(str, repeats))) == 1
        assert in_order(received) == {"vs_a": [1, 2]}

    async def test_a_canceled_call_spoils_nothing(self, broker: Broker) -> None:
        """Calls that ran into their time limit leave a handler that delivers the next ones."""
        async with self.proxied(broker) as (handler, proxy):
            await handler(transition("a", 1))
            proxy.delay_s = 0.2
            calls = [asyncio.create_task(handler(transition(f"b{n}", 1))) for n in range(10)]
            await asyncio.sleep(0.05)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            proxy.delay_s = 0.0
            await persist(handler, transition("a", 2))

        assert in_order(await broker.received())["vs_a"] == [1, 2]

    async def test_a_cut_connection_loses_nothing(self, broker: Broker) -> None:
        """Connections reset under load, again and again: all that was returned from is there."""
        async with self.proxied(broker) as (handler, proxy):
            load = Load(handler, 20, "c")
            async with load.running():
                for _ in range(6):
                    await load.more(60)
                    proxy.cut()
                before = load.failures
                proxy.refusing = True
                proxy.cut()
                await until(lambda: load.failures > before)
                proxy.refusing = False
                await load.more(60)

        await self._nothing_lost(broker, load.confirmed)

    async def test_an_idle_connection_may_go(self, broker: Broker) -> None:
        """A connection closed while nothing was sent is replaced without anybody noticing."""
        async with self.proxied(broker) as (handler, proxy):
            for sequence in range(1, 4):
                await handler(transition("a", sequence))
                proxy.cut()
                # However long a turn of the loop takes, the client has several to notice.
                for _ in range(10):
                    await asyncio.sleep(0.01)

        assert in_order(await broker.received()) == {"vs_a": [1, 2, 3]}

    @pytest.mark.usefixtures("own_limits")
    async def test_a_broker_that_crashes_loses_nothing(self, broker: Broker) -> None:
        """Killed under load and away for a while: no dead letters, order kept, all caught up."""
        consumer = FakeConsumer()
        async with self.opened(broker.environ()) as handler:
            circuits = CircuitBreakers("queue", initial_delay_s=POLICY.initial_delay_s)
            dispatcher = Dispatcher(
                "queue", handler, consumer, POLICY, circuits=circuits, quarantine=asyncio.Lock()
            )
            working = asyncio.create_task(dispatcher.run())
            consumer.add(*((f"k{n}", 1) for n in range(40)))
            await until(lambda: len(consumer.acked) == 40)
            before = await broker.received()
            consumer.add(*((f"k{n}", sequence) for sequence in range(2, 11) for n in range(40)))
            await until(lambda: len(consumer.acked) >= 60)
            await asyncio.to_thread(broker.kill)
            try:
                await asyncio.sleep(DOWN_S)
            finally:
                await asyncio.to_thread(broker.start)
            consumer.add(*((f"k{n}", sequence) for sequence in range(11, 13) for n in range(40)))
            await until(
                lambda: len(consumer.acked) == len(consumer.stream), deadline_s=2 * PATIENCE_S
            )
            dispatcher.stop()
            await asyncio.wait_for(working, PATIENCE_S)

        assert consumer.dead_letters == []
        # What was under way while others still got through counts once; waiting counts nothing.
        assert all(attempts.failed <= 1 for _, attempts in consumer.recorded)
        received = await broker.received()
        if broker.keeps:
            assert in_order(received) == {f"vs_k{n}": list(range(1, 13)) for n in range(40)}
        else:
            assert in_order(before) == {f"vs_k{n}": [1] for n in range(40)}
            for sequences in in_order(received).values():
                assert sequences == list(range(sequences[0], 13))

    @takes_long
    @pytest.mark.usefixtures("own_limits")
    async def test_a_frozen_broker_is_unreachable_in_good_time(self, broker: Broker) -> None:
        """Hung with the connection open, or before it: ConnectionError, bounded; then recovery."""
        async with (
            self.opened(broker.environ()) as handler,
            self.opened(broker.environ()) as fresh,
        ):
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
            assert [isinstance(outcome, ConnectionError) for outcome in outcomes] == [True] * 4, (
                outcomes
            )
            for one in (transition("a", 2), transition("b", 1)):
                await persist(handler, one)
            await persist(fresh, transition("c", 1))

        assert in_order(await broker.received()) == {"vs_a": [1, 2], "vs_b": [1], "vs_c": [1]}

    async def test_what_is_refused_for_good_is_undeliverable(self, broker: Broker) -> None:
        """Each refusal that no repeat can mend has its word, and spoils nothing else."""
        for word, environ, refused in broker.refused():
            async with self.opened(environ) as handler:
                for _ in range(2):
                    with pytest.raises(Undeliverable) as raised:
                        await handler(refused)
                    assert raised.value.reason == word

    async def test_a_destination_that_refuses_everybody_is_waited_for(self, broker: Broker) -> None:
        """What is wrong with the queue, and with no message, has its word and is no dead letter."""
        for word, environ, refused in broker.refusing():
            async with self.opened(environ) as handler:
                for _ in range(2):
                    with pytest.raises(Unreachable) as raised:
                        await handler(refused)
                    assert raised.value.reason == word

    async def test_a_queue_that_is_gone_for_a_while_loses_nothing(self, broker: Broker) -> None:
        """Deleted and made anew: the circuit opens with its word; no attempt is counted."""
        consumer = FakeConsumer()
        circuits = CircuitBreakers("queue", initial_delay_s=0.05)
        with structlog.testing.capture_logs() as lines:
            async with self.opened(broker.environ()) as handler:
                dispatcher = Dispatcher(
                    "queue",
                    handler,
                    consumer,
                    POLICY._replace(max_attempts=1),
                    circuits=circuits,
                    quarantine=asyncio.Lock(),
                )
                working = asyncio.create_task(dispatcher.run())
                async with broker.away() as word:
                    if not word:
                        pytest.skip("this stand-in cannot lose its queue")
                    consumer.add(*((f"g{n}", sequence) for sequence in (1, 2) for n in range(20)))
                    await until(lambda: circuits.for_destination("").probes >= 3)
                await until(lambda: len(consumer.acked) == 40)
                dispatcher.stop()
                await asyncio.wait_for(working, PATIENCE_S)

        assert (consumer.dead_letters, consumer.recorded) == ([], [])
        assert in_order(await broker.received()) == {f"vs_g{n}": [1, 2] for n in range(20)}
        opened = [one["reason"] for one in lines if one["event"] == "circuit.opened"]
        assert opened[0] == word

    async def test_a_refusal_is_of_that_message_alone(self, broker: Broker) -> None:
        """What is under way beside a refused message is delivered; none is taken for the other."""
        refused = [one for one in broker.refused() if one.environ == broker.environ()]
        good = [transition(f"s{n}", 1) for n in range(20)]
        async with self.opened(broker.environ()) as handler:

            async def call(one: Refused) -> None:
                while True:
                    with pytest.raises((Undeliverable, ConnectionError)) as raised:
                        await handler(one.transition)
                    if isinstance(raised.value, Undeliverable):
                        assert raised.value.reason == one.word
                        return

            async with asyncio.timeout(BOUND_S), asyncio.TaskGroup() as tasks:
                for one in good[:10]:
                    tasks.create_task(persist(handler, one))
                for unwanted in refused:
                    tasks.create_task(call(unwanted))
                for one in good[10:]:
                    tasks.create_task(persist(handler, one))

        received = {one.body for one in await broker.received()}
        assert received == {message(one).body for one in good}

    async def test_a_check_finds_nothing_where_all_is_well(self, broker: Broker) -> None:
        """Checking a queue that is there says nothing, and sends nothing."""
        async with self.opened(broker.environ()) as handler:
            await check(handler)
            await check(handler)

        assert await broker.received() == []

    async def test_a_check_tells_wrong_settings(self, broker: Broker) -> None:
        """What configuration got wrong is a ConfigError that names the variable, every time."""
        for setting, environ in broker.misconfigured():
            async with self.opened(environ) as handler:
                for _ in range(2):
                    with pytest.raises(ConfigError, match=f"^{setting}: "):
                        await check(handler)

    async def test_nobody_listening_is_unreachable(self, broker: Broker) -> None:
        """Without a broker, opening works, and calls and checks raise ConnectionError, quickly."""
        async with self.opened(broker.environ(free_port())) as handler:
            for _ in range(2):
                with pytest.raises(ConnectionError):
                    async with asyncio.timeout(BOUND_S):
                        await handler(transition("a", 1))
                with pytest.raises(ConnectionError):
                    async with asyncio.timeout(BOUND_S):
                        await check(handler)

    async def test_closing_leaves_nothing_behind(self, broker: Broker) -> None:
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
        """A broker that hangs does not hold up the end of the process."""
        async with AsyncExitStack() as closing:
            handler = await closing.enter_async_context(self.opened(broker.environ()))
            await handler(transition("a", 1))
            with broker.frozen():
                async with asyncio.timeout(BOUND_S):
                    await closing.aclose()

    async def test_credentials_show_nowhere(
        self,
        broker: Broker,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """Whatever goes wrong, no log line, output or exception holds what is in the URL."""
        caplog.set_level(logging.DEBUG)
        said: list[str] = []
        async with proxy_to(f"tcp://127.0.0.1:{broker.port}") as proxy:
            for port in (free_port(), proxy.port):
                environ = broker.environ(port, credentials=f"someone:{CANARY}")
                async with self.opened(environ) as handler:
                    said.append(repr(handler) + repr(vars(handler)))
                    for call in (check(handler), handler(transition("a", 1))):
                        try:
                            await call
                        except Exception as error:  # noqa: BLE001 - whatever it is, it is looked at
                            said += traceback.format_exception(error)
                    proxy.cut()
                    await asyncio.sleep(0.05)

        output = capfd.readouterr()
        everything = [*said, caplog.text, output.out, output.err]
        assert not [text for text in everything if CANARY in text]

    async def _nothing_lost(self, broker: Broker, confirmed: list[StatusTransition]) -> None:
        received = await broker.received()
        assert {one.body for one in received} == {message(one).body for one in confirmed}
        wanted: dict[str, list[int]] = {}
        for one in confirmed:
            wanted.setdefault(one.session_id, []).append(one.sequence)
        assert in_order(received) == wanted


async def check(handler: Handler) -> None:
    """Call the handler's `check`."""
    await handler.check()  # type: ignore[attr-defined]
