"""Order: a session ends in the same state, in whatever order its events arrive.

Every permutation of every life goes through the script and through the model.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from service.inbox.admission import Admission
from service.transitions import stream_entry
from tests.support import session_record_model
from tests.support.admissions import InspectedInbox, event_body, parsed
from tests.support.session_record_model import DAY_S

STATUSES = {"created": "requires_input"}


class LifeEvent(NamedTuple):
    """One event of a life: the last word of its type, when it was created, what it says."""

    word: str
    at: int
    error: str | None = None
    report: str | None = None
    redaction: str | None = None
    status: str | None = None


CREATED, SUBMITTED = LifeEvent("created", 0), LifeEvent("processing", 30)
VERIFIED = LifeEvent("verified", 60, report="vr_1")
FAILED = LifeEvent("requires_input", 60, error="document_expired", report="vr_1")
SUBMITTED_AGAIN = LifeEvent("processing", 100, report="vr_1")
REJECTED = LifeEvent("requires_input", 4_000, report="vr_1")
ERASING = LifeEvent("verified", 9_000, report="vr_1", redaction="processing")
ERASED = LifeEvent("redacted", 9_900, report="vr_1", redaction="redacted", status="verified")

LIVES: dict[str, tuple[str, list[LifeEvent]]] = {
    "verified": ("verified", [CREATED, SUBMITTED, VERIFIED]),
    "failed, then verified": (
        "verified",
        [CREATED, SUBMITTED, FAILED, SUBMITTED_AGAIN, VERIFIED._replace(at=130, report="vr_2")],
    ),
    "failed twice": (
        "requires_input",
        [CREATED, SUBMITTED, FAILED, SUBMITTED_AGAIN, FAILED._replace(at=130, report="vr_2")],
    ),
    "submitted again at once": (
        "verified",
        [
            *(CREATED, SUBMITTED, FAILED._replace(at=40), SUBMITTED_AGAIN._replace(at=43)),
            VERIFIED._replace(at=50, report="vr_2"),
        ],
    ),
    "canceled": ("canceled", [CREATED, LifeEvent("canceled", 60)]),
    "declined": ("requires_input", [CREATED, LifeEvent("requires_input", 60, "consent_declined")]),
    "rejected on review": ("requires_input", [CREATED, SUBMITTED, VERIFIED, REJECTED]),
    "approved on review": ("verified", [CREATED, SUBMITTED, FAILED, VERIFIED._replace(at=4_000)]),
    "rejected and approved again": (
        "verified",
        [CREATED, SUBMITTED, VERIFIED, REJECTED, VERIFIED._replace(at=8_000)],
    ),
    "rejected and tried again": (
        "verified",
        [
            *(CREATED, SUBMITTED, VERIFIED, REJECTED, SUBMITTED_AGAIN._replace(at=5_000)),
            VERIFIED._replace(at=5_060, report="vr_2"),
        ],
    ),
    "redacted": ("redacted", [CREATED, SUBMITTED, VERIFIED, ERASING, ERASED]),
    "redacted while open": (
        "redacted",
        [
            CREATED,
            LifeEvent("canceled", 60, redaction="processing"),
            LifeEvent("redacted", 9_900, redaction="redacted", status="canceled"),
        ],
    ),
    "rejected and redacted": (
        "redacted",
        [CREATED, SUBMITTED, VERIFIED, REJECTED, ERASED._replace(status="requires_input")],
    ),
    "test mode, all in one second": (
        "verified",
        [CREATED, SUBMITTED._replace(at=0), VERIFIED._replace(at=0)],
    ),
    "test mode, failed in one second": (
        "verified",
        [
            *(CREATED, SUBMITTED._replace(at=0), FAILED._replace(at=0)),
            *(SUBMITTED_AGAIN._replace(at=8), VERIFIED._replace(at=8, report="vr_2")),
        ],
    ),
    "a check that ends a second before it begins": (
        "verified",
        [CREATED, SUBMITTED._replace(at=31), VERIFIED._replace(at=30)],
    ),
    "a check that begins a second before the session": (
        "verified",
        [
            *(CREATED._replace(at=1), SUBMITTED._replace(at=0), FAILED._replace(at=20)),
            *(SUBMITTED_AGAIN._replace(at=60), VERIFIED._replace(at=59, report="vr_2")),
        ],
    ),
    "two events for one change": (
        "verified",
        [CREATED, SUBMITTED, FAILED, FAILED, SUBMITTED_AGAIN, VERIFIED._replace(at=130)],
    ),
    "two changes in one second": (
        "requires_input",
        [CREATED, SUBMITTED, FAILED, FAILED._replace(error="abandoned")],
    ),
}


def make_events(session: str, life: list[LifeEvent]) -> list[Any]:
    """Return the events of a life, as Stripe would send them; ids in the order of the life."""
    return [
        event_body(
            one.word,
            one.status or STATUSES.get(one.word, one.word),
            id=f"evt_{session}_{number}",
            at=one.at - 7 * DAY_S,
            session=f"vs_{session}",
            error=one.error,
            report=one.report,
            redaction=one.redaction,
        )
        for number, one in enumerate(life)
    ]


def orders(life: list[LifeEvent]) -> Iterator[list[Any]]:
    """Yield every order of a life's events, each of a session of its own."""
    for number, order in enumerate(itertools.permutations(range(len(life)))):
        events = make_events(f"{number}", life)
        yield [events[n] for n in order]


def admit_in_model(
    arrivals: list[Any],
) -> tuple[list[tuple[str, int]], session_record_model.Record]:
    """Return the model's answer to each event, and its record after all of them."""
    model = session_record_model.Model()
    answers = [
        model.admit(event, "nonce", now=time.time(), age_limit_s=35 * DAY_S)[:2]
        for event in arrivals
    ]
    [record] = model.records.values()
    return answers, record


async def admit_all(
    inbox: InspectedInbox, arrivals: list[list[Any]]
) -> list[list[tuple[str, int]]]:
    """Admit one event of each session in a loop turn, until all have; return the answers."""
    answers: list[list[tuple[str, int]]] = [[] for _ in arrivals]
    for events in zip(*arrivals, strict=True):
        admissions = await inbox.together(*map(parsed, events))
        for own, admission in zip(answers, admissions, strict=True):
            assert isinstance(admission, Admission), admission
            own.append((str(admission.outcome), admission.sequence))
    return answers


@pytest.mark.parametrize("name", LIVES)
async def test_every_order_of_arrival_ends_in_the_same_state(
    name: str, inbox: InspectedInbox
) -> None:
    """Status, state hash, latest result and last transition do not depend on the order."""
    end, life = LIVES[name]
    arrivals = list(orders(life))
    answers = await admit_all(inbox, arrivals)
    last = {one.session_id: one for one in map(stream_entry.unpack, await inbox.entries())}
    ends = set()
    for events, answered in zip(arrivals, answers, strict=True):
        expected, model = admit_in_model(events)
        assert answered == expected
        session_id = events[0]["data"]["object"]["id"]
        record = await inbox.record(session_id)
        assert (record["status"], model.status, last[session_id].current) == (end,) * 3
        result = record.get("result", record["latest"]).split(" ")
        ends.add((record["hash"], result[1], result[2].rpartition("_")[2]))
        assert model.result["id"] == result[2]
    assert len(ends) == 1
