"""The `stripe` package of PyPI reads all that the stand-in serves into its own types.

`TEST_STRIPE_PYTHON` names a Python that has the package; it must not be mixed with ours.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.support.stripe_api import (
    Fault,
    Permission,
    Receiver,
    StripeStandIn,
    all_types,
    broken,
    running,
    served,
    too_many_requests,
)
from tests.support.waiting import DEADLINE_S, until

PYTHON = os.environ.get("TEST_STRIPE_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="TEST_STRIPE_PYTHON names no Python with the package `stripe`"
)
READER = Path(__file__).with_name("sdk_reader.py")


async def read(asked: dict[str, Any]) -> Any:
    """Return what the package reads."""
    process = await asyncio.create_subprocess_exec(
        PYTHON, str(READER), stdin=-1, stdout=-1, stderr=-1, env={"PATH": os.environ["PATH"]}
    )
    out, err = await asyncio.wait_for(process.communicate(orjson.dumps(asked)), DEADLINE_S)
    assert process.returncode == 0, err.decode()
    return orjson.loads(out)


def live_through(stand_in: StripeStandIn) -> str:
    """Let things happen to four sessions; return the id of one that ends verified."""
    sessions = stand_in.sessions
    rejected, other = (sessions.create().id for _ in range(2))
    verified = sessions.create(
        type="verification_flow",
        verification_flow="vf_1",
        client_reference_id="user-1",
        metadata={"attempt": "1"},
        related_person={"account": "acct_1", "person": "person_1"},
    ).id
    sessions.reject(other, "consent_declined")
    sessions.cancel(other)
    for submitted in (rejected, verified):
        sessions.submit(submitted)
    sessions.reject(rejected, "selfie_face_mismatch")
    sessions.verify(verified)
    sessions.override(rejected, "verified")
    redacted = sessions.create(type="id_number").id
    sessions.redact(redacted)
    sessions.finish_redaction(redacted)
    return verified


async def test_every_answer_is_read_into_the_types_of_the_package() -> None:
    """And it raises the right error for each that is none."""
    stand_in, receiver = StripeStandIn(), Receiver()
    key = stand_in.directory.add_key().secret
    full = stand_in.directory.add_key(permissions=list(Permission)).secret
    narrow = stand_in.directory.add_key(permissions=[Permission.IDENTITY_READ]).secret
    connected, gone = (stand_in.directory.connect().id for _ in range(2))
    stand_in.directory.deauthorize(gone)
    async with running(receiver) as hook, served(stand_in) as address:
        snapshot = stand_in.subscribe(f"{hook}/snapshot")
        off = stand_in.subscribe(None, is_enabled=False)
        thin = stand_in.subscribe(f"{hook}/thin", payload="thin")
        verified = live_through(stand_in)
        foreign = stand_in.sessions.create(scope=stand_in.scope(connected))
        own = [one for one in stand_in.events.all if not one.is_connected]
        await until(lambda: len(receiver.received) >= 2 * len(own))
        secrets = {"/snapshot": snapshot.secret, "/thin": thin.secret}
        for fault, limit in (
            (too_many_requests(3), 91),
            (broken(), 92),
            (Fault(kind="cut"), 93),
        ):
            fault.query = f".*limit={limit}.*"
            stand_in.faults.add(fault)
        found = await read(
            {
                "address": address,
                "key": key,
                "narrow_key": narrow,
                "full_key": full,
                "session": verified,
                "types": all_types("snapshot"),
                "since": int(own[0].created),
                "connected": {"stripe_account": connected},
                "deauthorized": {"stripe_account": gone},
                "pushes": [
                    {
                        "body": one.body.decode(),
                        "signature": one.headers["stripe-signature"],
                        "secret": secrets[one.path],
                    }
                    for one in receiver.received
                ],
            }
        )
    assert found.pop("problems") == []
    check_events(found, own, verified)
    check_sessions(found["sessions"], stand_in, foreign.id)
    assert found["endpoints"] == {
        "endpoints": [snapshot.id],
        "destinations": [[thin.id, "enabled"], [off.id, "disabled"], [snapshot.id, "enabled"]],
        "urls": [f"{hook}/thin", None, f"{hook}/snapshot"],
        "ping": "v2.core.event_destination.ping",
    }
    assert found["errors"] == {
        "wrong key": ["AuthenticationError", 401, None],
        "forbidden": ["PermissionError", 403, None],
        "forbidden v2": ["PermissionError", 403, None],
        "revoked account": ["PermissionError", 403, "account_invalid"],
        "missing": ["InvalidRequestError", 404, "resource_missing"],
        "missing v2": ["InvalidRequestError", 404, "resource_missing"],
        "unknown parameter": ["InvalidRequestError", 400, "parameter_unknown"],
        "sensitive": ["PermissionError", 403, None],
        "429": ["RateLimitError", 429, "rate_limit"],
        "429 v2": ["RateLimitError", 429, "rate_limit"],
        "500": ["APIError", 500, None],
        "cut": ["APIConnectionError", None, None],
    }


def check_events(found: dict[str, Any], own: list[Any], verified: str) -> None:
    """Compare events and pushes with those of the stand-in, in order of time."""
    snapshots, thin, pushes = found["snapshots"], found["thin_events"], found["pushes"]
    ids = [one.id for one in own]
    assert snapshots["listed"] == ids[::-1]
    assert snapshots["onwards"] == ids[1:]
    assert snapshots["statuses"] == [one.session["status"] for one in own[::-1]]
    assert snapshots["retrieved"] == ids[0]
    assert (snapshots["undelivered"], snapshots["by_pattern"]) == ([], len(ids))
    about = [one for one in own if one.related.id == verified][::-1]
    assert thin["listed"] == [one.thin_id for one in about]
    assert thin["classes"] == [
        f"V1IdentityVerificationSession{word}Event"
        for word in ("Verified", "Processing", "Created")
    ]
    assert thin["windowed"][-1] == about[0].thin_id
    assert (thin["twin"], thin["related"]) == (about[0].id, verified)
    assert sorted(pushes["snapshot"]) == sorted(ids)
    assert sorted(twin for _, twin in pushes["thin"]) == sorted(ids)
    assert all(name.endswith("EventNotification") for name, _ in pushes["thin"])


def check_sessions(found: dict[str, Any], stand_in: StripeStandIn, foreign: str) -> None:
    """Compare sessions with those of the stand-in."""
    own = [one for one in stand_in.sessions.all.values() if one.id != foreign]
    reports = [report.id for one in own for report in one.reports]
    assert found["outputs"] == [
        *("address", "email", "first_name", "id_number_type", "last_name", "phone"),
    ]
    assert found["report"] in reports
    assert set(found["sensitive"]) == {"dob", "id_number", "number", "expiration_date"}
    assert found["metadata"] == {"user": "1"}
    assert (found["canceled"], found["redacting"]) == ("canceled", "processing")
    assert found["account"] == [foreign]
    # One more was created afterwards, to provoke an error.
    assert found["listed"] == [one.id for one in own[:5]][::-1]
