"""The `rabbitmq` handler: persistent messages, mandatory, each confirmed by the broker.

Needs the `rabbitmq` extra. The exchange and its bindings are yours; nothing is declared here.
"""
# ruff: noqa: RUF009 (each call in the body of the settings makes a dataclass field)

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
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
from .shared_connection import Link, RefusedError, silence, url

_REFUSALS: dict[type[AMQPError], str] = {
    ChannelNotFoundEntity: "no_such_exchange",
    ChannelAccessRefused: "access_refused",
    ChannelLockedResource: "resource_locked",
}


@dataclass(frozen=True, kw_only=True)
class RabbitmqSettings:
    """What the `rabbitmq` handler needs."""

    rabbitmq_url: Secret[str] = environment.setting(
        Secret("amqp://127.0.0.1:5672/"), url("amqp", "amqps"), "RabbitMQ broker and virtual host"
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


class _Line(NamedTuple):
    """A connection, and the one channel on which everything is published."""

    connection: AbstractConnection
    channel: AbstractChannel


class Rabbitmq:
    """Publishes each transition and waits for the broker's confirmation."""

    def __init__(self, settings: RabbitmqSettings) -> None:
        self._settings = settings
        lost = (AMQPConnectionError, ChannelInvalidStateError, OSError)
        self._link = Link(self._connect, lost=lost, is_open=_is_open)

    async def __call__(self, transition: StatusTransition) -> None:
        """Publish; return when the broker has taken the message into every bound queue."""
        message = cloudevents.message(transition)
        try:
            async with self._link.use() as line:
                await self._publish(line.channel, message)
        except ChannelClosed:
            # One refused message closes the channel for all that are under way on it, so that
            # none of them knows which it was.
            self._link.drop(line)
            await self._publish_alone(message)

    async def check(self) -> None:
        """Connect, and ask for the exchange, or for the queue on the default exchange.

        Raises:
            ConfigError: The broker refuses the credentials or has no such exchange or queue.
            ConnectionError: It does not answer.
        """
        name, key = self._settings.rabbitmq_exchange, self._settings.rabbitmq_routing_key
        async with self._link.examine() as line, line.connection.channel() as channel:
            try:
                if name:
                    await channel.get_exchange(name)
                else:
                    await channel.get_queue(key)
            except ChannelClosed:
                setting = "RABBITMQ_EXCHANGE" if name else "RABBITMQ_ROUTING_KEY"
                what = "exchange" if name else "queue"
                problem = f"{setting}: the broker has no such {what} for us"
                raise RefusedError(problem, f"no_such_{what}") from None

    async def close(self) -> None:
        """Close the connection."""
        await self._link.close()

    async def _publish(self, channel: AbstractChannel, message: cloudevents.Message) -> None:
        name = self._settings.rabbitmq_exchange
        exchange: AbstractExchange = channel.default_exchange
        if name:
            exchange = await channel.get_exchange(name, ensure=False)
        try:
            await exchange.publish(_amqp(message), self._settings.rabbitmq_routing_key)
        except PublishError:
            # No queue is bound, or the only one is on a node that is away.
            raise Unreachable("unroutable") from None
        except DeliveryError:
            # A queue that takes no more, say.
            raise Unreachable("queue_refused") from None

    async def _publish_alone(self, message: cloudevents.Message) -> None:
        """Publish on a channel of its own, where a refusal is of this message and no other."""
        async with self._link.use() as line:
            try:
                async with line.connection.channel(on_return_raises=True) as channel:
                    await self._publish(channel, message)
            except ChannelClosed as error:
                raise _refused(error) from None

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[_Line]:
        try:
            connection = await aio_pika.connect(self._settings.rabbitmq_url.reveal())
        except ProbableAuthenticationError:
            raise RefusedError("RABBITMQ_URL: the broker refuses the credentials") from None
        except InvalidFrameError:
            # What the client makes of being sent away when it names its virtual host.
            problem = "RABBITMQ_URL: the broker refuses the virtual host"
            raise RefusedError(problem, "no_such_virtual_host") from None
        async with connection:
            yield _Line(connection, await connection.channel(on_return_raises=True))


@asynccontextmanager
async def open(environ: Mapping[str, str]) -> AsyncIterator[Handler]:  # noqa: A001 - the protocol's word
    """Yield the handler; the connection is made on first use."""
    silence("aio_pika", "aiormq")
    handler = Rabbitmq(environment.read(RabbitmqSettings, environ))
    try:
        yield handler
    finally:
        await handler.close()


def _is_open(line: _Line) -> bool:
    return not (line.connection.is_closed or line.channel.is_closed)


def _amqp(message: cloudevents.Message) -> aio_pika.Message:
    return aio_pika.Message(
        message.body,
        message_id=message.id,
        type=message.type,
        content_type=message.content_type,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        headers=dict(message.headers),
    )


def _refused(error: AMQPError) -> Exception:
    """Tell what is wrong with the message from what is wrong with the exchange."""
    if isinstance(error, ChannelPreconditionFailed):
        return Undeliverable("message_too_large")
    for kind, word in _REFUSALS.items():
        if isinstance(error, kind):
            return Unreachable(word)
    return RuntimeError(type(error).__name__)
