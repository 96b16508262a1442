"""Reloading: a new value is applied once, an invalid one changes nothing and is logged once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from service.errors import ConfigError
from service.runtime import reloading
from service.runtime.reloading import Reloader
from service.secret import Secret
from service.stripe.signatures import fingerprint
from service.stripe.signing_secrets import SigningSecrets
from service.stripe_api.keys import ApiKeys
from tests.support.depth import takes_long
from tests.support.harness import SECRET, event, signed
from tests.support.processes import Process, Sandbox
from tests.support.waiting import until, wait_until

CANARY = "canary4711"
OLD, NEW = (Secret(b"whsec_old"),), (Secret(b"whsec_new"),)


class Log:
    """Stands in for the logger and keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def _write(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    info = error = _write


class Source:
    """The source of a setting: what each reading finds, the last one again and again."""

    def __init__(self, *looks: str | ConfigError) -> None:
        self.looks = list(looks)
        self.count = 0

    def read(self) -> str:
        """Return or raise the next one."""
        self.count += 1
        found = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(found, ConfigError):
            raise found
        return found


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Record what is logged, and read often."""
    recorded = Log()
    monkeypatch.setattr(reloading, "log", recorded)
    monkeypatch.setattr(reloading, "READ_EVERY_S", 0.001)
    return recorded


async def applied(
    source: Source, *, readings: int, start: Callable[[Reloader[str]], None] = lambda _: None
) -> list[str]:
    """Return the values applied within a number of readings, starting from `old`."""
    used: list[str] = []

    def use(found: str) -> dict[str, Any]:
        used.append(found)
        return {"now": found}

    reloader = Reloader("secrets", "old", read=source.read, apply=use)
    start(reloader)
    running = asyncio.create_task(reloader.run())
    await until(lambda: source.count > readings)
    running.cancel()
    return used


BAD, WORSE = ConfigError(["SECRETS: expected one"]), ConfigError(["SECRETS: expected a file"])


async def test_an_unchanged_value_is_not_applied(log: Log) -> None:
    """Nothing is applied and nothing logged while nothing changes."""
    assert await applied(Source("old"), readings=5) == []
    assert log.lines == []


async def test_a_new_value_is_applied_once_two_readings_agree(log: Log) -> None:
    """It is applied once, and logged."""
    assert await applied(Source("old", "ne", "new", "new", "new"), readings=8) == ["new"]
    assert log.lines == [("secrets.reloaded", {"now": "new"})]


async def test_a_requested_value_is_applied_at_once(log: Log) -> None:
    """A requested reading counts alone, and logs the value even if it is the same."""
    assert await applied(Source("new"), readings=3, start=Reloader.request) == ["new"]
    assert await applied(Source("old"), readings=3, start=Reloader.request) == ["old"]
    assert log.lines == [("secrets.reloaded", {"now": now}) for now in ("new", "old")]


async def test_an_invalid_value_is_logged_once(log: Log) -> None:
    """It changes nothing; each problem is logged once, and again after it was fixed."""
    looks: list[str | ConfigError] = [BAD, BAD, BAD, WORSE, WORSE, "old", "old", BAD, BAD, "new"]
    assert await applied(Source(*looks), readings=15) == ["new"]
    kept = [("secrets.reload_failed", {"problems": each.problems}) for each in (BAD, WORSE, BAD)]
    assert log.lines == [*kept, ("secrets.reloaded", {"now": "new"})]


async def test_a_momentary_problem_is_not_logged(log: Log) -> None:
    """A file that is missing for one reading is being replaced."""
    assert await applied(Source("old", BAD, "new"), readings=6) == ["new"]
    assert [event for event, _ in log.lines] == ["secrets.reloaded"]


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
    """A removed token ends its logins; without a list of readers the page does not become open."""
    acting, reading = (sandbox.directory / name for name in ("acting", "reading"))
    acting.write_text(f"alice:{CANARY}-of-alice,bob:{CANARY}-of-bobbob\n")
    reading.write_text(f"carol:{CANARY}-of-carol\n")
    files = {"ADMIN_TOKENS_FILE": str(acting), "ADMIN_READ_TOKENS_FILE": str(reading)}
    work = sandbox.start("work", **files).ready()

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
        assert status() == 200
        put(acting, "", "admin_tokens.reloaded")
        put(reading, "", "admin_read_tokens.reload_failed")
        assert status() == 303
    reloaded = [[*line["fingerprints"]] for line in work.lines("admin_tokens.reloaded")]
    assert (reloaded[0], reloaded[-1]) == (["bob"], [])
    assert work.stop() == 0
    assert CANARY.encode() not in work.out + work.err
