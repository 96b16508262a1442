"""Laws of a Redis in trouble: what Stripe is told, what the probes say, and how it ends."""

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

from tests.support.harness import Process, Processes, event, signed, soon, takes_long
from tests.support.servers import free_port, server
from tests.support.topologies import command

pytestmark = pytest.mark.timeout(120)

NUMBERS = itertools.count()


class Place:
    """A server of its own kind, and a receiver that stands on it."""

    def __init__(self, stack: ExitStack, directory: Path, url: str, *options: str) -> None:
        self._stack = stack
        self._directory = directory / "redis"
        self._options = ("--appendonly", "yes", *options)
        self.port = free_port()
        self.start()
        if "--cluster-enabled" in options:
            command(self.server, "CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            soon(lambda: command(self.server, "CLUSTER INFO")["cluster_state"] == "ok")
        settings = {"ADMIT_DEADLINE_S": "0.3", "DURABILITY": "none"}
        processes = Processes(url.format(self.port), directory)
        stack.enter_context(contextlib.closing(processes))
        self.receiver: Process = processes.start("serve", **settings).ready()
        self.root = f"http://127.0.0.1:{self.receiver.port}"

    def start(self, *more: str) -> None:
        """Start the server."""
        started = server(self._directory, *self._options, *more, port=self.port)
        self.server = self._stack.enter_context(started)

    def post(self) -> httpx2.Response:
        """Post an event that was never seen."""
        n = next(NUMBERS)
        body = event(id=f"evt_{n}", session=f"vs_{n}")
        return httpx2.post(self.receiver.url, content=body, headers=signed(body))

    def refused(self) -> httpx2.Response:
        """Post until that is refused, and return the answer."""
        while (answer := self.post()).status_code == 200:
            pass
        return answer

    def words(self) -> set[str]:
        """Return the reasons that were logged for putting an event off."""
        return {line["reason"] for line in self.receiver.lines("event.unavailable")}

    def is_ready(self) -> bool:
        """Say what the readiness probe says."""
        return httpx2.get(f"{self.root}/readyz").status_code == 200

    def is_well(self) -> bool:
        """Say whether all is well, and nothing is left of what was found wrong before."""
        metrics = httpx2.get(f"{self.receiver.admin}/metrics").text
        kinds = r'^idv_redis_finding_severity\{finding="(?:writes|eviction)"\} (\S+)'
        found = re.findall(kinds, metrics, re.MULTILINE)
        return set(found) == {"0.0"} and self.is_ready() and self.post().status_code == 200


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Yield a receiver on a plain server."""
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp("plain")
        yield Place(stack, directory, "redis://127.0.0.1:{}")


@contextmanager
def set_to(place: Place, name: str, value: str) -> Iterator[None]:
    """Configure the server otherwise for the length of the block."""
    with place.server.client() as client:
        [before] = client.config_get(name).values()
        client.config_set(name, value)
        yield
        client.config_set(name, before)


def full(place: Place) -> AbstractContextManager[None]:
    """Let there be no memory left."""
    return set_to(place, "maxmemory", "1")


def lonely(place: Place) -> AbstractContextManager[None]:
    """Let there be fewer replicas than the server insists on."""
    return set_to(place, "min-replicas-to-write", "1")


@contextmanager
def demoted(place: Place) -> Iterator[None]:
    """Make the server a replica, of nobody who answers."""
    command(place.server, "REPLICAOF", "127.0.0.1", free_port())
    yield
    command(place.server, "REPLICAOF", "NO", "ONE")


@contextmanager
def cut_off(place: Place) -> Iterator[None]:
    """The same, where it may not even tell what it knows."""
    with set_to(place, "replica-serve-stale-data", "no"), demoted(place):
        yield


@contextmanager
def gone(place: Place) -> Iterator[None]:
    """Kill the server, and start it again."""
    place.server.process.kill()
    place.server.process.wait()
    yield
    place.start()


@contextmanager
def unable_to_save(place: Place) -> Iterator[None]:
    """Let the last snapshot have failed."""
    with set_to(place, "save", "3600 1"), place.server.client() as client:
        in_the_way = Path(str(client.config_get("dir")["dir"])) / "dump.rdb"
        in_the_way.mkdir()
        client.bgsave()
        soon(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        yield
        in_the_way.rmdir()
        client.bgsave()
        soon(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "ok")


@contextmanager
def forgetful(place: Place) -> Iterator[None]:
    """Let it make room by dropping keys, as soon as it is full."""
    with set_to(place, "maxmemory-policy", "allkeys-lru"):
        command(place.server, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        yield


@pytest.mark.parametrize(
    ("trouble", "words", "stays_ready"),
    [
        (full, {"redis_full"}, True),
        (lonely, {"not_durable"}, True),
        (unable_to_save, {"redis_refused"}, True),
        (forgetful, {"not_durable"}, True),
        (demoted, {"redis_refused"}, True),
        (cut_off, {"redis_refused"}, True),
        (gone, {"redis_unreachable"}, False),
    ],
)
def test_trouble_is_told_and_ends(
    place: Place,
    trouble: Callable[[Place], AbstractContextManager[None]],
    words: set[str],
    stays_ready: bool,
) -> None:
    """In trouble: 503, Retry-After and its word; afterwards all is well without anybody's help."""
    soon(place.is_well)
    told_before = len(place.receiver.lines("event.unavailable"))
    found_before = len(place.receiver.lines("redis.finding"))
    with trouble(place):
        answer = place.refused()
        assert (answer.status_code, answer.json()) == (503, {"error": "unavailable"})
        assert answer.headers["Retry-After"]
        soon(lambda: place.is_ready() is stays_ready)
        assert httpx2.get(f"{place.root}/livez").status_code == 200
        told = soon(lambda: place.receiver.lines("event.unavailable")[told_before:])
        assert {line["reason"] for line in told} <= words
        if stays_ready:
            soon(lambda: place.receiver.lines("redis.finding")[found_before:])
            assert place.is_ready()
    soon(place.is_well)


@takes_long
def test_a_server_that_loads_its_file_is_awaited(place: Place) -> None:
    """While Redis loads, receivers are not ready and put off; when it has loaded, they go on."""
    with place.server.client() as client:
        for n in range(500):
            client.set(f"other:{n}", n)
        client.bgrewriteaof()
        soon(lambda: _is_rewritten(client))
    place.server.process.kill()
    place.server.process.wait()
    slowly = ("--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tests.support.servers._await_answer", lambda *_: None)
        place.start(*slowly)
    soon(lambda: not place.is_ready())
    assert place.post().status_code == 503
    soon(lambda: place.is_ready() and place.post().status_code == 200, 30)


def _is_rewritten(client: redis.Redis) -> bool:
    state = client.info("persistence")
    return not state["aof_rewrite_in_progress"] and not state["aof_rewrite_scheduled"]


@takes_long
def test_a_cluster_with_a_hole_is_told_and_ends(tmp_path: Path) -> None:
    """While a slot has no primary, events are put off with the word for it; then all is well."""
    with ExitStack() as stack:
        # The bus would take a port of those that the system gives to clients.
        as_cluster = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        place = Place(stack, tmp_path, "redis+cluster://127.0.0.1:{}", *as_cluster)
        assert place.post().status_code == 200
        command(place.server, "CLUSTER", "DELSLOTS", 1)
        answer = place.refused()
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        # A line is written behind its answer.
        assert soon(place.words) == {"redis_unreachable"}
        command(place.server, "CLUSTER", "ADDSLOTS", 1)
        soon(lambda: place.is_ready() and place.post().status_code == 200)
