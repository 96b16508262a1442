"""Laws of several receivers on one port: one service to the outside, whoever of them dies."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx2
import pytest
from harness import Process, Yard, event, signed, soon, takes_long, yard

COUNTS = re.compile(r'^idv_events_total{outcome="admitted",type="created"} (\S+)$', re.MULTILINE)
# As `python -m service`, but whoever is replaced waits a moment only.
HASTY = """
from service import supervisor
from service.cli import main
supervisor.FIRST_PAUSE_S = 0.01
{changes}
main()
"""

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's end")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    """Yield a yard with a server for the tests of this module."""
    with yard(tmp_path_factory.mktemp("supervisor")) as opened:
        yield opened


def started(ground: Yard, *, changes: str = "", **settings: str) -> Process:
    """Start two receivers on one port and wait until both listen."""
    serve = ground.start(
        "serve", program=HASTY.format(changes=changes), WEB_CONCURRENCY="2", **settings
    )
    soon(lambda: serve.popen.poll() is not None or len(serve.lines("process.started")) >= 2)
    assert serve.popen.poll() is None, (serve.out, serve.err)
    serve.started = serve.lines("process.started")[0]
    return serve


def receivers(serve: Process) -> list[int]:
    """Return the process ids of all receivers that ever listened, oldest first."""
    return [line["pid"] for line in serve.lines("process.started")]


def admitted(serve: Process) -> float:
    """Return how many events the metrics say were admitted."""
    found = COUNTS.search(httpx2.get(serve.admin + "/metrics").text)
    return float(found[1]) if found else 0.0


def post(serve: Process, number: int, name: str) -> None:
    """Post new events, each over a connection of its own."""
    for each in range(number):
        body = event(session=f"vs_{name}{each}", id=f"evt_{name}{each}")
        # A connection that waited for one who was killed is reset: Stripe comes again.
        assert soon(partial(_taken, serve, body))


def _taken(serve: Process, body: bytes) -> bool:
    with suppress(httpx2.TransportError):
        return httpx2.post(serve.url, content=body, headers=signed(body)).is_success
    return False


def gone(pid: int) -> bool:
    """Say whether a process is no more."""
    stat = Path(f"/proc/{pid}/stat")
    with suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    return True


@takes_long
def test_the_sum_is_told_whoever_is_asked(ground: Yard) -> None:
    """Both receivers take events; each scrape of the one admin port tells the sum of both."""
    serve = started(ground)
    takers: set[str] = set()
    sent = 0

    def both_took_some() -> bool:
        nonlocal sent
        post(serve, 10, f"sum{sent}")
        sent += 10
        # What a receiver makes as request id begins with a word of its own.
        takers.update(line["request_id"][:8] for line in serve.lines("event.admitted"))
        return len(takers) == 2

    soon(both_took_some)
    assert [admitted(serve) for _ in range(8)] == [sent] * 8
    assert httpx2.get(serve.admin + "/readyz").status_code == 200
    assert serve.stop() == 0
    assert serve.err == b""


def test_who_is_killed_is_replaced_and_what_it_counted_stays(ground: Yard) -> None:
    """Kill -9 of a receiver: another takes its place, counters keep, no gauge tells of the dead."""
    serve = started(ground)
    post(serve, 20, "kept")
    soon(lambda: admitted(serve) == 20)
    first, second = receivers(serve)
    os.kill(first, signal.SIGKILL)
    soon(lambda: len(receivers(serve)) == 3)
    os.kill(second, signal.SIGKILL)
    soon(lambda: len(receivers(serve)) == 4)

    [ended, also] = serve.lines("receiver.ended")
    assert (ended["pid"], ended["exit_code"]) == (first, -signal.SIGKILL)
    assert also["pid"] == second
    post(serve, 5, "after")
    assert admitted(serve) == 25

    def told() -> str:
        return httpx2.get(serve.admin + "/metrics").text

    # Somebody dead who was in the middle of starting would have left a 0.
    soon(lambda: "\nidv_ready 1.0\n" in told())
    assert "\nidv_requests_in_flight 0.0\n" in told()
    assert 'pid="' not in told()
    assert serve.stop() == 0


@takes_long
def test_every_gauge_says_how_it_is_summed(ground: Yard) -> None:
    """No series of ours is told per process, or otherwise described than by a single one."""
    serve = started(ground)
    post(serve, 1, "same")
    several = httpx2.get(serve.admin + "/metrics").text
    serve.stop()
    alone = ground.start("serve").ready()
    post(alone, 1, "alone")
    single = httpx2.get(alone.admin + "/metrics").text
    alone.stop()
    described = re.compile(r"^# (?:TYPE|HELP) idv_.*$", re.MULTILINE)
    # In files there is nothing of a series before it has a value.
    assert {*described.findall(several)} <= {*described.findall(single)}
    for name in ("idv_ready", "idv_requests_in_flight", "idv_build_info", "idv_redis_risk"):
        assert f"# TYPE {name} gauge" in several
    assert "pid=" not in several


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=takes_long)])
def test_a_signal_ends_all_in_good_order(ground: Yard, how: signal.Signals) -> None:
    """SIGTERM and Ctrl-C: all drain, the port closes, nobody and nothing is left; exit code 0."""
    serve = started(ground, TMPDIR=str(ground.directory))
    [directory] = ground.directory.glob("idv-metrics-*")
    serve.popen.send_signal(how)
    assert serve.wait() == 0
    assert len(serve.lines("process.stopped")) == 2
    assert serve.lines()[-1]["event"] == "receivers.stopped"
    assert all(gone(pid) for pid in receivers(serve))
    assert not directory.exists()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(serve.url)


def test_a_second_signal_ends_all_at_once(ground: Yard) -> None:
    """Whoever does not want to wait for the drain sends SIGTERM twice."""
    serve = started(ground, DRAIN_S="300")
    serve.popen.terminate()
    soon(lambda: len(serve.lines("process.draining")) == 2)
    serve.popen.terminate()
    assert serve.wait(5) == -signal.SIGTERM
    soon(lambda: all(gone(pid) for pid in receivers(serve)))


@on_linux
def test_nobody_outlives_the_parent(ground: Yard) -> None:
    """Kill -9 of the parent: the receivers drain and end by themselves."""
    serve = started(ground)
    serve.popen.kill()
    serve.wait()
    soon(lambda: all(gone(pid) for pid in receivers(serve)))
    assert len(serve.lines("process.stopped")) == 2


@takes_long
def test_what_is_wrong_at_start_is_said_once(ground: Yard) -> None:
    """A setting or a handler that cannot be ends it with one line and the code of one receiver."""
    several = {"WEB_CONCURRENCY": "3"}
    unknown = ground.run("serve", HANDLERS="log,nobody", **several)
    taken = ground.start("serve").ready()
    busy = ground.run("serve", PORT=str(taken.port), **several)
    for process in (unknown, busy):
        assert process.wait() == 2
        [said] = process.err.decode().splitlines()
        assert said.startswith("error: ")
    taken.stop()


@takes_long
def test_who_dies_too_often_is_not_replaced_for_ever(ground: Yard) -> None:
    """After so many deaths all end with an exit code, so that whoever runs us begins afresh."""
    serve = started(ground, changes="supervisor.MOST_REPLACED = 1")
    os.kill(receivers(serve)[-1], signal.SIGKILL)
    soon(lambda: len(receivers(serve)) == 3)
    os.kill(receivers(serve)[-1], signal.SIGKILL)
    assert serve.wait() == 1
    assert len(serve.lines("receiver.ended")) == 2
    assert all(gone(pid) for pid in receivers(serve))


def test_the_last_who_ends_by_itself_ends_all(ground: Yard) -> None:
    """When none is left and the last ended by its own decision, its code is the service's."""
    # Every receiver dies of what the first health check meets; none will ever live.
    failing = "import os\nos.environ['PYTHONPATH'] = os.environ['FAULTY']"
    faulty = ground.directory / "faulty"
    faulty.mkdir(exist_ok=True)
    (faulty / "sitecustomize.py").write_text(
        "from service.health import Health\n"
        "async def watch(health):\n    raise KeyError('canary')\n"
        "Health.watch = watch\n"
    )
    path = f"{faulty}{os.pathsep}{Path(__file__).parents[1]}"
    process = ground.run(
        "serve", program=HASTY.format(changes=failing), WEB_CONCURRENCY="2", FAULTY=path
    )
    assert process.wait() == 1
    assert b"canary" not in process.out + process.err
