"""Calls the application without a socket, checks responses, and records request lines. No tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx2
import orjson

from service.telemetry import metrics
from tests.support.harness import SECRET, WEBHOOK, signed

OpenApp = Callable[..., AbstractAsyncContextManager[httpx2.AsyncClient]]

# The default endpoint, and a named one.
TWO_ENDPOINTS = {"": (SECRET,), "acme": (SECRET,)}
PING = orjson.dumps(
    {"id": "evt_t", "object": "v2.core.event", "type": "v2.core.event_destination.ping"}
)


class Log:
    """Stands in for what the request log writes with, and keeps what was written."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.warned: list[str] = []

    def _write(self, event: str, **fields: Any) -> None:
        self.lines.append({"event": event, **fields})

    def write_line(self, level: str, fields: dict[str, Any]) -> None:
        """Keep a line, and whether it is a warning."""
        getattr(self, level)(**fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Keep a line, and that it is a warning."""
        self.warned.append(event)
        self._write(event, **fields)

    info = error = _write


@asynccontextmanager
async def asgi_client(app: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield a client that calls *app*, and raises what it raises."""
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
    # The request log records what was answered when the loop turn is over.
    await asyncio.sleep(0)


async def post_event(
    client: httpx2.AsyncClient,
    body: bytes,
    headers: dict[str, str] | None = None,
    *,
    path: str = WEBHOOK,
) -> httpx2.Response:
    """Post *body*, signed unless *headers* are given."""
    return await client.post(
        path, content=body, headers=signed(body) if headers is None else headers
    )


def assert_response(response: httpx2.Response, status: int, **said: str) -> None:
    """Check a whole response: status, JSON body, and no other headers than these."""
    assert (response.status_code, response.content) == (status, orjson.dumps(said))
    headers = {
        "content-type": "application/json",
        "content-length": str(len(response.content)),
        **({"retry-after": "5"} if status == 503 else {}),
    }
    assert dict(response.headers) == headers


def signature(body: bytes = b"{}", **changes: Any) -> str:
    """Return the value of Stripe-Signature for *body*."""
    return signed(body, **changes)["Stripe-Signature"]


def sample(name: str, **labels: str) -> float:
    """Return the value of a metric."""
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


def counted(outcome: str, event_type: str = metrics.OTHER_TYPE) -> float:
    """Return how many requests had an outcome, or were refused for a reason."""
    return sample("idv_events_total", outcome=outcome, type=event_type)
