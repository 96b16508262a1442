"""Offers the service twice what it can do: `python -m tests.bench.overload`. Asserts no time.

First its peak is found with 64 connections; then twice as much comes at an even pace, whatever is
answered, on 1,024 connections; then, at once, half of it. All of that several times over, for the
machine is not always as fast.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tests.bench.candidates import ALL, OTHERS_CORE, on_core, running
from tests.bench.load import Answers, Load

MAX_PER_S = 10_000
ROUNDS = 5
WARM_S, PEAK_S, OVERLOAD_S, AFTER_S = 1, 2, 3, 1
FEW, MANY = 64, 1024
# An answer within this time is as good as on any other day.
RECOVERED_MS = 100


class Round(NamedTuple):
    """What was answered at the peak, under twice as much, and afterwards."""

    peak: Answers
    over: Answers
    after: Answers

    @property
    def goodput(self) -> float:
        """The share of the peak that is still answered 200 under overload."""
        return self.over.per_s / self.peak.per_s


def main() -> None:
    """Measure, and say it line by line."""
    with tempfile.TemporaryDirectory(prefix="overload-") as made:
        directory = Path(made)
        per_round_s = PEAK_S + 2 * OVERLOAD_S + AFTER_S / 2
        load = Load(directory, int((WARM_S + ROUNDS * per_round_s) * MAX_PER_S))
        with running(ALL["service"], directory / "run") as service, on_core(OTHERS_CORE):
            warm = load.post(service.port, connections=FEW, seconds=WARM_S)
            before = service.resident_mib
            rounds, first = [], warm.next
            for _ in range(ROUNDS):
                rounds.append(_round(load, service.port, first))
                first = rounds[-1].after.next
            _say("memory", f"{before:.0f} MiB before, {service.resident_mib:.0f} MiB after")
    _report(rounds)


def _round(load: Load, port: int, first: int) -> Round:
    peak = load.post(port, first=first, connections=FEW, seconds=PEAK_S)
    rate = 2 * peak.per_s
    over = load.post(port, first=peak.next, connections=MANY, seconds=OVERLOAD_S, rate=rate)
    after = load.post(port, first=over.next, connections=FEW, seconds=AFTER_S, rate=rate / 4)
    return Round(peak, over, after)


def _report(rounds: Sequence[Round]) -> None:
    peaks = sorted(each.peak.per_s for each in rounds)
    _say("peak", f"{peaks[0]:,.0f} to {peaks[-1]:,.0f}/s with {FEW} connections")
    shares = sorted(each.goodput for each in rounds)
    _say(
        f"goodput at twice the peak on {MANY}",
        f"{median(shares):.0%} of the peak ({shares[0]:.0%} to {shares[-1]:.0%})",
    )
    over = [each.over for each in rounds]
    _say("accepted", _spread(over, "good"))
    _say(f"refused, {sum(each.refused for each in over):,}", _spread(over, "refused"))
    others = [what for each in over for what in each.found["answers"]]
    strange = {what for what in others if what[:3] not in ("200", "503")}
    _say("without an answer, other answers", f"{sum(each.lost for each in over)}, {strange or 0}")
    after = [each.after for each in rounds]
    recovered_s = max(map(_recovered_after_s, after))
    _say("afterwards", f"{recovered_s} s to be as ever; {_spread(after, 'good')}")
    _say("afterwards refused", f"{sum(each.refused for each in after)}")


def _spread(answers: Sequence[Answers], which: str) -> str:
    p50, p99 = (median(each.ms(share, which) for each in answers) for share in ("p50", "p99"))
    most = max(each.ms("p100", which) for each in answers)
    return f"p50 {p50:.1f} ms  p99 {p99:.1f} ms  max {most:.1f} ms"


def _recovered_after_s(after: Answers) -> float:
    """Return the seconds until no request is refused and no response is slow."""
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
