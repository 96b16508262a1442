"""Planted bugs that the suite has to find: `python -m tests.mutants [WORDS…]`, from the root.

Each change listed in `planted` is made in a copy of the tree, in which the tests named beside it
then run; the bug is caught when they turn red. Exit code 1 if one survives. `test_mutants` holds
that every change still applies.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.planted import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
COPIED = ("service", "tests", "deploy", "pyproject.toml", "README.md", ".env.example")
SIDE_BY_SIDE = 2
# Far more than is needed. A run that exceeds it proves nothing, so the bug is not caught.
MAX_S = 600
MAX_HEALTHY_S = 1800
RED = 1

_FAILED = re.compile(r"^(?:FAILED|ERROR) \S*?(\w+\.py\S*)", re.MULTILINE)


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """Return the text of the mutant's file with the bug in it.

    Raises:
        ValueError: The change does not apply exactly once, or changes nothing.
    """
    text = (root / mutant.path).read_text(encoding="utf-8")
    if text.count(mutant.old) != 1 or mutant.old == mutant.new:
        raise ValueError(f"{mutant.bug}: not exactly once in {mutant.path}: {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)


def main(words: Sequence[str]) -> int:
    """Run those whose bug or file holds one of *words*; print a table; return 1 if one survives."""
    chosen = [one for one in MUTANTS if not words or any(w in one.bug + one.path for w in words)]
    if not chosen:
        _say(f"no bug or file holds any of {words}")
        return 1
    targets = sorted({target for one in chosen for target in one.targets})
    with TemporaryDirectory(prefix="mutants-") as directory:
        healthy = _copied(Path(directory) / "healthy")
        verdict, red = _tested(healthy, targets, MAX_HEALTHY_S)
        if verdict != "survived":
            _say(f"without any bug the tests are not green: {verdict} {red}")
            return 1
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            numbered = [(Path(directory) / str(n), one) for n, one in enumerate(chosen)]
            verdicts = list(pool.map(lambda pair: _run(*pair), numbered))
    caught = sum(verdict == "caught" for verdict in verdicts)
    _say(f"{caught} of {len(chosen)} caught")
    return int(caught < len(chosen))


def _run(directory: Path, mutant: Mutant) -> str:
    """Plant one bug in a copy, run its tests there, print a line, and return the verdict."""
    root = _copied(directory)
    (root / mutant.path).write_text(mutated(mutant, root), encoding="utf-8")
    started = time.monotonic()
    verdict, red = _tested(root, mutant.targets, MAX_S)
    shutil.rmtree(root)
    _say(f"{verdict:8} {time.monotonic() - started:5.1f} s  {mutant.bug:70} {red}")
    return verdict


def _copied(directory: Path) -> Path:
    directory.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, directory / name)
    return directory


def _tested(root: Path, targets: Sequence[str], most_s: float) -> tuple[str, str]:
    """Run tests in a tree; return what became of its bug, and the test that was red.

    `survived` or `caught`; `broken` or `endless` where the tests did not come to a verdict.
    """
    options = ["-x", "-q", "-n0", "-rfE", "--no-cov", "-p", "no:cacheprovider"]
    # What was found need not be made small.
    options.append("--hypothesis-profile=unshrunk")
    files = [f"tests/{target}" for target in targets]
    try:
        ended = subprocess.run(
            [sys.executable, "-B", "-m", "pytest", *options, *files],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
            timeout=most_s,
            env={**os.environ, "TEST_LONG": "1"},
        )
    except subprocess.TimeoutExpired:
        return "endless", ""
    if ended.returncode == 0:
        return "survived", ""
    red = _FAILED.search(ended.stdout)
    if ended.returncode == RED and red:
        return "caught", red[1]
    return "broken", ended.stdout[-2000:] + ended.stderr[-2000:]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
