"""One bounded GET of Stripe's API, and its errors as words from a closed list.

| answer                                    | becomes                  | tried again         |
|-------------------------------------------|--------------------------|---------------------|
| 200 with JSON                             | the body                 |                     |
| 401, or no key for the mode               | `api_unauthorized`       | no                  |
| 403                                       | `api_forbidden`          | no                  |
| 404                                       | `api_not_found`          | no                  |
| 429                                       | `api_rate_limited`       | after `Retry-After` |
| no or half an answer, 409, 5xx            | `api_unreachable`        | after a pause       |
| anything else: redirects, too many bytes, | `api_unexpected`         | no                  |
| other types of content                    |                          |                     |

All attempts and the pauses between them share one deadline. Nothing of a request or of an answer
is logged, and no exception of the HTTP library is kept: those hold the key and the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from enum import StrEnum
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import msgspec

from ..config import DAY_S
from ..errors import ApiError, ApiErrorReason, ConfigError
from ..telemetry import metrics
from .keys import ApiKeys
from .rate_limit import Priority, RateLimiter

if TYPE_CHECKING:
    import httpx2

Found = TypeVar("Found")

# The versions of events are those of the account; this one is of the answers around them.
API_VERSION: Final = "2026-10-28.endive"
DEADLINE_S: Final = 20.0
CONNECT_TIMEOUT_S: Final = 5.0
# Between two pieces of an answer.
READ_TIMEOUT_S: Final = 10.0
MAX_CONNECTIONS: Final = 20
KEEP_ALIVE_S: Final = 60.0
MAX_OBJECT_BYTES: Final = 1024 * 1024
# A page has up to a hundred objects.
MAX_PAGE_BYTES: Final = 8 * 1024 * 1024
MAX_ATTEMPTS: Final = 5
RETRY_INITIAL_DELAY_S: Final = 0.5

# Stripe keeps events for 30 days.
EVENTS_KEPT_S: Final = 31 * DAY_S

OK: Final = "ok"
# What may become the value of a header, or part of one.
_ID: Final = re.compile(r"[A-Za-z0-9_/-]{1,255}")
_SECONDS: Final = re.compile(r"[0-9]{1,6}")


class ApiEndpoint(StrEnum):
    """What is read: a closed list for metrics."""

    EVENTS = "events"
    EVENT = "event"
    THIN_EVENT = "thin_event"
    SESSION = "session"
    WEBHOOK_ENDPOINTS = "webhook_endpoints"
    EVENT_DESTINATIONS = "event_destinations"

    @property
    def max_bytes(self) -> int:
        """The most bytes that its answer may have."""
        is_page = self.value.endswith("s")
        return MAX_PAGE_BYTES if is_page else MAX_OBJECT_BYTES


class Caller(NamedTuple):
    """Whose objects are read.

    Attributes:
        is_live: Their mode, which chooses the key.
        account: A connected account (`acct_…`); None for that of the key.
        context: The context that a thin event names; None for that of the key.
    """

    is_live: bool
    account: str | None = None
    context: str | None = None


class _Failure(NamedTuple):
    """Why an attempt brought no answer, and whether another one may."""

    reason: ApiErrorReason
    is_temporary: bool = False
    retry_after_s: float = 0.0


_UNREACHABLE = _Failure(ApiErrorReason.UNREACHABLE, is_temporary=True)
_UNEXPECTED = _Failure(ApiErrorReason.UNEXPECTED)
_BY_STATUS: Final = {
    401: _Failure(ApiErrorReason.UNAUTHORIZED),
    403: _Failure(ApiErrorReason.FORBIDDEN),
    404: _Failure(ApiErrorReason.NOT_FOUND),
    409: _UNREACHABLE,
}


class StripeApi:
    """Reads Stripe's API; made by `open_api`."""

    def __init__(
        self,
        client: httpx2.AsyncClient,
        keys: ApiKeys,
        limiter: RateLimiter | None,
        open_span: Callable[[str], AbstractContextManager[object]],
    ) -> None:
        self._client = client
        self._keys = keys
        self._limiter = limiter
        self._open_span = open_span

    def holds(self, is_live: bool) -> bool:  # noqa: FBT001 - passed on as a function of the mode
        """Say whether there is a key of a mode."""
        return self._keys.holds(is_live)

    async def get(
        self,
        path: str,
        params: Sequence[tuple[str, str]] = (),
        *,
        caller: Caller,
        priority: Priority,
        endpoint: ApiEndpoint,
    ) -> bytes:
        """Return the body of an answer: JSON that is not decoded yet.

        Args:
            path: Begins with `/v1/` or `/v2/`; ids in it match their patterns.
            params: The query.
            caller: Whose objects are read.
            priority: Who waits when the budget of requests runs out.
            endpoint: What is read.

        Raises:
            ApiError: There was no such answer within `DEADLINE_S`.
            Unavailable: Redis, where the budget is, did not answer.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DEADLINE_S
        request = self._request(path, params, caller)
        attempts = 0
        with self._open_span(endpoint):
            while True:
                await self._take(caller, priority, deadline)
                answer = await self._attempt(request, endpoint, deadline)
                if isinstance(answer, bytes):
                    return answer
                pause_s = answer.retry_after_s + _jitter(attempts)
                attempts += 1
                is_last = attempts == MAX_ATTEMPTS or loop.time() + pause_s >= deadline
                if is_last or not answer.is_temporary:
                    raise ApiError(answer.reason)
                await asyncio.sleep(pause_s)

    def _request(
        self, path: str, params: Sequence[tuple[str, str]], caller: Caller
    ) -> httpx2.Request:
        """Return a request that carries the key, which no variable of the caller's holds then."""
        authorization = self._keys.authorization(is_live=caller.is_live)
        if authorization is None:
            raise ApiError(ApiErrorReason.UNAUTHORIZED)
        named = {"Stripe-Account": caller.account, "Stripe-Context": caller.context}
        given = {name: value for name, value in named.items() if value is not None}
        if not all(map(_ID.fullmatch, given.values())):
            raise ApiError(ApiErrorReason.UNEXPECTED)
        headers = {"Authorization": authorization, **given}
        return self._client.build_request("GET", path, params=[*params], headers=headers)

    async def _take(self, caller: Caller, priority: Priority, deadline: float) -> None:
        if self._limiter is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._limiter.wait(is_live=caller.is_live, priority=priority)
                return
        raise ApiError(ApiErrorReason.RATE_LIMITED)

    async def _attempt(
        self, request: httpx2.Request, endpoint: ApiEndpoint, deadline: float
    ) -> bytes | _Failure:
        """Make an attempt, and count it."""
        with metrics.STRIPE_API_SECONDS.labels(endpoint).time():
            answer = await self._exchange(request, endpoint.max_bytes, deadline)
        outcome = OK if isinstance(answer, bytes) else answer.reason
        metrics.STRIPE_API_REQUESTS.labels(endpoint, outcome).inc()
        return answer

    async def _exchange(
        self, request: httpx2.Request, max_bytes: int, deadline: float
    ) -> bytes | _Failure:
        """Send a request and read its answer."""
        from httpx2 import DecodingError, HTTPError  # noqa: PLC0415  as in `open_api`

        try:
            async with asyncio.timeout_at(deadline):
                response = await self._client.send(request, stream=True)
                async with contextlib.aclosing(response):
                    return await _read(response, max_bytes)
        except DecodingError:
            return _UNEXPECTED
        except (HTTPError, TimeoutError):
            return _UNREACHABLE


@asynccontextmanager
async def open_api(
    address: str,
    keys: ApiKeys,
    limiter: RateLimiter | None = None,
    open_span: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> AsyncIterator[StripeApi]:
    """Yield a client of Stripe's API; its connections are made on first use and closed at the end.

    Args:
        address: Where the API is.
        keys: The keys, which may be replaced meanwhile.
        limiter: The deployment's budget of requests; None for no limit.
        open_span: Enters the span of one request, given its endpoint.

    Raises:
        ConfigError: The environment names a proxy that cannot be used.
    """
    import httpx2  # noqa: PLC0415  processes without a key start without it

    try:
        client = httpx2.AsyncClient(
            base_url=address,
            headers={"Stripe-Version": API_VERSION, "Accept-Encoding": "gzip"},
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            timeout=httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=MAX_CONNECTIONS, keepalive_expiry=KEEP_ALIVE_S),
            # Plain HTTP is for this machine's loopback, which no proxy can reach.
            trust_env=address.startswith("https://"),
        )
    except (ValueError, ImportError, httpx2.InvalidURL):
        client = None
    if client is None:
        raise ConfigError(["HTTPS_PROXY: expected a proxy that can be used"])
    for endpoint in ApiEndpoint:
        for outcome in (OK, *ApiErrorReason):
            metrics.STRIPE_API_REQUESTS.labels(endpoint, outcome)
    async with client:
        yield StripeApi(client, keys, limiter, open_span)


def decode_answer(decode: Callable[[bytes], Found], body: bytes) -> Found:
    """Return what *decode*, of a decoder of msgspec's, makes of an answer.

    Raises:
        ApiError: It does not fit.
    """
    with contextlib.suppress(msgspec.DecodeError, RecursionError, ValueError):
        return decode(body)
    # Not raised inside `except`: the decoder's exception holds its whole input.
    raise ApiError(ApiErrorReason.UNEXPECTED)


def _jitter(attempts: int) -> float:
    """Return the seconds to pause after some attempts; processes must not come back together."""
    return random.uniform(0, RETRY_INITIAL_DELAY_S * 2**attempts)  # noqa: S311


async def _read(response: httpx2.Response, max_bytes: int) -> bytes | _Failure:
    """Return the body of an answer, or why it is none.

    The body of an error is read as well, so that its connection can be used again.
    """
    failure, body = _judge(response), bytearray()
    read = response.aiter_raw() if failure else response.aiter_bytes()
    async with contextlib.aclosing(read) as pieces:
        async for piece in pieces:
            body += piece
            if len(body) > max_bytes:
                return failure or _UNEXPECTED
    return failure or bytes(body)


def _judge(response: httpx2.Response) -> _Failure | None:
    """Return what is wrong with the head of an answer."""
    status, headers = response.status_code, response.headers
    if status == 200:  # noqa: PLR2004
        content_type = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        is_json = content_type == "application/json"
        # Encodings within encodings could unpack to nothing, for ever.
        is_readable = headers.get("Content-Encoding", "identity").lower() in {"gzip", "identity"}
        return None if is_json and is_readable else _UNEXPECTED
    if status == 429:  # noqa: PLR2004
        found = _SECONDS.fullmatch(headers.get("Retry-After", ""))
        after_s = float(found[0]) if found else 0.0
        return _Failure(ApiErrorReason.RATE_LIMITED, is_temporary=True, retry_after_s=after_s)
    if status >= 500:  # noqa: PLR2004
        return _UNREACHABLE
    return _BY_STATUS.get(status, _UNEXPECTED)
