"""The checker notices what only the reconciler finds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.support.depth import takes_long
from tests.system.chaos.runner import Plan, run

PLAN = Plan(seed=1, rate=60, seconds=8, faults=("webhooks-lost",))


@takes_long
async def test_without_the_reconciler_unsent_events_are_missed(tmp_path: Path) -> None:
    """Each of them, and nothing else is wrong but what follows from it."""
    outcome = await run(PLAN, tmp_path, RECONCILE_EVERY_S="0")
    laws = Counter(violation.law for violation in outcome.judgement.violations)
    assert laws.keys() <= {"missed", "not_as_at_stripe"}
    assert laws["missed"] == outcome.judgement.counts["never sent"] > 0
    assert outcome.judgement.counts["sent thin"] > 0
