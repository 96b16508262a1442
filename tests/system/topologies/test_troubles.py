"""A Redis in trouble: what Stripe and the probes get, and that it recovers by itself."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import httpx2
import pytest
import redis

from tests.support.depth import takes_long
from tests.support.harness import event, signed
from tests.support.processes import PATIENT, Process, Processes
from tests.support.servers import Server, free_port, server
from tests.support.topologies import command
from tests.support.troubles import (
    configured,
    cut_off,
    demoted,
    full,
    lacking_replicas,
    unable_to_save,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(120)

NUMBERS = itertools.count()
# `python -m service` that looks at Redis ten times as often, and at its settings every second.
WATCHFUL = f"""
from service.storage import health
health.PROBE_EVERY_S, health.INSPECT_EVERY_S = 0.1, 1.0
{PATIENT}"""


class Deployment:
    """A Redis server, and a receiver on it."""

    def __init__(self, stack: ExitStack, directory: Path, url: str, *options: str) -> None:
        self._stack = stack
        self._directory = directory / "redis"
        self._options = ("--appendonly", "yes", *options)
        self.port = free_port()
        self.start()
        if "--cluster-enabled" in options:
            command(self.server, "CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_until(lambda: command(self.server, "CLUSTER INFO")["cluster_state"] == "ok")
        settings = {"ADMIT_DEADLINE_S": "0.3", "DURABILITY": "none"}
        processes = Processes(url.format(self.port), directory)
        stack.enter_context(contextlib.closing(processes))
        self.receiver: Process = processes.start("serve", program=WATCHFUL, **settings).ready()
        self.root = f"http://127.0.0.1:{self.receiver.port}"

    def start(self, *more: str) -> None:
        """Start the server."""
        started = server(self._directory, *self._options, *more, port=self.port)
        self.server = self._stack.enter_context(started)

    def post(self) -> httpx2.Response:
        """Post a new event."""
        n = next(NUMBERS)
        body = event(id=f"evt_{n}", session=f"vs_{n}")
        return httpx2.post(self.receiver.url, content=body, headers=signed(body))

    def first_refusal(self) -> httpx2.Response:
        """Post until the answer is not 200, and return it."""
        while (answer := self.post()).status_code == 200:
            pass
        return answer

    def reasons(self) -> set[str]:
        """Return the logged reasons of events that were not decided."""
        return {line["reason"] for line in self.receiver.lines("event.unavailable")}

    def is_ready(self) -> bool:
        """Return whether the readiness probe succeeds."""
        return httpx2.get(f"{self.root}/readyz").status_code == 200

    def has_recovered(self) -> bool:
        """Return whether events are admitted, and no finding is left."""
        metrics = httpx2.get(f"{self.receiver.admin}/metrics").text
        kinds = r'^idv_redis_finding_severity\{finding="(?:writes|eviction)"\} (\S+)'
        found = re.findall(kinds, metrics, re.MULTILINE)
        return set(found) == {"0.0"} and self.is_ready() and self.post().status_code == 200


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Yield a receiver on a plain server."""
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp("plain")
        yield Deployment(stack, directory, "redis://127.0.0.1:{}")


@contextmanager
def killed(deployed: Deployment) -> Iterator[None]:
    """Kill the server, and start it again at the end."""
    deployed.server.process.kill()
    deployed.server.process.wait()
    yield
    deployed.start()


@contextmanager
def evicting(server: Server) -> Iterator[None]:
    """Let the server evict keys as soon as it is full."""
    with configured(server, "maxmemory-policy", "allkeys-lru"):
        command(server, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        yield


@pytest.mark.parametrize(
    ("trouble", "reasons", "stays_ready"),
    [
        (full, {"redis_full"}, True),
        (lacking_replicas, {"not_durable"}, True),
        (unable_to_save, {"redis_refused"}, True),
        (evicting, {"not_durable"}, True),
        (demoted, {"redis_refused"}, True),
        (cut_off, {"redis_refused"}, True),
        (None, {"redis_unreachable"}, False),
    ],
)
def test_the_service_recovers_from_trouble(
    deployed: Deployment,
    trouble: Callable[[Server], AbstractContextManager[None]] | None,
    reasons: set[str],
    stays_ready: bool,
) -> None:
    """In trouble an event gets 503, Retry-After and a logged reason; afterwards all recovers."""
    wait_until(deployed.has_recovered)
    logged_before = len(deployed.receiver.lines("event.unavailable"))
    found_before = len(deployed.receiver.lines("redis.finding"))
    with trouble(deployed.server) if trouble else killed(deployed):
        answer = deployed.first_refusal()
        assert (answer.status_code, answer.json()) == (503, {"error": "unavailable"})
        assert answer.headers["Retry-After"]
        wait_until(lambda: deployed.is_ready() is stays_ready)
        assert httpx2.get(f"{deployed.root}/livez").status_code == 200
        logged = wait_until(lambda: deployed.receiver.lines("event.unavailable")[logged_before:])
        assert {line["reason"] for line in logged} <= reasons
        if stays_ready:
            wait_until(lambda: deployed.receiver.lines("redis.finding")[found_before:])
            assert deployed.is_ready()
    wait_until(deployed.has_recovered)


@takes_long
def test_a_server_that_loads_its_file(deployed: Deployment) -> None:
    """While Redis loads its file events get 503 and the receiver is not ready; then it recovers."""
    with deployed.server.client() as client:
        for n in range(500):
            client.set(f"other:{n}", n)
        client.bgrewriteaof()
        wait_until(lambda: _is_rewritten(client))
    deployed.server.process.kill()
    deployed.server.process.wait()
    slowly = ("--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tests.support.servers._await_answer", lambda *_: None)
        deployed.start(*slowly)
    wait_until(lambda: not deployed.is_ready())
    assert deployed.post().status_code == 503
    wait_until(lambda: deployed.is_ready() and deployed.post().status_code == 200, 30)


def _is_rewritten(client: redis.Redis) -> bool:
    state = client.info("persistence")
    return not state["aof_rewrite_in_progress"] and not state["aof_rewrite_scheduled"]


@takes_long
def test_a_cluster_without_a_slot(tmp_path: Path) -> None:
    """While a slot has no primary its events get 503, with a logged reason; then it recovers."""
    with ExitStack() as stack:
        # The bus would take a port of those that the system gives to clients.
        as_cluster = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        deployed = Deployment(stack, tmp_path, "redis+cluster://127.0.0.1:{}", *as_cluster)
        assert deployed.post().status_code == 200
        command(deployed.server, "CLUSTER", "DELSLOTS", 1)
        answer = deployed.first_refusal()
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        # The line is written after the answer.
        assert wait_until(deployed.reasons) == {"redis_unreachable"}
        command(deployed.server, "CLUSTER", "ADDSLOTS", 1)
        wait_until(lambda: deployed.is_ready() and deployed.post().status_code == 200)
