"""HAProxy, with the shipped file, in front of two real receivers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.balancers import balancer
from tests.system.balancers.balancer import Contract, Site
from tests.system.balancers.haproxy import HAProxy


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Run it in front of two receivers."""
    with balancer.site(HAProxy(), tmp_path_factory.mktemp("haproxy")) as running:
        yield running


class TestHAProxy(Contract):
    """The contract of balancers."""
