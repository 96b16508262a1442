"""Writes the bill of materials of the image to dist/, and looks up known vulnerabilities.

Run by the Python of .venv-tools. Fails if the bill is incomplete or a vulnerability is known. If no
service answers the lookup, it says so and succeeds.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS = ROOT / "deploy" / "requirements"
TOOLS = Path(sys.executable).parent
BILL = ROOT / "dist" / "image.cdx.json"
FINDINGS = ROOT / "dist" / "findings.json"
MAX_S = 120


def pinned(name: str) -> set[tuple[str, str]]:
    """Return what a file pins: names and versions."""
    pins = re.compile(r"^([a-z0-9.-]+)==(\S+)", re.MULTILINE)
    return set(pins.findall((PINS / name).read_text()))


def write_bill() -> set[tuple[str, str]]:
    """Write the bill of materials; return what it holds."""
    BILL.parent.mkdir(exist_ok=True)
    command = [TOOLS / "cyclonedx-py", "requirements", "--pyproject", ROOT / "pyproject.toml"]
    options = ["--output-reproducible", "--short-PURLs", "--output-file", BILL]
    subprocess.run(  # noqa: S603 - a tool that tools.txt pins
        [*command, *options, PINS / "image.txt"], check=True, stderr=subprocess.DEVNULL
    )
    components = json.loads(BILL.read_text())["components"]
    return {(one["name"], one["version"]) for one in components}


def look_up() -> tuple[dict[str, list[str]], set[str]]:
    """Return the vulnerabilities by package, and the packages that could not be looked up."""
    FINDINGS.unlink(missing_ok=True)
    command = [TOOLS / "pip-audit", "--disable-pip", "--require-hashes", "--timeout", "5"]
    options = ["--progress-spinner", "off", "--format", "json", "--output", FINDINGS]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(  # noqa: S603 - as above
            [*command, *options, "--requirement", PINS / "image.txt"],
            check=False,
            stderr=subprocess.DEVNULL,
            timeout=MAX_S,
        )
    names = {name for name, _ in pinned("image.txt")}
    if not FINDINGS.exists():
        return {}, names
    packages = json.loads(FINDINGS.read_text())["dependencies"]
    known = {one["name"]: [each["id"] for each in one.get("vulns", [])] for one in packages}
    answered = {one["name"] for one in packages if "skip_reason" not in one}
    return {name: ids for name, ids in known.items() if ids}, names - answered


def main() -> int:
    """Write the bill, look up vulnerabilities, and return the exit code."""
    held = write_bill()
    lost = (pinned("image.txt") | pinned("runtime.txt")) - held
    print(f"{BILL.relative_to(ROOT)}: {len(held)} packages, {BILL.stat().st_size} bytes")
    known, unanswered = look_up()
    if unanswered:
        print(f"NOT LOOKED UP: {len(unanswered)} packages, no service answers")
    for name, ids in known.items():
        print(f"VULNERABLE: {name}: {', '.join(ids)}")
    for name, version in sorted(lost):
        print(f"NOT IN THE BILL: {name} {version}")
    return 1 if known or lost else 0


if __name__ == "__main__":
    sys.exit(main())
