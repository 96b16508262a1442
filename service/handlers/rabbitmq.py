"""The `rabbitmq` handler: one persistent message per transition, confirmed by the broker.

Needs the `rabbitmq` extra. Declares nothing: exchange, queues and bindings must exist.
"""
# ruff: noqa: RUF009 (each call in the body of the settings makes a dataclass field)

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange
from aio_pika.exceptions import (
    AMQPConnectionError,
    AMQPError,
    ChannelClosed,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    DeliveryError,
    InvalidFrameError,
    ProbableAuthenticationError,
    PublishError,
)
from aiormq.exceptions import ChannelAccessRefused, ChannelLockedResource

from .. import environment
from ..errors import Undeliverable, Unreachable
from ..secret import Secret
from ..transitions import cloudevents
from ..transitions.transition import StatusTransition
from . import Handler
from .shared_connection import BrokerRefusedError, SharedConnection, broker_url, disable_loggers

_REFUSALS: dict[type[AMQPError], str] = {
    ChannelNotFoundEntity: "no_such_exchange",
    ChannelAccessRefused: "access_refused",
    ChannelLockedResource: "resource_locked",
}


@dataclass(frozen=True, kw_only=True)
class RabbitmqSettings:
    """Settings of the `rabbitmq` handler."""

    rabbitmq_url: Secret[str] = environment.setting(
        Secret("amqp://127.0.0.1:5672/"),
        broker_url("amqp", "amqps"),
        "RabbitMQ broker and virtual host",
    )
    rabbitmq_exchange: str = environment.setting(
        "",
        environment.matching(r"[ -~]{0,255}", "up to 255 characters"),
        "RabbitMQ exchange; empty for the default exchange",
    )
    rabbitmq_routing_key: str = environment.setting(
        "verifications",
        environment.matching(r"[ -~]{1,255}", "1 to 255 characters"),
        "Routing key; on the default exchange, the name of the queue",
    )


class _Connection(NamedTuple):
    """A connection, and the channel that all calls publish on."""

    amqp: AbstractConnection
    channel: AbstractChannel


class Rabbitmq:
    """Publishes each transition and waits for the broker's confirmation."""

    def __init__(self, settings: RabbitmqSettings) -> None:
        self._settings = settings
        lost = (AMQPConnectionError, ChannelInvalidStateError, OSError)
        self._shared = SharedConnection(self._connect, lost=lost, is_open=_is_open)

    async def __call__(self, transition: StatusTransition) -> None:
        """Publish; return when the broker has the message in every bound queue."""
        message = cloudevents.message(transition)
        try:
            async with self._shared.acquire() as connection:
                await self._publish(connection.channel, message)
        except ChannelClosed:
            # A refused message closes the channel, and with it fails every message under way. To
            # find out which one was refused, each is published again on a channel of its own.
            self._shared.discard(connection)
            await self._publish_alone(message)

    async def check(self) -> None:
        """Connect, and ask for the exchange, or for the queue on the default exchange.

        Raises:
            ConfigError: The broker refuses the credentials or has no such exchange or queue.
            ConnectionError: The broker does not answer.
        """
        name, key = self._settings.rabbitmq_exchange, self._settings.rabbitmq_routing_key
        async with (
            self._shared.acquire_for_check() as connection,
            connection.amqp.channel() as channel,
        ):
            try:
                if name:
                    await channel.get_exchange(name)
                else:
                    await channel.get_queue(key)
            except ChannelClosed:
                setting = "RABBITMQ_EXCHANGE" if name else "RABBITMQ_ROUTING_KEY"
                what = "exchange" if name else "queue"
                problem = f"{setting}: the broker has no such {what}, or refuses access"
                raise BrokerRefusedError(problem, f"no_such_{what}") from None

    async def aclose(self) -> None:
        """Close the connection."""
        await self._shared.close()

    async def _publish(self, channel: AbstractChannel, message: cloudevents.Message) -> None:
        name = self._settings.rabbitmq_exchange
        exchange: AbstractExchange = channel.default_exchange
        if name:
            exchange = await channel.get_exchange(name, ensure=False)
        try:
            await exchange.publish(_amqp(message), self._settings.rabbitmq_routing_key)
        except PublishError:
            # No queue is bound, or the node of the only bound queue is down.
            raise Unreachable("unroutable") from None
        except DeliveryError:
            # A bound queue rejects messages, for example because it is full.
            raise Unreachable("queue_refused") from None

    async def _publish_alone(self, message: cloudevents.Message) -> None:
        """Publish on a new channel, where a refusal concerns this message only."""
        async with self._shared.acquire() as connection:
            try:
                async with connection.amqp.channel(on_return_raises=True) as channel:
                    await self._publish(channel, message)
            except ChannelClosed as error:
                raise _refusal(error) from None

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[_Connection]:
        try:
            amqp = await aio_pika.connect(self._settings.rabbitmq_url.reveal())
        except ProbableAuthenticationError:
            raise BrokerRefusedError("RABBITMQ_URL: the broker refuses the credentials") from None
        except InvalidFrameError:
            # The broker closed the connection on hearing the name of the virtual host.
            problem = "RABBITMQ_URL: the broker refuses the virtual host"
            raise BrokerRefusedError(problem, "no_such_virtual_host") from None
        async with amqp:
            yield _Connection(amqp, await amqp.channel(on_return_raises=True))


@asynccontextmanager
async def open(environ: Mapping[str, str]) -> AsyncIterator[Handler]:  # noqa: A001 - the protocol's word
    """Yield the handler; the connection is made on first use."""
    disable_loggers("aio_pika", "aiormq")
    async with aclosing(Rabbitmq(environment.read(RabbitmqSettings, environ))) as handler:
        yield handler


def _is_open(connection: _Connection) -> bool:
    return not (connection.amqp.is_closed or connection.channel.is_closed)


def _amqp(message: cloudevents.Message) -> aio_pika.Message:
    return aio_pika.Message(
        message.body,
        message_id=message.id,
        type=message.type,
        content_type=message.content_type,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        headers=dict(message.headers),
    )


def _refusal(error: AMQPError) -> Exception:
    """Return `Undeliverable` if the message is at fault, `Unreachable` if the exchange is."""
    if isinstance(error, ChannelPreconditionFailed):
        return Undeliverable("message_too_large")
    for kind, word in _REFUSALS.items():
        if isinstance(error, kind):
            return Unreachable(word)
    return RuntimeError(type(error).__name__)
