"""Each benchmark still runs to its end: here with the least work, whatever its figures are then."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.depth import takes_long

BENCHMARKS = [
    path.stem
    for path in sorted(Path(__file__).parent.glob("[!t]*.py"))
    if "\ndef main(" in path.read_text(encoding="utf-8")
]
# The arguments of `way_in`. Of the others, how much they do is in constants.
ARGUMENTS = ("--candidates", "bare,service", "--rounds", "1", "--seconds", "0.5")
LEAST: dict[str, dict[str, Any]] = {
    "fetching": {"EVENTS_PER_S": 10, "SECONDS": 1, "LIST_LAGS_S": (0,)},
    "memory": {"CONNECTIONS": 2},
    "overload": dict.fromkeys(("WARM_S", "PEAK_S", "OVERLOAD_S", "AFTER_S"), 0.5) | {"ROUNDS": 1},
    "page": dict.fromkeys(("OVERVIEW_KEPT_S", "REFRESH_S"), 0.1)
    | {"SESSIONS": 100, "DEAD_LETTERS": 4000, "LOADS": 1, "OVERVIEWS": 1, "OPEN_PAGES": 2},
    "scale": dict.fromkeys(("WARM_S", "SECONDS"), 0.5)
    | {"WHOLE_SESSIONS": 10, "SESSIONS": 20, "ROUNDS": 1},
    "way_in": {"WARM_S": 0.5},
    "way_out": dict.fromkeys(("SETTLE_DOWN_S", "IDLE_S", "MEMORY_STEP_S"), 0.1)
    | {"THROUGHPUT_ENTRIES": 500, "WAITING_ENTRIES": 500, "QUEUES": {"redis_stream": 500}}
    | {"LATENCY_S": 1},
}
# How the last line of each begins.
LAST = {
    "fetching": "  worker's CPU ",
    "memory": "pipelined requests ",
    "overload": "afterwards refused ",
    "page": "a receiver with 2 pages open ",
    "scale": "| 100,000,000 | ",
    "way_in": "| this service | ",
    "way_out": "dead letters meanwhile ",
}


@takes_long
@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_to_its_end(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each module with a `main` ends without an error, and prints its last figure."""
    benchmark = importlib.import_module(f"tests.bench.{name}")
    for constant, least in LEAST[name].items():
        monkeypatch.setattr(benchmark, constant, least)
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS])
    benchmark.main()
    assert capsys.readouterr().out.splitlines()[-1].startswith(LAST[name])
