"""`session`: the timeline of one session, in 80 columns and as JSON."""

from __future__ import annotations

import io
import time
from contextlib import closing
from typing import Any

import msgspec
import orjson
import pytest
import redis
from rich.console import Console

from service.cli.session_view import render
from service.monitoring.finished_attempts import Attempt
from service.monitoring.session_timeline import Arrival, HandlerOutcome, Timeline
from service.monitoring.unfetched import Unfetched
from tests.admin import samples
from tests.cli.conftest import KEYS, claim_layout
from tests.support.admissions import make_notification
from tests.support.processes import Sandbox
from tests.support.transitions import stored_notification

SESSION_ID = "vs_1"
UNFETCHED = "vs_unfetched"
PARTITION = KEYS.partition(SESSION_ID)
CANARY = "canary4711"
PROGRAM = "identity-webhooks"
HOSTILE = "[red]a\x1b[2J\u202eb"


def shown(
    timeline: Timeline | None, *unfetched: Unfetched, width: int = 80, zone: str = "UTC"
) -> str:
    """Return what a terminal shows of a session."""
    console = Console(file=io.StringIO(), width=width)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TZ", zone)
        time.tzset()
        console.print(render(samples.SESSION, timeline, unfetched, PROGRAM))
    time.tzset()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_timeline_in_80_columns() -> None:
    """Each arrival and each handler has its line; no id is cut; a dead letter says what to type."""
    timeline = samples.timeline()
    text = shown(timeline)
    lines = [line.rstrip() for line in text.splitlines()]

    assert max(map(len, lines)) <= 80
    assert lines[0] == f"{samples.SESSION}  verified → requires_input"
    assert {step.arrival.event_id for step in timeline.steps} <= {*text.split()}
    said = " ".join(text.split())
    assert (
        "rabbitmq dead letter 3-1785500000000-0, 3 attempts failed dead-lettered 14:08:09.000 "
        "TimeoutError in my_handler.py:41 in post; client.py:210 in _send "
        f"-> {PROGRAM} dead show rabbitmq 3-1785500000000-0"
    ) in said
    for words in (
        *("verified → requires_input reversal", "processing, thin event", "2 duplicates answered"),
        *("late: an older event", "unchanged: it said nothing new", "retrying, 2 attempts failed"),
        *("settled (acknowledged,", "my_company.handlers:open_crm waiting", "document_expired"),
        *("a change that the stream no longer holds", "67 min old"),
        *("#1 → requires_input earlier epoch", "test mode account acct_1MZ 4 transitions"),
    ):
        assert words in said
    assert said.count("earlier epoch") == 1


def test_a_transition_that_was_not_looked_up_is_not_said_to_be_gone() -> None:
    """Only the latest ones are looked up; the stream may still hold the others."""
    timeline = samples.timeline()
    first = timeline.steps[-1].arrival._replace(is_looked_up=False)
    text = shown(timeline._replace(steps=(timeline.steps[-1]._replace(arrival=first),)))

    assert "a change that was not looked up" in text
    assert "no longer holds" not in text


def test_what_changed_nothing_is_dimmed() -> None:
    """Colours and dimmed lines are for terminals only."""
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    console.print(render(samples.SESSION, samples.timeline(), (), PROGRAM))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    dimmed = [line.startswith("\x1b[2m") for line in lines if "late: " in line or " #1 " in line]
    assert dimmed == [False, True]


def test_times_are_local() -> None:
    """Each day is named once, with the difference to UTC."""
    text = shown(samples.timeline(), zone="Pacific/Auckland")
    assert "(times: UTC+1200)" in text
    assert text.count("times:") == 1


def test_text_from_redis_is_shown_as_text() -> None:
    """Control characters are escaped, and nothing is read as rich's markup."""
    timeline = samples.timeline()
    step = timeline.steps[0]
    assert step.arrival.transition
    change = {"event_type": HOSTILE, "origin": HOSTILE, "last_error_code": HOSTILE}
    transition = msgspec.structs.replace(
        step.arrival.transition, previous=HOSTILE, current=HOSTILE, **change
    )
    dead = timeline.steps[1].outcomes[1]
    attempts = tuple(one._replace(error=HOSTILE, place=HOSTILE) for one in dead.attempts)
    outcome = dead._replace(handler=HOSTILE, attempts=attempts)
    arrival = step.arrival._replace(event_id=HOSTILE, transition=transition)
    hostile = timeline._replace(
        steps=(step._replace(arrival=arrival, outcomes=(outcome,)),),
        record=timeline.record._replace(session_id=HOSTILE, status=HOSTILE, previous=HOSTILE),
    )
    text = shown(hostile, width=400)

    assert text.replace("\n", "").isprintable()
    assert text.count(r"[red]a\x1b[2J\u202eb") == 13


@pytest.mark.parametrize("timeline", [None, samples.timeline()], ids=["no record", "a record"])
def test_thin_events_that_are_not_fetched(timeline: Timeline | None) -> None:
    """They are named with what to type, also where they are all that is known of the session."""
    dead = samples.timeline().steps[1].outcomes[1]._replace(handler="fetch")
    event = make_notification(id="evt_test_1")
    text = shown(timeline, Unfetched(event, dead))

    assert text.startswith(samples.SESSION)
    assert ("no session record" in text) == (timeline is None)
    said = " ".join(text.split())
    assert "may not be known evt_test_1 verified, test mode, created 20" in said
    assert f"-> {PROGRAM} dead show fetch 3-1785500000000-0" in said
    assert "not fetched" not in shown(samples.timeline())


def test_a_session_of_which_nothing_is_remembered() -> None:
    """Its status is shown all the same."""
    text = shown(samples.timeline()._replace(steps=()))
    assert "no event of this session is remembered" in text


@pytest.fixture(scope="module")
def filled(sandbox: Sandbox) -> Sandbox:
    """Return a sandbox whose Redis holds a session with a dead letter, as processes write it."""
    claim_layout(sandbox.server.url)
    with closing(redis.Redis.from_url(sandbox.server.url)) as client:
        _fill(client)
    return sandbox


def _fill(client: Any) -> None:
    change = (
        f'{{"event_id":"evt_2","event_type":"identity.verification_session.verified",'
        f'"occurred_at":"2026-01-01T00:00:00Z","session_id":"{SESSION_ID}","current":"verified",'
        f'"client_reference_id":"{CANARY}","metadata":{{"k":"{CANARY}"}}}}'
    )
    fields = {"change": change, "previous": "processing", "sequence": 2, "epoch": 1790000000000}
    stream, dead = KEYS.transitions(PARTITION), KEYS.dead_letters(PARTITION, "log")
    client.xadd(stream, fields, id="1790000002000-0")
    client.xgroup_create(stream, "log", id="$")
    waiting = stored_notification(UNFETCHED, 1)
    client.xadd(KEYS.notifications(KEYS.partition(UNFETCHED)), waiting)
    client.xadd(dead, fields | {"entry_id": "1790000002000-0"}, id="1790000003000-0")
    attempt = {"event": "evt_2", "outcome": "dead_lettered", "attempt": 3, "error": "ValueError",
               "place": "own.py:1 handle", "letter": "1790000003000-0"}  # fmt: skip
    client.xadd(KEYS.finished_attempts(PARTITION, "log"), attempt, id="1790000003000-0")
    record = {
        "state": "2 1790000000000 01234567 0123456789abcdef R",
        "status": "8 verifiedprocessing",
        "latest": "R 17900000010 evt_2",
        "evt_1": "a 1 1790000000 nonce678 1790000001000-0",
        "evt_2": "a 2 1790000001 nonce678 1790000002000-0",
        "evt_3": "l 2 1790000000 nonce678 1790000002500",
    }
    client.hset(KEYS.session(SESSION_ID), mapping=record)


def test_the_json_has_everything_but_your_own_data(filled: Sandbox) -> None:
    """Named tuples are objects, in the order of arrival; metadata and references are left out."""
    found = orjson.loads(filled.invoke("session", SESSION_ID, "--json").out)

    assert CANARY not in str(found)
    assert (found["status"], found["previous"], found["sequence"]) == ("verified", "processing", 2)
    assert [one["event_id"] for one in found["steps"]] == ["evt_1", "evt_2", "evt_3"]
    for step in found["steps"]:
        assert step.keys() == {*Arrival._fields, "handlers"}
    assert found["steps"][0]["transition"] is None
    verified = found["steps"][1]
    assert verified["arrived_at"] == "2026-09-21T14:13:22+00:00"
    assert verified["transition"]["previous"] == "processing"
    [outcome] = verified["handlers"]
    assert outcome.keys() == {*HandlerOutcome._fields}
    assert outcome["state"] == "dead letter"
    assert outcome["dead_letter_id"] == f"{PARTITION}-1790000003000-0"
    [attempt] = outcome["attempts"]
    assert attempt.keys() == {*Attempt._fields}
    [late] = [step for step in found["steps"] if step["outcome"] == "late"]
    assert late["handlers"] == []


def test_the_json_of_a_session_without_a_record(filled: Sandbox) -> None:
    """It has the same names; what a record would say is null."""
    found = orjson.loads(filled.invoke("session", UNFETCHED, "--json").out)
    known = orjson.loads(filled.invoke("session", SESSION_ID, "--json").out)

    assert found.keys() == known.keys()
    assert (found["session_id"], found["status"], found["steps"]) == (UNFETCHED, None, [])
    assert known["unfetched"] == []
    [event] = found["unfetched"]
    assert (event["event_id"], event["fetch"]["state"]) == (f"evt_{UNFETCHED}_1", "unknown")


def test_what_it_says_to_type_works(filled: Sandbox) -> None:
    """In a pipe every line is whole, and the dead letter is found by the id that is shown."""
    said = filled.invoke("session", SESSION_ID)
    assert (said.code, said.err) == (0, b"")
    assert CANARY.encode() not in said.out
    [hint] = [line for line in said.out.splitlines() if b"-> " in line]
    words = hint.decode().partition(" dead ")[2].split()
    letter = filled.invoke("dead", *words, "--json")
    assert orjson.loads(letter.out)["event_id"] == "evt_2"
