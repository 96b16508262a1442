"""The laws of every queue for `sqs`, FIFO and standard, and what only SQS has."""
# ruff: noqa: E402 (what may be missing is imported after the skip)

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.errors import ConfigError, Undeliverable, Unreachable
from service.transitions.cloudevents import message
from tests.handlers import brokers
from tests.handlers.contract import (
    Misconfigured,
    QueueLaws,
    Received,
    Refused,
    check,
    in_order,
    transition,
)
from tests.support import programs

brokers.client_installed("aiobotocore", "sqs")

from service.handlers import sqs
from tests.handlers.moto_queue import MISSING, REGION, MotoQueue, moto_queue, moto_server


class Broker(MotoQueue):
    """What the laws ask of a broker."""

    @property
    def drops_repeats(self) -> bool:
        """Only FIFO queues do."""
        return self._name.endswith(".fifo")

    def environ(self, port: int | None = None, *, credentials: str = "") -> dict[str, str]:
        """Return the settings."""
        return {
            "SQS_QUEUE_URL": self.url_at(port or self.port),
            "SQS_REGION": REGION,
            "SQS_ACCESS_KEY_ID": "tests",
            "SQS_SECRET_ACCESS_KEY": credentials.partition(":")[2] or "tests",
        }

    def _elsewhere(self) -> dict[str, str]:
        return {**self.environ(), "SQS_QUEUE_URL": self.url_at(self.port, "missing.fifo")}

    def refused(self) -> Iterable[Refused]:
        """Return what is refused for good."""
        huge = transition("huge", 1, metadata={"key": "x" * 1_100_000})
        return [
            Refused("message_too_large", self.environ(), huge),
        ]

    def refusing(self) -> Iterable[Refused]:
        """Return a queue that is not there."""
        return [Refused("no_such_queue", self._elsewhere(), transition("a", 1))]

    @asynccontextmanager
    async def away(self) -> AsyncIterator[str]:
        """Delete the queue."""
        async with self._client() as client:
            await client.delete_queue(QueueUrl=self.url)
        yield "no_such_queue"
        async with self._client() as client:
            fifo = {"FifoQueue": "true"} if self.drops_repeats else {}
            await client.create_queue(QueueName=self._name, Attributes=fifo)

    def misconfigured(self) -> Iterable[Misconfigured]:
        """Return what a check finds."""
        return [Misconfigured("SQS_QUEUE_URL", self._elsewhere())]

    async def received(self) -> list[Received]:
        """Return the messages since `empty`."""
        return [
            Received(
                one["Body"].encode(),
                one["Attributes"].get("MessageDeduplicationId"),
                one["Attributes"].get("MessageGroupId"),
                {name: each["StringValue"] for name, each in one["MessageAttributes"].items()},
            )
            for one in await self.messages()
        ]


@contextmanager
def serving(directory: Path, name: str = "everything.fifo") -> Iterator[Broker]:
    """Run one queue until the block is left; it writes nothing."""
    program = moto_server()
    if program is None:
        programs.missing(MISSING)
    queue = Broker(program, name)
    with moto_queue(queue):
        yield queue


@pytest.fixture(scope="class")
def broker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Broker]:
    """Run a queue of the kind that the class is about."""
    with serving(tmp_path_factory.mktemp("sqs"), request.cls.queue) as broker:
        yield broker


class TestFifo(QueueLaws):
    """A FIFO queue."""

    opener = "service.handlers.sqs:open"
    queue = "laws.fifo"

    async def test_a_repeat_is_taken_and_not_delivered(self, broker: Broker) -> None:
        """Within five minutes, a repeat is confirmed like the first, even long after others."""
        async with self.opened(broker.environ()) as handler:
            for sequence in (1, 2, 3, 1, 2, 3):
                await handler(transition("a", sequence))

        assert [one.id for one in await broker.received()] == ["evt_a_1", "evt_a_2", "evt_a_3"]

    async def test_a_session_is_a_group(self, broker: Broker) -> None:
        """Consumers get each session as a group of its own, in order."""
        async with self.opened(broker.environ()) as handler:
            for sequence, session in itertools.product((1, 2), "ab"):
                await handler(transition(session, sequence))

        groups = [one.key for one in await broker.received()]
        assert sorted(map(str, groups)) == ["vs_a", "vs_a", "vs_b", "vs_b"]


class TestStandard(QueueLaws):
    """A standard queue."""

    opener = "service.handlers.sqs:open"
    queue = "laws"

    async def test_order_holds_per_session_side_by_side(self, broker: Broker) -> None:  # type: ignore[override]  # our own broker
        """Standard queues promise no order, so none is asked of them; but all is there once."""
        async with self.opened(broker.environ()) as handler:
            sent = itertools.product(range(1, 5), (f"s{n}" for n in range(20)))
            await asyncio.gather(*(handler(transition(name, n)) for n, name in sent))

        received = await broker.received()
        assert len(received) == 80
        found = {session: sorted(each) for session, each in in_order(received).items()}
        assert found == {f"vs_s{n}": [1, 2, 3, 4] for n in range(20)}


@asynccontextmanager
async def answering(status: int, code: str, message: str = "") -> AsyncIterator[dict[str, str]]:
    """Yield the settings for a stand-in for SQS that gives every request one answer."""
    body = json.dumps({"__type": f"com.amazonaws.sqs#{code}", "message": message})
    answer = f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
        await reader.readexactly(length)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield settings(server.sockets[0].getsockname()[1])


def settings(port: int) -> dict[str, str]:
    """Return the settings for a stand-in."""
    return {
        "SQS_QUEUE_URL": f"http://127.0.0.1:{port}/1/queue.fifo",
        "SQS_REGION": REGION,
        "SQS_ACCESS_KEY_ID": "tests",
        "SQS_SECRET_ACCESS_KEY": "tests",
    }


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "RequestThrottled"),
        (400, "ThrottlingException"),
        (400, "KmsThrottled"),
        (403, "Throttling"),
        (500, "InternalFailure"),
        (503, "ServiceUnavailable"),
    ],
)
async def test_throttling_and_faults_are_passing(status: int, code: str) -> None:
    """What SQS says of itself is no fault of the message: calls and checks find it unreachable."""
    async with answering(status, code) as environ, sqs.open(environ) as handler:
        for call in (handler(transition("a", 1)), check(handler)):
            with pytest.raises(ConnectionError):
                await call


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "InvalidClientTokenId"),
        (403, "SignatureDoesNotMatch"),
        (403, "SomethingNew"),
        (400, "AccessDeniedException"),
        (400, "ExpiredTokenException"),
    ],
)
async def test_refused_credentials_wait_for_the_operator(status: int, code: str) -> None:
    """Nothing is buried for credentials that SQS refuses; a check tells of them."""
    async with answering(status, code) as environ, sqs.open(environ) as handler:
        with pytest.raises(ConnectionError):
            await handler(transition("a", 1))
        with pytest.raises(ConfigError, match=r"^SQS_QUEUE_URL: the credentials"):
            await check(handler)


@pytest.mark.parametrize(
    ("code", "message", "word"),
    [
        ("InvalidParameterValue", "Message must be shorter than 1024 bytes.", "message_too_large"),
        ("InvalidParameterValue", "Something else", "message_refused"),
        ("InvalidMessageContents", "Invalid binary character", "message_refused"),
    ],
)
async def test_each_final_refusal_has_its_word(code: str, message: str, word: str) -> None:
    """Codes of SQS that are about the message become words of dead letters."""
    async with answering(400, code, message) as environ, sqs.open(environ) as handler:
        with pytest.raises(Undeliverable, match=f"^{word}$"):
            await handler(transition("a", 1))


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("InvalidAddress", "no_such_queue"),
        ("QueueDoesNotExist", "no_such_queue"),
        ("UnsupportedOperation", "operation_unsupported"),
        ("KmsDisabled", "key_refused"),
        ("KmsAccessDenied", "key_refused"),
    ],
)
async def test_a_queue_that_refuses_everything_is_waited_for(code: str, word: str) -> None:
    """Codes of SQS that are about the queue are no message's fault, and a check tells of them."""
    async with answering(400, code) as environ, sqs.open(environ) as handler:
        with pytest.raises(Unreachable, match=f"^{word}$"):
            await handler(transition("a", 1))
        with pytest.raises(ConfigError, match=r"^SQS_QUEUE_URL: "):
            await check(handler)


@asynccontextmanager
async def recording() -> AsyncIterator[tuple[dict[str, str], list[dict[str, Any]]]]:
    """Yield the settings for a stand-in that takes everything, and what it was sent."""
    sent: list[dict[str, Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
        sent.append(json.loads(await reader.readexactly(length)))
        answer = json.dumps({"MessageId": "1", "MD5OfMessageBody": ""})
        writer.write(f"HTTP/1.1 200 X\r\ncontent-length: {len(answer)}\r\n\r\n{answer}".encode())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield settings(server.sockets[0].getsockname()[1]), sent


async def test_what_sqs_takes_in_no_text_is_escaped() -> None:
    """Two characters that SQS refuses in a body go as JSON escapes; it stays the same JSON."""
    taken = transition("a", 1, metadata={"odd": "\ufffe\uffff\t\x7f\U0001fffe"})
    async with recording() as (environ, sent), sqs.open(environ) as handler:
        await handler(taken)
    [one] = sent
    assert not {"\ufffe", "\uffff"} & {*one["MessageBody"]}
    assert json.loads(one["MessageBody"]) == json.loads(message(taken).body)


async def test_ids_too_long_for_sqs_are_shortened_and_stay_apart() -> None:
    """Groups and deduplication ids have 128 characters at the most, the same for the same."""
    long = "x" * 250
    async with recording() as (environ, sent), sqs.open(environ) as handler:
        for name in (f"{long}a", f"{long}b", f"{long}a", "short"):
            await handler(transition(name, 1))
    for field in ("MessageGroupId", "MessageDeduplicationId"):
        first, second, again, short = (one[field] for one in sent)
        assert first == again != second
        assert [len(one) for one in (first, second)] == [128, 128]
        assert re.fullmatch(r"[!-~]{1,128}", first)
        assert short in ("vs_short", "evt_short_1")


async def test_an_unknown_refusal_counts() -> None:
    """A code that is not known is a failed attempt, no more and no less."""
    async with answering(400, "SomethingNew") as environ, sqs.open(environ) as handler:
        with pytest.raises(RuntimeError, match=r"^refused by SQS$"):
            await handler(transition("a", 1))


async def test_missing_credentials_and_region_wait_for_the_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without any, nothing is sent or buried, and a check names what is missing."""
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
async def test_wrong_settings_are_told_by_name(name: str, environ: dict[str, str]) -> None:
    """Opening names the variable that is wrong or missing, and never its value."""
    with pytest.raises(ConfigError, match=f"^{name}: ") as raised:
        async with sqs.open(environ):
            pass
    assert "canary" not in str(raised.value)
