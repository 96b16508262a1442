"""How a process stops: by a signal, while it starts, with clients that are stuck."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys

import httpx2
import pytest

from tests.support.harness import event, signed
from tests.support.processes import PROCESS_DEADLINE_S, Sandbox, environment
from tests.support.waiting import DEADLINE_S, wait_until

# Handlers that stop their process: when they are imported, when they are opened, and when they are
# opened and again when they are closed.
HANDLERS = {
    "imported": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n",
    "opened": """
from contextlib import asynccontextmanager

@asynccontextmanager
async def open(environ):
    import imported
    yield handle

async def handle(transition):
    pass
""",
    "opened_and_closed": """
from contextlib import asynccontextmanager
import asyncio, os, signal

@asynccontextmanager
async def open(environ):
    os.kill(os.getpid(), signal.SIGTERM)
    try:
        yield await asyncio.sleep(3600)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
""",
}


def test_stopping_is_not_ready_then_closed_then_gone(sandbox: Sandbox) -> None:
    """On SIGTERM: not ready at once, open for another DRAIN_S, then closed; exit code 0."""
    serve = sandbox.start("serve", DRAIN_S="3", KEEP_ALIVE_S="3600").ready()
    with httpx2.Client(base_url=f"http://127.0.0.1:{serve.port}") as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        serve.popen.terminate()
        wait_until(lambda: client.get("/readyz").status_code == 503)
        body = event(session="vs_drain", id="evt_drain")
        with httpx2.Client() as fresh:
            assert fresh.post(serve.url, content=body, headers=signed(body)).status_code == 200
        assert client.get("/livez").status_code == 200
        # The test would time out if the process waited for this connection.
        assert serve.wait() == 0
    names = [line["event"] for line in serve.lines()]
    assert names[-2:] == ["event.admitted", "process.stopped"]
    assert b"Traceback" not in serve.out + serve.err


def test_a_second_signal_ends_it_at_once(sandbox: Sandbox) -> None:
    """A second SIGTERM skips the drain."""
    serve = sandbox.start("serve", DRAIN_S="300").ready()
    serve.popen.terminate()
    wait_until(lambda: serve.lines("process.draining"))
    serve.popen.terminate()
    assert serve.wait() == -signal.SIGTERM


def exit_code(sandbox: Sandbox, handler: str, *run: str) -> int:
    """Return the exit code of a worker that its handler stops; *run* is what runs its command."""
    for name, text in HANDLERS.items():
        (sandbox.directory / f"{name}.py").write_text(text)
    environ = environment(
        HANDLERS=f"{handler}:open",
        REDIS_URL="unix:///nowhere",
        ADMIN_PORT="0",
        PYTHONPATH=str(sandbox.directory),
    )
    command = [*run, sys.executable, "-m", "service", "work"]
    return subprocess.run(command, env=environ, timeout=PROCESS_DEADLINE_S, check=False).returncode


@pytest.mark.parametrize("when", ["imported", "opened_and_closed"])
def test_the_first_process_of_a_container_can_be_stopped_too(sandbox: Sandbox, when: str) -> None:
    """The kernel withholds from it what it does not handle: early signals, and the second one."""
    in_container = ("unshare", "--map-root-user", "--pid", "--fork", "--kill-child")
    if not shutil.which("unshare") or subprocess.call([*in_container, "true"]):
        pytest.skip("needs a process namespace")
    assert exit_code(sandbox, when, *in_container) == 128 + signal.SIGTERM


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_process_without_standard_streams_stops_too(sandbox: Sandbox, closed: str) -> None:
    """Where a shell has closed some, no socket takes their place: it would end the process."""
    assert exit_code(sandbox, "opened", "sh", "-c", f'exec "$@" {closed}', "sh") == 0


async def test_a_stuck_client_does_not_hold_up_the_stop(sandbox: Sandbox) -> None:
    """A client that stops in mid-body delays the stop by SHUTDOWN_GRACE_S, and gets 503."""
    serve = sandbox.start("serve", RECEIVE_TIMEOUT_S="300", SHUTDOWN_GRACE_S="1").ready()
    reader, writer = await asyncio.open_connection("127.0.0.1", serve.port)
    head = b"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n"
    writer.write(head + b"Expect: 100-continue\r\n\r\n")
    invited = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
    assert invited == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"half")
    serve.popen.terminate()
    said = await asyncio.wait_for(reader.read(), DEADLINE_S)
    assert said.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 5" in said
    assert await asyncio.to_thread(serve.wait) == 0
    assert b"Traceback" not in serve.out + serve.err
    assert b"exception" not in serve.out
    writer.close()


@pytest.mark.parametrize("command", ["serve", "work", "dev"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_starting_is_a_stop(
    sandbox: Sandbox, command: str, how: signal.Signals
) -> None:
    """A process that still waits for Redis stops at once, with exit code 0."""
    nowhere = f"unix://{sandbox.directory}/nowhere.sock"
    process = sandbox.start(command, REDIS_URL=nowhere, DRAIN_S="300").ready()
    wait_until(lambda: process.lines("redis.lost"))
    process.popen.send_signal(how)
    assert process.wait() == 0, process.err
    assert process.lines()[-1]["event"] == "process.stopped"
    assert command == "dev" or process.err == b""


def test_a_stop_while_a_handler_opens_is_a_stop(sandbox: Sandbox) -> None:
    """A handler that is still being opened is cancelled, and cleans up."""
    process = sandbox.start("work", HANDLERS="broken:slow").ready()
    wait_until(lambda: b"opening" in process.out)
    assert process.stop() == 0
    assert b"closing" in process.out
    assert process.err == b""


def test_sighup_does_not_stop_a_process(sandbox: Sandbox) -> None:
    """SIGHUP stops neither a worker nor a receiver."""
    started = [sandbox.start("serve"), sandbox.start("work")]
    for process in started:
        process.ready().popen.send_signal(signal.SIGHUP)
    wait_until(lambda: started[0].lines("secrets.reloaded"))
    assert [process.stop() for process in started] == [0, 0]
