"""The pins are complete and hashed, and equal where two files share one."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.support.programs import ROOT

FOLDER = ROOT / "deploy" / "requirements"
FILES = sorted(FOLDER.glob("*.txt"))


def pins(name: str) -> dict[str, set[str]]:
    """Return the versions that a file pins, by name; several where Pythons differ."""
    found: dict[str, set[str]] = {}
    for package, version in re.findall(
        r"^([\w.-]+)==([^\s;]+)", (FOLDER / f"{name}.txt").read_text(), re.MULTILINE
    ):
        found.setdefault(package, set()).add(version)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_pin_is_hashed(path: Path) -> None:
    """Each requirement is one version with hashes, and no line names an index."""
    requirements = path.read_text().replace("\\\n", "").splitlines()

    assert requirements
    for requirement in requirements:
        assert re.fullmatch(
            r"[\w.-]+==\S+( ; [^#@]+?)?(\s+--hash=sha256:[0-9a-f]{64})+", requirement
        )


@pytest.mark.parametrize("name", ["image", "embedded", "dev"])
def test_files_agree(name: str) -> None:
    """Production, development and tests use the same versions."""
    assert pins("runtime").items() <= pins(name).items()
    assert name != "dev" or pins("image").items() <= pins(name).items()


def test_each_dependency_is_pinned() -> None:
    """Each dependency that pyproject.toml names is pinned in its file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = {
        "runtime": project["project"]["dependencies"],
        "image": [each for name in ("kafka", "nats", "otel", "page", "rabbitmq", "sqs")
                  for each in extras[name]],
        "embedded": extras["embedded"] + extras["page"],
        "dev": extras["dev"][1:],
        "tools": project["dependency-groups"]["tools"],
    }  # fmt: skip

    assert asked.keys() == {path.stem for path in FILES}
    for name, requirements in asked.items():
        assert {re.split(r"[\[<>=]", each)[0] for each in requirements} <= pins(name).keys()
