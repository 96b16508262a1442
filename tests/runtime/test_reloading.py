"""Reloading: a new value is applied once, an invalid one changes nothing and is logged once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from itertools import chain, repeat
from pathlib import Path

import httpx2
import pytest
from structlog.testing import capture_logs

from service.cancellation import cancel_and_wait
from service.errors import ConfigError
from service.runtime import reloading
from service.runtime.reloading import Reloader
from service.secret import Secret
from service.stripe.signatures import fingerprint
from service.stripe.signing_secrets import SigningSecrets
from service.stripe_api.keys import ApiKeys
from tests.support import roles
from tests.support.depth import takes_long
from tests.support.harness import SECRET, event, signed
from tests.support.processes import Process, Sandbox
from tests.support.waiting import until, wait_until

CANARY = "canary4711"
OLD, NEW = (Secret(b"whsec_old"),), (Secret(b"whsec_new"),)


BAD, WORSE = ConfigError(["SECRETS: expected one"]), ConfigError(["SECRETS: expected a file"])


async def logged_of(
    monkeypatch: pytest.MonkeyPatch,
    readings: Sequence[str | ConfigError],
    *,
    is_requested: bool = False,
) -> list[str | Sequence[str]]:
    """Return the values and problems that are logged while a setting that was `old` is read.

    Each reading finds the next one of *readings*, and the last one again and again.
    """
    monkeypatch.setattr(reloading, "READ_EVERY_S", 0.001)
    found = chain(readings, repeat(readings[-1]))
    count, applied = 0, list[str]()

    def read() -> str:
        nonlocal count
        count += 1
        one = next(found)
        if isinstance(one, ConfigError):
            raise one
        return one

    def apply(value: str) -> dict[str, str]:
        applied.append(value)
        return {"now": value}

    reloader = Reloader("secrets", "old", read=read, apply=apply)
    if is_requested:
        reloader.request()
    with capture_logs() as lines:
        running = asyncio.create_task(reloader.run())
        await until(lambda: count > len(readings) + 3)
        await cancel_and_wait(running)
    assert [line["now"] for line in lines if line["event"] == "secrets.reloaded"] == applied
    failed = [line["event"] for line in lines if "problems" in line]
    assert {*failed} <= {"secrets.reload_failed"}
    return [line["problems"] if "problems" in line else line["now"] for line in lines]


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        pytest.param(["old"], [], id="unchanged"),
        pytest.param(["old", "ne", "new"], ["new"], id="half written"),
        pytest.param(["old", BAD, "new"], ["new"], id="missing while it is replaced"),
        pytest.param(
            [BAD, BAD, BAD, WORSE, WORSE, "old", "old", BAD, BAD, "new"],
            [BAD.problems, WORSE.problems, BAD.problems, "new"],
            id="invalid",
        ),
    ],
)
async def test_two_readings_must_agree(
    readings: Sequence[str | ConfigError], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new value is applied and logged once; a problem is logged once until it is fixed."""
    assert await logged_of(monkeypatch, readings) == expected


@pytest.mark.parametrize("readings", [["new", "old"], ["old"]])
async def test_a_requested_value_is_applied_at_once(
    readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A requested reading counts alone, and logs the value even if it is the same."""
    assert await logged_of(monkeypatch, readings, is_requested=True) == readings


def test_signing_secrets_are_replaced_as_a_whole() -> None:
    """After a replacement only the new secrets are in use, and in the fingerprints."""
    signing_secrets = SigningSecrets({"": OLD, "eu": OLD})
    before = signing_secrets[""]
    signing_secrets.replace({"": (*NEW, *OLD), "us": NEW})
    assert before == OLD
    assert dict(signing_secrets) == {"": (*NEW, *OLD), "us": NEW}
    assert len(signing_secrets) == 2
    assert signing_secrets.get("eu") is None
    assert signing_secrets.fingerprints() == sorted({fingerprint(OLD[0]), fingerprint(NEW[0])})


# Whole processes


def rotated(
    process: Process, client: httpx2.Client, secret: Secret[bytes], number: int
) -> dict[str, int]:
    """Post an event signed with each of the two secrets; return the status codes."""
    statuses = {}
    for name, by in (("old", SECRET), ("new", secret)):
        body = event(id=f"evt_{name}_{number}", session=f"vs_{name}")
        answer = client.post(process.url, content=body, headers=signed(body, by))
        statuses[name] = answer.status_code
    return statuses


@pytest.mark.parametrize(
    "asked", [True, pytest.param(False, marks=takes_long)], ids=["by signal", "by itself"]
)
@pytest.mark.parametrize("command", ["serve", "dev"])
def test_secrets_follow_their_file(sandbox: Sandbox, command: str, asked: bool) -> None:
    """A changed file, or SIGHUP, replaces the secrets; an invalid one changes nothing."""
    new = Secret(b"whsec_new_" + CANARY.encode())
    path = sandbox.directory / f"secrets_{command}_{asked}"
    path.write_bytes(SECRET.reveal())
    process = sandbox.start(
        command, STRIPE_WEBHOOK_SECRETS="", STRIPE_WEBHOOK_SECRETS_FILE=str(path)
    ).ready()

    def put(text: bytes, event: str, count: int) -> None:
        path.with_suffix(".new").write_bytes(text)
        path.with_suffix(".new").replace(path)
        if asked:
            process.popen.send_signal(signal.SIGHUP)
        wait_until(lambda: len(process.lines(event)) == count)

    both = new.reveal() + b"," + SECRET.reveal() + b"\n"
    with httpx2.Client() as client:
        assert rotated(process, client, new, 1) == {"old": 200, "new": 400}
        put(both, "secrets.reloaded", 1)
        assert rotated(process, client, new, 2) == {"old": 200, "new": 200}
        put(b"two words " + CANARY.encode(), "secrets.reload_failed", 1)
        assert rotated(process, client, new, 3) == {"old": 200, "new": 200}
        put(new.reveal(), "secrets.reloaded", 2)
        assert rotated(process, client, new, 4) == {"old": 400, "new": 200}
    assert process.lines("secrets.reloaded")[-1]["fingerprints"] == [fingerprint(new)]
    [kept] = process.lines("secrets.reload_failed")
    assert kept["problems"][0].startswith("STRIPE_WEBHOOK_SECRETS: expected ")
    assert process.stop() == 0
    assert CANARY.encode() not in process.out + process.err


@takes_long
def test_networks_follow_their_file(sandbox: Sandbox) -> None:
    """The allow list is read again when its file changes; a missing file changes nothing."""
    path = sandbox.directory / "networks"
    path.write_text("192.0.2.0/24\n2001:db8::/32\n")
    serve = sandbox.start("serve", ALLOWED_NETWORKS_FILE=str(path)).ready()
    body = event(session="vs_networks", id="evt_networks")
    with httpx2.Client() as client:

        def status() -> int:
            return client.post(serve.url, content=body, headers=signed(body)).status_code

        assert status() == 403
        path.write_text("192.0.2.0/24\n127.0.0.0/8\n")
        wait_until(lambda: serve.lines("networks.reloaded"))
        assert status() == 200
        path.unlink()
        wait_until(lambda: serve.lines("networks.reload_failed"))
        assert status() == 200
    assert serve.lines("networks.reload_failed")[0]["problems"] == [
        "ALLOWED_NETWORKS_FILE: expected a readable file of UTF-8 text"
    ]
    assert serve.stop() == 0


@takes_long
def test_api_keys_follow_their_file(sandbox: Sandbox) -> None:
    """A worker takes a new key; an empty file changes nothing. No key is ever shown."""
    path = sandbox.directory / "api_key"
    path.write_text(f"rk_test_{CANARY}\n")
    work = sandbox.start("work", STRIPE_API_KEY_FILE=str(path)).ready()
    new = f"rk_test_new{CANARY},rk_live_{CANARY}"
    path.write_text(new)
    wait_until(lambda: work.lines("api_keys.reloaded"))
    path.write_text("")
    wait_until(lambda: work.lines("api_keys.reload_failed"))
    assert work.stop() == 0
    [reloaded] = work.lines("api_keys.reloaded")
    assert reloaded["fingerprints"] == ApiKeys([*map(Secret, new.split(","))]).fingerprints()
    assert CANARY.encode() not in work.out + work.err


def test_tokens_of_the_page_follow_their_files(sandbox: Sandbox) -> None:
    """A removed token ends its logins; reading does not become open, nor a reader one who acts."""
    acting, reading = (sandbox.directory / name for name in ("acting", "reading"))
    acting.write_text(f"alice:{CANARY}-of-alice,bob:{CANARY}-of-bobbob\n")
    reading.write_text(f"carol:{CANARY}-of-carol\n")
    files = {"ADMIN_TOKENS_FILE": str(acting), "ADMIN_READ_TOKENS_FILE": str(reading)}
    work = sandbox.start("work", **files, **roles.of_page(sandbox.url)).ready()

    def put(path: Path, text: str, event: str) -> None:
        path.write_text(text)
        seen = len(work.lines(event))
        work.popen.send_signal(signal.SIGHUP)
        wait_until(lambda: len(work.lines(event)) > seen)

    with httpx2.Client(base_url=work.admin, headers={"Origin": work.admin}) as client:

        def status() -> int:
            return client.get("/handlers").status_code

        assert status() == 303
        client.post("/login", data={"token": f"{CANARY}-of-alice"})
        assert status() == 200
        put(acting, f"bob:{CANARY}-of-bobbob", "admin_tokens.reloaded")
        assert status() == 303
        client.post("/login", data={"token": f"{CANARY}-of-bobbob"})
        put(acting, f"bob:{CANARY}", "admin_tokens.reload_failed")
        put(acting, f"bob:{CANARY}-of-carol", "admin_tokens.reload_failed")
        put(reading, f"carol:{CANARY}-of-bobbob", "admin_read_tokens.reload_failed")
        assert status() == 200
        put(acting, "", "admin_tokens.reloaded")
        put(reading, "", "admin_read_tokens.reload_failed")
        assert status() == 303
    reloaded = [[*line["fingerprints"]] for line in work.lines("admin_tokens.reloaded")]
    assert (reloaded[0], reloaded[-1]) == (["bob"], [])
    assert work.stop() == 0
    assert CANARY.encode() not in work.out + work.err
