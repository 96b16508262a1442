"""The systemd units are valid and hardened, and have time to stop."""

from __future__ import annotations

import contextlib
import re
import sys
from collections import defaultdict
from pathlib import Path

import httpx2
import pytest

from service.config import Settings
from tests.deploy.settings_named import known_settings
from tests.support.processes import open_sandbox
from tests.support.programs import ROOT, program, run
from tests.support.servers import free_port

UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
# Of 10, which is a unit without hardening. What remains is that it has a network.
MAX_EXPOSED = 1.2
every_unit = pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)


def directives(unit: Path) -> dict[str, list[str]]:
    """Return the directives of a unit, each name with its values."""
    found = defaultdict(list)
    for name, value in re.findall(r"^([A-Za-z]+)=(.*)$", unit.read_text(), re.MULTILINE):
        found[name].append(value)
    return found


@every_unit
def test_it_is_valid(unit: Path, tmp_path: Path) -> None:
    """Every directive is known and every program exists, with the project at its path."""
    moved = tmp_path / unit.name
    text = unit.read_text().replace("/opt/identity-webhooks/.venv/bin/python", sys.executable)
    moved.write_text(text.replace("/opt/identity-webhooks", str(ROOT)))

    assert run(program("systemd-analyze", "systemd"), "verify", "--man=no", moved) == ""


@every_unit
def test_it_is_hardened(unit: Path) -> None:
    """The exposure that systemd computes stays below a bound."""
    threshold = str(round(MAX_EXPOSED * 10))
    analyze = program("systemd-analyze", "systemd")

    run(analyze, "security", "--offline=true", f"--threshold={threshold}", unit)


@every_unit
def test_it_has_time_to_stop(unit: Path) -> None:
    """Systemd waits until it has drained and finished."""
    [seconds] = directives(unit)["TimeoutStopSec"]

    assert float(seconds) >= Settings.drain_s + Settings.shutdown_grace_s + 5


@every_unit
def test_its_credentials_are_settings(unit: Path) -> None:
    """Each credential has the name of a setting, and comes from a file."""
    loaded = dict(each.split(":") for each in directives(unit)["LoadCredential"])

    assert loaded.keys() <= known_settings()
    assert {Path(path).name for path in loaded.values()} == loaded.keys()
    assert ("STRIPE_WEBHOOK_SECRETS" in loaded) == ("receiver" in unit.stem)
    assert "STRIPE_API_KEY" in loaded


@every_unit
def test_a_200_means_on_disk(unit: Path) -> None:
    """The only setting in a unit is the durability."""
    assert directives(unit)["Environment"] == ["DURABILITY=fsync"]
    assert "DURABILITY" in known_settings()


def test_both_are_hardened_alike() -> None:
    """Receiver and worker differ in what they run, not in what they may do."""
    receiver, worker = (directives(unit) for unit in UNITS)
    differ = {name for name in receiver | worker if receiver[name] != worker[name]}

    assert differ == {"Description", "ExecStart", "LoadCredential", "MemoryMax"}


def test_both_run_on_one_machine(tmp_path: Path) -> None:
    """With .env.example as their settings file, both listen on one machine."""
    web, receivers_admin, workers_admin = (str(free_port()) for _ in range(3))
    example = (ROOT / ".env.example").read_text()
    lines = dict(re.findall(r"^([A-Z_]+)=(.*)$", example, re.MULTILINE))
    ports = {lines["ADMIN_PORT"]: receivers_admin, lines["PORT"]: web}

    with open_sandbox(tmp_path) as opened, contextlib.ExitStack() as ending:
        for unit in UNITS:
            [command] = directives(unit)["ExecStart"]
            *prefix, _, _, _, verb = command.split()
            own = dict(word.split("=") for word in prefix if "=" in word)
            if "ADMIN_PORT" in own:
                ports[own["ADMIN_PORT"]] = workers_admin
            settings = lines | own
            process = opened.start(
                verb, PORT=ports[settings["PORT"]], ADMIN_PORT=ports[settings["ADMIN_PORT"]]
            )
            ending.callback(process.end)
            process.ready()
        asked = [httpx2.get(f"http://127.0.0.1:{port}/livez") for port in ports.values()]

    assert [answer.status_code for answer in asked] == [200, 200, 200]
