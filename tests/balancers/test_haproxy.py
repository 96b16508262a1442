"""HAProxy, with the file that is shipped, in front of two real receivers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import balancer
import pytest
from balancer import Balancer, Laws, Site
from programs import ROOT


class HAProxy(Balancer):
    """Debian's HAProxy."""

    shipped = ROOT / "deploy" / "haproxy.cfg"
    name = "haproxy"

    def checked(self, configuration: Path) -> Sequence[str | Path]:
        """Check, and take warnings for faults."""
        return ("-c", "-dW", "-f", configuration)

    def run(self, configuration: Path) -> Sequence[str | Path]:
        """Stay in the foreground."""
        return ("-db", "-f", configuration)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Run it in front of two receivers."""
    with balancer.site(HAProxy(), tmp_path_factory.mktemp("haproxy")) as running:
        yield running


class TestHAProxy(Laws):
    """The laws of balancers."""
