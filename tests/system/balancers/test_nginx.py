"""nginx, with the shipped file, in front of two real receivers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.programs import ROOT
from tests.system.balancers import balancer
from tests.system.balancers.balancer import Balancer, Contract, Site


class Nginx(Balancer):
    """Debian's nginx."""

    shipped = ROOT / "deploy" / "nginx.conf"
    name = "nginx"

    def checked(self, configuration: Path) -> Sequence[str | Path]:
        """Check."""
        return ("-t", "-c", configuration)

    def run(self, configuration: Path) -> Sequence[str | Path]:
        """Stay in the foreground."""
        return ("-g", "daemon off;", "-c", configuration)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Run it in front of two receivers."""
    with balancer.site(Nginx(), tmp_path_factory.mktemp("nginx")) as running:
        yield running


class TestNginx(Contract):
    """The contract of balancers."""
