"""Events of one session, and an inbox whose writes in Redis a test can read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

import orjson

from service.config import Settings
from service.inbox.admission import Admission, Inbox
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.storage.scripts import Script
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


def event_body(
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
) -> dict[str, Any]:
    """Return an event of a session as Stripe sends it, created *at* seconds after NOW."""
    return {
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


def make_event(*words: str, **changes: Any) -> Event:
    """Return the event that `event_body` describes."""
    return parsed(event_body(*words, **changes))


def make_notification(
    *, id: str = "evt_thin", at: int = 0, session: str = SESSION_ID
) -> Notification:
    """Return a notification about a session, whose event was created *at* seconds after NOW."""
    return Notification(
        event_id=id,
        event_type=PREFIX + "verified",
        session_id=session,
        created=NOW + at,
        livemode=False,
        received_at=NOW + at + 1.5,
    )


def parsed(body: Mapping[str, Any]) -> Event:
    """Return the event in *body* as if its signature had been verified."""
    event = parse(VerifiedPayload(orjson.dumps(body), "fingerprint"))
    assert isinstance(event, Event)
    return event


CREATED = make_event("created", "requires_input", at=0)
PROCESSING = make_event("processing", "processing", at=10)
FAILED = make_event("requires_input", "requires_input", at=20, error="document_expired")
VERIFIED = make_event("verified", "verified", at=40, report="vr_1")


class InspectedInbox(NamedTuple):
    """An inbox, and a view of everything that it wrote."""

    inbox: Inbox
    connections: Connections
    keys: Keys

    @property
    def client(self) -> Any:
        """The client of its Redis."""
        return self.connections.client

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
        found = await self._entries(self.keys.notifications)
        return [thin_notification.unpack(fields) for fields in found]

    async def ask(self, keys: Sequence[str], *event: str | int) -> tuple[str, int]:
        """Return the script's answer about one event, and how many changes it has written.

        Args:
            keys: The stream, and the record or the key of a known notification.
            event: The eight arguments that stand for it.
        """
        layout = self.keys.layout_in(self.keys.partition(SESSION_ID))
        policy = [int(time.time()), 0, 0, 300, self.keys.layout_copy, 5, 9**9, 9]
        before = await self._changes()
        [answer] = await self.client.eval(
            Script("service.inbox", "admit.lua").source, 3, layout, *keys, *policy, *event
        )
        return answer.decode(), await self._changes() - before

    async def _changes(self) -> int:
        return int((await self.client.info("persistence"))["rdb_changes_since_last_save"])

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
        return await self._entries(self.keys.transitions)

    async def _entries(self, stream: Callable[[int], str]) -> list[dict[bytes, bytes]]:
        streams = [
            await self.client.xrange(stream(partition)) for partition in range(self.keys.partitions)
        ]
        return [fields for entries in streams for _, fields in entries]

    async def transitions(self, session: str = SESSION_ID) -> list[StatusTransition]:
        """Return a session's transitions as handlers will read them."""
        found = [stream_entry.unpack(fields) for fields in await self.entries()]
        return [one for one in found if one.session_id == session]


OpenInbox = Callable[..., InspectedInbox]
InboxAt = Callable[..., AbstractAsyncContextManager[InspectedInbox]]


def inspected(
    connections: Connections, settings: Settings, *, judges_age: bool = True
) -> InspectedInbox:
    """Return an inbox with a layout of its settings."""
    keys = Keys(settings.redis_prefix, settings.partitions)
    inbox = Inbox(connections, keys, settings, judges_age=judges_age)
    return InspectedInbox(inbox, connections, keys)


def outcomes(answers: Sequence[Admission | BaseException]) -> list[str]:
    """Return the words of *answers*: outcomes, and reasons why there is none."""
    return [
        str(answer.outcome) if isinstance(answer, Admission) else str(answer) for answer in answers
    ]
