"""One notification's event: the snapshot event, else its session; nothing else is taken for it."""

from __future__ import annotations

import traceback
from typing import Any

import orjson
import pytest

from service.errors import ApiError, ApiErrorReason
from service.stripe_api.client import MAX_OBJECT_BYTES, StripeApi
from service.stripe_api.single_events import read_event
from tests.support.notifications import notification_of, pushed
from tests.support.stripe_api import CANARY, Fault, StripeStandIn, answer, fail
from tests.support.stripe_api import Event as StandInEvent
from tests.support.stripe_api.errors import missing

THIN, SNAPSHOT, SESSION = "/v2/core/events/", "/v1/events/", "/v1/identity/verification_sessions/"


def latest(stand_in: StripeStandIn) -> StandInEvent:
    """Return the latest event."""
    return stand_in.events.all[-1]


def verify_a_session(stand_in: StripeStandIn, account: str | None = None) -> StandInEvent:
    """Let a session be verified; return its latest event."""
    stand_in.sessions.create_verified(stand_in.scope(account))
    return latest(stand_in)


def asked(stand_in: StripeStandIn) -> list[str]:
    """Return which kinds of objects were asked for."""
    return [one.path[: one.path.rindex("/") + 1] for one in stand_in.requests]


def gone(path: str) -> Fault:
    """Return a fault: what is asked for under *path* does not exist."""
    return fail(missing("event", "x"), path=f"{path}.*")


@pytest.mark.parametrize("names_snapshot", [False, True])
async def test_the_snapshot_event_is_read(
    names_snapshot: bool, stand_in: StripeStandIn, api: StripeApi
) -> None:
    """The event is the snapshot's, also while no list shows it; a named one saves a request."""
    stand_in.list_lag_s = 60
    event = verify_a_session(stand_in)

    found = await read_event(api, notification_of(event, names_snapshot=names_snapshot))

    assert found == pushed(event)
    assert asked(stand_in) == ([SNAPSHOT] if names_snapshot else [THIN, SNAPSHOT])


async def test_the_snapshot_event_of_a_connected_account(
    stand_in: StripeStandIn, api: StripeApi
) -> None:
    """What a thin event's context names is read in that context."""
    account = stand_in.directory.connect()
    event = verify_a_session(stand_in, account.id)

    found = await read_event(api, notification_of(event))

    assert (found.account, found.context) == (account.id, account.id)
    assert [one.account for one in stand_in.requests] == [account.id] * 2


@pytest.mark.parametrize("named", ["acct_other", None])
async def test_the_account_of_a_snapshot_event(
    named: str | None, stand_in: StripeStandIn, api: StripeApi
) -> None:
    """One that names no account gets that of the context; one of another account is refused."""
    account = stand_in.directory.connect()
    event = verify_a_session(stand_in, account.id)
    body = orjson.dumps({**event.as_snapshot(), "account": named})
    stand_in.faults.add(answer(body, path=f"{SNAPSHOT}.*"))

    if named is None:
        assert await read_event(api, notification_of(event)) == pushed(event)
    else:
        with pytest.raises(ApiError):
            await read_event(api, notification_of(event))


async def test_placeholders_are_absent(stand_in: StripeStandIn, api: StripeApi) -> None:
    """A snapshot event that Stripe has redacted since shows what is left of it."""
    session = stand_in.sessions.create(client_reference_id="mine", metadata={"order": "1"})
    event = latest(stand_in)
    stand_in.sessions.redact(session.id)
    stand_in.subscribe("http://127.0.0.1:1", events=["identity.verification_session.redacted"])
    stand_in.sessions.finish_redaction(session.id)

    found = (await read_event(api, notification_of(event))).session

    assert found.status == "requires_input"
    assert (found.client_reference_id, found.client_secret, found.url) == (None, None, None)


@pytest.mark.parametrize(
    "fault", [None, gone(THIN), gone(SNAPSHOT)], ids=["none", "thin", "snapshot"]
)
async def test_without_a_snapshot_event_the_session_is_read(
    fault: Fault | None, stand_in: StripeStandIn, api: StripeApi
) -> None:
    """The event has the notification's type and time, an id of its own, and the present state."""
    stand_in.makes_snapshots = fault is not None
    stand_in.clock.stop()
    account = stand_in.directory.connect()
    session = stand_in.sessions.create(scope=stand_in.scope(account.id), metadata={"order": "1"})
    created = latest(stand_in)
    stand_in.clock.advance(10)
    stand_in.sessions.submit(session.id)
    if fault is not None:
        stand_in.faults.add(fault)

    found = await read_event(api, notification_of(created))

    assert found.id == f"read:{created.thin_id}"
    assert (found.type, found.created) == (created.type, int(created.created))
    assert (found.livemode, found.account, found.context) == (False, account.id, account.id)
    assert (found.session.id, found.session.status) == (session.id, "processing")
    assert found.session.metadata == {"order": "1"}
    assert asked(stand_in)[-1] == SESSION


async def test_a_session_that_is_gone(stand_in: StripeStandIn, api: StripeApi) -> None:
    """Without snapshot event and session there is nothing to admit."""
    event = verify_a_session(stand_in)
    stand_in.faults.add(gone(".*/"))

    with pytest.raises(ApiError) as caught:
        await read_event(api, notification_of(event))

    assert caught.value.reason is ApiErrorReason.NOT_FOUND
    assert asked(stand_in) == [THIN, SESSION]


# What is answered instead of an object: bytes, or fields of the object that are changed; `session`
# stands for the session in it.
WRONG: dict[str, Any] = {
    "nothing": b"",
    "no JSON": b'{"canary0',
    "JSON and more": b'{"id": "canary0"} canary0',
    "not UTF-8": b'{"object": "canary0\xff"}',
    "no object": b'["canary0"]',
    "an empty object": b"{}",
    "deep": b'{"a":' * 100_000,
    "too large": b'{"canary0":"' + b"x" * MAX_OBJECT_BYTES + b'"}',
    "another kind": {"object": "canary0"},
    "without a kind": {"object": None},
    "another id": {"id": "evt_canary0"},
    "an id of another pattern": {"id": "canary0 "},
    "an id of another type": {"id": 7},
    "another session": {"related_object": {"id": "vs_canary0"}, "session": {"id": "vs_canary0"}},
    "another mode": {"livemode": True, "session": {"livemode": True}},
    "another type": {"type": "identity.verification_session.canary0"},
    "no such event": {"snapshot_event": "canary0 \n"},
    "no session": {"related_object": "canary0", "data": "canary0", "status": 7},
}
# What is wrong only with one kind of object.
SPARED = {
    "another mode": {THIN},
    "another type": {THIN, SESSION},
    "no such event": {SNAPSHOT, SESSION},
}


def body_of(wrong: Any, path: str, event: StandInEvent) -> bytes:
    """Return the answer for what is asked for under *path*, with something wrong."""
    if isinstance(wrong, bytes):
        return wrong
    right: dict[str, Any] = {
        THIN: event.as_thin_event(),
        SNAPSHOT: event.as_snapshot(),
        SESSION: dict(event.session),
    }[path]
    changes = dict(wrong)
    session = changes.pop("session", {})
    if path == SNAPSHOT and session:
        changes["data"] = {"object": {**event.session, **session}}
    if path == SESSION:
        changes |= session
    return orjson.dumps({**right, **changes})


@pytest.mark.parametrize("path", [THIN, SNAPSHOT, SESSION])
async def test_what_was_not_asked_for(path: str, stand_in: StripeStandIn, api: StripeApi) -> None:
    """It is `api_unexpected`, and nothing of it is in the error."""
    stand_in.makes_snapshots = path != SESSION
    event = verify_a_session(stand_in)
    for name, wrong in WRONG.items():
        if path in SPARED.get(name, set()):
            continue
        stand_in.faults.clear()
        stand_in.faults.add(answer(body_of(wrong, path, event), path=f"{path}.*"))

        with pytest.raises(ApiError) as caught:
            await read_event(api, notification_of(event))

        assert caught.value.reason is ApiErrorReason.UNEXPECTED, name
        assert (caught.value.__cause__, caught.value.__context__) == (None, None), name
        assert CANARY not in "".join(traceback.format_exception(caught.value)), name


async def test_a_session_cannot_change_what_is_around_it(
    stand_in: StripeStandIn, api: StripeApi
) -> None:
    """Of a session only the session is taken, whatever fields it has."""
    stand_in.makes_snapshots = False
    event = verify_a_session(stand_in)
    more = {"data": {"object": {}}, "skipped_fields": ["x"], "account": "acct_x", "created": 1}
    body = orjson.dumps({**event.session, **more})
    stand_in.faults.add(answer(body, path=f"{SESSION}.*"))

    found = await read_event(api, notification_of(event))

    assert (found.account, found.created) == (None, int(event.created))
    assert (found.session.status, found.skipped_fields) == ("verified", ())
