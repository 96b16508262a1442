"""Handlers of your own: the example in the README, installed, tested, checked and run."""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from service.findings import Severity
from service.handlers import ENTRY_POINT_GROUP
from service.testing import transition
from service.transitions.transition import StatusTransition
from tests.support.processes import Process, Sandbox, environment, open_sandbox
from tests.support.waiting import DEADLINE_S

README = (Path(__file__).parents[2] / "README.md").read_text()
NAMES = ("audit", "own_audit:open")


def blocks() -> list[str]:
    """Return the README's examples about handlers of one's own: the handler, and its test."""
    section = README.partition("\n## A handler of your own\n")[2].partition("\n## ")[0]
    found = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(found) == 2
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example as a package with an entry point; return where."""
    site = tmp_path_factory.mktemp("site")
    (site / "own_audit.py").write_text(blocks()[0])
    information = site / "own_audit-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: own-audit\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        f"[{ENTRY_POINT_GROUP}]\naudit = own_audit:open\n"
    )
    return site


@pytest.fixture
def importable(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the installed package importable here."""
    monkeypatch.syspath_prepend(installed)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """Yield a sandbox with a server."""
    with open_sandbox(tmp_path_factory.mktemp("sandbox")) as opened:
        yield opened


@pytest.mark.usefixtures("importable")
async def test_the_example_knows_users_with_several_sessions(tmp_path: Path) -> None:
    """A user is verified while any session is, also after late, repeated and redacted ones."""
    own = importlib.import_module("own_audit")
    path = str(tmp_path / "out")
    another = functools.partial(transition, session_id="vs_2")
    steps: list[tuple[StatusTransition, bool]] = [
        (transition(current="requires_input", sequence=1), False),
        (another(current="requires_input", sequence=1), False),
        (transition(current="verified", sequence=3), True),
        # Another session of the user fails; its sequence is independent.
        (another(current="requires_input", sequence=9), True),
        # A repeated delivery.
        (transition(current="requires_input", sequence=1), True),
        (transition(current="redacted", sequence=4), True),
        # Staff reject the session on review; then a new epoch begins.
        (transition(current="requires_input", reversal=True, sequence=5), False),
        (transition(current="verified", sequence=1, epoch=transition().epoch + 1), True),
        (transition(client_reference_id="user_2", session_id="vs_3", current="canceled"), True),
    ]
    async with own.open({"DATABASE": path}) as handle:
        for number, (each, is_verified) in enumerate(steps):
            await handle(each)
            assert own.is_verified(path, "user_1") is is_verified, number
    assert not own.is_verified(path, "user_2")


def test_the_example_s_test_passes(tmp_path: Path) -> None:
    """Pytest passes the README's test of the README's handler."""
    handler, test = blocks()
    (tmp_path / "my_handler.py").write_text(handler)
    (tmp_path / "test_my_handler.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        command,
        check=False,
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert ended.returncode == 0, ended.stdout
    assert "1 passed" in ended.stdout


def test_check_says_what_is_loaded_and_from_where(
    ground: Sandbox, installed: Path, tmp_path: Path
) -> None:
    """`check` names each handler, its module, what installed it, and whether it opens."""

    def check(**settings: str) -> tuple[int, dict[str, dict[str, str]]]:
        names = {"HANDLERS": ",".join(NAMES), "PYTHONPATH": str(installed)}
        process: Process = ground.run("check", "--json", **names, **settings)
        return process.wait(), {one["name"]: one for one in orjson.loads(process.out)}

    code, found = check(DATABASE=str(tmp_path / "out"))
    assert code == 0
    assert found["handler audit"]["meaning"] == "opens (own_audit:open of own-audit 1.0)"
    assert found["handler own_audit:open"]["meaning"] == "opens (own_audit:open)"

    code, found = check()
    assert code == 1
    assert found["handler audit"]["severity"] == Severity.FATAL
