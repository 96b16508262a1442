"""HAProxy with the configuration that is shipped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.support.programs import ROOT
from tests.system.balancers.balancer import Balancer


class HAProxy(Balancer):
    """HAProxy as packaged by Debian."""

    shipped = ROOT / "deploy" / "haproxy.cfg"
    name = "haproxy"

    def checked(self, configuration: Path) -> Sequence[str | Path]:
        """Check the configuration; warnings count as errors."""
        return ("-c", "-dW", "-f", configuration)

    def run(self, configuration: Path) -> Sequence[str | Path]:
        """Run in the foreground."""
        return ("-db", "-f", configuration)
