"""Memory limits are the same on every platform, and above the worst case."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from service.config import Settings
from tests.support.programs import ROOT, documents

DEPLOY = ROOT / "deploy"
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# What a process needs when idle, and in the worst case.
IDLE = 50 << 20
WORST = {
    # Every connection holds the largest body without its last byte, and 64 KiB besides.
    "receiver": IDLE + Settings.max_connections * (Settings.max_body_bytes + (64 << 10)),
    # As measured with 200,000 transitions waiting and every call failing (tests/bench/README.md).
    "worker": 70 << 20,
}
MARGIN = 1.3


def size(text: str) -> int:
    """Return a limit in bytes; 512m, 512Mi and 512M are the same."""
    found = re.fullmatch(r"(\d+)([KMG])I?", text.upper())
    assert found
    return int(found[1]) * UNITS[found[2]]


def limits() -> Iterator[tuple[str, str, int]]:
    """Yield each limit: its process, its platform, and the bytes."""
    [compose] = documents(DEPLOY / "compose.yaml")
    for service, process in (("receiver-1", "receiver"), ("receiver-2", "receiver"),
                             ("worker", "worker")):  # fmt: skip
        yield process, service, size(compose["services"][service]["mem_limit"])
    for process in WORST:
        deployment, *_ = documents(DEPLOY / "kubernetes" / f"{process}.yaml")
        [container] = deployment["spec"]["template"]["spec"]["containers"]
        yield process, "kubernetes", size(container["resources"]["limits"]["memory"])
        unit = (DEPLOY / "systemd" / f"identity-webhooks-{process}.service").read_text()
        yield process, "systemd", size(*re.findall(r"^MemoryMax=(.*)$", unit, re.MULTILINE))


@pytest.mark.parametrize("process", WORST)
def test_limits_are_equal_and_sufficient(process: str) -> None:
    """Each platform has the same limit, a third above the worst case, and the document names it."""
    given = {where: amount for name, where, amount in limits() if name == process}

    assert len(set(given.values())) == 1, given
    assert min(given.values()) >= MARGIN * WORST[process]
    assert f"{min(given.values()) >> 20} MiB" in (DEPLOY / "README.md").read_text()
