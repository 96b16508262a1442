"""A shared connection: opened once, lost for all calls at once, and never waited for too long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from service import environment
from service.config import Settings as ServiceSettings
from service.errors import ConfigError, Unreachable
from service.handlers import shared_connection
from service.handlers.shared_connection import BrokerRefusedError, SharedConnection
from service.secret import Secret
from tests.support.virtual_time import push
from tests.support.waiting import PATIENCE_S, until


async def never() -> None:
    """Wait for ever."""
    await asyncio.Event().wait()


class LostError(Exception):
    """The client's error for a lost connection."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings with one URL."""

    acme_url: Secret[str] = environment.setting(  # noqa: RUF009 - this makes a dataclass field
        Secret("amqp://127.0.0.1"), shared_connection.broker_url("amqp", "amqps"), "Broker"
    )


class FakeConnection:
    """A connection that knows whether it is open."""

    is_open = True


Shared = SharedConnection[FakeConnection]


class Broker:
    """Opens connections.

    Attributes:
        connections: Those that were opened.
        attempts: How often opening was attempted.
        before: Awaited before a connection is opened.
        after: Awaited after a connection is closed.
    """

    def __init__(self) -> None:
        self.connections: list[FakeConnection] = []
        self.attempts = 0
        self.before: Callable[[], Awaitable[object]] | None = None
        self.after: Callable[[], Awaitable[object]] | None = None

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[FakeConnection]:
        """Open a connection."""
        self.attempts += 1
        if self.before is not None:
            await self.before()
        connection = FakeConnection()
        self.connections.append(connection)
        try:
            yield connection
        finally:
            connection.is_open = False
            if self.after is not None:
                await self.after()


async def in_use(shared: Shared, calls: int = 1) -> None:
    """Wait until *calls* calls use the connection."""
    await until(lambda: shared._current is not None and len(shared._current.timeouts) == calls)


@pytest.fixture
def broker() -> Broker:
    """Return a broker."""
    return Broker()


@pytest.fixture
async def shared(broker: Broker) -> AsyncIterator[Shared]:
    """Yield a shared connection to the broker; it is closed at the end."""
    opened: Shared = SharedConnection(
        broker, lost=(LostError,), is_open=lambda connection: connection.is_open
    )
    yield opened
    await opened.close()


async def use(
    shared: Shared, raised: Exception | None = None, *, ends: bool = True
) -> FakeConnection:
    """Use the connection once: return it, raise an error, or never end."""
    async with shared.acquire() as connection:
        if not ends:
            await never()
        if raised is not None:
            raise raised
        return connection


async def test_calls_share_one_connection(broker: Broker, shared: Shared) -> None:
    """Concurrent calls open one connection, which later calls use too."""
    broker.before = lambda: asyncio.sleep(0.01)
    connections = await asyncio.gather(*(use(shared) for _ in range(20)))
    assert {*connections, await use(shared)} == {*broker.connections}
    assert broker.attempts == 1
    await shared.close()
    assert not broker.connections[0].is_open


async def test_a_failed_attempt_fails_all_waiting_calls(broker: Broker, shared: Shared) -> None:
    """Concurrent calls make one attempt to connect, not one each."""

    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise LostError

    broker.before = fail
    outcomes = await asyncio.gather(*(use(shared) for _ in range(20)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unreachable] * 20
    assert broker.attempts == 1
    broker.before = None
    await use(shared)


async def test_a_connection_lost_before_its_use_is_not_used(shared: Shared) -> None:
    """A call that begins in the turn in which the connection is lost does not get it."""
    lost = await use(shared)
    late = asyncio.create_task(use(shared))
    await asyncio.sleep(0)
    shared.discard(lost)

    with pytest.raises(ConnectionError):
        await late
    assert await use(shared) is not lost


async def test_opening_has_a_time_limit(
    broker: Broker, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that does not respond is unreachable after `CONNECT_TIMEOUT_S`."""
    monkeypatch.setattr(shared_connection, "CONNECT_TIMEOUT_S", 600)
    broker.before = never
    used = asyncio.create_task(use(shared))
    await until(lambda: broker.attempts == 1)
    push(600)

    with pytest.raises(ConnectionError, match="timed_out"):
        await used


def test_limits_are_below_the_dispatchers() -> None:
    """Connecting and publishing end before the handler's time limit counts an attempt."""
    both_s = shared_connection.CONNECT_TIMEOUT_S + shared_connection.PUBLISH_TIMEOUT_S
    assert both_s < ServiceSettings(redis_url=Secret("")).handler_timeout_s


async def test_a_call_that_times_out_discards_the_connection(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `PUBLISH_TIMEOUT_S` calls are unreachable, and the next one connects anew."""
    monkeypatch.setattr(shared_connection, "PUBLISH_TIMEOUT_S", 600)
    first = await use(shared)
    used = [asyncio.create_task(use(shared, ends=False)) for _ in range(2)]
    await in_use(shared, 2)
    push(600)

    outcomes = await asyncio.gather(*used, return_exceptions=True)
    assert [repr(outcome) for outcome in outcomes] == ["Unreachable('timed_out')"] * 2
    assert await use(shared) is not first
    await shared.close()
    assert not first.is_open


async def test_a_lost_connection_fails_all_calls(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When one call finds the connection lost, the others fail at once."""
    monkeypatch.setattr(shared_connection, "PUBLISH_TIMEOUT_S", 600)
    waiting = [asyncio.create_task(use(shared, ends=False)) for _ in range(5)]
    await in_use(shared, 5)

    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ConnectionError):
            await use(shared, LostError())
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [repr(outcome) for outcome in outcomes] == ["Unreachable('connection_lost')"] * 5


async def test_a_lost_connection_does_not_affect_the_next(shared: Shared) -> None:
    """A call that still fails on the old connection does not discard the new one."""
    old = asyncio.Event()

    async def late() -> None:
        try:
            async with shared.acquire():
                try:
                    await never()
                except asyncio.CancelledError:
                    await old.wait()
                    raise
        except ConnectionError:
            return

    lingering = asyncio.create_task(late())
    await in_use(shared)
    with pytest.raises(ConnectionError):
        await use(shared, LostError())
    new = await use(shared)
    old.set()
    await lingering
    shared.discard(FakeConnection())
    assert await use(shared) is new


async def test_other_errors_keep_the_connection(shared: Shared) -> None:
    """An error that does not mean a lost connection is raised, and the connection stays."""
    connection = await use(shared)

    with pytest.raises(KeyError):
        await use(shared, KeyError())
    assert await use(shared) is connection


async def test_a_canceled_call_does_not_cancel_connecting(broker: Broker, shared: Shared) -> None:
    """When a waiting call is canceled, the connection is still opened for the others."""
    may_open = asyncio.Event()
    broker.before = may_open.wait
    first, second = (asyncio.create_task(use(shared)) for _ in range(2))
    await until(lambda: broker.attempts == 1)
    first.cancel()
    await asyncio.sleep(0)
    may_open.set()

    assert await second is broker.connections[0]
    assert first.cancelled()


async def test_a_refusal_is_a_config_error_for_checks(broker: Broker, shared: Shared) -> None:
    """A refused configuration is `Unreachable` for a call and `ConfigError` for a check."""

    async def refuse() -> None:
        raise BrokerRefusedError("NAME: wrong")

    broker.before = refuse
    with pytest.raises(BrokerRefusedError):
        await use(shared)
    with pytest.raises(ConfigError, match=r"^NAME: wrong$"):
        async with shared.acquire_for_check():
            pytest.fail("not reached")


async def test_closing_is_bounded(
    broker: Broker, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that does not close is given up after `CLOSE_TIMEOUT_S`."""
    monkeypatch.setattr(shared_connection, "CLOSE_TIMEOUT_S", 0.05)
    await use(shared)
    broker.after = never

    async with asyncio.timeout(PATIENCE_S):
        await shared.close()
        await shared.close()


@pytest.mark.parametrize(
    "wrong",
    [
        *("amqp://", "http://canary@host", "amqp://user:pa/canary@host"),
        *("amqp://user:canary@host:port", "amqp://user:canary@host:0"),
        *("amqp://user:canary@host:99999", "amqp://user:canary@ho st", "amqp://[canary"),
        "amqp://one,amqp://canary",
    ],
)
def test_an_unusable_url_is_refused_without_being_shown(wrong: str) -> None:
    """A URL without a host, or with a wrong port or scheme, is a problem without the URL."""
    with pytest.raises(ConfigError) as raised:
        environment.read(Settings, {"ACME_URL": wrong})
    assert str(raised.value) == "ACME_URL: expected amqp://host:port or amqps://host:port"


@pytest.mark.parametrize("right", ["amqp://host", "amqps://user:p%2Fw@[::1]:5671/a?b=c"])
def test_a_usable_url_is_kept_secret(right: str) -> None:
    """A usable URL is parsed as a secret."""
    read = shared_connection.broker_url("amqp", "amqps").parse(right)

    assert read.reveal() == right
    assert right not in repr(read)


def test_several_urls_are_parsed_where_allowed() -> None:
    """Several URLs are separated by commas."""
    text = "nats://a:b@one:4222,tls://two"
    assert shared_connection.broker_url("nats", "tls", many=True).parse(text).reveal() == text
