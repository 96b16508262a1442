"""The `sqs` handler: one message per transition, to a FIFO or a standard queue.

On a FIFO queue, the session is the message group. Needs the `sqs` extra. Creates no queue. Region
and credentials that are not set come from AWS's usual places (environment, profile, instance role).
"""

# ruff: noqa: RUF009 (each call in the body of the settings makes a dataclass field)

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ReadTimeoutError,
    SSLError,
)
from botocore.parsers import ResponseParserError

from .. import environment
from ..errors import ConfigError, Undeliverable, Unreachable
from ..secret import Secret
from ..transitions import cloudevents
from ..transitions.transition import StatusTransition
from . import Handler
from .shared_connection import (
    CONNECT_TIMEOUT_S,
    PUBLISH_TIMEOUT_S,
    BrokerRefusedError,
    SharedConnection,
    disable_loggers,
)

FIFO_SUFFIX = ".fifo"
CONNECTIONS = 64
# Of body and attributes together. A queue may have a lower limit, which it reports itself.
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html
MAX_BYTES = 1_048_576

_URL = r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?/[!-~]+"
_REGION = re.compile(r"(?:^|\.)sqs(?:-fips)?\.([a-z0-9-]+)\.")
_TOO_LARGE = "must be shorter than"
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessage.html
_MESSAGE_REFUSED = frozenset({"InvalidMessageContents", "InvalidParameterValue"})
_QUEUE_REFUSED = {
    "AWS.SimpleQueueService.NonExistentQueue": "no_such_queue",
    "QueueDoesNotExist": "no_such_queue",
    "InvalidAddress": "no_such_queue",
    "AWS.SimpleQueueService.UnsupportedOperation": "operation_unsupported",
    "UnsupportedOperation": "operation_unsupported",
}
# The prefix of errors about the queue's encryption key: disabled, deleted or not permitted.
_KEY_REFUSED = "Kms"
_PROBLEMS = {
    "access_refused": "the credentials are refused, or not for this queue",
    "key_refused": "the queue's key cannot be used",
    "no_such_queue": "there is no such queue",
    "operation_unsupported": "the queue takes no such message",
}
# The characters that SQS accepts in no message, and the length of group and deduplication ids.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
MAX_ID_CHARACTERS = 128
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/CommonErrors.html
_ACCESS_REFUSED = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "ExpiredTokenException",
        "InvalidClientTokenId",
        "InvalidSecurity",
        "MissingAuthenticationToken",
        "NotAuthorized",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)
_THROTTLED = frozenset(
    {"KmsThrottled", "RequestThrottled", "Throttling", "ThrottlingException", "OverLimit"}
)


@dataclass(frozen=True, kw_only=True)
class SqsSettings:
    """Settings of the `sqs` handler."""

    sqs_queue_url: str = environment.setting(
        "",
        environment.matching(_URL, "an SQS queue URL"),
        "URL of the queue; requests are sent to its host",
    )
    sqs_region: str = environment.setting(
        "",
        environment.matching(r"[a-z0-9-]{1,32}", "an AWS region"),
        "AWS region, if the URL does not name it",
    )
    sqs_access_key_id: str = environment.setting(
        "",
        environment.matching(r"\w{1,128}", "an access key id"),
        "AWS access key id; empty for AWS's default credential chain",
    )
    sqs_secret_access_key: Secret[str] = environment.setting(
        Secret(""),
        environment.secret(environment.matching(r"[!-~]+", "a secret access key")),
        "AWS secret access key",
    )


class Sqs:
    """Sends each transition and waits for the queue's answer."""

    def __init__(self, settings: SqsSettings) -> None:
        self._settings = settings
        self._is_fifo = settings.sqs_queue_url.endswith(FIFO_SUFFIX)
        # The client is a pool that replaces its connections itself: no error makes it unusable.
        self._shared = SharedConnection(self._connect, lost=())

    async def __call__(self, transition: StatusTransition) -> None:
        """Send; return when the queue has stored the message."""
        message = cloudevents.message(transition)
        body = _FORBIDDEN.sub(_escaped, message.body.decode())
        if _size(body, message.headers) > MAX_BYTES:
            raise Undeliverable("message_too_large")
        fifo = {
            "MessageGroupId": _short(message.key),
            "MessageDeduplicationId": _short(message.deduplication_id),
        }
        async with self._client() as client:
            await client.send_message(
                QueueUrl=self._settings.sqs_queue_url,
                MessageBody=body,
                MessageAttributes={
                    name: {"DataType": "String", "StringValue": _FORBIDDEN.sub("?", value)}
                    for name, value in message.headers.items()
                },
                **(fifo if self._is_fifo else {}),
            )

    async def check(self) -> None:
        """Ask the queue for its name.

        Raises:
            ConfigError: Queue, region or credentials are missing or refused.
            ConnectionError: SQS does not answer.
        """
        try:
            async with self._client() as client:
                await client.get_queue_attributes(
                    QueueUrl=self._settings.sqs_queue_url, AttributeNames=["QueueArn"]
                )
        except BrokerRefusedError as error:
            raise ConfigError([error.problem]) from None

    async def aclose(self) -> None:
        """Close the connections."""
        await self._shared.close()

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[Any]:
        """Yield the client, and translate the errors that it raises."""
        try:
            async with self._shared.acquire() as client:
                yield client
        except ClientError as error:
            raise _refusal(error) from None
        except (NoCredentialsError, PartialCredentialsError):
            raise BrokerRefusedError("SQS_ACCESS_KEY_ID: there are no credentials") from None
        except NoRegionError:
            raise BrokerRefusedError("SQS_REGION: there is no region") from None
        except (BotoCoreError, ResponseParserError) as error:
            raise Unreachable(_reason(error)) from None

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[Any]:
        settings = self._settings
        url = urlsplit(settings.sqs_queue_url)
        region = _REGION.search(url.netloc)
        async with get_session().create_client(
            "sqs",
            endpoint_url=f"{url.scheme}://{url.netloc}",
            region_name=settings.sqs_region or (region and region[1]),
            aws_access_key_id=settings.sqs_access_key_id or None,
            aws_secret_access_key=settings.sqs_secret_access_key.reveal() or None,
            config=AioConfig(
                connect_timeout=CONNECT_TIMEOUT_S,
                # Below PUBLISH_TIMEOUT_S, which would discard the client for all calls.
                read_timeout=PUBLISH_TIMEOUT_S - 1,
                # Retries are the dispatcher's job.
                retries={"total_max_attempts": 1},
                max_pool_connections=CONNECTIONS,
            ),
        ) as client:
            yield client


@asynccontextmanager
async def open(environ: Mapping[str, str]) -> AsyncIterator[Handler]:  # noqa: A001 - the protocol's word
    """Yield the handler; connections are made on first use.

    Raises:
        ConfigError: SQS_QUEUE_URL is missing, or settings are wrong.
    """
    settings = environment.read(SqsSettings, environ)
    if not settings.sqs_queue_url:
        raise ConfigError(["SQS_QUEUE_URL: expected a queue's URL"])
    if bool(settings.sqs_access_key_id) != bool(settings.sqs_secret_access_key.reveal()):
        raise ConfigError(["SQS_ACCESS_KEY_ID: expected together with SQS_SECRET_ACCESS_KEY"])
    disable_loggers("aiobotocore", "botocore")
    async with aclosing(Sqs(settings)) as handler:
        yield handler


def _size(body: str, headers: Mapping[str, str]) -> int:
    attributes = (f"{name}String{value}" for name, value in headers.items())
    return sum(len(one.encode()) for one in (body, *attributes))


def _escaped(found: re.Match[str]) -> str:
    """Return the JSON escape of a character, which can only be part of a string."""
    return f"\\u{ord(found[0]):04x}"


def _short(text: str) -> str:
    """Return *text* if SQS takes it as an id, else its beginning and a hash."""
    if len(text) <= MAX_ID_CHARACTERS:
        return text
    digest = sha256(text.encode()).hexdigest()
    return f"{text[: MAX_ID_CHARACTERS - len(digest) - 1]}.{digest}"


def _reason(error: BotoCoreError | ResponseParserError) -> str:
    """Return the reason for an error that is no answer of SQS."""
    if isinstance(error, ConnectTimeoutError | ReadTimeoutError):
        return "timed_out"
    return "certificate_untrusted" if isinstance(error, SSLError) else "connection_lost"


def _refusal(error: ClientError) -> Exception:
    """Return `Undeliverable` if the message is at fault, `Unreachable` if the queue is."""
    found = error.response.get("Error", {})
    code = str(found.get("Code", ""))
    if code in _MESSAGE_REFUSED:
        too_large = _TOO_LARGE in str(found.get("Message", ""))
        return Undeliverable("message_too_large" if too_large else "message_refused")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    reason = _refusal_reason(code, status)
    if reason in _PROBLEMS:
        return BrokerRefusedError(f"SQS_QUEUE_URL: {_PROBLEMS[reason]}", reason)
    return Unreachable(reason) if reason else RuntimeError("refused by SQS")


def _refusal_reason(code: str, status: int) -> str:
    """Return the reason if SQS would refuse any message, or an empty text if unknown."""
    if code in _THROTTLED:
        return "throttled"
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return "server_failed"
    if code in _ACCESS_REFUSED or status == HTTPStatus.FORBIDDEN:
        return "access_refused"
    if code.startswith(_KEY_REFUSED):
        return "key_refused"
    return _QUEUE_REFUSED.get(code, "")
