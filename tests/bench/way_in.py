"""Measures the way in on this machine: `python -m tests.bench.way_in`. Asserts no time.

Each candidate in turn, fresh and warmed, several rounds; what matters is the CPU time of the
server's processes per event, and its ratio to the bare application's of the same round.
"""
# ruff: noqa: E402 (the tests' own modules are found after the path is set)

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import candidates
import redis
import rivals
from candidates import Candidate, Running
from load import Answers, Load

WARM_S = 1.0
MOST_PER_S = 9000


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
        load = Load(Path(made), int((WARM_S + asked.seconds) * MOST_PER_S), asked.duplicates)
        for number in range(asked.rounds):
            for candidate in chosen:
                directory = Path(made) / f"{number}-{len(found)}-{candidate.name[:4]}"
                with candidates.running(candidate, directory) as running:
                    one = _round(candidate, running, load, asked)
                found[candidate.name].append(one)
                _report(candidate.name, one)
    _table(found, chosen[0].name)


def _chosen(names: Sequence[str]) -> list[Candidate]:
    """Return the candidates called *names*, without those that cannot run here."""
    everybody = candidates.ALL | rivals.ALL
    reasons = rivals.missing() if rivals.ALL.keys() & set(names) else {}
    for name, reason in reasons.items():
        _say(f"NOT MEASURED: {everybody[name].name}: {reason}")
    return [everybody[name] for name in names if name not in reasons]


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser("tests.bench.way_in", description=__doc__)
    parser.add_argument("--candidates", default="bare,service,node,node_piped,fastapi,starlette")
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
    return running.cpu_s, candidates.cpu_s(running.store.process.pid), candidates.busy_s()


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
    admitted = words.pop('200 {"outcome":"admitted"}')
    duplicates = words.pop('200 {"outcome":"duplicate"}', 0)
    assert entries == ids == admitted, (entries, ids, admitted, duplicates)
    assert not words, dict(words)


def _report(name: str, one: Round) -> None:
    answers = one.answers
    _say(
        f"{name:22}{one.cpu_us:6.1f} us  {answers.per_s:7,.0f}/s  p50 {answers.ms('p50'):.2f}"
        f"  p99 {answers.ms('p99'):.2f}  p99.9 {answers.ms('p99.9'):.2f} ms"
        f"  Redis {one.redis_us:.1f} us  {one.mib:.0f} MiB"
        f"  (generator {answers.generator_us:.1f} us, others {one.others:.2f} cores)"
    )


def _table(found: dict[str, list[Round]], base: str) -> None:
    _say("\n| candidate | CPU us per event | ratio (quartiles) |\n|---|---|---|")
    for name, rounds in found.items():
        ratios = [one.cpu_us / bare.cpu_us for one, bare in zip(rounds, found[base], strict=True)]
        low, middle, high = _quartiles(ratios)
        cpu_us = statistics.median(one.cpu_us for one in rounds)
        _say(f"| {name} | {cpu_us:.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - what it is for


if __name__ == "__main__":
    main()
