"""The events of a chaos run: lives of synthetic sessions with a canary in each secret field.

Among them what Stripe also sends: two events for one change, events that are too old, and events
that are nothing for us. Pure: the same seed gives the same lives.
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


class Letter(NamedTuple):
    """An event and the body that tells of it."""

    event: Event
    body: bytes


def lives(random: Random, now: int) -> Iterator[list[Letter]]:
    """Yield the events of one session after the other, for ever, each in its order."""
    while True:
        age_days = 40 if random.random() < EXPIRED else 5
        name = random.choice([*LIFECYCLES])
        simulated = lifecycle_events(name, random=random, started_at=now - age_days * DAY_S)
        told = [orjson.loads(one.body) for one in simulated]
        if random.random() < TWINS:
            told.append(told[-1] | {"id": f"{told[-1]['id']}twin"})
        if random.random() < FOREIGN:
            told.append(told[0] | {"id": f"{told[0]['id']}else", "type": "account.updated"})
        yield [_letter(one) for one in told]


def _letter(told: dict[str, Any]) -> Letter:
    session = _with_canaries(told["data"]["object"])
    told = told | {"data": {"object": session}}
    return Letter(event_of(told), orjson.dumps(told))


def event_of(told: dict[str, Any]) -> Event:
    """Return what of an event's JSON decides about its place."""
    session = told["data"]["object"]
    report = session["last_verification_report"]
    return Event(
        id=told["id"],
        session_id=session["id"],
        type=told["type"],
        created=told["created"],
        status=session["status"],
        redaction=(session["redaction"] or {}).get("status"),
        error=(session["last_error"] or {}).get("code"),
        report=report["id"] if isinstance(report, dict) else report,
    )


def _with_canaries(session: dict[str, Any]) -> dict[str, Any]:
    """Return *session* with something to be kept secret wherever it can hold that."""
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
