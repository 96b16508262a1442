"""How far the searching tests search: usually a little, and `TEST_DEPTH` times as far by command.

A failure prints its steps and a `@reproduce_failure` line; `--hypothesis-seed=N` repeats a run:

    TEST_DEPTH=30 python -m pytest --no-cov tests/test_*_machine.py
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

DEPTH = int(os.environ.get("TEST_DEPTH", "1"))
# Shrinking a failure may take Hypothesis minutes; interrupted, it would not report the failure.
SEARCH_TIMEOUT_S = 600 * DEPTH
# Health checks about the machine's speed, which is not under test.
_TOLERATED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


def searching(examples: int, *, steps: int = 50) -> settings:
    """Return the settings of a search of so many *examples*, or of `TEST_DEPTH` times as many."""
    return settings(
        max_examples=examples * DEPTH,
        stateful_step_count=steps,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=_TOLERATED,
    )
