"""Each balancer, with its shipped file, in front of two real receivers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.balancers import balancer
from tests.system.balancers.balancer import HAPROXY, NGINX, Contract, Site


@pytest.fixture(scope="class")
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """Run the balancer of a class in front of two receivers."""
    with balancer.site(request.cls.balancer, tmp_path_factory.mktemp("balancer")) as running:
        yield running


class TestHAProxy(Contract):
    """HAProxy keeps the contract."""

    balancer = HAPROXY


class TestNginx(Contract):
    """So does nginx."""

    balancer = NGINX
