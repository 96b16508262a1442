"""The systemd units: understood by systemd, closed to nearly everything, and given time to stop."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from programs import ROOT, program, run
from settings_named import known_settings

from service.config import Settings

UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
# Of 10, which is a unit that is closed to nothing; what is left is that it has a network.
MOST_EXPOSED = 1.2
every_unit = pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)


def directives(unit: Path) -> dict[str, list[str]]:
    """Return what a unit says, each name with its values."""
    found = defaultdict(list)
    for name, value in re.findall(r"^([A-Za-z]+)=(.*)$", unit.read_text(), re.MULTILINE):
        found[name].append(value)
    return found


@every_unit
def test_systemd_understands_it(unit: Path, tmp_path: Path) -> None:
    """Every directive is known and every program is there, once the project is where it says."""
    moved = tmp_path / unit.name
    text = unit.read_text().replace("/opt/identity-webhooks/.venv/bin/python", sys.executable)
    moved.write_text(text.replace("/opt/identity-webhooks", str(ROOT)))

    assert run(program("systemd-analyze", "systemd"), "verify", "--man=no", moved) == ""


@every_unit
def test_it_is_hardened(unit: Path) -> None:
    """What systemd itself counts as exposed stays below a bound."""
    threshold = str(round(MOST_EXPOSED * 10))
    analyze = program("systemd-analyze", "systemd")

    run(analyze, "security", "--offline=true", f"--threshold={threshold}", unit)


@every_unit
def test_it_has_time_to_stop(unit: Path) -> None:
    """It is not killed before it has drained and finished."""
    [seconds] = directives(unit)["TimeoutStopSec"]

    assert float(seconds) >= Settings.drain_s + Settings.shutdown_grace_s + 5


@every_unit
def test_its_credentials_are_settings(unit: Path) -> None:
    """Each credential is named as the setting it is, and comes from a file."""
    loaded = dict(each.split(":") for each in directives(unit)["LoadCredential"])

    assert loaded.keys() <= known_settings()
    assert {Path(path).name for path in loaded.values()} == loaded.keys()
    assert ("STRIPE_WEBHOOK_SECRETS" in loaded) == ("receiver" in unit.stem)


def test_both_are_closed_alike() -> None:
    """Receiver and worker differ in what they do, not in what they may."""
    receiver, worker = (directives(unit) for unit in UNITS)
    differ = {name for name in receiver | worker if receiver[name] != worker[name]}

    assert differ == {"Description", "ExecStart", "LoadCredential"}
