"""No test depends on the speed of the machine."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Modules that wait, or compare costs, for all tests; and tests of what happens in a time.
CLOCKS = {
    *("waiting.py", "usage.py", "processes.py", "rate_limit.py"),
    *("test_rate_limit.py", "test_faults.py"),
}
TIMED = {"monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time", "timeit"}
# Chaos runs and benchmarks are about time.
SUITE = [
    path
    for path in sorted(HERE.glob("**/*.py"))
    if not {"bench", "chaos"} & set(path.relative_to(HERE).parts)
    and path.name not in {*CLOCKS, Path(__file__).name, "mutants.py"}
]
MIN_PATIENCE_S = 10
VIRTUAL = "from tests.support import virtual_time\n"
LIMITS = {"timeout", "wait_for"}


def clocks(tree: ast.AST) -> Iterator[int]:
    """Yield the lines that use a clock."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in TIMED:
            yield node.lineno
        if isinstance(node, ast.ImportFrom | ast.Import):
            yield from (node.lineno for one in node.names if one.name in TIMED)


def short_limits(tree: ast.AST) -> Iterator[int]:
    """Yield the lines with a short time limit.

    If the time-out is expected, or time is virtual, a short limit is allowed.
    """
    if any(
        isinstance(node, ast.Import | ast.ImportFrom) and _names(node, "virtual_time")
        for node in ast.walk(tree)
    ):
        return
    meant = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With | ast.AsyncWith) and _asks_for_a_timeout(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in meant and _is_short(node):
            yield node.lineno


def _names(imported: ast.Import | ast.ImportFrom, module: str) -> bool:
    return any(one.name == module for one in imported.names)


def _asks_for_a_timeout(block: ast.With | ast.AsyncWith) -> bool:
    return any(
        ast.unparse(one.context_expr) == "pytest.raises(TimeoutError)" for one in block.items
    )


def _is_short(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    given = [*call.args, *(word.value for word in call.keywords)] if name in LIMITS else []
    return any(
        isinstance(one, ast.Constant)
        and isinstance(one.value, int | float)
        and one.value < MIN_PATIENCE_S
        for one in given
    )


def test_no_test_depends_on_time() -> None:
    """No test reads a clock, or sets a time limit below ten seconds for success."""
    texts = {str(path.relative_to(HERE)): path.read_text() for path in SUITE}
    suspects = {
        name: ast.parse(text)
        for name, text in texts.items()
        if any(word in text for word in TIMED | LIMITS)
    }
    found = {name: [*clocks(tree), *short_limits(tree)] for name, tree in suspects.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "timed",
    [
        "began = time.monotonic()",
        "from time import perf_counter",
        "import timeit",
        "async def f():\n async with asyncio.timeout(0.5): await g()",
        "async def f(): await asyncio.wait_for(g(), 2)",
        "async def f(): await asyncio.wait_for(g(), timeout=2)",
    ],
)
def test_dependence_on_time_is_found(timed: str) -> None:
    """Every way to depend on the machine's speed that ever occurred is found."""
    tree = ast.parse(timed)
    assert [*clocks(tree), *short_limits(tree)]


@pytest.mark.parametrize(
    "steady",
    [
        "async def f(): await asyncio.wait_for(g(), PATIENCE_S)",
        "async def f():\n with pytest.raises(TimeoutError): await asyncio.wait_for(g(), 0.1)",
        VIRTUAL + "async def f():\n async with asyncio.timeout(1): await g()",
    ],
)
def test_long_limits_and_virtual_time_pass(steady: str) -> None:
    """Long limits, expected time-outs and virtual time are allowed."""
    tree = ast.parse(steady)
    assert [*clocks(tree), *short_limits(tree)] == []
