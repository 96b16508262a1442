"""The documented recipe: FastAPI, stripe-python's `construct_event`, redis-py's asyncio client."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import orjson
import stripe
import structlog
from fastapi import FastAPI, Header, HTTPException, Request
from redis.asyncio import BlockingConnectionPool, Redis

SECRET = os.environ["STRIPE_WEBHOOK_SECRET"]
REMEMBERED_S = 35 * 86_400

structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.JSONRenderer(serializer=orjson.dumps),
    ],
    logger_factory=structlog.BytesLoggerFactory(),
    cache_logger_on_first_use=True,
)
log = structlog.get_logger()
# The default pool fails requests as soon as more of them wait than it has connections.
store = Redis(
    connection_pool=BlockingConnectionPool.from_url(
        os.environ["REDIS_URL"], max_connections=64, timeout=5
    )
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Close the client at the end."""
    yield
    await store.aclose()


app = FastAPI(lifespan=lifespan)


@app.post("/webhooks/stripe")
async def webhook(request: Request, stripe_signature: Annotated[str, Header()]) -> dict[str, str]:
    """Take one event in."""
    try:
        event = stripe.Webhook.construct_event(await request.body(), stripe_signature, SECRET)
    except (ValueError, stripe.SignatureVerificationError) as error:
        raise HTTPException(400) from error
    session = event.data.object
    outcome = "duplicate"
    if await store.set(f"seen:{event.id}", 1, nx=True, ex=REMEMBERED_S):
        outcome = "admitted"
        await store.xadd(
            "transitions",
            {
                "event_id": event.id,
                "type": event.type,
                "session_id": session.id,
                "status": session.status,
                "created": event.created,
            },
        )
    log.info(
        "event.received",
        outcome=outcome,
        event_id=event.id,
        event_type=event.type,
        session_id=session.id,
        status=session.status,
    )
    return {"outcome": outcome}
