"""Measures what a ledger of a million sessions costs: `python -m tests.bench.scale`.

The same receiver is measured on an empty ledger and on a full one; in between sessions are put
there by the real script, in pipelines. Also how long processes take to start, and their memory.
Asserts no time.
"""
# ruff: noqa: E402 (the tests' own modules are found after the path is set)

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import redis
from candidates import ALL, OTHERS_CORE, Running, cpu_s, on_core, resident_mib, running
from harness import SECRET, Process
from load import STEPS, Answers, Load, bodies
from servers import Server

from service.config import DAY_S
from service.connections import Script
from service.events import Event, parse
from service.layout import Keys
from service.signatures import VerifiedPayload
from service.transitions import fingerprint, position
from service.wire import pack

KEYS = Keys("idv", 8)
WHOLE_SESSIONS, SESSIONS = 100_000, 1_000_000
# Beyond those that the load uses.
FIRST_SESSION = 10_000_000
PER_CALL = 100
WARM_S, SECONDS = 1, 4
MOST_PER_S = 9000
KEPT_DAYS, STREAM_DAYS, YEAR_DAYS = 400, 7, 365
# How much busier the busiest second of a year is than the mean one.
PEAK_OVER_MEAN = 20


def main() -> None:
    """Measure, and say it line by line."""
    with tempfile.TemporaryDirectory(prefix="scale-") as made:
        directory = Path(made)
        load = Load(directory, int((WARM_S + 2 * SECONDS) * MOST_PER_S))
        with running(ALL["service"], directory / "run") as service, on_core(OTHERS_CORE):
            warm = load.post(service.port, connections=64, seconds=WARM_S)
            bare_us = _bare_us(load, directory / "before")
            empty = _measured("cost, an empty ledger", service, load, warm, bare_us)
            per_session, per_entry = _filled_whole(service.store)
            _fill(service.store, range(WHOLE_SESSIONS, SESSIONS), steps=1)
            bare_us = _bare_us(load, directory / "after")
            _measured(f"cost, {SESSIONS:,} sessions known", service, load, empty, bare_us)
            per_s = empty.per_s
            _started(service.store, directory)
    _plan(per_session, per_entry, per_s)


def _bare_us(load: Load, directory: Path) -> float:
    """Return what an answer costs the bare application now: the machine is not always as fast."""
    with running(ALL["bare"], directory) as bare:
        load.post(bare.port, connections=64, seconds=WARM_S, again=True)
        before_s = bare.cpu_s
        answers = load.post(bare.port, connections=64, seconds=SECONDS, again=True)
        return (bare.cpu_s - before_s) / answers.good * 1e6


def _measured(what: str, service: Running, load: Load, before: Answers, bare_us: float) -> Answers:
    redis_pid = service.store.process.pid
    used_s = service.cpu_s, cpu_s(redis_pid)
    answers = load.post(service.port, first=before.next, connections=64, seconds=SECONDS)
    assert not answers.refused
    assert not answers.lost
    ours_us, redis_us = (
        (late - early) / answers.good * 1e6
        for early, late in zip(used_s, (service.cpu_s, cpu_s(redis_pid)), strict=True)
    )
    _say(
        what,
        f"{ours_us:.1f} us, {ours_us / bare_us:.2f} times the bare application's;"
        f" Redis {redis_us:.1f} us, {answers.per_s:,.0f}/s",
    )
    return answers


def _filled_whole(store: Server) -> tuple[float, float]:
    """Put whole sessions there; return the bytes of each, and those of an entry of the streams."""
    before = _memory(store)
    _fill(store, range(WHOLE_SESSIONS), steps=STEPS)
    (used, streams), (used_before, streams_before) = _memory(store), before
    per_session = (used - used_before - (streams - streams_before)) / WHOLE_SESSIONS
    per_entry = (streams - streams_before) / (WHOLE_SESSIONS * STEPS)
    _say("memory of a session, four events", f"{per_session:.0f} bytes")
    _say("memory of a transition in a stream", f"{per_entry:.0f} bytes")
    return per_session, per_entry


def _memory(store: Server) -> tuple[int, int]:
    """Return the bytes in use: by everything, and by the streams."""
    with store.client() as client:
        described: Any = client.info("memory")
        sizes: list[Any] = [
            client.memory_usage(KEYS.transitions(partition), samples=0)
            for partition in range(KEYS.partitions)
        ]
    return described["used_memory"] - described["mem_clients_normal"], sum(filter(None, sizes))


def _fill(store: Server, sessions: range, *, steps: int) -> None:
    """Admit the first *steps* events of each session, by the script itself."""
    known = [_arguments(body) for body in _templates()[:steps]]
    script = Script("admit")
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
    change = event.change()
    where = position(event.type, event.created, event.session)
    judged_by = event.created, where, fingerprint(change.current, event.session), change.current
    return pack(change), judged_by


def _call(
    sessions: range, change: bytes, judged_by: tuple[Any, ...]
) -> tuple[list[str], list[Any]]:
    """Return keys and arguments of one call that admits one event of each session."""
    keys: list[str] = []
    values: list[Any] = [35 * DAY_S, 400 * DAY_S, 10_000_000]
    created, where, what, current = judged_by
    for number in sessions:
        session_id = f"vs_1NuN4zLkdIwHu7ix{FIRST_SESSION + number:08}"
        keys += KEYS.transitions(KEYS.partition(session_id)), KEYS.session(session_id)
        event_id = f"evt_1NuN4zLkdI{where % 1_000_000:06}{number:08}"
        values += event_id, "nonce678", created, where, what, current, change
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
            f"{took_s:.2f} s, {resident_mib(process.popen.pid):.0f} MiB",
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
