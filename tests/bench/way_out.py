"""Measures the way out on this machine: `python -m tests.bench.way_out`. Asserts no time.

Throughput beside a bare loop of the same client, CPU per queue, latency of the whole way, an idle
worker, and a worker's memory while a handler is dead. Loopback only; takes under four minutes.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import orjson
import redis
import redis.asyncio
import uvloop

from service.delivery.consumer_groups import create_groups
from service.operations.sender import Answer, WebhookRequest, send
from service.operations.synthetic_events import lifecycle_events
from service.secret import Secret
from service.storage.connections import connect
from service.storage.keys import Keys
from service.transitions import stream_entry
from service.transitions.transition import SessionChange
from tests.support.brokers.broker import Broker
from tests.support.brokers.installed import start_installed
from tests.support.harness import SECRET
from tests.support.processes import Process, Sandbox, open_sandbox
from tests.support.streams import count_unsettled
from tests.support.usage import cpu_s, memory_mib
from tests.support.waiting import wait_until

BENCH = Path(__file__).parent
STAMPING = "subjects:stamping"
PARTITIONS = 8
# How many each queue is given, so that each takes some seconds.
QUEUES = {"redis_stream": 20_000, "rabbitmq": 10_000, "nats": 10_000, "kafka": 10_000, "sqs": 1500}
THROUGHPUT_ENTRIES = 120_000
WAITING_ENTRIES = 200_000
SESSIONS_SIDE_BY_SIDE = 500
STEPS = 4
EVENTS_PER_S = 200
LATENCY_S = 20
SETTLE_DOWN_S = 4
IDLE_S = 20
MEMORY_STEP_S = 15
DRAIN_DEADLINE_S = 60


class Drained(NamedTuple):
    """How a worker worked its streams off, between a tenth and nine tenths of the way.

    Attributes:
        per_s: Transitions settled per second.
        cpu_us: The worker's own CPU time per transition, in microseconds.
        core: The share of one core it used meanwhile.
    """

    per_s: float
    cpu_us: float
    core: float

    def __str__(self) -> str:
        return f"{self.per_s:8,.0f}/s  {self.cpu_us:5.0f} us CPU each  {self.core:4.0%} of a core"


def main() -> None:
    """Measure everything and say it line by line."""
    with tempfile.TemporaryDirectory(prefix="way-out-") as made, ExitStack() as running:
        directory = Path(made)
        opened = running.enter_context(open_sandbox(directory))
        queues, absent = start_installed(QUEUES, running, directory)
        _say("python, redis", f"{sys.version.split()[0]}, {_server(opened)}")
        _throughput(opened)
        for name, reason in absent.items():
            _say(f"queue {name}", reason)
        for name, broker in queues.items():
            _say(f"queue {name}", str(_drained(opened, name, QUEUES[name], broker.environ())))
        _latency(opened, directory)
        _idle(opened, queues)
        _memory(opened)


def _server(sandbox: Sandbox) -> str:
    with redis.Redis.from_url(sandbox.server.url) as client:
        described: Any = client.info("server")
    return str(described.get("valkey_version") or described["redis_version"])


def _throughput(sandbox: Sandbox) -> None:
    """Work off the same entries with a bare loop, with a worker, and with the loop again."""
    bare = [_bare(sandbox, "bare0")]
    worker = _drained(sandbox, "subjects:silent", THROUGHPUT_ENTRIES)
    bare.append(_bare(sandbox, "bare1"))
    _say("worker, no-op handler", str(worker))
    _say("bare XREADGROUP + XACK", f"{bare[0]:,.0f}/s before, {bare[1]:,.0f}/s after")
    _say("ratio", f"{worker.per_s / statistics.mean(bare):.2f}")


def _bare(sandbox: Sandbox, prefix: str) -> float:
    """Return the entries per second of a loop that only reads and acknowledges."""
    keys = _filled(sandbox, prefix, "bare", THROUGHPUT_ENTRIES)

    async def loop() -> float:
        begun = time.perf_counter()
        client: Any = redis.asyncio.Redis.from_url(sandbox.server.url)
        async with client:
            for stream in map(keys.transitions, range(PARTITIONS)):
                while found := await client.xreadgroup("bare", "one", {stream: ">"}, count=100):
                    await client.xack(stream, "bare", *(entry_id for entry_id, _ in found[0][1]))
        return THROUGHPUT_ENTRIES / (time.perf_counter() - begun)

    return uvloop.run(loop())


def _drained(
    sandbox: Sandbox, handler: str, entries: int, settings: Mapping[str, str] | None = None
) -> Drained:
    """Let one worker hand *entries* that are already there to *handler*."""
    prefix = handler.rpartition(":")[2]
    keys = _filled(sandbox, prefix, handler, entries)
    worker = _worker(sandbox, prefix, handler, settings or {})
    with redis.Redis.from_url(sandbox.server.url) as client:

        def passed(share: float) -> tuple[float, float, int]:
            most = entries * (1 - share)
            left = wait_until(lambda: _below(client, keys, handler, most), DRAIN_DEADLINE_S)[0]
            return time.perf_counter(), cpu_s(worker.popen.pid), left

        first, last = passed(0.1), passed(0.9)
    assert worker.stop() == 0
    took_s, used_s = last[0] - first[0], last[1] - first[1]
    count = max(1, first[2] - last[2])  # too few to measure may be settled all at once
    return Drained(count / took_s, used_s / count * 1e6, used_s / took_s)


def _below(client: redis.Redis, keys: Keys, handler: str, most: float) -> tuple[int, ...]:
    """Return how many entries are not settled, or nothing while there are more than *most*."""
    left = 0
    for partition in range(PARTITIONS):
        groups: Any = client.xinfo_groups(keys.transitions(partition))
        left += sum(g["lag"] + g["pending"] for g in groups if g["name"] == handler.encode())
    return (left,) if left <= most else ()


def _filled(sandbox: Sandbox, prefix: str, handler: str, entries: int) -> Keys:
    """Open the group of *handler* and append *entries* after it."""
    keys = Keys(prefix, PARTITIONS)

    async def open_them() -> None:
        async with connect(Secret(sandbox.server.url)) as connections:
            await create_groups(connections, keys, [handler])

    asyncio.run(open_them())
    _fill(sandbox, keys, entries)
    return keys


def _fill(sandbox: Sandbox, keys: Keys, entries: int) -> None:
    with redis.Redis.from_url(sandbox.server.url) as client:
        pipeline = client.pipeline(transaction=False)
        for number in range(entries):
            session_id, entry = _entry(number)
            pipeline.xadd(keys.transitions(keys.partition(session_id)), entry)
            if number % 1000 == 999:
                pipeline.execute()
        pipeline.execute()


def _entry(number: int) -> tuple[str, dict[Any, Any]]:
    """Return one entry; the steps of a session come some hundred entries apart."""
    generation, place = divmod(number, SESSIONS_SIDE_BY_SIDE * STEPS)
    step, session = divmod(place, SESSIONS_SIDE_BY_SIDE)
    session_id = f"vs_1NuN4zLkdIwHu7ixleE6{generation:04}{session:04}"
    change = SessionChange(
        event_id=f"evt_1NuN4zLkdIwHu7ix{number:08}",
        event_type="identity.verification_session.processing",
        occurred_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        livemode=True,
        session_id=session_id,
        session_type="document",
        current="processing" if step % 2 else "requires_input",
        client_reference_id="user-6735",
        metadata={"user_id": "user-6735", "attempt_group": "simulated"},
    )
    fields = {"previous": b"requires_input", "sequence": step + 1, "epoch": 1_790_000_000_000}
    return session_id, {"change": stream_entry.pack(change), **fields}


def _latency(sandbox: Sandbox, directory: Path) -> None:
    """Post at an even rate, and compare when with when a worker's handler was called."""
    stamps = directory / "stamps"
    settings = {"WAY_STAMPS": str(stamps), "HANDLERS": STAMPING}
    receiver = sandbox.start(
        "serve", PYTHONPATH=str(BENCH), REDIS_PREFIX="late", **settings
    ).ready()
    worker = _worker(sandbox, "late", STAMPING, settings)
    answered: dict[str, tuple[int, float]] = {}

    def note(answer: Answer) -> None:
        event_id = orjson.loads(answer.request.body)["id"]
        answered[event_id] = time.time_ns(), answer.elapsed_s
        assert answer.outcome == "admitted"

    random, began = Random(1), int(time.time()) - 86_400
    sessions = (lifecycle_events("verified", random=random, started_at=began) for _ in iter(int, 1))
    posts = [WebhookRequest(body=next(sessions)[0].body) for _ in range(EVENTS_PER_S * LATENCY_S)]
    asyncio.run(
        send(
            posts, to=receiver.url, secret=SECRET, rate=EVENTS_PER_S, concurrency=64, progress=note
        )
    )
    keys = Keys("late", PARTITIONS)
    streams = list(map(keys.transitions, range(PARTITIONS)))
    with redis.Redis.from_url(sandbox.server.url) as client:
        wait_until(lambda: not any(count_unsettled(client, one, STAMPING) for one in streams))
    assert (worker.stop(), receiver.stop()) == (0, 0)
    called = dict(line.split() for line in stamps.read_text().splitlines())
    assert called.keys() == answered.keys()
    after = {one: (int(called[one]) - at) / 1e6 for one, (at, _) in answered.items()}
    _say("latency, 200 in hand to handler called", _spread(list(after.values())))
    whole = [after[one] + elapsed_s * 1000 for one, (_, elapsed_s) in answered.items()]
    _say("latency, POST begun to handler called", _spread(whole))


def _spread(values_ms: list[float]) -> str:
    cuts = statistics.quantiles(values_ms, n=100)
    most = max(values_ms)
    return f"p50 {cuts[49]:.1f} ms  p99 {cuts[98]:.1f} ms  max {most:.1f} ms  at {EVENTS_PER_S}/s"


def _idle(sandbox: Sandbox, queues: Mapping[str, Broker]) -> None:
    """Let a worker of five no-op handlers, and one of the real queues, do nothing side by side."""
    nothing = ",".join(f"subjects:{name}" for name in ("one", "two", "three", "four", "five"))
    settings: dict[str, str] = {}
    for broker in queues.values():
        settings |= broker.environ()
    workers = {
        "idle, 8 partitions, 5 no-op handlers": _worker(sandbox, "idle", nothing, {}),
        f"idle, 8 partitions, {len(queues)} queues": _worker(
            sandbox, "idle_queues", ",".join(queues), settings
        ),
    }
    time.sleep(SETTLE_DOWN_S)
    pids = {what: worker.popen.pid for what, worker in workers.items()}
    pids["the Redis of both"] = sandbox.server.pid
    before = {what: cpu_s(pid) for what, pid in pids.items()}
    time.sleep(IDLE_S)
    for what, pid in pids.items():
        _say(what, f"{(cpu_s(pid) - before[what]) / IDLE_S:.2%} of a core over {IDLE_S} s")
    assert [worker.stop() for worker in workers.values()] == [0] * len(workers)


def _memory(sandbox: Sandbox) -> None:
    """Watch two workers while their handlers get nothing away of what waits."""
    # Quick enough to try, fail and dead-letter without a pause.
    hurry = {"RETRY_INITIAL_DELAY_S": "0.05", "RETRY_MAX_DELAY_S": "0.2", "RETRY_MAX_ATTEMPTS": "3"}
    workers = {
        "unreachable": _worker(sandbox, "unreachable", "subjects:unreachable", {}),
        "failing": _worker(sandbox, "failing", "subjects:failing", hurry),
    }
    time.sleep(1)
    found = {name: [memory_mib(worker.popen.pid)] for name, worker in workers.items()}
    for name in workers:
        _fill(sandbox, Keys(name, PARTITIONS), WAITING_ENTRIES)
    for _ in range(3):
        time.sleep(MEMORY_STEP_S)
        for name, worker in workers.items():
            found[name].append(memory_mib(worker.popen.pid))
    for name, worker in workers.items():
        steps = "  ".join(f"{mib:.1f}" for mib in found[name])
        _say(f"memory, handler {name}", f"{steps} MiB: empty, then every {MEMORY_STEP_S} s")
        assert worker.stop() == 0
    with redis.Redis.from_url(sandbox.server.url) as client:
        dead = sum(
            client.xlen(Keys("failing", 8).dead_letters(n, "subjects:failing")) for n in range(8)
        )
    _say("dead letters meanwhile", f"{dead:,} by the handler that fails")


def _worker(sandbox: Sandbox, prefix: str, handlers: str, settings: Mapping[str, str]) -> Process:
    ours = {"REDIS_PREFIX": prefix, "HANDLERS": handlers, "PYTHONPATH": str(BENCH)}
    return sandbox.start("work", **{**settings, **ours}).ready()


def _say(what: str, figure: str) -> None:
    print(f"{what:42}{figure}", flush=True)  # noqa: T201 - what it is for


if __name__ == "__main__":
    main()
