"""The laws of a link: one connection for all, nothing waits longer than it must."""

from __future__ import annotations

import asyncio
import logging
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
from tests.support.servers import PATIENCE_S, until
from tests.support.virtual_time import push


async def never() -> None:
    """Wait for what does not come."""
    await asyncio.Event().wait()


class GoneError(Exception):
    """A client's word for a connection that was lost."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a handler might need."""

    acme_url: Secret[str] = environment.setting(  # noqa: RUF009 - this makes a dataclass field
        Secret("amqp://127.0.0.1"), shared_connection.broker_url("amqp", "amqps"), "Its broker"
    )


class Wire:
    """A connection that remembers whether it is open."""

    is_open = True


class Dialer:
    """Opens wires, and does beforehand what the test says.

    Attributes:
        wires: All that were opened.
        before: Awaited before a wire is opened.
        after: Awaited before a wire is closed.
    """

    def __init__(self, before: Callable[[], Awaitable[object]] | None = None) -> None:
        self.wires: list[Wire] = []
        self.dials = 0
        self.before = before
        self.after: Callable[[], Awaitable[object]] | None = None

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[Wire]:
        """Open a wire."""
        self.dials += 1
        if self.before is not None:
            await self.before()
        wire = Wire()
        self.wires.append(wire)
        try:
            yield wire
        finally:
            wire.is_open = False
            if self.after is not None:
                await self.after()


async def in_use(over: SharedConnection[Wire], times: int = 1) -> None:
    """Wait until the connection is used by so many."""
    await until(lambda: over._current is not None and len(over._current.timeouts) == times)


def linked(dialer: Dialer) -> SharedConnection[Wire]:
    """Return a link over *dialer*."""
    return SharedConnection(dialer, lost=(GoneError,), is_open=lambda wire: wire.is_open)


async def use(
    over: SharedConnection[Wire], raised: Exception | None = None, *, ends: bool = True
) -> Wire:
    """Use a link for a moment or for ever, and perhaps fail."""
    async with over.acquire() as wire:
        if not ends:
            await never()
        if raised is not None:
            raise raised
        return wire


async def test_all_share_one_connection() -> None:
    """However many ask at once, one connection is opened, and it is kept."""
    dialer = Dialer(lambda: asyncio.sleep(0.01))
    over = linked(dialer)

    wires = await asyncio.gather(*(use(over) for _ in range(20)))
    assert {*wires, await use(over)} == {*dialer.wires}
    assert dialer.dials == 1
    await over.close()
    assert not dialer.wires[0].is_open


async def test_all_who_wait_for_a_connection_hear_at_once_that_there_is_none() -> None:
    """One attempt is made for all who wait, not one after the other."""

    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise GoneError

    dialer = Dialer(fail)
    over = linked(dialer)

    outcomes = await asyncio.gather(*(use(over) for _ in range(20)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unreachable] * 20
    assert dialer.dials == 1
    dialer.before = None
    await use(over)
    await over.close()


async def test_what_ends_before_it_is_used_is_not_used() -> None:
    """Who asks in the very turn in which another loses the connection, does not get that one."""
    dialer = Dialer()
    over = linked(dialer)
    lost = await use(over)
    late = asyncio.create_task(use(over))
    await asyncio.sleep(0)
    over.discard(lost)

    with pytest.raises(ConnectionError):
        await late
    assert await use(over) is not lost
    await over.close()


async def test_opening_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that never greets is unreachable after `CONNECT_TIMEOUT_S`."""
    monkeypatch.setattr(shared_connection, "CONNECT_TIMEOUT_S", 600)
    dialer = Dialer(never)
    over = linked(dialer)
    used = asyncio.create_task(use(over))
    await until(lambda: dialer.dials == 1)
    push(600)

    with pytest.raises(ConnectionError):
        await used
    await over.close()


def test_limits_are_ours_and_not_the_dispatchers() -> None:
    """Connecting and publishing give up before a handler's usual time limit counts an attempt."""
    both_s = shared_connection.CONNECT_TIMEOUT_S + shared_connection.PUBLISH_TIMEOUT_S
    assert both_s < ServiceSettings(redis_url=Secret("")).handler_timeout_s


async def test_a_use_has_a_time_limit_and_takes_the_connection_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who hears nothing for `PUBLISH_TIMEOUT_S` gives up, and the connection with it."""
    monkeypatch.setattr(shared_connection, "PUBLISH_TIMEOUT_S", 600)
    over = linked(Dialer())
    first = await use(over)
    used = asyncio.create_task(use(over, ends=False))
    await in_use(over)
    push(600)

    with pytest.raises(ConnectionError):
        await used
    assert await use(over) is not first
    await over.close()
    assert not first.is_open


async def test_a_lost_connection_ends_every_use_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """When one finds the connection gone, the others need not find out for themselves."""
    monkeypatch.setattr(shared_connection, "PUBLISH_TIMEOUT_S", 600)
    over = linked(Dialer())
    waiting = [asyncio.create_task(use(over, ends=False)) for _ in range(5)]
    await in_use(over, 5)

    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ConnectionError):
            await use(over, GoneError("what the client said"))
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unreachable] * 5
    await over.close()


async def test_a_lost_connection_takes_no_later_one_along() -> None:
    """Whoever still fails on an old connection leaves the new one alone."""
    over = linked(Dialer())
    old = asyncio.Event()

    async def late() -> None:
        try:
            async with over.acquire():
                try:
                    await never()
                except asyncio.CancelledError:
                    await old.wait()
                    raise
        except ConnectionError:
            return

    lingering = asyncio.create_task(late())
    await in_use(over)
    with pytest.raises(ConnectionError):
        await use(over, GoneError())
    new = await use(over)
    old.set()
    await lingering
    over.discard(Wire())
    assert await use(over) is new
    await over.close()


async def test_another_error_is_nobodys_concern() -> None:
    """What does not mean a lost connection passes, and the connection stays."""
    over = linked(Dialer())
    wire = await use(over)

    with pytest.raises(KeyError):
        await use(over, KeyError())
    assert await use(over) is wire
    await over.close()


async def test_a_canceled_caller_cancels_nobody_else() -> None:
    """Who gives up while the connection is being opened does not stop it from being opened."""
    may_open = asyncio.Event()
    dialer = Dialer(may_open.wait)
    over = linked(dialer)
    first, second = (asyncio.create_task(use(over)) for _ in range(2))
    await until(lambda: dialer.dials == 1)
    first.cancel()
    await asyncio.sleep(0)
    may_open.set()

    assert await second is dialer.wires[0]
    assert first.cancelled()
    await over.close()


async def test_a_refusal_is_a_config_error_to_a_check_alone() -> None:
    """Refused by a broker that is there: a call tries again later, a check says what is wrong."""

    async def refuse() -> None:
        raise BrokerRefusedError("NAME: wrong")

    over = linked(Dialer(refuse))
    with pytest.raises(BrokerRefusedError):
        await use(over)
    with pytest.raises(ConfigError, match=r"^NAME: wrong$"):
        async with over.acquire_for_check():
            pytest.fail("not reached")
    await over.close()


async def test_closing_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that cannot be closed is left, and so is one that fails to close."""
    monkeypatch.setattr(shared_connection, "CLOSE_TIMEOUT_S", 0.05)
    dialer = Dialer()
    over = linked(dialer)
    await use(over)
    dialer.after = never

    async with asyncio.timeout(PATIENCE_S):
        await over.close()
        await over.close()


@pytest.mark.parametrize(
    "wrong",
    [
        "amqp://",
        "http://canary@host",
        "amqp://user:pa/canary@host",
        "amqp://user:canary@host:port",
        "amqp://user:canary@host:0",
        "amqp://user:canary@host:99999",
        "amqp://user:canary@ho st",
        "amqp://[canary",
        "amqp://one,amqp://canary",
    ],
)
def test_an_unusable_url_is_refused_without_being_shown(wrong: str) -> None:
    """A URL without host, with an odd port or scheme, is refused before any client sees it."""
    with pytest.raises(ConfigError) as raised:
        environment.read(Settings, {"ACME_URL": wrong})
    assert str(raised.value) == "ACME_URL: expected amqp://host:port or amqps://host:port"


@pytest.mark.parametrize("right", ["amqp://host", "amqps://user:p%2Fw@[::1]:5671/a?b=c"])
def test_a_usable_url_is_kept_secret(right: str) -> None:
    """A URL that can be used is read as a secret."""
    read = shared_connection.broker_url("amqp", "amqps").parse(right)

    assert read.reveal() == right
    assert right not in repr(read)


def test_several_urls_are_read_where_allowed() -> None:
    """Servers by commas, each a URL of its own."""
    text = "nats://a:b@one:4222,tls://two"
    assert shared_connection.broker_url("nats", "tls", many=True).parse(text).reveal() == text


def test_silenced_loggers_say_nothing() -> None:
    """Not even their worst."""
    shared_connection.disable_loggers("acme.broker")
    assert not logging.getLogger("acme.broker").isEnabledFor(logging.CRITICAL)
