"""Measures the way in on this machine: `python -m tests.bench.way_in`. Asserts no time.

Each candidate in turn, fresh and warmed, several rounds; what matters is the CPU time of the
server's processes per event, and its ratio to the bare application's of the same round.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import redis

from tests.bench import candidates, rivals
from tests.bench.candidates import Candidate, Running
from tests.bench.load import Answers, Load
from tests.support.servers import binary
from tests.support.usage import cpu_s

WARM_S = 1.0
MAX_PER_S = 9000
# With many connections a step may be overtaken by the next: it is late, and remembered.
OUTCOMES = ("admitted", "duplicate", "late", "unchanged")


class Round(NamedTuple):
    """What one fresh start of a candidate was measured to do.

    Attributes:
        cpu_us: CPU time of its processes per answer, in microseconds.
        redis_us: CPU time of Redis per answer.
        mib: Its memory at the end.
        others: How many cores everything else on the machine used meanwhile: nought when quiet.
        answers: What the generator saw.
    """

    cpu_us: float
    redis_us: float
    mib: float
    others: float
    answers: Answers


def main() -> None:
    """Measure, and print the table."""
    asked = _asked()
    chosen = _chosen(asked.candidates.split(","))
    found: dict[str, list[Round]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="way-in-") as made:
        load = Load(Path(made), int((WARM_S + asked.seconds) * MAX_PER_S), asked.duplicates)
        for number in range(asked.rounds):
            for candidate in chosen:
                directory = Path(made) / f"{number}-{len(found)}-{candidate.name[:4]}"
                with candidates.running(candidate, directory) as running:
                    one = _round(candidate, running, load, asked)
                found[candidate.name].append(one)
                _report(candidate.name, one)
    _table(found, chosen[0].name, asked.connections)


def _chosen(names: Sequence[str]) -> list[Candidate]:
    """Return the candidates called *names*, without those that cannot run here."""
    every = candidates.ALL | rivals.ALL
    reasons = rivals.missing() if rivals.ALL.keys() & set(names) else {}
    for name, reason in reasons.items():
        _say(f"NOT MEASURED: {every[name].name}: {reason}")
    return [every[name] for name in names if name not in reasons]


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser("tests.bench.way_in", description=__doc__)
    parser.add_argument("--candidates", default="bare,service,node,node_piped,fastapi")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--rate", type=float, default=0, help="per second; 0 for a closed loop")
    parser.add_argument("--duplicates", type=float, default=0, help="their share")
    return parser.parse_args()


def _round(candidate: Candidate, running: Running, load: Load, asked: argparse.Namespace) -> Round:
    """Warm a candidate, measure it, and check its work."""
    again = candidate.name == candidates.ALL["bare"].name
    with candidates.on_core(candidates.OTHERS_CORE):
        warm = load.post(running.port, connections=asked.connections, seconds=WARM_S, again=again)
        before = _used(running)
        answers = load.post(
            running.port,
            first=0 if again else warm.next,
            connections=asked.connections,
            seconds=asked.seconds,
            rate=asked.rate,
            again=again,
        )
    after = _used(running)
    if not again:
        _check(candidate, running, [warm, answers])
    server_s, redis_s, busy_s = (late - early for early, late in zip(before, after, strict=True))
    others_s = busy_s - server_s - redis_s - answers.found["cpu_s"]
    count = answers.good + answers.refused
    return Round(
        cpu_us=server_s / count * 1e6,
        redis_us=redis_s / count * 1e6,
        mib=running.resident_mib,
        others=others_s / answers.found["seconds"],
        answers=answers,
    )


def _used(running: Running) -> tuple[float, float, float]:
    """Return the CPU time used so far: by the server, by Redis, by the whole machine."""
    return running.cpu_s, cpu_s(running.store.process.pid), candidates.busy_s()


def _check(candidate: Candidate, running: Running, posted: Sequence[Answers]) -> None:
    """Hold the work against the answers: all were 200, and each event is there once."""
    assert not any(answers.refused or answers.lost for answers in posted), [
        answers.found["answers"] for answers in posted
    ]
    words: dict[str, int] = defaultdict(int)
    for answers in posted:
        for word, count in answers.found["answers"].items():
            words[word] += count
    with redis.Redis.from_url(running.store.url) as client:
        entries, ids = candidate.counted(client)
    counts = {word: words.pop(f'200 {{"outcome":"{word}"}}', 0) for word in OUTCOMES}
    assert entries == counts["admitted"], (entries, counts)
    assert ids == sum(counts.values()) - counts["duplicate"], (ids, counts)
    assert not words, dict(words)


def _report(name: str, one: Round) -> None:
    answers = one.answers
    _say(
        f"{name:22}{one.cpu_us:6.1f} us  {answers.per_s:7,.0f}/s  p50 {answers.ms('p50'):.2f}"
        f"  p99 {answers.ms('p99'):.2f}  p99.9 {answers.ms('p99.9'):.2f} ms"
        f"  Redis {one.redis_us:.1f} us  {one.mib:.0f} MiB"
        f"  (generator {answers.generator_us:.1f} us, others {one.others:.2f} cores)"
    )


def _table(found: dict[str, list[Round]], base: str, connections: int) -> None:
    _say(f"\n{_machine()}; {connections} connections; medians of {len(found[base])} fresh starts\n")
    _say("| | CPU per event | ratio (quartiles) | requests/s | p50, p99, p99.9 | Redis | memory |")
    _say("|---|---|---|---|---|---|---|")
    for name, rounds in found.items():
        ratios = [one.cpu_us / bare.cpu_us for one, bare in zip(rounds, found[base], strict=True)]
        low, middle, high = _quartiles(ratios)
        latencies = ", ".join(
            f"{statistics.median(one.answers.ms(share) for one in rounds):.1f}"
            for share in ("p50", "p99", "p99.9")
        )
        cpu_us, redis_us, mib, per_s = (
            statistics.median(values)
            for values in zip(
                *((one.cpu_us, one.redis_us, one.mib, one.answers.per_s) for one in rounds),
                strict=True,
            )
        )
        _say(
            f"| {name} | {cpu_us:.0f} µs | {middle:.2f} ({low:.2f} to {high:.2f}) | {per_s:,.0f}"
            f" | {latencies} ms | {redis_us:.0f} µs | {mib:.0f} MiB |"
        )


def _machine() -> str:
    """Say what was measured on."""
    model = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("model name\t: ")[2]
    server = subprocess.run([binary(), "--version"], check=True, capture_output=True, text=True)
    name, version = server.stdout.split()[0], server.stdout.partition("v=")[2].split()[0]
    python = platform.python_version()
    return f"{os.cpu_count()} cores of {model.splitlines()[0]}; Python {python}; {name} {version}"


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - what it is for


if __name__ == "__main__":
    main()
