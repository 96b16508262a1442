"""A Redis for the commands of each module, and the mark of a deployment in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import redis

from service.storage.keys import LAYOUT_VERSION, Keys
from tests.support.processes import Sandbox, open_sandbox

KEYS = Keys("idv", 8)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """Yield a sandbox with a server for the tests of a module."""
    with open_sandbox(tmp_path_factory.mktemp("cli")) as opened:
        yield opened


def claim_layout(url: str) -> None:
    """Let the server at *url* hold a deployment in which nothing has happened yet."""
    layout: dict[Any, Any] = {"version": LAYOUT_VERSION, "partitions": KEYS.partitions}
    with closing(redis.Redis.from_url(url)) as client:
        client.hset(KEYS.layout, mapping=layout)
