"""Events of one session, and an inbox whose writes in Redis a test can read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import orjson

from service.config import Settings
from service.inbox.admission import Admission, Inbox
from service.secret import Secret
from service.storage.connections import connect
from service.storage.keys import Keys
from service.stripe.events import Event, parse
from service.stripe.signatures import VerifiedPayload
from service.transitions import stream_entry, thin_notification
from service.transitions.thin_notification import Notification
from service.transitions.transition import StatusTransition, make_change

NOW = int(time.time()) - 3600
PREFIX = "identity.verification_session."
# Longer than anything in a test takes: it passes when the test moves the clock.
DEADLINE_S = 600.0
STATE = ("sequence", "epoch", "server", "hash", "kind")
EVENT_ID = "evt_1PgafTB7WZ01zgkWKhTeq3Xy"
SESSION_ID = "vs_1PgafTB7WZ01zgkWKhTeq3Xy"


def make_event(
    step: str = "created",
    status: str = "requires_input",
    *,
    id: str | None = None,
    at: int = 0,
    session: str = SESSION_ID,
    error: str | None = None,
    redaction: str | None = None,
    report: str | dict[str, Any] | None = None,
    **more: Any,
) -> Event:
    """Return an event of a session, *at* seconds after NOW."""
    body = {
        "id": id or f"evt_{step}_{NOW + at}",
        "type": PREFIX + step,
        "created": NOW + at,
        "data": {
            "object": {
                "id": session,
                "status": status,
                "last_error": error and {"code": error},
                "redaction": redaction and {"status": redaction},
                "last_verification_report": report,
                **more,
            }
        },
    }
    return parsed(orjson.dumps(body))


def make_notification(
    step: str = "verified",
    *,
    id: str = "evt_thin",
    at: int = 0,
    session: str = SESSION_ID,
    **more: Any,
) -> Notification:
    """Return a notification about a session, whose event was created *at* seconds after NOW."""
    return Notification(
        event_id=id,
        event_type=PREFIX + step,
        session_id=session,
        created=NOW + at,
        livemode=False,
        received_at=NOW + at + 1.5,
        **more,
    )


def parsed(body: bytes) -> Event:
    """Return the event in *body* as if its signature had been verified."""
    event = parse(VerifiedPayload(body, "fingerprint"))
    assert isinstance(event, Event)
    return event


CREATED = make_event("created", "requires_input", at=0)
PROCESSING = make_event("processing", "processing", at=10)
FAILED = make_event("requires_input", "requires_input", at=20, error="document_expired")
VERIFIED = make_event("verified", "verified", at=40, report="vr_1")


class InspectedInbox(NamedTuple):
    """An inbox, and a view of everything that it wrote."""

    inbox: Inbox
    client: Any
    keys: Keys

    async def admit(self, *events: Event) -> list[Admission]:
        """Admit *events* one after the other."""
        return [await self.inbox.admit(event, make_change(event)) for event in events]

    async def together(self, *events: Event) -> list[Admission | BaseException]:
        """Admit *events* in one loop turn."""
        return await asyncio.gather(
            *(self.inbox.admit(event, make_change(event)) for event in events),
            return_exceptions=True,
        )

    async def note(self, *notifications: Notification) -> list[Admission | BaseException]:
        """Note *notifications* in one loop turn."""
        return await asyncio.gather(
            *(self.inbox.note(one) for one in notifications), return_exceptions=True
        )

    async def notifications(self) -> list[Notification]:
        """Return the notifications that wait, oldest first within each partition."""
        streams = [
            await self.client.xrange(self.keys.notifications(partition))
            for partition in range(self.keys.partitions)
        ]
        return [thin_notification.unpack(fields) for stream in streams for _, fields in stream]

    async def record(self, session: str = SESSION_ID) -> dict[str, str]:
        """Return a session's record, its state field by field."""
        found = await self.client.hgetall(self.keys.session(session))
        fields = {name.decode(): value.decode() for name, value in found.items()}
        if "state" in fields:
            numbers = fields.pop("state").split(" ")
            fields |= zip(STATE, numbers, strict=True)
            length, words = fields["status"].split(" ", 1)
            fields |= {"status": words[: int(length)], "previous": words[int(length) :]}
        return fields

    async def entries(self) -> list[dict[bytes, bytes]]:
        """Return all stream entries, oldest first within each partition."""
        streams = [
            await self.client.xrange(self.keys.transitions(partition))
            for partition in range(self.keys.partitions)
        ]
        return [fields for stream in streams for _, fields in stream]

    async def transitions(self, session: str = SESSION_ID) -> list[StatusTransition]:
        """Return a session's transitions as handlers will read them."""
        found = [stream_entry.unpack(fields) for fields in await self.entries()]
        return [one for one in found if one.session_id == session]


OpenInbox = Callable[..., InspectedInbox]


@asynccontextmanager
async def inbox_at(
    url: str, make_settings: Callable[..., Settings], **changes: Any
) -> AsyncIterator[InspectedInbox]:
    """Yield an inbox with clients of its own."""
    chosen = make_settings(redis_url=Secret(url), **changes)
    keys = Keys(chosen.redis_prefix, chosen.partitions)
    async with connect(chosen.redis_url) as connections:
        yield InspectedInbox(Inbox(connections, keys, chosen), connections.client, keys)


def outcomes(answers: Sequence[Admission | BaseException]) -> list[str]:
    """Return the words of *answers*: outcomes, and reasons why there is none."""
    return [
        str(answer.outcome) if isinstance(answer, Admission) else str(answer) for answer in answers
    ]
