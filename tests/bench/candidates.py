"""Who is measured on the way in: how each is started, and what its work leaves in Redis."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import redis

from tests.support.harness import SECRET
from tests.support.processes import Processes, StartedProcess, environment
from tests.support.servers import Server, free_port, server
from tests.support.usage import TICKS_PER_S, cpu_s, memory_mib
from tests.support.waiting import wait_until

BENCH = Path(__file__).parent
STOP_DEADLINE_S = 15
CORES = sorted(os.sched_getaffinity(0))
# The candidate has one core for itself; the generator and Redis share the other.
CANDIDATES_CORE = {CORES[0]}
OTHERS_CORE = {CORES[-1]}

# Counted where they are: 50,000 sessions would take the client seconds.
_COUNT_SERVICE = """
local ids, entries, cursor = 0, 0, '0'
repeat
  local found = redis.call('SCAN', cursor, 'MATCH', 'idv:*:session:*', 'COUNT', 1000)
  cursor = found[1]
  for _, key in ipairs(found[2]) do
    for _, field in ipairs(redis.call('HKEYS', key)) do
      if field:sub(1, 4) == 'evt_' then ids = ids + 1 end
    end
  end
until cursor == '0'
for partition = 0, 255 do
  entries = entries + redis.call('XLEN', 'idv:{' .. partition .. '}:transitions')
end
return {entries, ids}
"""


class Running(NamedTuple):
    """A candidate that listens.

    Attributes:
        port: Where.
        process: The one that was started; it may have started others.
        store: The Redis it uses.
    """

    port: int
    process: StartedProcess
    store: Server

    @property
    def cpu_s(self) -> float:
        """The CPU time its processes have used so far."""
        return sum(map(cpu_s, _family(self.process.pid)))

    @property
    def resident_mib(self) -> float:
        """The memory its processes have in use."""
        return sum(map(memory_mib, _family(self.process.pid)))


class Candidate(NamedTuple):
    """One that is measured.

    Attributes:
        name: What the table calls it.
        start: Starts it on a port, with a Redis and a directory.
        counted: Returns how many stream entries and remembered ids its work has left.
    """

    name: str
    start: Callable[[int, Server, Path], StartedProcess]
    counted: Callable[[Any], tuple[int, int]]


def _family(pid: int) -> Iterator[int]:
    """Yield a process and those it has started."""
    yield pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
        yield from _family(int(child))


def busy_s() -> float:
    """Return the CPU time that everything on this machine has used."""
    line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    user, nice, system, _idle, _waiting, *interrupts = map(int, line.split()[1:9])
    return (user + nice + system + sum(interrupts)) / TICKS_PER_S


@contextmanager
def on_core(cores: set[int]) -> Iterator[None]:
    """Let what is started in the block run on *cores* only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def running(candidate: Candidate, directory: Path) -> Iterator[Running]:
    """Run a candidate, fresh, with a fresh Redis of its own."""
    directory.mkdir()
    with on_core(OTHERS_CORE):
        serving = server(
            directory / "redis",
            *("--appendonly", "yes", "--appendfsync", "everysec"),
            # A rewrite in the middle of one run and not of another would be noise.
            *("--auto-aof-rewrite-percentage", "0"),
        )
        store = serving.__enter__()
    try:
        port = free_port()
        with on_core(CANDIDATES_CORE):
            process = candidate.start(port, store, directory)
        try:
            wait_until(lambda: _listens(port, process))
            yield Running(port, process, store)
        finally:
            process.terminate()
            process.wait(STOP_DEADLINE_S)
    finally:
        serving.__exit__(None, None, None)


def _listens(port: int, process: StartedProcess) -> bool:
    assert process.poll() is None, "the candidate ended"
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _bare(port: int, store: Server, directory: Path) -> subprocess.Popen[bytes]:
    return uvicorn_of(Path(sys.executable), "bare:app", port, store, directory)


def uvicorn_of(
    python: Path, app: str, port: int, store: Server, directory: Path
) -> subprocess.Popen[bytes]:
    """Start an application under uvicorn as one would in production, its log in a file."""
    options = ["--http", "httptools", "--loop", "uvloop", "--no-access-log"]
    return logged(
        [str(python), "-m", "uvicorn", *options, "--port", str(port), app], store, directory
    )


def logged(
    command: list[str], store: Server, directory: Path, **further: str
) -> subprocess.Popen[bytes]:
    """Start a command whose log goes to a file."""
    ours = {
        "REDIS_URL": store.url,
        "STRIPE_WEBHOOK_SECRET": SECRET.reveal().decode(),
        "PYTHONPATH": str(BENCH),
        **further,
    }
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=BENCH, env=environment(**ours), stdout=log, stderr=subprocess.STDOUT
        )


def _service(port: int, store: Server, directory: Path) -> StartedProcess:
    processes = Processes(store.url, directory)
    return processes.start("serve", program="", PORT=str(port), LOG_FORMAT="json").popen


def _count_service(client: Any) -> tuple[int, int]:
    entries, ids = client.eval(_COUNT_SERVICE, 0)
    return entries, ids


def _count_nothing(client: redis.Redis) -> tuple[int, int]:
    return 0, 0


ALL = {
    "bare": Candidate("bare ASGI application", _bare, _count_nothing),
    "service": Candidate("this service", _service, _count_service),
}
