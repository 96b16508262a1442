"""The `kafka` handler: one record per transition, confirmed by all in-sync replicas.

The record's key is the session id. Needs the `kafka` extra. Creates no topic. To trust a private
certificate authority, set OpenSSL's SSL_CERT_FILE.
"""

# ruff: noqa: RUF009 (each call in the body of the settings makes a dataclass field)

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import aclosing, asynccontextmanager
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
from .shared_connection import (
    CLOSE_TIMEOUT_S,
    BrokerRefusedError,
    SharedConnection,
    disable_loggers,
)

# Below CONNECT_TIMEOUT_S and PUBLISH_TIMEOUT_S, so that the client gives up before we do.
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
    """Settings of the `kafka` handler."""

    kafka_url: Secret[str] = environment.setting(
        Secret("kafka://127.0.0.1:9092"),
        environment.secret(
            environment.matching(
                _URL, "kafka:// or kafkas:// and hosts, user and password percent-encoded"
            )
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
    """Sends each transition and waits for the confirmation of all in-sync replicas."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._shared = SharedConnection(self._connect, lost=(KafkaError, OSError))
        self._stopping: set[asyncio.Task[None]] = set()

    async def __call__(self, transition: StatusTransition) -> None:
        """Send a record; return when every in-sync replica has it."""
        message = cloudevents.message(transition)
        async with self._shared.acquire() as producer:
            try:
                confirmation = await producer.send(
                    self._settings.kafka_topic,
                    message.body,
                    key=message.key.encode(),
                    headers=[(name, value.encode()) for name, value in message.headers.items()],
                )
                await self._wait_for(confirmation, producer)
            except (MessageSizeTooLargeError, RecordListTooLargeError):
                raise Undeliverable("message_too_large") from None
            except TopicAuthorizationFailedError:
                raise BrokerRefusedError("KAFKA_TOPIC: the brokers refuse to write to it") from None

    async def _wait_for(self, confirmation: Awaitable[Any], producer: AIOKafkaProducer) -> None:
        try:
            await confirmation
        except KafkaError:
            # The record has used up a sequence number, which the brokers now miss: they would
            # refuse all later records of this producer.
            self._shared.discard(producer)
            raise

    async def check(self) -> None:
        """Connect, and ask for the topic.

        Raises:
            ConfigError: The brokers refuse the credentials, have no such topic, or have a
                certificate that is not trusted.
            ConnectionError: No broker answers.
        """
        async with self._shared.acquire_for_check() as producer:
            await _require_topic(producer, self._settings.kafka_topic)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._shared.close()
        if self._stopping:
            _, late = await asyncio.wait(self._stopping, timeout=CLOSE_TIMEOUT_S)
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
            await _require_topic(producer, self._settings.kafka_topic)
            yield producer
        finally:
            # An unconfirmed record must not arrive after those of the next producer. aiokafka has
            # no way to give records up: an idempotent producer's `stop` repeats them until the
            # brokers are back. So its client refuses every further request, and `stop` returns.
            producer.client.send = _refuse_request
            stopping = asyncio.create_task(_stop(producer))
            self._stopping.add(stopping)
            stopping.add_done_callback(self._stopped)
            # Requests that wait for an answer delay it, perhaps beyond CLOSE_TIMEOUT_S.
            await asyncio.shield(stopping)

    def _stopped(self, stopping: asyncio.Task[None]) -> None:
        self._stopping.discard(stopping)
        if not stopping.cancelled():
            stopping.exception()

    async def _start(self, producer: AIOKafkaProducer) -> None:
        """Start; if no broker can be reached, ask each of them why, which the producer hides."""
        try:
            await producer.start()
        except KafkaConnectionError:
            arguments = _connection(self._settings)
            for host, port, _ in collect_hosts(arguments.pop("bootstrap_servers")):
                if (refusal := await _refusal(host, port, arguments)) is not None:
                    raise refusal from None
            raise


@asynccontextmanager
async def open(environ: Mapping[str, str]) -> AsyncIterator[Handler]:  # noqa: A001 - the protocol's word
    """Yield the handler; the connection is made on first use."""
    disable_loggers("aiokafka")
    async with aclosing(Kafka(environment.read(KafkaSettings, environ))) as handler:
        yield handler


async def _stop(producer: AIOKafkaProducer) -> None:
    try:
        await producer.stop()
    finally:
        # If `stop` was canceled, unanswered requests still hold connections open.
        await producer.client.close()


async def _require_topic(producer: AIOKafkaProducer, topic: str) -> None:
    """Ask for the topic; the producer's own request would create it.

    Raises:
        BrokerRefusedError: The topic does not exist.
    """
    request = MetadataRequest([topic], allow_auto_topic_creation=False)
    answer = await producer.client.send(producer.client.get_random_node(), request)
    if any(code == _UNKNOWN_TOPIC for code, *_ in answer.topics):
        raise BrokerRefusedError("KAFKA_TOPIC: the brokers have no such topic", "no_such_topic")


async def _refusal(host: str, port: int, arguments: Mapping[str, Any]) -> BrokerRefusedError | None:
    """Return why a broker refuses our connection, or None if it is only unreachable."""
    try:
        connection = await create_conn(
            host, port, request_timeout_ms=REQUEST_TIMEOUT_MS, **arguments
        )
    except _REFUSALS:
        return BrokerRefusedError("KAFKA_URL: the brokers refuse the credentials")
    except SSLCertVerificationError:
        problem = "KAFKA_URL: the brokers' certificate is not trusted"
        return BrokerRefusedError(problem, "certificate_untrusted")
    except (KafkaError, OSError):
        return None
    connection.close()
    return None


async def _refuse_request(*_: object, **__: object) -> NoReturn:
    raise ProducerClosed


def _connection(settings: KafkaSettings) -> dict[str, Any]:
    """Return the URL as arguments of the producer."""
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
