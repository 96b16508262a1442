"""The `sqs` handler against moto, and against a fake SQS for errors that moto does not make."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import pytest
from botocore.loaders import JSONFileLoader

from service.errors import ConfigError, Undeliverable, Unreachable
from service.handlers import Handler, sqs
from service.transitions.cloudevents import message
from tests.handlers.contract import QueueContract, check
from tests.support.brokers.broker import transition
from tests.support.brokers.sqs import REGION, SqsBroker, run_broker

SETTINGS = {"SQS_REGION": REGION, "SQS_ACCESS_KEY_ID": "tests", "SQS_SECRET_ACCESS_KEY": "tests"}
ACCEPTED = {"MessageId": "1", "MD5OfMessageBody": ""}


@pytest.fixture(scope="module", autouse=True)
def data_files() -> Iterator[None]:
    """Read botocore's data files, of a megabyte, once and not for each client."""
    loader = JSONFileLoader()
    read = functools.cache(loader.load_file)
    with mock.patch.object(JSONFileLoader, "load_file", lambda _, path: read(path)):
        yield


@pytest.fixture(scope="class")
def broker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SqsBroker]:
    """Run a queue of the kind that the class tests."""
    with run_broker(tmp_path_factory.mktemp("sqs"), request.cls.queue) as broker:
        yield broker


class TestFifo(QueueContract):
    """The contract of every queue on a FIFO queue."""

    opener = "service.handlers.sqs:open"
    queue = "contract.fifo"

    async def test_a_session_is_a_group(self, broker: SqsBroker) -> None:
        """Each session is a message group."""
        async with self.opened(broker.environ()) as handler:
            for sequence, session in itertools.product((1, 2), "ab"):
                await handler(transition(session, sequence))

        groups = [one.key for one in await broker.received()]
        assert sorted(map(str, groups)) == ["vs_a", "vs_a", "vs_b", "vs_b"]


class TestStandard(QueueContract):
    """The contract of every queue on a standard queue."""

    opener = "service.handlers.sqs:open"
    queue = "contract"


@asynccontextmanager
async def fake_sqs(
    status: int, answer: dict[str, str]
) -> AsyncIterator[tuple[dict[str, str], list[dict[str, Any]]]]:
    """Yield the settings for a fake SQS that gives every request one answer, and the requests."""
    requests: list[dict[str, Any]] = []
    body = json.dumps(answer)
    response = f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
        requests.append(json.loads(await reader.readexactly(length)))
        writer.write(response)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield {**SETTINGS, "SQS_QUEUE_URL": f"http://127.0.0.1:{port}/1/queue.fifo"}, requests


@asynccontextmanager
async def opened_with_error(status: int, code: str, text: str = "") -> AsyncIterator[Handler]:
    """Yield a handler whose every request gets an error of SQS."""
    answer = {"__type": f"com.amazonaws.sqs#{code}", "message": text}
    async with fake_sqs(status, answer) as (environ, _), sqs.open(environ) as handler:
        yield handler


@pytest.mark.parametrize(
    ("code", "text", "reason"),
    [
        ("InvalidParameterValue", "Message must be shorter than 1024 bytes.", "message_too_large"),
        ("InvalidParameterValue", "Something else", "message_refused"),
        ("InvalidMessageContents", "Invalid binary character", "message_refused"),
    ],
)
async def test_a_refused_message_is_undeliverable(code: str, text: str, reason: str) -> None:
    """Errors about the message make it undeliverable, with a reason for the dead letter."""
    async with opened_with_error(400, code, text) as handler:
        with pytest.raises(Undeliverable, match=f"^{reason}$"):
            await handler(transition("a", 1))


@pytest.mark.parametrize(
    ("status", "code", "reason", "problem"),
    [
        (400, "RequestThrottled", "throttled", None),
        (400, "ThrottlingException", "throttled", None),
        (400, "KmsThrottled", "throttled", None),
        (403, "Throttling", "throttled", None),
        (500, "InternalFailure", "server_failed", None),
        (503, "ServiceUnavailable", "server_failed", None),
        (403, "InvalidClientTokenId", "access_refused", "the credentials"),
        (403, "SignatureDoesNotMatch", "access_refused", "the credentials"),
        (403, "SomethingNew", "access_refused", "the credentials"),
        (400, "AccessDeniedException", "access_refused", "the credentials"),
        (400, "ExpiredTokenException", "access_refused", "the credentials"),
        (400, "InvalidAddress", "no_such_queue", "there is no such queue"),
        (400, "QueueDoesNotExist", "no_such_queue", "there is no such queue"),
        (400, "UnsupportedOperation", "operation_unsupported", "the queue takes no such message"),
        (400, "KmsDisabled", "key_refused", "the queue's key"),
        (400, "KmsAccessDenied", "key_refused", "the queue's key"),
    ],
)
async def test_a_refusing_queue_is_waited_for(
    status: int, code: str, reason: str, problem: str | None
) -> None:
    """Errors of SQS or the queue make it unreachable; a check reports what can be corrected."""
    found: tuple[type[Exception], str] = (Unreachable, f"^{reason}$")
    if problem is not None:
        found = (ConfigError, f"^SQS_QUEUE_URL: {problem}")
    async with opened_with_error(status, code) as handler:
        with pytest.raises(Unreachable, match=f"^{reason}$"):
            await handler(transition("a", 1))
        with pytest.raises(found[0], match=found[1]):
            await check(handler)


async def test_forbidden_characters_are_escaped() -> None:
    """Characters that SQS refuses are sent as JSON escapes, so the JSON stays the same."""
    taken = transition("a", 1, metadata={"odd": "\ufffe\uffff\t\x7f\U0001fffe"})
    async with fake_sqs(200, ACCEPTED) as (environ, sent), sqs.open(environ) as handler:
        await handler(taken)
    [one] = sent
    assert not {"\ufffe", "\uffff"} & {*one["MessageBody"]}
    assert json.loads(one["MessageBody"]) == json.loads(message(taken).body)


async def test_long_ids_are_shortened_and_stay_different() -> None:
    """Group and deduplication ids have at most 128 characters, equal for equal ids."""
    long = "x" * 250
    async with fake_sqs(200, ACCEPTED) as (environ, sent), sqs.open(environ) as handler:
        for name in (f"{long}a", f"{long}b", f"{long}a", "short"):
            await handler(transition(name, 1))
    for field in ("MessageGroupId", "MessageDeduplicationId"):
        first, second, again, short = (one[field] for one in sent)
        assert first == again != second
        assert [len(one) for one in (first, second)] == [128, 128]
        assert re.fullmatch(r"[!-~]{1,128}", first)
        assert short in ("vs_short", "evt_short_1")


async def test_an_unknown_error_counts_an_attempt() -> None:
    """An unknown error code is a failed attempt."""
    async with opened_with_error(400, "SomethingNew") as handler:
        with pytest.raises(RuntimeError, match=r"^refused by SQS$"):
            await handler(transition("a", 1))


async def test_missing_credentials_and_region_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a region or credentials the queue is unreachable; a check says what is missing."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    environ = {"SQS_QUEUE_URL": "http://127.0.0.1:1/1/queue"}
    regional = {"SQS_QUEUE_URL": "http://sqs.eu-west-1.localhost:1/1/queue"}
    for name, settings in (("SQS_REGION", environ), ("SQS_ACCESS_KEY_ID", regional)):
        async with sqs.open(settings) as handler:
            with pytest.raises(ConnectionError):
                await handler(transition("a", 1))
            with pytest.raises(ConfigError, match=f"^{name}: "):
                await check(handler)


@pytest.mark.parametrize(
    ("name", "environ"),
    [
        ("SQS_QUEUE_URL", {}),
        ("SQS_QUEUE_URL", {"SQS_QUEUE_URL": "queue.fifo"}),
        ("SQS_QUEUE_URL", {"SQS_QUEUE_URL": "https://user:canary@host/1/queue"}),
        ("SQS_REGION", {"SQS_QUEUE_URL": "https://host/1/queue", "SQS_REGION": "Über"}),
        ("SQS_ACCESS_KEY_ID", {"SQS_QUEUE_URL": "https://host/1/q", "SQS_ACCESS_KEY_ID": "canary"}),
    ],
)
async def test_wrong_settings_are_reported_by_name(name: str, environ: dict[str, str]) -> None:
    """Opening names the wrong or missing variable, and does not show its value."""
    with pytest.raises(ConfigError, match=f"^{name}: ") as raised:
        async with sqs.open(environ):
            pass
    assert "canary" not in str(raised.value)
