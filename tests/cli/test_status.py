"""`status`: its exit codes, its JSON, and what it looks like in 80 columns."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis
from rich.console import Console

from service.cli.status_view import render, sparkline
from service.findings import Severity
from service.monitoring.activity import Activity, Day, Minute, Process, Reversal
from service.monitoring.handler_state import HandlerState
from service.monitoring.overview import Overview
from service.monitoring.reconciliation import AccountState, Reconciliation
from service.monitoring.verdict import Reason
from service.storage.keys import LAYOUT_VERSION, Keys
from tests.support.processes import PATIENT, Sandbox, environment, open_sandbox
from tests.support.servers import free_port, server
from tests.support.waiting import wait_until

NOW = datetime(2026, 11, 29, 12, 30, tzinfo=UTC)
POD = "identity-webhooks-receiver-7d9f8b6c5d-x2x9z-1"
LAYOUT: dict[Any, Any] = {"version": LAYOUT_VERSION, "partitions": 8}
HOSTILE = "[red]a\x1b[2J\u202eb"
QUICK = PATIENT.replace(
    "\nmain()", "\nfrom service.cli import status\nstatus.WATCH_EVERY_S = 0.1\nmain()"
)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """Yield a sandbox with a server for the tests of this module."""
    with open_sandbox(tmp_path_factory.mktemp("status")) as opened:
        yield opened


def test_exit_codes(sandbox: Sandbox) -> None:
    """0 while nothing fails, 1 if something does, 2 where nothing is stored, 3 without Redis."""
    empty = sandbox.invoke("status")
    assert (empty.code, empty.err) == (
        2,
        b"error: REDIS_PREFIX: nothing was ever stored under idv\n",
    )
    serve = sandbox.start("serve").ready()
    # It claims the layout once Redis has answered it.
    wait_until(lambda: sandbox.invoke("status").code != empty.code)
    wait_until(lambda: "receivers" not in reasons(sandbox, 1))
    assert reasons(sandbox, 1) == ["workers", "events"]
    work = sandbox.start("work").ready()
    wait_until(lambda: sandbox.invoke("status", "--json").code == 0)
    well = sandbox.invoke("status")
    assert (well.code, well.out.startswith(b" all is well   idv at ")) == (0, True)
    for name in (serve, work):
        assert name.stop() == 0
    wait_until(lambda: reasons(sandbox, 1)[:2] == ["receivers", "handler log"])
    gone = sandbox.invoke("status", REDIS_URL="redis://user:canary@127.0.0.1:1/0")
    assert gone.code == 3
    assert b"Redis: does not answer (redis_unreachable)" in gone.out
    assert b"canary" not in gone.out + gone.err
    assert reasons(sandbox, 3, REDIS_URL="redis://127.0.0.1:1/0") == ["Redis"]


def reasons(sandbox: Sandbox, code: int, **settings: str) -> list[str]:
    """Return what the reasons of `status --json` are about, and check its exit code."""
    invoked = sandbox.invoke("status", "--json", **settings)
    found = orjson.loads(invoked.out)
    assert invoked.code == code, found["reasons"]
    return [each["subject"] for each in found["reasons"]]


def test_the_json_has_everything(sandbox: Sandbox) -> None:
    """Named tuples are objects, times are text, and what is internal is left out."""
    with closing(redis.Redis.from_url(sandbox.server.url)) as client:
        client.hset(Keys("idv", 8).layout, mapping=LAYOUT)
    found = orjson.loads(sandbox.invoke("status", "--json").out)
    assert found.keys() == {*Overview._fields}
    assert found["activity"].keys() == {*Activity._fields} - {"watch_report"}
    assert [minute.keys() for minute in found["activity"]["minutes"]] == [
        {"at", "received", "delivered"}
    ] * 60
    assert {one["name"] for one in found["redis_findings"]} >= {"clock", "memory"}
    assert datetime.fromisoformat(found["at"]).tzinfo is UTC or found["at"].endswith("+00:00")


def test_watch_goes_on_without_redis(tmp_path: Path) -> None:
    """It says when Redis does not answer, and goes on when it comes back; Ctrl-C ends it with 0."""
    port = free_port()
    with open_sandbox(tmp_path) as sandbox:
        watching = sandbox.start(
            "status", "--watch", "--json", program=QUICK, REDIS_URL=f"redis://127.0.0.1:{port}"
        )

        def last() -> dict[str, Any]:
            lines = watching.out.rpartition(b"\n")[0].split(b"\n")
            found: dict[str, Any] = orjson.loads(lines[-1] or b"{}")
            return found

        wait_until(lambda: last().get("is_available") is False)
        for directory in ("first", "second"):
            with server(tmp_path / directory, port=port) as running:
                with running.client() as client:
                    client.hset(Keys("idv", 8).layout, mapping=LAYOUT)
                wait_until(lambda: last()["is_available"])
            wait_until(lambda: not last()["is_available"])
        watching.popen.send_signal(signal.SIGINT)
        assert watching.wait() == 0
        assert watching.err == b""


def process(name: str, kind: str, **changes: Any) -> Process:
    """Return a process."""
    fields = {"seen_s": 1.0, "ready": None, "last_event_at": None, "works": (), **changes}
    return Process(
        name=name, kind=kind, version="0.1.0", started_at=NOW - timedelta(hours=2), **fields
    )


def handler(name: str, **changes: Any) -> HandlerState:
    """Return a handler."""
    fields = {"is_configured": True, "lag": 0, "replays": 0, "oldest_s": 0.0, "dead_letters": 0}
    more = {"is_circuit_open": False, "workers": 2, "leases": ("w", None), "failing": 0}
    return HandlerState(name, "transitions", **{**fields, **more, **changes})


OVERVIEW = Overview(
    NOW,
    "failing",
    (
        Reason(Severity.FATAL, "receivers", "no receiver is ready (redis_slow)", "see their log"),
        Reason(Severity.WARNING, f"handler {HOSTILE}", "word " * 30, "do this"),
        Reason(Severity.FINE, "events", "no genuine event has come within seven days"),
    ),
    activity=Activity(
        processes=(
            process(POD, "receiver", ready="redis_slow"),
            process("worker-1", "worker", works=("log", "own:open"), seen_s=45.0),
        ),
        minutes=tuple(
            Minute(
                NOW - timedelta(minutes=59 - i),
                {"admitted": 12345, "signature_mismatch": 1} if i == 58 else {},
                {"log": {"delivered": 7}, "own:open": {"failed": 3}} if i == 57 else {},
            )
            for i in range(60)
        ),
        days=(Day(NOW.date(), 2, 3, 4),),
        reversals=(
            Reversal(NOW - timedelta(hours=3), "vs_1Abc", "verified", "requires_input", "evt_1"),
        ),
        last_event_at=NOW - timedelta(seconds=4),
    ),
    handlers=(
        handler("log"),
        handler("my_company.handlers:open", lag=123456, replays=1, oldest_s=301.0, workers=0),
        handler("own:open", is_circuit_open=True, dead_letters=1500, failing=800, lag=None),
    ),
    reconciliation=Reconciliation(
        5.0,
        960.0,
        (AccountState("live", 960.0, "api_unreachable"), AccountState("test", None, "")),
        3,
    ),
)


def rendered(width: int, *, has_charts: bool = True) -> str:
    """Return the overview in so many columns."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(render(OVERVIEW, "idv at redis:6379", has_charts=has_charts))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [80, 160])
def test_all_of_it_can_be_read(width: int) -> None:
    """Nothing is cut, however wide the terminal is; hostile text is escaped."""
    text = rendered(width)
    assert "…" not in text
    assert r"handler [red]a\x1b[2J\u202eb" in text
    said = re.sub(r"\s+", " ", text)
    for words in (
        "failing idv at redis:6379, 2026-11-29 12:30:00 UTC",
        "fatal receivers: no receiver is ready (redis_slow) -> see their log",
        "hint events: no genuine event",
        f"receiver {POD} redis_slow, up 2 h, 0.1.0",
        "worker worker-1 silent for 45 s, up 2 h, 0.1.0, log, own:open",
        "▁█▁ 12,346/min admitted 12,345, signature_mismatch 1",
        "0/min log 7 failed own:open 3 last genuine event 4 s ago",
        "log 0 - 0 0 closed 2 1/2",
        "my_company.handlers 123,457 5 min 0 0 closed 0 1/2 :open"
        if width == 80
        else "my_company.handlers:open 123,457 5 min 0 0 closed 0 1/2",
        "own:open ? - 800 1,500 open 2 1/2",
        "3 events recovered within 7 days; live read up to 16 min ago (api_unreachable); test not",
        "reversals: 2 sessions within 7 days vs_1Abc verified to requires_input, 3 h ago",
    ):
        assert words in said, said


def test_words_of_stripe_and_of_other_processes_are_escaped() -> None:
    """A status may be any text that Stripe sends; a process may run another version."""
    hostile = "[red]\x1b[2J\u202e"
    reversal = OVERVIEW.activity.reversals[0]._replace(previous=hostile, current=hostile)
    process = OVERVIEW.activity.processes[0]._replace(
        kind=hostile, name=hostile, version=hostile, ready=hostile, works=(hostile,),
        started_at=NOW + timedelta(minutes=1),
    )  # fmt: skip
    activity = OVERVIEW.activity._replace(processes=(process,), reversals=(reversal,))
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    console.print(render(OVERVIEW._replace(activity=activity), "idv", has_charts=False))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text.replace("\n", "").isprintable()
    # Both statuses, four words of the process and its handler, and the name of a handler.
    assert text.count(r"\x1b[2J\u202e") == 8
    assert "up 0 s" in text


def test_without_charts_it_is_plain() -> None:
    """A program, or a terminal that shows ASCII only, gets numbers alone."""
    assert rendered(80, has_charts=False).isascii()


def test_sparkline() -> None:
    """The greatest number has the highest bar, 0 the lowest, and 1 is seen beside a million."""
    assert sparkline([]) == ""
    assert sparkline([0, 0]) == "▁▁"
    assert sparkline([0, 1, 500_000, 1_000_000]) == "▁▂▅█"


def test_watch_on_a_terminal(sandbox: Sandbox) -> None:
    """It draws on the terminal's other screen, in place, and leaves the terminal as it was."""
    with closing(redis.Redis.from_url(sandbox.server.url)) as client:
        client.hset(Keys("idv", 8).layout, mapping=LAYOUT)
    ours, theirs = pty.openpty()
    watching = subprocess.Popen(
        [sys.executable, "-c", QUICK, "status", "--watch"],
        stdout=theirs,
        stdin=subprocess.DEVNULL,
        env=environment(
            COLUMNS="80", LINES="30", TERM="xterm", REDIS_URL=sandbox.server.url, LC_ALL="C.UTF-8"
        ),
    )
    os.close(theirs)
    found = b""
    while found.count(b"failing") < 3:
        found += os.read(ours, 65536)
    watching.send_signal(signal.SIGINT)
    try:
        while chunk := os.read(ours, 65536):
            found += chunk
    except OSError:
        os.close(ours)
    assert watching.wait() == 0
    entered, left = found.find(b"\x1b[?1049h"), found.rfind(b"\x1b[?1049l")
    assert 0 <= entered < found.find(b"failing") < left
    assert "▁".encode() in found
