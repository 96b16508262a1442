"""Sends signed events to an endpoint, as Stripe would, and counts the answers.

It prints nothing and retries nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Final

import orjson

from ..errors import ConfigError
from ..secret import Secret
from ..stripe.signatures import sign
from .synthetic_events import SyntheticEvent

if TYPE_CHECKING:
    import ssl

    import httpx2

TIMEOUT_S: Final = 10.0
HEADERS: Final[Mapping[str, str]] = {
    "User-Agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
    "Content-Type": "application/json; charset=utf-8",
}

_WORD: Final = re.compile(r"[a-z][a-z0-9_]{0,39}")
_OK: Final = range(200, 300)


@dataclass(frozen=True, kw_only=True)
class WebhookRequest:
    """One body to sign and send.

    Attributes:
        body: The raw bytes.
        ordering_key: Requests with the same key are sent one after the other, each after the answer
            to the one before; those without a key wait for none.
        signature: The header to send instead of a genuine one; empty to send none.
    """

    body: bytes = field(repr=False)
    ordering_key: str | None = None
    signature: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The outcome of one request.

    Attributes:
        request: What was sent.
        outcome: The JSON answer's `outcome` or `error`, else `http_<status>`, or `unreachable`.
        status: The HTTP status; None when there was no answer.
        elapsed_s: Seconds from sending to the end of the answer.
    """

    request: WebhookRequest
    outcome: str
    status: int | None
    elapsed_s: float

    @property
    def ok(self) -> bool:
        """Whether Stripe would take this answer as an acknowledgement."""
        return self.status in _OK


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All answers together: `counts` by outcome, and `ok` when every one was a 2xx."""

    counts: Mapping[str, int]
    total: int
    ok: bool


def plan(
    events: Iterable[SyntheticEvent], *, duplicates: float, shuffle: bool, random: Random
) -> list[WebhookRequest]:
    """Return requests for *events*, in the order in which to send them.

    Args:
        events: What to send; the events of one session in their order.
        duplicates: The share of events, 0 to 1, to send again at a random later position.
        shuffle: Whether to send in a random order; else each session's events keep theirs.
        random: The source of every choice.
    """
    requests = [
        WebhookRequest(body=event.body, ordering_key=None if shuffle else event.session_id)
        for event in events
    ]
    if shuffle:
        random.shuffle(requests)
    # Positions are real numbers, so that a copy can be placed between any two requests.
    count = len(requests)
    copied = random.sample(range(count), round(duplicates * count))
    placed = [(float(index), index) for index in range(count)]
    placed += [(random.uniform(index, count), index) for index in copied]
    return [requests[index] for _, index in sorted(placed)]


async def send(
    requests: Iterable[WebhookRequest],
    *,
    to: str,
    secret: Secret[bytes],
    rate: float | None = None,
    concurrency: int = 8,
    progress: Callable[[Answer], None] = lambda _: None,
    stopping: asyncio.Event | None = None,
) -> Summary:
    """Sign and post *requests* to the URL *to*, and return the answers, also when stopped early.

    Args:
        requests: In the order in which to start them, see also `WebhookRequest.ordering_key`.
        to: An http or https URL.
        secret: The whole signing secret, `whsec_` included.
        rate: The maximum number per second; None for no limit.
        concurrency: The maximum number at a time.
        progress: Called with each answer as it comes.
        stopping: Once set, no further request is started.

    Raises:
        ConfigError: *to* is no http or https URL.
    """
    stopping = stopping or asyncio.Event()
    limiter = _RateLimiter(rate, stopping)
    # One iterator for all workers: each takes the next sequence.
    sequences = iter(_by_ordering_key(requests))
    answers: list[Answer] = []

    async def work(endpoint: _Endpoint) -> None:
        for request in (one for sequence in sequences for one in sequence):
            await limiter.wait()
            if stopping.is_set():
                return
            answer = await endpoint.deliver(request)
            answers.append(answer)
            progress(answer)

    async with _client(to, concurrency) as client, asyncio.TaskGroup() as workers:
        endpoint = _Endpoint(client=client, to=to, secret=secret)
        for _ in range(concurrency):
            workers.create_task(work(endpoint))
    return _summary(answers)


def _summary(answers: Collection[Answer]) -> Summary:
    return Summary(
        counts=Counter(answer.outcome for answer in answers),
        total=len(answers),
        ok=all(answer.ok for answer in answers),
    )


class _RateLimiter:
    """Lets callers pass in order of arrival, at most *rate* per second."""

    def __init__(self, rate: float | None, stopping: asyncio.Event) -> None:
        self._stopping = stopping
        self._interval_s = 1 / rate if rate else 0.0
        self._free_at = 0.0

    async def wait(self) -> None:
        """Wait until this caller may pass, or until *stopping*."""
        now = asyncio.get_running_loop().time()
        at = max(self._free_at, now)
        self._free_at = at + self._interval_s
        if at > now:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(at):
                    await self._stopping.wait()


def _by_ordering_key(requests: Iterable[WebhookRequest]) -> Iterable[list[WebhookRequest]]:
    """Return the requests of each key as one sequence; one without a key is a sequence alone."""
    sequences: dict[object, list[WebhookRequest]] = {}
    for index, request in enumerate(requests):
        key = index if request.ordering_key is None else request.ordering_key
        sequences.setdefault(key, []).append(request)
    return sequences.values()


def _client(to: str, concurrency: int) -> httpx2.AsyncClient:
    import httpx2  # noqa: PLC0415  receivers and workers start without it

    try:
        address = httpx2.URL(to)
    except httpx2.InvalidURL:
        address = httpx2.URL()
    if address.scheme not in {"http", "https"} or not address.host:
        raise ConfigError(["the address to send to is no http or https URL"])
    return httpx2.AsyncClient(
        headers=HEADERS,
        timeout=TIMEOUT_S,
        verify=_tls_context(),
        limits=httpx2.Limits(max_connections=concurrency),
        # A proxy named in the environment cannot reach this machine's loopback.
        mounts={f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")},
    )


@functools.cache
def _tls_context() -> ssl.SSLContext:
    """Return httpx2's own context, made once: it takes 30 ms, and a self-test has 20 clients."""
    import httpx2  # noqa: PLC0415  as above

    return httpx2.create_ssl_context()


@dataclass(frozen=True, kw_only=True)
class _Endpoint:
    client: httpx2.AsyncClient
    to: str
    secret: Secret[bytes]

    async def deliver(self, request: WebhookRequest) -> Answer:
        """Sign *request* as of now, post it and read the answer."""
        started_at = time.monotonic()
        signature = request.signature
        if signature is None:
            signature = sign(request.body, self.secret, int(time.time()))
        response = await self._post(request.body, signature)
        return Answer(
            request=request,
            outcome=_outcome(response) if response is not None else "unreachable",
            status=response.status_code if response is not None else None,
            elapsed_s=time.monotonic() - started_at,
        )

    async def _post(self, body: bytes, signature: str) -> httpx2.Response | None:
        from httpx2 import RequestError  # noqa: PLC0415  as in `_client`

        headers = {"Stripe-Signature": signature} if signature else {}
        try:
            # The client's own timeout is per read: a trickling answer would never exceed it.
            async with asyncio.timeout(TIMEOUT_S):
                return await self.client.post(self.to, content=body, headers=headers)
        except (RequestError, TimeoutError):
            return None


def _outcome(answer: httpx2.Response) -> str:
    """Return the word that a JSON answer has as `outcome` or `error`, else its status."""
    try:
        found = orjson.loads(answer.content)
    except orjson.JSONDecodeError:
        found = None
    words = [found.get("outcome"), found.get("error")] if isinstance(found, dict) else []
    for word in words:
        if isinstance(word, str) and _WORD.fullmatch(word):
            return word
    return f"http_{answer.status_code}"
