"""What all tests share: one private server per process, emptied for each test, and patience."""

from __future__ import annotations

import functools
import gc
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpcore2
import pytest
import redis
from httpx2 import Timeout, _config
from hypothesis import HealthCheck, Phase
from hypothesis import settings as profiles

from service.config import Settings
from service.delivery.consumer_groups import create_groups
from service.monitoring import overview
from service.runtime.embedded_redis import EmbeddedServer, find_server
from service.secret import Secret
from service.storage import clients
from service.storage.connections import Connections, connect
from service.storage.keys import Keys
from tests.support import depth, roles
from tests.support.prefork import forking
from tests.support.servers import Server, server
from tests.support.waiting import PATIENCE_S, wait_until

SIGNING_SECRET = Secret(b"whsec_tests")
# What the service allows Redis, and what tests do: a busy machine is no fault of the code's.
OWN_TIMEOUTS = {
    name: getattr(clients, name)
    for name in ("CALL_TIMEOUT_S", "CONNECT_TIMEOUT_S", "POOL_WAIT_S", "BLOCKING_READ_TIMEOUT_S")
}
PATIENT_TIMEOUTS = {**dict.fromkeys(OWN_TIMEOUTS, PATIENCE_S), "BLOCKING_READ_TIMEOUT_S": 900.0}

# A shell that starts tests in the background lets them, and whatever they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Every run tries the same examples, however long each takes: what fails, fails again. A search by
# command (`depth`) tries others each time.
profiles.register_profile(
    "steady",
    max_examples=depth.examples(100),
    deadline=None,
    derandomize="TEST_DEPTH" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
profiles.load_profile("steady")
# For who only wants to know whether anything is found, not what exactly: `mutants`.
profiles.register_profile("unshrunk", phases=[Phase.explicit, Phase.reuse, Phase.generate])

# Each client of httpx2 reads this machine's certificates, for 30 ms, even if it does not use TLS.
httpcore2.default_ssl_context = functools.cache(httpcore2.default_ssl_context)
# By default they wait five seconds for an answer, which a busy machine may exceed.
vars(_config.DEFAULT_TIMEOUT_CONFIG).update(Timeout(PATIENCE_S).as_dict())
# Imports leave no garbage, and six thousand tests are collected.
gc.disable()


def pytest_xdist_auto_num_workers() -> int:
    """Run three processes for each core, since tests wait; with four, deadlines pass too often."""
    return min(3 * (os.cpu_count() or 1), 16)


def pytest_collection_finish() -> None:
    """From here on the garbage collector runs, and ignores what there is so far."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Tests run on asyncio, like the service."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def forks() -> Iterator[None]:
    """Fork processes of the service."""
    with forking.on():
        yield


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients of Redis wait for as long as a busy machine may need."""
    for name, seconds in PATIENT_TIMEOUTS.items():
        monkeypatch.setattr(clients, name, seconds)
    monkeypatch.setattr(overview, "COLLECT_TIMEOUT_S", PATIENCE_S)


@pytest.fixture
def own_timeouts(patience: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients of Redis wait as long as in service, where that is what a test is about."""
    for name, seconds in OWN_TIMEOUTS.items():
        monkeypatch.setattr(clients, name, seconds)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """Run one server for this test process: the embedded one, or TEST_REDIS_SERVER."""
    chosen = os.environ.get("TEST_REDIS_SERVER", "")
    environ = {**os.environ, "REDIS_SERVER": chosen}
    with EmbeddedServer.start(
        find_server(environ), directory=tmp_path_factory.mktemp("redis")
    ) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: EmbeddedServer) -> str:
    """Return the address of an empty server."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def make_settings(redis_url: str) -> Callable[..., Settings]:
    """Return a factory of settings that differ from the defaults where a test says so."""

    def make(**changes: Any) -> Settings:
        defaults = Settings(
            redis_url=Secret(redis_url),
            secrets={"": (SIGNING_SECRET,)},
            admit_deadline_s=PATIENCE_S,
        )
        return replace(defaults, **changes)

    return make


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    """Return the default settings, but patient, on an empty server."""
    return make_settings()


@pytest.fixture
def keys(settings: Settings) -> Keys:
    """Return the key names of the default settings."""
    return Keys(settings.redis_prefix, settings.partitions)


@pytest.fixture
async def connections(settings: Settings, keys: Keys) -> AsyncIterator[Connections]:
    """Yield clients of an empty server on which the groups of all handlers exist."""
    opening = (
        roles.connect_as_users(settings.redis_url.reveal())
        if roles.are_wanted()
        else connect(settings.redis_url)
    )
    async with opening as opened:
        await create_groups(opened, keys, settings.handlers)
        yield opened


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    """Yield a primary and its replica, in step."""
    quick = ("--repl-diskless-sync-delay", "0")
    with (
        server(tmp_path / "primary", *quick) as primary,
        server(tmp_path / "replica", *quick, "--replicaof", f"127.0.0.1 {primary.port}") as replica,
        primary.client() as client,
    ):
        wait_until(lambda: client.wait(1, 100))
        yield primary, replica
