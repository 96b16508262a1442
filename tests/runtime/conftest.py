"""A sandbox for the tests of processes, with handlers that do not open."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.processes import Sandbox, open_sandbox

CANARY = "canary-4711"
BROKEN = f"""
from contextlib import asynccontextmanager
from service.errors import ConfigError

@asynccontextmanager
async def refuses(environ):
    raise ConfigError(["BROKEN_URL: expected a URL", "BROKEN_TOPIC: expected a name"])
    yield

@asynccontextmanager
async def crashes(environ):
    secret = "{CANARY}"
    raise RuntimeError(secret, environ)
    yield

@asynccontextmanager
async def slow(environ):
    import asyncio
    try:
        print("opening", flush=True)
        await asyncio.sleep(3600)
        yield
    finally:
        print("closing", flush=True)
"""


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """Yield a sandbox with a server for the tests of this module."""
    directory = tmp_path_factory.mktemp("processes")
    (directory / "broken.py").write_text(BROKEN)
    with open_sandbox(directory) as opened:
        yield opened
