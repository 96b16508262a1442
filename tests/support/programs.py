"""Programs that tests run: where they are, and what happens if one is missing.

Tests of a missing program are skipped and name what to install. With REQUIRE_BROKERS set, as in CI,
they fail instead.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
CONTRACTS = ROOT / "deploy" / "contracts"
# Where `.ci/run` puts what deploy/requirements/tools.txt pins.
TOOLS = ROOT / ".venv-tools" / "bin"
# And what it takes from a newer Debian.
UNPACKED = ROOT / ".venv-debian" / "usr" / "bin"
PINNED_TOOLS = (
    "python3 -m venv .venv-tools && "
    ".venv-tools/bin/pip install --no-deps -r deploy/requirements/tools.txt"
)
RUN_DEADLINE_S = 240.0


def missing(what: str) -> NoReturn:
    """Skip what needs something that is not installed, or fail it where all is meant to be."""
    if os.environ.get("REQUIRE_BROKERS"):
        pytest.fail(what)
    pytest.skip(what, allow_module_level=True)


def program(name: str, package: str, *directories: str) -> Path:
    """Return the path of a program that a package of Debian's brings, or skip."""
    return _find(name, f"apt-get install {package}", *directories, os.environ["PATH"], "/usr/sbin")


def tool(name: str) -> Path:
    """Return the path of a tool that deploy/requirements/tools.txt pins, or skip."""
    return _find(name, PINNED_TOOLS, str(TOOLS), os.environ["PATH"])


def documents(path: Path) -> list[Any]:
    """Return the documents of a YAML file; read by a tool's parser, for none of ours is one."""
    python = tool("yamllint").resolve().with_name("python")
    program = "import json, sys, yaml; print(json.dumps([*yaml.safe_load_all(sys.stdin)]))"
    with path.open("rb") as text:
        read = subprocess.run(
            [python, "-c", program], stdin=text, stdout=subprocess.PIPE, check=True
        )
    found: list[Any] = json.loads(read.stdout)
    return found


def run(*command: str | Path, directory: Path = ROOT) -> str:
    """Run a command that must succeed; return what it printed."""
    ended = subprocess.run(
        [str(word) for word in command],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=RUN_DEADLINE_S,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def _find(name: str, how: str, *directories: str) -> Path:
    found = shutil.which(name, path=os.pathsep.join(directories))
    if found is None:
        missing(f"{name} is not installed: {how}")
    return Path(found)
