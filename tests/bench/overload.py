"""Offers the service twice what it can do: `python -m tests.bench.overload`. Asserts no time.

First its peak is found with 64 connections; then twice as much comes at an even pace, whatever is
answered, on 1,024 connections; then, at once, half of it.
"""
# ruff: noqa: E402 (the tests' own modules are found after the path is set)

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from candidates import ALL, OTHERS_CORE, on_core, running
from load import Answers, Load

MOST_PER_S = 12_000
WARM_S, PEAK_S, OVERLOAD_S, AFTER_S = 1, 3, 8, 3
FEW, MANY = 64, 1024
# An answer within this time is as good as on any other day.
RECOVERED_MS = 100


def main() -> None:
    """Measure, and say it line by line."""
    with tempfile.TemporaryDirectory(prefix="overload-") as made:
        directory = Path(made)
        load = Load(directory, int((WARM_S + PEAK_S + 2 * OVERLOAD_S + AFTER_S) * MOST_PER_S))
        with running(ALL["service"], directory / "run") as service, on_core(OTHERS_CORE):
            warm = load.post(service.port, connections=FEW, seconds=WARM_S)
            peak = load.post(service.port, first=warm.next, connections=FEW, seconds=PEAK_S)
            before = service.resident_mib
            over = load.post(
                service.port,
                first=peak.next,
                connections=MANY,
                seconds=OVERLOAD_S,
                rate=2 * peak.per_s,
            )
            after = load.post(
                service.port,
                first=over.next,
                connections=FEW,
                seconds=AFTER_S,
                rate=peak.per_s / 2,
            )
            _say("memory", f"{before:.0f} MiB before, {service.resident_mib:.0f} MiB after")
        _report(peak, over, after)


def _report(peak: Answers, over: Answers, after: Answers) -> None:
    _say("peak", f"{peak.per_s:,.0f}/s with {FEW} connections")
    offered = over.good + over.refused + over.lost
    _say("offered", f"{offered / OVERLOAD_S:,.0f}/s on {MANY} connections")
    _say("goodput", f"{over.per_s:,.0f}/s, {over.per_s / peak.per_s:.0%} of the peak")
    _say("accepted", _spread(over, "good"))
    _say("refused", f"{over.refused:,}: {_spread(over, 'refused')}")
    others = {
        what: n for what, n in over.found["answers"].items() if what[:3] not in ("200", "503")
    }
    _say("without an answer, other answers", f"{over.lost}, {others or 'none'}")
    _say("afterwards", f"{_recovered_after_s(after)} s to be as ever; {_spread(after, 'good')}")
    _say("afterwards refused", f"{after.refused}")


def _spread(answers: Answers, which: str) -> str:
    p50, p99, most = (answers.ms(share, which) for share in ("p50", "p99", "p100"))
    return f"p50 {p50:.1f} ms  p99 {p99:.1f} ms  max {most:.1f} ms"


def _recovered_after_s(after: Answers) -> float:
    """Return after how long nothing is refused, and nobody waits longer than ever."""
    tenths = after.found["tenths"]
    bad = [
        number
        for number, (_, refused, worst_us) in enumerate(tenths)
        if refused or worst_us > RECOVERED_MS * 1000
    ]
    return (bad[-1] + 1) / 10 if bad else 0.0


def _say(what: str, figure: str) -> None:
    print(f"{what:36}{figure}", flush=True)  # noqa: T201 - what it is for


if __name__ == "__main__":
    main()
