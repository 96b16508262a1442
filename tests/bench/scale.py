"""Measures the cost of a million session records: `python -m tests.bench.scale`.

Two receivers are measured in turn, one on an empty Redis, one on a full one, whose sessions were
admitted as a receiver does. Also how long processes take to start, and their memory. Asserts no
time.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import uvloop

from service.config import DAY_S, Settings
from service.inbox.admission import Inbox, Outcome
from service.secret import Secret
from service.storage.connections import connect
from service.storage.keys import Keys
from service.stripe.events import Event, parse
from service.stripe.signatures import VerifiedPayload
from service.transitions.transition import make_change
from tests.bench.candidates import ALL, OTHERS_CORE, Running, on_core, running
from tests.bench.load import STEPS, Load, layouts
from tests.support.processes import Processes
from tests.support.servers import Server
from tests.support.usage import cpu_s, memory_mib
from tests.support.waiting import DEADLINE_S

KEYS = Keys("idv", 8)
WHOLE_SESSIONS, SESSIONS = 100_000, 1_000_000
# Beyond those that the load uses.
FIRST_SESSION = 10_000_000
AT_ONCE = 500
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
    """Admit the first *steps* events of each session, as a receiver does."""
    uvloop.run(_admit(store, sessions, steps))


async def _admit(store: Server, sessions: range, steps: int) -> None:
    settings = Settings(redis_url=Secret(store.url), admit_deadline_s=DEADLINE_S)
    template = layouts()[0]
    async with connect(settings.redis_url) as connections:
        inbox = Inbox(connections, KEYS, settings)
        for first in range(sessions.start, sessions.stop, AT_ONCE):
            chosen = range(first, min(first + AT_ONCE, sessions.stop))
            for step in range(steps):
                bodies = (template.body(step, FIRST_SESSION + number) for number in chosen)
                events = [parse(VerifiedPayload(body, "01234567")) for body in bodies]
                admissions = await asyncio.gather(
                    *(
                        inbox.admit(one, make_change(one))
                        for one in events
                        if isinstance(one, Event)
                    )
                )
                assert [one.outcome for one in admissions] == [Outcome.ADMITTED] * len(chosen)


def _started(store: Server, directory: Path) -> None:
    processes = Processes(store.url, directory)
    for command in ("serve", "work"):
        began = time.perf_counter()
        process = processes.start(command, program="", REDIS_PREFIX="start").ready()
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
