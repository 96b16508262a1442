"""The events of a chaos run: synthetic sessions with a canary in each secret field.

Some have what Stripe also sends: two events for one change, events that are too old, and events of
other types. Pure: the same seed gives the same events.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

import orjson

from service.operations.synthetic_events import LIFECYCLES, lifecycle_events
from tests.system.chaos.evidence import Event

CANARY, PUBLISHED = "canary0", "published0"
DAY_S = 86_400
TWINS, EXPIRED, FOREIGN = 0.05, 0.03, 0.03


class Payload(NamedTuple):
    """An event and its body; its thin form too, if Stripe's API has one."""

    event: Event
    body: bytes
    thin_id: str = ""
    thin_body: bytes = b""


def sessions(random: Random, now: int) -> Iterator[list[Payload]]:
    """Yield the events of one session after the other, without end, each in order."""
    while True:
        age_days = 40 if random.random() < EXPIRED else 5
        name = random.choice([*LIFECYCLES])
        simulated = lifecycle_events(name, random=random, started_at=now - age_days * DAY_S)
        events = [orjson.loads(one.body) for one in simulated]
        if random.random() < TWINS:
            events.append(events[-1] | {"id": f"{events[-1]['id']}twin"})
        if random.random() < FOREIGN:
            events.append(events[0] | {"id": f"{events[0]['id']}else", "type": "account.updated"})
        yield [_payload(one) for one in events]


def _payload(event: dict[str, Any]) -> Payload:
    session = _with_canaries(event["data"]["object"])
    event = event | {"data": {"object": session}}
    return Payload(event_of(event), orjson.dumps(event))


def event_of(event: dict[str, Any]) -> Event:
    """Return the fields of an event's JSON that decide about its order and outcome."""
    session = event["data"]["object"]
    report = session["last_verification_report"]
    return Event(
        id=event["id"],
        session_id=session["id"],
        type=event["type"],
        created=event["created"],
        status=session["status"],
        redaction=(session["redaction"] or {}).get("status"),
        error=(session["last_error"] or {}).get("code"),
        report=report["id"] if isinstance(report, dict) else report,
    )


def _with_canaries(session: dict[str, Any]) -> dict[str, Any]:
    """Return *session* with a canary in every field that can hold a secret."""
    secret = {
        "client_secret": f"{session['id']}_secret_{CANARY}",
        "url": f"https://verify.stripe.com/start/{CANARY}",
        "provided_details": {"email": f"{CANARY}@example.com", "phone": CANARY},
        "verified_outputs": {
            "first_name": CANARY,
            "id_number": CANARY,
            "address": {"line1": CANARY, "city": CANARY},
        },
        "metadata": {"user": PUBLISHED},
    }
    if session["last_error"]:
        secret["last_error"] = session["last_error"] | {"reason": f"{CANARY} is expired"}
    if report := session["last_verification_report"]:
        document = {"first_name": CANARY, "number": CANARY, "files": [f"file_{CANARY}"]}
        secret["last_verification_report"] = {
            "id": report,
            "object": "identity.verification_report",
            "document": {"status": "verified", **document},
        }
    return session | secret
