"""Tests of workers in processes of their own that are suspended or killed by a transition."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.delivery.deliverer import MAX_DELIVERIES_WITHOUT_OUTCOME, DeadLetterReason
from tests.support.servers import frozen
from tests.support.waiting import PATIENCE_S, until
from tests.support.workers import INTERVAL_S, TTL_S, Deployment, Entry, check_order

# The handler writes a line for each call and each return: "<worker> > <session> <sequence>". From
# one sequence on it does not return before there is a file with the worker's name.
PROGRAM = f"""
import asyncio, os, sys
from service.storage import clients
from service.delivery import worker
from service.config import Settings
from service.storage.connections import connect
from service.storage.keys import Keys
from service.secret import Secret
from service.delivery.worker import Worker

clients.CALL_TIMEOUT_S = clients.CONNECT_TIMEOUT_S = {PATIENCE_S}
worker.MAX_INTERVAL_S = {INTERVAL_S}
url, log, name, held_from, ttl_s = sys.argv[1:]
out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

async def handle(transition):
    session, sequence = transition.session_id, transition.sequence
    os.write(out, f"{{name}} > {{session}} {{sequence}}\\n".encode())
    if session.startswith("vs_killer"):
        os._exit(9)
    while sequence >= int(held_from) and not os.path.exists(f"{{log}}.{{name}}"):
        await asyncio.sleep(0.01)
    os.write(out, f"{{name}} < {{session}} {{sequence}}\\n".encode())

async def main():
    settings = Settings(
        redis_url=Secret(url),
        lease_ttl_s=float(ttl_s),
        handler_timeout_s={10 * PATIENCE_S},
    )
    async with connect(settings.redis_url) as connections:
        keys = Keys(settings.redis_prefix, settings.partitions)
        await Worker(connections, keys, settings, {{"log": handle}}).run(asyncio.Event())

asyncio.run(main())
"""

Start = Callable[..., subprocess.Popen[bytes]]


class LogFile:
    """The calls of the handlers in all worker processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def let_return(self, worker: str) -> None:
        """Let the calls of a worker return."""
        self.path.with_name(f"{self.path.name}.{worker}").touch()

    def calls(self, worker: str = "") -> list[Entry]:
        """Return the calls of one worker or of all."""
        return self._entries(">", worker)

    def returns(self, worker: str = "") -> list[Entry]:
        """Return the calls that have returned, of one worker or of all."""
        return self._entries("<", worker)

    def _entries(self, wanted: str, worker: str) -> list[Entry]:
        if not self.path.exists():
            return []
        lines = [line.split() for line in self.path.read_text().splitlines()]
        return [
            (session, int(sequence))
            for name, mark, session, sequence in lines
            if mark == wanted and name.startswith(worker)
        ]


@pytest.fixture
def log(tmp_path: Path) -> LogFile:
    """Return the log file of the worker processes."""
    return LogFile(tmp_path / "log")


@pytest.fixture
def start(deployment: Deployment, log: LogFile) -> Iterator[Start]:
    """Yield a function that starts a worker process; all are killed at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def start_one(
        name: str, *, held_from: int = 10**9, ttl_s: float = 10 * PATIENCE_S
    ) -> subprocess.Popen[bytes]:
        url = deployment.settings.redis_url.reveal()
        command = [sys.executable, "-c", PROGRAM, url, log.path, name, held_from, ttl_s]
        devnull = subprocess.DEVNULL
        process = subprocess.Popen([*map(str, command)], stderr=devnull, stdout=devnull)
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.wait(PATIENCE_S)


async def test_a_suspended_process_acknowledges_nothing_of_others(
    deployment: Deployment, start: Start, log: LogFile
) -> None:
    """A process that is suspended for longer than its lease does not disturb the order."""
    first = start("first", held_from=3, ttl_s=TTL_S)
    deployment.admit(40, 6)
    await until(lambda: len(set(log.calls("first"))) == 40 * 3)
    with frozen(first.pid):
        start("second", held_from=5, ttl_s=TTL_S)
        await until(lambda: len(set(log.returns("second"))) == 40 * 2)
        assert len(set(log.calls("first")) - set(log.returns("first"))) == 40
        assert deployment.pending() >= 40
        # As soon as it goes on, all its calls return.
        log.let_return("first")
    await until(lambda: deployment.live_workers() == 2)
    assert deployment.pending() >= 40
    deployment.admit(40, 5)
    log.let_return("second")
    await deployment.deliver_all(log.returns)

    check_order(log.calls(), deployment.admitted)
    assert not deployment.dead_letters()


async def test_a_poison_pill_becomes_a_dead_letter_and_no_other(
    deployment: Deployment, start: Start, log: LogFile
) -> None:
    """An entry whose every call kills the process is a dead letter; all others are delivered."""
    deployment.admit(20, 3)
    deployment.admit(1, name="vs_killer")
    deployment.admit(20, 3)
    good = [one for one in deployment.admitted if not one[0].startswith("vs_killer")]
    deaths = 0
    process = start("w0")

    def is_over() -> bool:
        nonlocal deaths, process
        if process.poll() is not None:
            deaths += 1
            assert deaths <= MAX_DELIVERIES_WITHOUT_OUTCOME
            # As a process manager would. The leases are freed to save the time.
            deployment.client.delete(*deployment.lease_keys(), deployment.keys.workers("log"))
            process = start(f"w{deaths}")
        return deployment.pending() == 0 and set(good) <= set(log.returns())

    await until(is_over, deadline_s=4 * PATIENCE_S)

    check_order([one for one in log.calls() if one in set(good)], good)
    assert deployment.dead_letters() == [("vs_killer0", DeadLetterReason.KILLED_WORKER)]
    assert deaths == MAX_DELIVERIES_WITHOUT_OUTCOME
