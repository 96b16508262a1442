"""Stripe's own command line client works with the stand-in as with Stripe.

`TEST_STRIPE_CLI` names its binary: `npm install @stripe/cli` puts it in
`node_modules/@stripe/cli-linux-x64/bin/stripe`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import orjson
import pytest

from tests.support.stripe_api import StripeStandIn, served
from tests.support.waiting import DEADLINE_S, until

CLI = os.environ.get("TEST_STRIPE_CLI", "")
pytestmark = pytest.mark.skipif(not CLI, reason="TEST_STRIPE_CLI names no binary of the Stripe CLI")

PREFIX = "identity.verification_session."
SESSIONS = "/v1/identity/verification_sessions"
# No server listens there.
NOWHERE = "http://127.0.0.1:9/webhooks"
Run: TypeAlias = Callable[..., Awaitable[tuple[int, str]]]


def command(address: str, key: str, home: Path) -> Run:
    """Return a function that runs the CLI and returns its exit code and its output."""
    environ = {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "STRIPE_API_KEY": key,
        "STRIPE_CLI_TELEMETRY_OPTOUT": "1",
    }

    async def run(*arguments: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            CLI, *arguments, "--api-base", address, stdin=-3, stdout=-1, stderr=-2, env=environ
        )
        out, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        return process.returncode or 0, out.decode()

    return run


async def answered(run: Run, *arguments: str) -> Any:
    """Run a command that prints an answer of the API, and return the answer."""
    code, out = await run(*arguments)
    assert code == 0, out
    return orjson.loads(out[out.index("{") :])


async def test_the_cli_triggers_lists_reads_and_resends(tmp_path: Path) -> None:
    """With both forms of events, and each way that the CLI has to ask for them."""
    stand_in = StripeStandIn()
    endpoint = stand_in.subscribe(NOWHERE)
    key = stand_in.directory.add_key().secret
    async with served(stand_in) as address:
        run = command(address, key, tmp_path)
        for word in ("created", "canceled", "redacted"):
            for prefix in ("", "v1."):
                code, out = await run("trigger", f"{prefix}{PREFIX}{word}")
                assert code == 0, out
        code, out = await run("trigger", f"{PREFIX}verified")
        assert code, "the CLI cannot trigger it, whatever the answer"
        assert [one.type.removeprefix(PREFIX) for one in stand_in.events.all] == [
            *("created", "created"),
            *("created", "canceled", "created", "canceled"),
            *("created", "canceled", "created", "canceled"),
        ]
        ids = [one.id for one in stand_in.events.all]

        listed = await answered(run, "events", "list", "--limit", "3", "--delivery-success=false")
        assert [one["id"] for one in listed["data"]] == ids[:-4:-1]
        of_type = await answered(run, "events", "list", "--types", f"{PREFIX}canceled")
        assert len(of_type["data"]) == 4
        before = await answered(run, "events", "list", "--ending-before", str(ids[7]))
        assert [one["id"] for one in before["data"]] == ids[:7:-1]
        event = await answered(run, "get", str(ids[0]))
        session = await answered(run, "get", f"{SESSIONS}/{event['data']['object']['id']}")
        assert session["object"] == "identity.verification_session"
        thin = await answered(run, "v2", "core", "events", "list", "--limit", "2")
        assert [one["id"] for one in thin["data"]] == [
            one.thin_id for one in stand_in.events.all[:-3:-1]
        ]

        [pushes] = [one.deliveries for one in stand_in.events.all[:1]]
        await until(lambda: len(stand_in.pushes.attempts) == len(ids))
        await answered(run, "events", "resend", str(ids[0]), f"--webhook-endpoint={endpoint.id}")
        await until(lambda: len(stand_in.pushes.attempts) == len(ids) + 1)
        assert stand_in.pushes.attempts[-1].event_id == ids[0]
        assert [one.is_pending for one in pushes] == [True]


async def test_the_cli_shows_errors(tmp_path: Path) -> None:
    """A key that the stand-in does not know, and an event that does not exist."""
    stand_in = StripeStandIn()
    async with served(stand_in) as address:
        _, out = await command(address, "sk_test_unknown", tmp_path)("events", "list")
        assert "Invalid API Key provided" in out
        key = stand_in.directory.add_key().secret
        _, out = await command(address, key, tmp_path)("get", "evt_missing")
        assert "No such event" in out
