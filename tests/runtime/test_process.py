"""Whole processes: how they start, wait, reload and stop, and what a failed start prints."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest
import redis

from tests.support.depth import takes_long
from tests.support.harness import answer, connected, event, request, signed
from tests.support.processes import Process, Sandbox, open_sandbox
from tests.support.servers import free_port, frozen, server
from tests.support.waiting import DEADLINE_S, until, wait_until

CANARY = "canary-4711"
# `python -m service` with a low limit of open files.
FEW_FILES = """
import resource
from service.cli import main
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
main()
"""
# `python -m service` without a writable directory for temporary files.
WITHOUT_TMP = """
import tempfile
from service.cli import main

def none():
    raise FileNotFoundError("canary-4711")

tempfile._get_default_tempdir = none
main()
"""
# `python -m service` with an error that no code expects.
FAULTY = f"""
from service.cli import main
from service.storage.health import Health

async def watch(health):
    raise KeyError("{CANARY}")

Health.watch = watch
main()
"""


def assert_one_line(process: Process, code: int, *problems: str) -> None:
    """Check that a process exited with *code* and printed one line for each problem only."""
    assert process.wait() == code, (process.out, process.err)
    said = process.err.decode().splitlines()
    assert [line for line in said if line.startswith("error: ")] == said
    assert len(said) == len(problems)
    for line, problem in zip(said, problems, strict=True):
        assert problem in line
    assert b"Traceback" not in process.out + process.err


@takes_long
def test_a_failed_start_is_one_line_for_each_problem(sandbox: Sandbox) -> None:
    """A taken port, another layout, an unknown or misconfigured handler: exit 2."""
    taken = sandbox.start("serve").ready()
    wait_until(lambda: taken.lines("redis.recovered"))
    busy = [
        sandbox.start("serve", PORT=str(taken.port)),
        sandbox.start("dev", PORT=str(taken.port)),
        sandbox.start("work", ADMIN_PORT=str(taken.port)),
    ]
    layouts = [sandbox.start(command, PARTITIONS="5") for command in ("serve", "work")]
    refused = sandbox.start("work", HANDLERS="broken:refuses")
    unknown = sandbox.start("serve", HANDLERS="log,absent")
    not_ours = sandbox.start("work", "--handlers", "kafka,log")
    keyless = sandbox.start("work", "--handlers", "fetch")
    for process in busy:
        assert_one_line(process, 2, "PORT or ADMIN_PORT: cannot listen")
    for process in layouts:
        assert_one_line(process, 2, "PARTITIONS is 5")
    assert_one_line(refused, 2, "BROKEN_URL: expected a URL", "BROKEN_TOPIC: expected a name")
    assert_one_line(unknown, 2, "HANDLERS: absent")
    assert_one_line(not_ours, 2, "--handlers: kafka is not among HANDLERS")
    assert_one_line(keyless, 2, "--handlers: fetch needs STRIPE_API_KEY")
    everything = b"".join(p.out + p.err for p in (*busy, *layouts, refused, unknown))
    assert CANARY.encode() not in everything
    assert taken.stop() == 0


def test_no_directory_for_temporary_files_is_needed(sandbox: Sandbox) -> None:
    """Receivers and workers run without one; `dev` needs one and says so."""
    started = [sandbox.start(command, program=WITHOUT_TMP) for command in ("serve", "work")]
    dev = sandbox.run("dev", program=WITHOUT_TMP, REDIS_URL="")
    assert_one_line(dev, 2, "set TMPDIR")
    assert [process.ready().stop() for process in started] == [0, 0]


@pytest.mark.parametrize("variable", ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"])
@pytest.mark.parametrize("is_there", [True, False])
def test_an_inherited_directory_of_metrics_is_not_used(
    sandbox: Sandbox, variable: str, is_there: bool
) -> None:
    """Metrics are of this process only, whatever another service has set in the environment."""
    directory = sandbox.directory / f"{variable}_{is_there}"
    if is_there:
        directory.mkdir()
    serve = sandbox.start("serve", **{variable: str(directory)}).ready()
    ready = "\nidv_ready 1.0\n"
    wait_until(lambda: ready in _metrics(serve).decode())
    assert "process_cpu_seconds_total" in _metrics(serve).decode()
    assert serve.stop() == 0
    assert not is_there or not [*directory.iterdir()]


def test_a_handler_that_cannot_be_opened_is_one_line(sandbox: Sandbox) -> None:
    """The process exits and names the file and line, but no data."""
    place = f"{sandbox.directory}/broken.py:13 crashes"
    problem = f"HANDLERS: broken:crashes cannot be opened: RuntimeError ({place})"
    work = sandbox.run("work", HANDLERS="broken:crashes")
    assert_one_line(work, 2, problem)
    dev = sandbox.run("dev", HANDLERS="broken:crashes")
    assert dev.wait() == 2
    assert dev.err.decode().endswith(f"\nerror: {problem}\n")
    for process in (work, dev):
        assert CANARY.encode() not in process.out + process.err
        assert sandbox.server.url.encode() not in process.out


def test_an_unexpected_error_stops_the_process_in_order(sandbox: Sandbox) -> None:
    """A part that fails stops the other parts, as a signal would."""
    process = sandbox.run("serve", program=FAULTY)
    assert_one_line(process, 1, "failed with KeyError")
    assert [line["event"] for line in process.lines()][-2:] == [
        "process.draining",
        "process.failed",
    ]
    assert CANARY.encode() not in process.out


def readiness(process: Process) -> tuple[int, Any]:
    """Return status and body of /readyz on the admin port."""
    answer = httpx2.get(f"{process.admin}/readyz")
    return answer.status_code, orjson.loads(answer.content or b"null")


def is_ready(process: Process) -> bool:
    """Say whether /readyz is 200."""
    return readiness(process)[0] == 200


def not_ready(reason: str) -> tuple[int, Any]:
    """Return status and body of /readyz for a process that is not ready."""
    return 503, {"ready": False, "reason": reason}


def test_a_redis_that_refuses_is_waited_for(sandbox: Sandbox) -> None:
    """A Redis that forbids our commands is logged at once, without its password."""
    with redis.Redis.from_url(sandbox.server.url) as client:
        client.acl_setuser(
            "weak", enabled=True, passwords=[f"+{CANARY}"], keys="*", commands=["+ping", "+info"]
        )
    url = f"{sandbox.server.url.replace('://', '://weak@')}?password={CANARY}"
    process = sandbox.start("serve", REDIS_URL=url).ready()
    [lost] = wait_until(lambda: process.lines("redis.lost"))
    assert lost["reason"] == "redis_unauthorized"
    assert readiness(process) == not_ready("redis_unauthorized")
    assert process.stop() == 0
    assert CANARY.encode() not in process.out + process.err


def test_groups_that_redis_refuses_to_create_are_waited_for(tmp_path: Path) -> None:
    """The reason is logged once; `status` and the metric of an alert say that nothing is done."""
    with open_sandbox(tmp_path) as sandbox, redis.Redis.from_url(sandbox.server.url) as client:
        client.acl_setuser(
            "early", enabled=True, nopass=True, keys="*", commands=["+@all", "-xgroup"]
        )
        early = sandbox.server.url.replace("://", "://early@")
        work = sandbox.start("work", REDIS_URL=early).ready()
        assert wait_until(lambda: b"handler log: has no consumer group" in _status(sandbox))
        # It tries once a second.
        refused = _refused(client)
        wait_until(lambda: _refused(client) > refused + 1)
        [refusal] = work.lines("group.not_created")
        assert refusal["reason"] == "redis_unauthorized"
        assert b'idv_leases_held{handler="log"} 0.0' in _metrics(work)
        client.acl_setuser("early", commands=["+xgroup"])
        wait_until(lambda: b"handler log" not in _status(sandbox))
        assert work.stop() == 0
        assert [line["handler"] for line in work.lines("group.created")] == ["log"]


def _refused(client: redis.Redis) -> int:
    entries: Any = client.acl_log()
    return sum(int(entry["count"]) for entry in entries)


def _status(sandbox: Sandbox) -> bytes:
    return sandbox.invoke("status").out


def test_a_redis_that_is_away_is_waited_for(sandbox: Sandbox) -> None:
    """Processes listen, and /readyz names what they wait for; once Redis is there, they work."""
    port = free_port()
    settings = {"REDIS_URL": f"redis://127.0.0.1:{port}/0", "ADMIT_DEADLINE_S": "0.2"}
    serve, work = (sandbox.start(command, **settings).ready() for command in ("serve", "work"))
    for process in (serve, work):
        assert httpx2.get(f"{process.admin}/livez").status_code == 200
        assert readiness(process) == not_ready("redis_unreachable")
        [lost] = wait_until(partial(process.lines, "redis.lost"))
        assert lost["reason"] == "redis_unreachable"
    body = event(id="evt_away", session="vs_away")

    def status() -> int:
        return httpx2.post(serve.url, content=body, headers=signed(body)).status_code

    assert status() == 503
    with server(sandbox.directory / "late", port=port):
        for process in (serve, work):
            wait_until(partial(is_ready, process))
        # On a busy machine an answer may come after the short deadline.
        wait_until(lambda: status() == 200)
        assert wait_until(lambda: work.lines("transition"))[0]["session_id"] == "vs_away"
        assert [serve.stop(), work.stop()] == [0, 0]


def test_a_handler_that_does_not_open_leaves_no_group(sandbox: Sandbox) -> None:
    """A worker creates groups only after its handlers have been opened."""
    process = sandbox.run("work", HANDLERS="log,broken:refuses", REDIS_PREFIX="unopened")
    assert process.wait() == 2
    with redis.Redis.from_url(sandbox.server.url) as client:
        assert not [*client.scan_iter("unopened:*transitions*")]


async def test_requests_beyond_the_limit_are_shed(sandbox: Sandbox) -> None:
    """With MAX_IN_FLIGHT requests in progress, another POST is answered 503 by the listener."""
    process = sandbox.start("serve", MAX_IN_FLIGHT="1", ADMIT_DEADLINE_S="30").ready()
    body = event()
    post = request(body, signed(body), close=False)
    async with connected(process.port) as first, connected(process.port) as second:
        with frozen(sandbox.server.pid):
            first[1].write(post)
            await until(lambda: b"idv_requests_in_flight 1.0" in _metrics(process))
            second[1].write(post)
            head = await asyncio.wait_for(second[0].readuntil(b"\r\n\r\n"), DEADLINE_S)
        assert (await answer(first[0]))[0] == 200
    assert head.startswith(b"HTTP/1.1 503 ")
    # Answers that went through uvicorn have a date.
    assert b"\r\ndate:" not in head
    assert process.stop() == 0
    [line] = process.lines("requests.shed")
    assert (line["reason"], line["requests"]) == ("busy", 1)


def _metrics(process: Process) -> bytes:
    return httpx2.get(f"{process.admin}/metrics").content


async def test_few_files_mean_few_connections(sandbox: Sandbox) -> None:
    """With a low limit of open files connections are limited, and some are left for Redis."""
    serve = sandbox.start("serve", program=FEW_FILES)
    await asyncio.to_thread(serve.ready)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(350):
            await stack.enter_async_context(connected(serve.port))
        body = event(session="vs_files", id="evt_files")
        async with connected(serve.port) as (reader, writer):
            writer.write(request(body, signed(body)))
            assert await answer(reader) == (200, b'{"outcome":"admitted"}')
    [limited] = serve.lines("connections.limited")
    assert limited["most"] == 150
    assert await asyncio.to_thread(serve.stop) == 0
    assert serve.err == b""


def test_a_worker_has_an_admin_port(sandbox: Sandbox) -> None:
    """`work` serves probes and metrics on its admin port, and no webhooks."""
    work = sandbox.start("work", "--handlers", "log", HANDLERS="log,redis_stream").ready()
    with httpx2.Client(base_url=work.admin) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        wait_until(lambda: 'idv_leases_held{handler="log"} 8.0' in client.get("/metrics").text)
        # An alert sees a handler that no worker calls.
        assert b'idv_leases_held{handler="redis_stream"} 0.0' in _metrics(work)
        assert client.get("/livez").status_code == 200
        # All that is posted there is the page's, which refuses what another site may have sent.
        assert client.post("/webhooks/stripe").status_code == 403
    assert work.started["port"] is None
    assert work.stop() == 0
