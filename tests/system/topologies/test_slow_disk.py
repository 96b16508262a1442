"""A Redis that is killed while its disk is slow: which answers were true.

A library that slows every sync down is compiled here and loaded into the server.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.depth import takes_long
from tests.support.load import (
    AFTER,
    BEFORE,
    PER_SECOND,
    SESSIONS,
    deployment,
    during,
    remembered,
)
from tests.support.servers import Server, free_port, server
from tests.support.waiting import until

pytestmark = [pytest.mark.timeout(400), takes_long]

KILLS = 3


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the library that makes syncs slow."""
    if (compiler := shutil.which("gcc")) is None:
        pytest.skip("gcc is not on this machine")
    made = tmp_path_factory.mktemp("shim") / "slow_disk.so"
    source = Path(__file__).with_name("slow_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True)
    return made


class Machine:
    """A server on a slow disk; after a crash it has what was on the disk."""

    def __init__(self, stack: ExitStack, directory: Path, environ: Mapping[str, str]) -> None:
        self._stack = stack
        self._directory = directory
        self._environ = environ
        self.port = free_port()
        self.fsync = ""

    def start(self, fsync: str) -> None:
        """Start the server with an `appendfsync`."""
        self.fsync = fsync
        options = ("--appendonly", "yes", "--appendfsync", fsync)
        started = server(self._directory, *options, port=self.port, environ=self._environ)
        self.server: Server = self._stack.enter_context(started)

    def kill(self) -> None:
        """Kill the server."""
        self.server.process.kill()
        self.server.process.wait()

    def restart(self) -> None:
        """Kill the server, and start it again."""
        self.kill()
        self.start(self.fsync)


def slow(stack: ExitStack, directory: Path, shim: Path, sync_ms: int) -> Machine:
    """Return a machine whose syncs take so long."""
    environ = {"LD_PRELOAD": str(shim), "SLOW_SYNC_MS": str(sync_ms)}
    return Machine(stack, directory / "redis", environ)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Yield the stack that stops the servers."""
    with ExitStack() as opened:
        yield opened


async def test_what_is_synced_before_it_is_answered_is_never_lost(
    stack: ExitStack, shim: Path, tmp_path: Path
) -> None:
    """With DURABILITY=fsync every event answered 200 outlives repeated crashes, in order."""
    machine = slow(stack, tmp_path, shim, 200)
    machine.start("always")
    async with deployment(
        f"redis://127.0.0.1:{machine.port}", tmp_path, DURABILITY="fsync"
    ) as deployed:
        for _ in range(KILLS):
            await deployed.load.answered(BEFORE)
            await during(machine.restart)
        await deployed.load.answered(AFTER)
        deployed.load.stop()
        await deployed.handed_over({*deployed.load.outcomes})
    deployed.assert_nothing_lost(remembered([machine.server]))


async def test_with_everysec_the_last_seconds_may_be_lost_and_no_more(
    stack: ExitStack, shim: Path, tmp_path: Path
) -> None:
    """Events answered earlier are kept, although the write itself waits for a busy disk."""
    machine = slow(stack, tmp_path, shim, 1500)
    machine.start("everysec")
    lost: list[set[str]] = []
    async with deployment(f"redis://127.0.0.1:{machine.port}", tmp_path) as deployed:
        for _ in range(KILLS):
            await deployed.load.answered(BEFORE)
            old = {*deployed.load.outcomes} - {name for each in lost for name in each}
            await deployed.load.answered(8 * PER_SECOND)
            machine.kill()
            # Once each session has had an error, no 200 is on its way any more.
            refused = deployed.load.statuses[503] + SESSIONS
            await until(lambda: deployed.load.statuses[503] >= refused)  # noqa: B023 - awaited
            answered = {*deployed.load.outcomes}
            await during(lambda: machine.start("everysec"))
            lost.append(answered - remembered([machine.server]).keys())
            assert not lost[-1] & old
    print("lost with each kill:", [len(each) for each in lost])  # noqa: T201 - to be read with -s
