"""Measures the cost of a million session records: `python -m tests.bench.scale`.

Two receivers are measured in turn, one on an empty Redis, one on a full one, whose sessions are
admitted by the real script, in pipelines. Also how long processes take to start, and their
memory. Asserts no time.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import redis

from service.config import DAY_S
from service.storage.keys import Keys
from service.storage.scripts import Script
from service.stripe.events import Event, parse
from service.stripe.signatures import VerifiedPayload
from service.transitions.lifecycle import FINAL
from service.transitions.ordering import SKEW_S, is_step, order_key, state_hash
from service.transitions.stream_entry import pack
from service.transitions.transition import make_change
from tests.bench.candidates import ALL, OTHERS_CORE, Running, on_core, running
from tests.bench.load import STEPS, Load, bodies
from tests.support.harness import SECRET
from tests.support.processes import Process
from tests.support.servers import Server
from tests.support.usage import cpu_s, memory_mib

KEYS = Keys("idv", 8)
WHOLE_SESSIONS, SESSIONS = 100_000, 1_000_000
# Beyond those that the load uses.
FIRST_SESSION = 10_000_000
PER_CALL = 100
WARM_S, SECONDS, ROUNDS = 1, 3, 7
MAX_PER_S = 11_000
KEPT_DAYS, STREAM_DAYS, YEAR_DAYS = 400, 7, 365
# How much busier the busiest second of a year is than the mean one.
PEAK_OVER_MEAN = 20


def main() -> None:
    """Measure, and say it line by line."""
    with tempfile.TemporaryDirectory(prefix="scale-") as made, ExitStack() as stack:
        directory = Path(made)
        load = Load(directory, int((WARM_S + ROUNDS * SECONDS) * MAX_PER_S))
        known = [
            Receiver(sessions, stack.enter_context(running(ALL["service"], directory / name)))
            for name, sessions in (("empty", 0), ("full", SESSIONS))
        ]
        stack.enter_context(on_core(OTHERS_CORE))
        store = known[-1].service.store
        per_session, per_entry = _filled_whole(store)
        fill(store, range(WHOLE_SESSIONS, SESSIONS), steps=1)
        for receiver in known:
            receiver.measure(load, WARM_S)
        # In turn: the machine is not always as fast.
        costs = [[receiver.measure(load, SECONDS) for receiver in known] for _ in range(ROUNDS)]
        _compare(known, costs)
        _started(store, directory)
    _plan(per_session, per_entry, median(full.per_s for _, full in costs))


class Cost(NamedTuple):
    """What an event costs: CPU time of the receiver and of Redis in microseconds, and how many."""

    receiver_us: float
    redis_us: float
    per_s: float


class Receiver:
    """A receiver, and how many session records its Redis has before the load begins."""

    def __init__(self, sessions: int, service: Running) -> None:
        self.sessions = sessions
        self.service = service
        self._next = 0

    def measure(self, load: Load, seconds: float) -> Cost:
        """Post new events on 64 connections."""
        before = self._used_s()
        answers = load.post(self.service.port, first=self._next, connections=64, seconds=seconds)
        assert not answers.refused
        assert not answers.lost
        self._next = answers.next
        receiver_us, redis_us = (
            (late - early) / answers.good * 1e6
            for early, late in zip(before, self._used_s(), strict=True)
        )
        return Cost(receiver_us, redis_us, answers.per_s)

    def _used_s(self) -> tuple[float, float]:
        return self.service.cpu_s, cpu_s(self.service.store.process.pid)


def _compare(known: Sequence[Receiver], costs: Sequence[Sequence[Cost]]) -> None:
    """Say what each costs, and how the second compares with the first in the same round."""
    for receiver, found in zip(known, zip(*costs, strict=True), strict=True):
        receiver_us, redis_us, per_s = (median(column) for column in zip(*found, strict=True))
        _say(
            f"cost, {receiver.sessions:,} sessions known",
            f"{receiver_us:.1f} us; Redis {redis_us:.1f} us; {per_s:,.0f}/s",
        )
    shares: list[tuple[str, Callable[[Cost], float]]] = [
        ("the receiver", lambda cost: cost.receiver_us),
        ("Redis", lambda cost: cost.redis_us),
        ("both", lambda cost: cost.receiver_us + cost.redis_us),
    ]
    for what, of in shares:
        ratios = sorted(of(full) / of(empty) for empty, full in costs)
        _say(
            f"  times as much for {what}",
            f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, {len(ratios)} rounds)",
        )


def _filled_whole(store: Server) -> tuple[float, float]:
    """Put whole sessions there; return the bytes of each, and those of an entry of the streams.

    The streams are emptied in between: what MEMORY USAGE says of one is an estimate.
    """
    before = _memory(store)
    fill(store, range(WHOLE_SESSIONS), steps=STEPS)
    filled = _memory(store)
    with store.client() as client:
        for partition in range(KEYS.partitions):
            client.xtrim(KEYS.transitions(partition), maxlen=0, approximate=False)
    emptied = _memory(store)
    per_session = (emptied - before) / WHOLE_SESSIONS
    per_entry = (filled - emptied) / (WHOLE_SESSIONS * STEPS)
    _say("memory of a session, four events", f"{per_session:.0f} bytes")
    _say("memory of a transition in a stream", f"{per_entry:.0f} bytes")
    return per_session, per_entry


def _memory(store: Server) -> int:
    """Return the bytes in use, without those of clients."""
    with store.client() as client:
        described: Any = client.info("memory")
    return int(described["used_memory"] - described["mem_clients_normal"])


def fill(store: Server, sessions: range, *, steps: int) -> None:
    """Admit the first *steps* events of each session, by the script itself."""
    known = [_arguments(body) for body in _templates()[:steps]]
    script = Script("service.inbox", "admit.lua")
    with redis.Redis(port=store.port, socket_timeout=60) as client:
        digest = client.script_load(script.source)
        for first in range(sessions.start, sessions.stop, PER_CALL):
            pipeline = client.pipeline(transaction=False)
            for arguments in known:
                chosen = range(first, min(first + PER_CALL, sessions.stop))
                keys, values = _call(chosen, *arguments)
                pipeline.evalsha(digest, len(keys), *keys, *values)
            assert all(
                answer.startswith(b"admitted") for reply in pipeline.execute() for answer in reply
            )


def _templates() -> list[bytes]:
    """Return the bodies of one session's events."""
    found: list[bytes] = []
    for number, body in enumerate(bodies()):
        if number % 2000 == 0:
            found.append(body)
        if len(found) == STEPS:
            break
    return found


def _arguments(body: bytes) -> tuple[bytes, tuple[Any, ...]]:
    """Return what differs from step to step: the packed change, and what the event is judged by."""
    event = parse(VerifiedPayload(body, "01234567"))
    assert isinstance(event, Event)
    change = make_change(event)
    key = order_key(change, event.created)
    kind = "s" if is_step(change) else "r"
    kind = kind.upper() if change.current in FINAL else kind
    judged_by = event.created, key, kind, state_hash(change), change.current
    return pack(change), judged_by


def _call(
    sessions: range, change: bytes, judged_by: tuple[Any, ...]
) -> tuple[list[str], list[Any]]:
    """Return keys and arguments of one call that admits one event of each session."""
    keys: list[str] = []
    now = int(time.time())
    oldest = now - 35 * DAY_S
    values: list[Any] = [now, oldest, oldest, 300, KEYS.layout_copy, SKEW_S]
    values += [400 * DAY_S, 10_000_000]
    created, key, kind, what, current = judged_by
    for number in sessions:
        session_id = f"vs_1NuN4zLkdIwHu7ix{FIRST_SESSION + number:08}"
        partition = KEYS.partition(session_id)
        keys += KEYS.layout_in(partition), KEYS.transitions(partition), KEYS.session(session_id)
        event_id = f"evt_1NuN4zLkdI{key % 1_000_000:06}{number:08}"
        values += event_id, "nonce678", created, key, kind, what, current, change
    return keys, values


def _started(store: Server, directory: Path) -> None:
    for command in ("serve", "work"):
        began = time.perf_counter()
        process = Process(
            command,
            directory=directory,
            program="",
            REDIS_URL=store.url,
            REDIS_PREFIX="start",
            STRIPE_WEBHOOK_SECRETS=SECRET.reveal().decode(),
            HOST="127.0.0.1",
            PORT="0",
            ADMIN_PORT="0",
            DRAIN_S="0",
        ).ready()
        took_s = time.perf_counter() - began
        _say(
            f"{command} until it is ready",
            f"{took_s:.2f} s, {memory_mib(process.popen.pid):.0f} MiB",
        )
        assert process.stop() == 0


def _plan(per_session: float, per_entry: float, per_s: float) -> None:
    _say("", "")
    _say("| verifications a year | events/s, mean and peak | Redis memory | receivers |")
    _say("|---|---|---|---|")
    for verifications in (10_000, 1_000_000, 100_000_000):
        for line in _planned(verifications, per_session, per_entry, per_s):
            _say(line)


def _planned(
    verifications: int, per_session: float, per_entry: float, per_s: float
) -> Iterator[str]:
    per_day = verifications / YEAR_DAYS
    mean = per_day * STEPS / DAY_S
    memory = per_day * (KEPT_DAYS * per_session + STREAM_DAYS * STEPS * per_entry)
    # Half of what they can do, and one may be away.
    receivers = 1 + math.ceil(mean * PEAK_OVER_MEAN / (per_s / 2))
    yield (
        f"| {verifications:,} | {mean:.3g}, {mean * PEAK_OVER_MEAN:.3g}"
        f" | {memory / 2**20:,.0f} MiB | {receivers} |"
    )


def _say(what: str, figure: str = "") -> None:
    print(f"{what:40}{figure}" if figure else what, flush=True)  # noqa: T201 - what it is for


if __name__ == "__main__":
    main()
