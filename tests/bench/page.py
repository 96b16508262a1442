"""Measures what the page for operators costs: `python -m tests.bench.page`. Asserts no time.

Redis has a million sessions and a hundred thousand dead letters. First each page is loaded, with
its style sheet, script and icon; then ten pages are open on the admin port of a receiver.
"""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx2
import redis

from tests.bench import scale
from tests.bench.candidates import BENCH, CANDIDATES_CORE, OTHERS_CORE, on_core
from tests.support.harness import event, signed
from tests.support.processes import Process, Processes
from tests.support.servers import Server, server
from tests.support.usage import cpu_s
from tests.support.waiting import wait_until

KEYS = scale.KEYS
HANDLER = "subjects:failing"
SESSIONS, DEAD_LETTERS = 1_000_000, 100_000
SESSION, STEPS = "vs_looked_at", ("created", "processing", "verified", "requires_input")
# As long as an overview is kept: each load of it has to collect it again.
OVERVIEW_KEPT_S = 5.5
LOADS, OVERVIEWS = 20, 4
OPEN_PAGES, REFRESH_S = 10, 5.0
_ASSET = re.compile(rb'(?:href|src)="(/static/[^"#]+)')

# Copies a dead letter into a stream, so many times.
_COPY = """
local _, fields = unpack(redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1])
for _ = 1, ARGV[1] do redis.call('XADD', KEYS[2], '*', unpack(fields)) end
return redis.call('XLEN', KEYS[2])
"""


def main() -> None:
    """Measure, and say it line by line."""
    with tempfile.TemporaryDirectory(prefix="page-") as made, ExitStack() as stack:
        directory = Path(made)
        store = stack.enter_context(_stored(directory))
        with _started(directory, store, "serve") as receiver:
            with _started(directory, store, "work") as worker:
                _send(receiver, store)
                assert worker.stop() == 0
            _fill(store)
            with _started(directory, store, "work") as worker:
                _pages(worker, store)
                _open_share(receiver)


@contextmanager
def _stored(directory: Path) -> Iterator[Server]:
    with (
        on_core(OTHERS_CORE),
        server(directory / "redis", "--appendonly", "yes", "--appendfsync", "everysec") as store,
    ):
        yield store


@contextmanager
def _started(directory: Path, store: Server, command: str) -> Iterator[Process]:
    with on_core(CANDIDATES_CORE if command == "serve" else OTHERS_CORE):
        process = Processes(store.url, directory).start(
            command,
            program="",
            HANDLERS=HANDLER,
            RETRY_MAX_ATTEMPTS="1",
            LOG_FORMAT="json",
            PYTHONPATH=str(BENCH),
        )
    try:
        yield process.ready()
    finally:
        process.end()


def _send(receiver: Process, store: Server) -> None:
    """Send the events of one session, which all end as dead letters."""
    for number, word in enumerate(STEPS):
        status = "requires_input" if word == "created" else word
        at = int(time.time()) - 600 + 60 * number
        body = event(word, id=f"evt_{number}", session=SESSION, status=status, created=at)
        answer = httpx2.post(receiver.url, content=body, headers=signed(body))
        assert answer.json() == {"outcome": "admitted"}
    stream = KEYS.dead_letters(KEYS.partition(SESSION), HANDLER)
    with store.client() as client:
        wait_until(lambda: client.xlen(stream) == len(STEPS))


def _fill(store: Server) -> None:
    """Admit sessions by the real script, copy the dead letter, and let nothing be delivered."""
    began = time.monotonic()
    scale.fill(store, range(SESSIONS), steps=1)
    source = KEYS.dead_letters(KEYS.partition(SESSION), HANDLER)
    with redis.Redis(port=store.port, socket_timeout=60) as client:
        for partition in range(KEYS.partitions):
            target = KEYS.dead_letters(partition, HANDLER)
            for _ in range(DEAD_LETTERS // KEYS.partitions // 500):
                client.eval(_COPY, 2, source, target, 500)
            stream: dict[str, Any] = client.xinfo_stream(KEYS.transitions(partition))
            client.execute_command(
                *("XGROUP", "SETID", KEYS.transitions(partition), HANDLER, "$"),
                *("ENTRIESREAD", stream["entries-added"]),
            )
        held = sum(client.xlen(KEYS.dead_letters(each, HANDLER)) for each in range(KEYS.partitions))
        _say(
            "filled",
            f"{client.dbsize():,} keys, {held:,} dead letters in {time.monotonic() - began:.0f} s",
        )


class Cost(NamedTuple):
    """What a load costs: CPU time of the process and of Redis in ms, time in ms, and bytes."""

    process_ms: float
    redis_ms: float
    took_ms: float
    size: int


def _pages(worker: Process, store: Server) -> None:
    """Say what a full load of each page costs, without what an idle worker uses meanwhile."""
    with httpx2.Client(base_url=worker.admin) as client:
        letters = f"/dead-letters/{quote(HANDLER, safe='')}"
        letter = re.search(rf'"({letters}/[0-9]+-[^"/]+)"', client.get(letters).text)
        assert letter is not None
        paths = ["/", "/sessions", f"/sessions/{SESSION}", "/dead-letters", letters, letter[1]]
        paths += [f"{letters}?since=2020-01-01T00:00", f"{letters}?session={SESSION}"]
        time.sleep(OVERVIEW_KEPT_S)
        idle = _idle_share(worker, store)
        for path in [*paths, "/handlers", "/endpoints"]:
            _say(path, _described(_measured(client, path, worker, store, idle)))


def _idle_share(worker: Process, store: Server) -> tuple[float, float]:
    """Return the share of a core that the worker and Redis use while no page is loaded."""
    before, began = _used(worker, store), time.monotonic()
    time.sleep(2 * OVERVIEW_KEPT_S)
    took_s = time.monotonic() - began
    after = _used(worker, store)
    return (after[0] - before[0]) / took_s, (after[1] - before[1]) / took_s


def _measured(
    client: httpx2.Client, path: str, worker: Process, store: Server, idle: tuple[float, float]
) -> Cost:
    """Return the medians of some loads; of the overview each is collected anew."""
    costs: list[Cost] = []
    for _ in range(OVERVIEWS if path == "/" else LOADS):
        if path == "/":
            time.sleep(OVERVIEW_KEPT_S)
        before, began = _used(worker, store), time.monotonic()
        size = _load(client, path)
        took_s = time.monotonic() - began
        process_s, redis_s = (
            late - early - share * took_s
            for early, late, share in zip(before, _used(worker, store), idle, strict=True)
        )
        costs.append(Cost(process_s * 1000, redis_s * 1000, took_s * 1000, size))
    process_ms, redis_ms, took_ms, size = map(median, zip(*costs, strict=True))
    return Cost(process_ms, redis_ms, took_ms, int(size))


def _load(client: httpx2.Client, path: str) -> int:
    """Load a page and what belongs to it; return the bytes of all bodies."""
    answer = client.get(path)
    assert answer.status_code == 200, (path, answer.status_code)
    assets = {found.decode() for found in _ASSET.findall(answer.content)}
    bodies = [answer.content, *(client.get(asset).content for asset in sorted(assets))]
    return sum(map(len, bodies))


def _used(worker: Process, store: Server) -> tuple[float, float]:
    return cpu_s(worker.popen.pid), cpu_s(store.process.pid)


def _described(cost: Cost) -> str:
    return (
        f"{cost.process_ms:6.1f} ms of CPU, Redis {cost.redis_ms:5.1f} ms,"
        f" in {cost.took_ms:6.1f} ms; {cost.size / 1000:6.1f} KB"
    )


def _open_share(receiver: Process) -> None:
    """Say what share of its core open pages cost a receiver that has nothing else to do.

    A busy receiver loses that share of its throughput; measured so, the machine's other work does
    not matter.
    """
    shares = []
    for pages in (0, OPEN_PAGES):
        with _open_pages(receiver.admin, pages):
            before, began = cpu_s(receiver.popen.pid), time.monotonic()
            time.sleep(4 * REFRESH_S)
            used_s = cpu_s(receiver.popen.pid) - before
        shares.append(used_s / (time.monotonic() - began))
    idle, beside = shares
    _say(
        f"a receiver with {OPEN_PAGES} pages open and no events",
        f"{beside:.2%} of a core; without pages {idle:.2%}",
    )


@contextmanager
def _open_pages(origin: str, pages: int) -> Iterator[None]:
    """Keep overviews open that refresh themselves, evenly spread."""
    ended = threading.Event()
    viewers = [
        threading.Thread(target=_view, args=(origin, ended, number * REFRESH_S / pages))
        for number in range(pages)
    ]
    for viewer in viewers:
        viewer.start()
    try:
        yield
    finally:
        ended.set()
        for viewer in viewers:
            viewer.join()


def _view(origin: str, ended: threading.Event, wait_s: float) -> None:
    with httpx2.Client(base_url=origin) as client:
        while not ended.wait(wait_s):
            assert client.get("/").status_code == 200
            wait_s = REFRESH_S


def _say(what: str, figure: str) -> None:
    print(f"{what:46}{figure}", flush=True)  # noqa: T201 - what it is for


if __name__ == "__main__":
    main()
