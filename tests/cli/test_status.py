"""`status`: its exit codes, its JSON, and what it looks like in 80 columns."""

from __future__ import annotations

import io
import re
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

from service.cli.status_view import render, sparkline
from service.findings import Severity
from service.monitoring.activity import Activity
from service.monitoring.overview import Overview
from service.monitoring.verdict import Reason
from tests.admin import samples
from tests.cli.conftest import claim_layout
from tests.support.processes import PATIENT, Sandbox, open_sandbox
from tests.support.servers import free_port, server
from tests.support.terminals import OnTerminal
from tests.support.waiting import wait_until

HOSTILE = "[red]a\x1b[2J\u202eb"
QUICK = PATIENT.replace(
    "\nmain()", "\nfrom service.cli import status\nstatus.WATCH_EVERY_S = 0.1\nmain()"
)


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
    wait_until(lambda: sandbox.invoke("status").out.startswith(b" all is well   idv at "))
    assert reasons(sandbox, 0) == ["events"]
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
    claim_layout(sandbox.server.url)
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
            with server(tmp_path / directory, port=port):
                claim_layout(f"redis://127.0.0.1:{port}")
                wait_until(lambda: last()["is_available"])
            wait_until(lambda: not last()["is_available"])
        watching.popen.send_signal(signal.SIGINT)
        assert watching.wait() == 0
        assert watching.err == b""


def rendered(overview: Overview, width: int, *, has_charts: bool = True) -> str:
    """Return an overview in so many columns."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(render(overview, "idv at redis:6379", has_charts=has_charts))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [80, 160])
def test_all_of_it_can_be_read(width: int) -> None:
    """Nothing is cut, however wide the terminal is."""
    overview = samples.overview()
    text = rendered(overview, width)
    assert "…" not in text
    said = re.sub(r"\s+", " ", text)
    for words in (
        f"failing idv at redis:6379, {overview.at:%Y-%m-%d %H:%M:%S} UTC",
        "1,204 transitions wait, the oldest for 32 min -> look at the queue;",
        "hint Redis: appendfsync is not always processes",
        "receiver receiver-2-7d9f-2 redis_slow, up 3 days, 0.1.0",
        "worker worker-5c8d-8 silent for 95 s, up 5 h, 0.1.0, rabbitmq, log, fetch",
        "▆▆ last minute 396; in all admitted 22,022, duplicate 1,096, redis_unreachable 120",
        "last minute 672; in all rabbitmq 23,130, log 18,000 failed rabbitmq 60",
        "last genuine event 4 s ago",
        "log 0 - 0 0 closed 1 8/8 rabbitmq 1,204 32 min 3 61 open 1 8/8",
        "my_company.handlers: ? - 0 0 closed 0 0/8 open_crm"
        if width == 80
        else "my_company.handlers:open_crm ? - 0 0 closed 0 0/8",
        "4 events recovered within 7 days; live read up to 71 s ago; live acct_1MZ not read yet",
        f"3 sessions within 7 days {samples.SESSION} verified to requires_input, 2 h ago",
    ):
        assert words in said, said


def test_text_from_redis_is_shown_as_text() -> None:
    """A status may be any text that Stripe sends; a process may run another version."""
    overview = samples.overview()
    activity = overview.activity
    reversal = activity.reversals[0]._replace(previous=HOSTILE, current=HOSTILE)
    process = activity.processes[0]._replace(
        kind=HOSTILE, name=HOSTILE, version=HOSTILE, ready=HOSTILE, works=(HOSTILE,),
        started_at=overview.at + timedelta(minutes=1),
    )  # fmt: skip
    hostile = overview._replace(
        activity=activity._replace(processes=(process,), reversals=(reversal,)),
        handlers=(overview.handlers[0]._replace(name=HOSTILE),),
        reasons=(Reason(Severity.WARNING, HOSTILE, HOSTILE, HOSTILE),),
    )
    text = rendered(hostile, 160, has_charts=False)
    assert text.replace("\n", "").isprintable()
    # Both statuses, four words of the process and its handler, a handler, and a reason.
    assert text.count(r"[red]a\x1b[2J\u202eb") == 11
    assert "up 0 s" in text


def test_without_charts_it_is_plain() -> None:
    """A program, or a terminal that shows ASCII only, gets numbers alone."""
    assert rendered(samples.overview(), 80, has_charts=False).isascii()


def test_sparkline() -> None:
    """The greatest number has the highest bar, 0 the lowest, and 1 is seen beside a million."""
    assert sparkline([]) == ""
    assert sparkline([0, 0]) == "▁▁"
    assert sparkline([0, 1, 500_000, 1_000_000]) == "▁▂▅█"


def test_watch_on_a_terminal(sandbox: Sandbox) -> None:
    """It draws on the terminal's other screen, in place, and leaves the terminal as it was."""
    claim_layout(sandbox.server.url)
    watching = OnTerminal(
        *("status", "--watch"),
        directory=sandbox.directory,
        program=QUICK,
        COLUMNS="80",
        LINES="30",
        REDIS_URL=sandbox.server.url,
    )
    wait_until(lambda: watching.out.count(b"failing") >= 3)
    watching.popen.send_signal(signal.SIGINT)
    assert watching.wait() == 0
    found = watching.out
    entered, left = found.find(b"\x1b[?1049h"), found.rfind(b"\x1b[?1049l")
    assert 0 <= entered < found.find(b"failing") < left
    assert "▁".encode() in found
