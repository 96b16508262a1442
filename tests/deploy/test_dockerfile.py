"""The image, as far as it can be tested without building it by an engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from tests.support.harness import SECRET
from tests.support.processes import Sandbox, environment, open_sandbox
from tests.support.programs import ROOT, missing, run, tool

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
QUEUES = sorted((ROOT / "service" / "handlers").glob("*.py"))
EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
BUILD_DEADLINE_S = 300


def instructions() -> list[tuple[str, str]]:
    """Return every instruction with its arguments, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def stages() -> list[list[tuple[str, str]]]:
    """Return the instructions of each stage, its FROM first."""
    found: list[list[tuple[str, str]]] = []
    for word, rest in instructions():
        if word == "FROM":
            found.append([])
        if found:
            found[-1].append((word, rest))
    return found


def health_check() -> list[str]:
    """Return the command of the health check, run by this Python."""
    [rest] = [rest for word, rest in stages()[-1] if word == "HEALTHCHECK"]
    _, *arguments = json.loads(rest.partition(" CMD ")[2])
    return [sys.executable, *arguments]


def test_its_linter_finds_nothing() -> None:
    """Hadolint has no finding of any severity."""
    run(tool("hadolint"), "--failure-threshold", "style", DOCKERFILE)


def test_the_last_stage_only_runs() -> None:
    """The image runs as a numeric user, and is stopped by SIGTERM."""
    last = stages()[-1]

    assert ("USER", "10001:10001") in last
    assert ("STOPSIGNAL", "SIGTERM") in last
    assert ("ENTRYPOINT", '["python", "-m", "service"]') in last


def test_the_classifiers_name_tested_pythons() -> None:
    """The classifiers name the Pythons that .ci/run tests on: the oldest, and the image's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [image] = [rest.split("-")[0] for word, rest in instructions() if rest.startswith("PYTHON=")]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))

    assert named == [project["requires-python"].removeprefix(">="), image.removeprefix("PYTHON=")]


def test_the_last_stage_has_no_installer_and_all_bytecode(tmp_path: Path) -> None:
    """Its command deletes the installers, and compiles the rest to unchecked bytecode."""
    library = tmp_path / "usr/local/lib" / f"python3.{sys.version_info.minor}"
    pip, module = library / "site-packages/pip/__init__.py", library / "json/decoder.py"
    for path in (library / "ensurepip/__init__.py", pip, module, tmp_path / "usr/local/bin/pip3"):
        path.parent.mkdir(parents=True)
        path.write_text("WORD = 'a'")

    [command] = [rest for word, rest in stages()[-1] if word == "RUN"]
    carry_out(command, tmp_path)

    [compiled] = library.rglob("*.pyc")
    assert compiled == Path(cache_from_source(str(module)))
    # The flags of an unchecked hash: Python does not read the source.
    assert compiled.read_bytes()[4:8] == b"\1\0\0\0"
    assert not [*tmp_path.rglob("*pip*")]


def test_the_build_context_is_what_is_copied() -> None:
    """The build context holds little more than what is copied: no secret, data or history."""
    build = stages()[0]
    defaults = dict(rest.split("=") for word, rest in build if word == "ARG")
    copied = [rest.split()[0] for word, rest in build if word == "COPY"]
    sources = {re.sub(r"\$\{(\w+)\}", lambda name: defaults[name[1]], each) for each in copied}
    lines = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]

    assert sources == {"service", "deploy/requirements/image.txt"}
    assert lines == ["*", "!service", "!deploy/requirements/*.txt", "**/__pycache__"]


def test_the_health_check_asks_the_process(tmp_path: Path) -> None:
    """The health check succeeds for a running process and fails for one that does not answer."""
    with open_sandbox(tmp_path) as opened:
        process = opened.start("serve").ready()
        port = {"ADMIN_PORT": str(process.started["admin_port"])}
        well = subprocess.run(health_check(), env={**os.environ, **port}, check=False)
        process.end()
        unwell = subprocess.run(
            health_check(), env={**os.environ, **port}, stderr=subprocess.DEVNULL, check=False
        )

    assert (well.returncode, unwell.returncode) == (0, 1)


@pytest.mark.timeout(BUILD_DEADLINE_S + 60)
def test_the_build_makes_what_every_handler_needs(tmp_path: Path) -> None:
    """The commands of the build stage, run in an empty directory, make all that handlers need."""
    if not os.environ.get("REQUIRE_BROKERS"):
        missing("installs packages: set REQUIRE_BROKERS to do so")
    build_in(tmp_path)
    modules = ["cli", *(f"handlers.{path.stem}" for path in QUEUES if path.stem != "__init__")]
    imports = ", ".join(f"service.{module}" for module in modules)

    with open_sandbox(tmp_path) as opened:
        checked = built(tmp_path, opened, "-m", "service", "check", "--json")
        built(tmp_path, opened, "-W", "error", "-c", f"import {EXPORTER}, {imports}")

    assert hidden_in(tmp_path) == []
    assert "pip" not in {path.name for path in tmp_path.glob("opt/venv/lib/*/site-packages/*")}
    assert "service.handlers.log" in checked


def hidden_in(directory: Path) -> list[Path]:
    """Return the files that only their owner can read, and folders that only it can enter."""
    found = [*(directory / "app").rglob("*"), *(directory / "opt" / "venv").rglob("*")]
    needed = {path: 0o005 if path.is_dir() else 0o004 for path in found if not path.is_symlink()}
    return [path for path, mode in needed.items() if path.stat().st_mode & mode != mode]


def build_in(directory: Path) -> None:
    """Run the build stage with *directory* in place of the root, from files only we can read."""
    (directory / "opt").mkdir()
    (directory / "app").mkdir()
    shutil.copy(ROOT / "deploy/requirements/image.txt", directory / "opt/requirements.txt")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "service", directory / "app/service", ignore=ignored)
    for path in (directory / "app").rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
    for word, rest in stages()[0]:
        if word == "RUN":
            carry_out(rest, directory)


def carry_out(command: str, directory: Path) -> None:
    """Run the command of a RUN with this Python, with *directory* in place of the root."""
    ours = Path(sys.executable).parent
    (directory / "app").mkdir(exist_ok=True)
    subprocess.run(
        ["/bin/sh", "-ec", re.sub(r"(?<!\S)/(?=opt/|usr/)", f"{directory}/", command)],
        cwd=directory / "app",
        env={**os.environ, "PATH": f"{ours}:{os.environ['PATH']}"},
        timeout=BUILD_DEADLINE_S,
        umask=0o077,
        check=True,
    )


def built(directory: Path, opened: Sandbox, *arguments: str) -> str:
    """Run what was built, without the packages that are installed here."""
    ours = environment(REDIS_URL=opened.server.url, STRIPE_WEBHOOK_SECRETS=SECRET.reveal().decode())
    ended = subprocess.run(
        [directory / "opt/venv/bin/python", *arguments],
        cwd=directory / "app",
        env={name: value for name, value in ours.items() if name != "PYTHONPATH"},
        stdout=subprocess.PIPE,
        timeout=BUILD_DEADLINE_S,
        check=True,
    )
    return ended.stdout.decode()
