"""How much the tests do: long ones only with `TEST_LONG`, searches `TEST_DEPTH` times as far.

A failure prints its steps and a `@reproduce_failure` line; `--hypothesis-seed=N` repeats a run:

    TEST_DEPTH=30 python -m pytest --no-cov tests/test_*_machine.py
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# Marks tests that take long, such as fail-overs under load.
takes_long = pytest.mark.skipif(
    not os.environ.get("TEST_LONG"), reason="takes long: set TEST_LONG=1, as .ci/run does"
)
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
