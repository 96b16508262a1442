"""The `kafka` handler: all in-sync replicas confirm each record; the session is the key.

Needs the `kafka` extra. The topic is yours; none is created here. A private authority is trusted
by OpenSSL's own SSL_CERT_FILE.
"""

# ruff: noqa: RUF009 (each call in the body of the settings makes a dataclass field)

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ssl import SSLCertVerificationError
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

from aiokafka import AIOKafkaProducer
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.errors import (
    AuthenticationFailedError,
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    ProducerClosed,
    RecordListTooLargeError,
    SaslAuthenticationFailed,
    TopicAuthorizationFailedError,
    UnsupportedSaslMechanismError,
)
from aiokafka.helpers import create_ssl_context
from aiokafka.protocol.metadata import MetadataRequest

from .. import environment
from ..errors import Undeliverable
from ..secret import Secret
from ..transitions import cloudevents
from ..transitions.transition import StatusTransition
from . import Handler
from .shared_connection import CLOSE_TIMEOUT_S, Link, RefusedError, silence

# Below what a link gives a connection, so that the client cleans up after itself.
REQUEST_TIMEOUT_MS = 2500

_HOST = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?"
_URL = rf"kafkas?://([^\s/?#@:]+:[^\s/?#@]+@)?{_HOST}(,{_HOST})*/?"
_UNKNOWN_TOPIC = 3
_REFUSALS = (
    AuthenticationFailedError,
    IllegalSaslStateError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)


@dataclass(frozen=True, kw_only=True)
class KafkaSettings:
    """What the `kafka` handler needs."""

    kafka_url: Secret[str] = environment.setting(
        Secret("kafka://127.0.0.1:9092"),
        environment.secret(
            environment.matching(_URL, "kafka:// or kafkas:// and hosts, user and password escaped")
        ),
        "Kafka brokers, separated by commas, with user:password@ for SASL; kafkas for TLS",
    )
    kafka_topic: str = environment.setting(
        "verifications",
        environment.matching(r"[A-Za-z0-9._-]{1,249}", "1 to 249 of A-Z, a-z, 0-9, '.', _ and -"),
        "Kafka topic",
    )
    kafka_sasl_mechanism: str = environment.setting(
        "SCRAM-SHA-512",
        environment.matching(r"PLAIN|SCRAM-SHA-(256|512)", "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512"),
        "SASL mechanism, if the URL names a user",
    )


class Kafka:
    """Sends each transition and waits until all in-sync replicas have it."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._link = Link(self._connect, lost=(KafkaError, OSError))
        self._ending: set[asyncio.Task[None]] = set()

    async def __call__(self, transition: StatusTransition) -> None:
        """Send; return when every in-sync replica has the record."""
        message = cloudevents.message(transition)
        async with self._link.use() as producer:
            try:
                confirmed = await producer.send(
                    self._settings.kafka_topic,
                    message.body,
                    key=message.key.encode(),
                    headers=[(name, value.encode()) for name, value in message.headers.items()],
                )
                await self._confirmed(confirmed, producer)
            except (MessageSizeTooLargeError, RecordListTooLargeError):
                raise Undeliverable("message_too_large") from None
            except TopicAuthorizationFailedError:
                raise RefusedError("KAFKA_TOPIC: it is not ours to write") from None

    async def _confirmed(self, confirmed: Awaitable[Any], producer: AIOKafkaProducer) -> None:
        try:
            await confirmed
        except KafkaError:
            # Its sequence number is spent: brokers would take no later one of this producer.
            self._link.drop(producer)
            raise

    async def check(self) -> None:
        """Connect, and ask for the topic.

        Raises:
            ConfigError: The brokers refuse the credentials, have no such topic, or are not trusted.
            ConnectionError: No broker answers.
        """
        async with self._link.examine() as producer:
            await _require(producer, self._settings.kafka_topic)

    async def close(self) -> None:
        """Close the connections."""
        await self._link.close()
        if self._ending:
            _, late = await asyncio.wait(self._ending, timeout=CLOSE_TIMEOUT_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[AIOKafkaProducer]:
        producer = AIOKafkaProducer(
            acks="all",
            enable_idempotence=True,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
            **_connection(self._settings),
        )
        try:
            await self._start(producer)
            await _require(producer, self._settings.kafka_topic)
            yield producer
        finally:
            # What is not confirmed by now must not arrive behind what the next producer sends;
            # and `stop` waits for it for as long as the brokers stay away.
            producer.client.send = _send_nothing
            ending = asyncio.create_task(_stop(producer))
            self._ending.add(ending)
            ending.add_done_callback(self._ended)
            await asyncio.shield(ending)

    def _ended(self, ending: asyncio.Task[None]) -> None:
        self._ending.discard(ending)
        if not ending.cancelled():
            ending.exception()

    async def _start(self, producer: AIOKafkaProducer) -> None:
        """Start, and where no broker will have us, hear why: the producer does not tell."""
        try:
            await producer.start()
        except KafkaConnectionError:
            arguments = _connection(self._settings)
            for host, port, _ in collect_hosts(arguments.pop("bootstrap_servers")):
                if (refused := await _refusal(host, port, arguments)) is not None:
                    raise refused from None
            raise


@asynccontextmanager
async def open(environ: Mapping[str, str]) -> AsyncIterator[Handler]:  # noqa: A001 - the protocol's word
    """Yield the handler; the connection is made on first use."""
    silence("aiokafka")
    handler = Kafka(environment.read(KafkaSettings, environ))
    try:
        yield handler
    finally:
        await handler.close()


async def _stop(producer: AIOKafkaProducer) -> None:
    try:
        await producer.stop()
    finally:
        # Where stopping was cut short, requests without an answer still hold connections.
        await producer.client.close()


async def _require(producer: AIOKafkaProducer, topic: str) -> None:
    """Ask for the topic by name without having it created, as the producer's own request would.

    Raises:
        RefusedError: There is none.
    """
    request = MetadataRequest([topic], allow_auto_topic_creation=False)
    answer = await producer.client.send(producer.client.get_random_node(), request)
    if any(code == _UNKNOWN_TOPIC for code, *_ in answer.topics):
        raise RefusedError("KAFKA_TOPIC: the brokers have no such topic", "no_such_topic")


async def _refusal(host: str, port: int, arguments: Mapping[str, Any]) -> RefusedError | None:
    """Return what a broker has against us; None if it is merely away."""
    try:
        connection = await create_conn(
            host, port, request_timeout_ms=REQUEST_TIMEOUT_MS, **arguments
        )
    except _REFUSALS:
        return RefusedError("KAFKA_URL: the brokers refuse the credentials")
    except SSLCertVerificationError:
        problem = "KAFKA_URL: the brokers' certificate is not trusted"
        return RefusedError(problem, "certificate_untrusted")
    except (KafkaError, OSError):
        return None
    connection.close()
    return None


async def _send_nothing(*_: object, **__: object) -> NoReturn:
    raise ProducerClosed


def _connection(settings: KafkaSettings) -> dict[str, Any]:
    """Return the producer's arguments that the URL stands for."""
    parts = urlsplit(settings.kafka_url.reveal())
    credentials, _, hosts = parts.netloc.rpartition("@")
    secure = parts.scheme == "kafkas"
    found: dict[str, Any] = {"bootstrap_servers": hosts.split(",")}
    if secure:
        found["ssl_context"] = create_ssl_context()
    protocol = "SSL" if secure else "PLAINTEXT"
    if credentials:
        user, _, password = credentials.partition(":")
        protocol = f"SASL_{protocol}"
        found["sasl_mechanism"] = settings.kafka_sasl_mechanism
        found["sasl_plain_username"] = unquote(user)
        found["sasl_plain_password"] = unquote(password)
    return found | {"security_protocol": protocol}
