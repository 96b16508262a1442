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
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tests.support.stripe_api import (
    Event,
    Fault,
    Permission,
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


class Receiver:
    """An endpoint that keeps what is pushed to it."""

    def __init__(self) -> None:
        self.pushes: list[tuple[str, dict[str, str]]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Keep a push with its path, and answer it."""
        request = Request(scope, receive)
        body, signature = (await request.body()).decode(), request.headers["stripe-signature"]
        self.pushes.append((request.url.path, {"body": body, "signature": signature}))
        await Response()(scope, receive, send)


def live_through(stand_in: StripeStandIn) -> str:
    """Let things happen to four sessions; return the id of one that ends verified."""
    sessions = stand_in.sessions
    rejected, other, redacted = (sessions.create().id for _ in range(3))
    verified = sessions.create(client_reference_id="user-1", metadata={"attempt": "1"}).id
    sessions.reject(other, "consent_declined")
    sessions.cancel(other)
    for submitted in (rejected, verified):
        sessions.submit(submitted)
    sessions.reject(rejected, "selfie_face_mismatch")
    sessions.verify(verified)
    sessions.override(rejected, "verified")
    sessions.redact(redacted)
    sessions.finish_redaction(redacted)
    return verified


async def test_every_answer_is_read_into_the_types_of_the_package() -> None:
    """And it raises the right error for each that is none."""
    stand_in, receiver = StripeStandIn(), Receiver()
    stand_in.expands_everything = True
    key = stand_in.directory.add_key().secret
    narrow = stand_in.directory.add_key(permissions=[Permission.IDENTITY_READ]).secret
    connected, gone = (stand_in.directory.connect().id for _ in range(2))
    stand_in.directory.deauthorize(gone)
    async with running(receiver) as hook, served(stand_in) as address:
        snapshot = stand_in.subscribe(f"{hook}/snapshot")
        off = stand_in.subscribe(None, is_enabled=False)
        thin = stand_in.subscribe(f"{hook}/thin", payload="thin")
        verified = live_through(stand_in)
        stand_in.sessions.create(scope=stand_in.scope(connected))
        foreign = stand_in.events.all[-1].id
        own = [one for one in stand_in.events.all if not one.is_connected]
        await until(lambda: len(receiver.pushes) >= 2 * len(own))
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
                "session": verified,
                "types": all_types("snapshot"),
                "since": int(own[0].created),
                "connected": {"stripe_account": connected},
                "deauthorized": {"stripe_account": gone},
                "pushes": [push | {"secret": secrets[path]} for path, push in receiver.pushes],
            }
        )
    assert found.pop("problems") == []
    check_events(found, own)
    assert found["snapshots"]["connected"] == [foreign]
    report = stand_in.sessions.all[verified].report
    assert report
    assert found["sessions"]["report"] == report.id
    assert {"address", "dob", "first_name", "id_number"} < {*found["sessions"]["outputs"]}
    assert found["endpoints"] == {
        "endpoints": [snapshot.id],
        "destinations": [[thin.id, "enabled"], [off.id, "disabled"], [snapshot.id, "enabled"]],
        "urls": [f"{hook}/thin", None, f"{hook}/snapshot"],
    }
    assert found["errors"] == {
        "wrong key": ["AuthenticationError", 401, None],
        "forbidden": ["PermissionError", 403, None],
        "forbidden v2": ["PermissionError", 403, None],
        "revoked account": ["PermissionError", 403, "account_invalid"],
        "missing": ["InvalidRequestError", 404, "resource_missing"],
        "missing v2": ["InvalidRequestError", 404, "resource_missing"],
        "unknown parameter": ["InvalidRequestError", 400, "parameter_unknown"],
        "429": ["RateLimitError", 429, "rate_limit"],
        "429 v2": ["RateLimitError", 429, "rate_limit"],
        "500": ["APIError", 500, None],
        "cut": ["APIConnectionError", None, None],
    }


def check_events(found: dict[str, Any], own: list[Event]) -> None:
    """Compare events and pushes with those of the stand-in, in order of time."""
    snapshots, pushes = found["snapshots"], found["pushes"]
    ids = [one.id or "" for one in own]
    assert snapshots["listed"] == ids[::-1]
    assert snapshots["statuses"] == [one.session["status"] for one in own[::-1]]
    assert snapshots["retrieved"] == ids[0]
    assert sorted(pushes["snapshot"]) == sorted(ids)
    assert len(pushes["thin"]) == len(ids)
    assert {(snapshot, session) for _, snapshot, session in pushes["thin"]} == {
        (one.id, one.session_id) for one in own
    }
    assert {name for name, _, _ in pushes["thin"]} == {
        f"V1IdentityVerificationSession{word}EventNotification"
        for word in ("Canceled", "Created", "Processing", "Redacted", "RequiresInput", "Verified")
    }
