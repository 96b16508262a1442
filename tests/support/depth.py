"""How much the tests do: all with `TEST_LONG`, else no long tests and a quarter of each search.

With `TEST_DEPTH` searches are whole, and go so many times as far.

A failure prints its steps and a `@reproduce_failure` line; `--hypothesis-seed=N` repeats a run:

    TEST_DEPTH=30 python -m pytest --no-cov tests/test_*_machine.py
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

IS_LONG = bool(os.environ.get("TEST_LONG"))
# Marks tests that take long, such as fail-overs under load.
takes_long = pytest.mark.skipif(not IS_LONG, reason="takes long: set TEST_LONG=1, as .ci/run does")
DEPTH = int(os.environ.get("TEST_DEPTH", "1"))
_IS_WHOLE = IS_LONG or "TEST_DEPTH" in os.environ
# Shrinking a failure may take Hypothesis minutes; interrupted, it would not report the failure.
SEARCH_TIMEOUT_S = 600 * DEPTH
# Health checks about the machine's speed, which is not under test.
_TOLERATED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


def examples(most: int) -> int:
    """Return how many of *most* examples this run tries."""
    return most * DEPTH if _IS_WHOLE else most // 4


def searching(most: int, *, steps: int = 50) -> settings:
    """Return the settings of a search of *most* examples."""
    return settings(
        max_examples=examples(most),
        stateful_step_count=steps,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=_TOLERATED,
    )
