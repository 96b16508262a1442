"""The deployment that a chaos run torments: Redis, maybe with replicas, and real processes.

Whatever ends without having been told to is started again, as a supervisor would. What is done to
it all is in `faults`; what is read from it in the end, in `collecting`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.storage.layout import Keys
from tests.support import servers
from tests.support.harness import SECRET
from tests.support.proxy import Proxy, proxy_to
from tests.support.waiting import until
from tests.system.chaos.evidence import (
    Bound,
    Crash,
    Probe,
    Reading,
    StrangerAnswer,
    Transition,
    Window,
)
from tests.system.chaos.hosts import RedisHost
from tests.system.chaos.needs import DEFAULT_DURABILITY, DEFAULT_FSYNC, Needs
from tests.system.chaos.places import Place
from tests.system.chaos.preloads import Clock, SlowDisk
from tests.system.chaos.sinks import EXIT_CODE as SINK_EXIT_CODE
from tests.system.chaos.sinks import Mood

LEASE_TTL_S = 2.0
HANDLERS = ("sinks:honest", "sinks:wayward")
STEADFAST = frozenset(HANDLERS[:1])
START_DEADLINE_S = 30.0
CALL_TIMEOUT_S = 5.0
STOP_DEADLINE_S = 30.0
SETTINGS = {
    "HANDLERS": ",".join(HANDLERS),
    "STRIPE_WEBHOOK_SECRETS": SECRET.reveal().decode(),
    "HOST": "127.0.0.1",
    "ADMIN_PORT": "0",
    "PARTITIONS": "8",
    "DRAIN_S": "0.3",
    "SHUTDOWN_GRACE_S": "5",
    "LEASE_TTL_S": str(LEASE_TTL_S),
    "ADMIT_DEADLINE_S": "2",
    "HANDLER_TIMEOUT_S": "1",
    "RETRY_INITIAL_DELAY_S": "0.1",
    "RETRY_MAX_DELAY_S": "1",
    "RETRY_MAX_ATTEMPTS": "10",
    "LOG_FORMAT": "json",
    "LOG_METADATA_KEYS": "",
}
# What makes one process live some minutes ahead of everybody else.
SKEWED = """
import sys, time
real, ahead_s = time.time, 900
time.time = lambda: real() + ahead_s
sys.argv = ["service", *sys.argv[1:]]
from service.cli import main
main()
"""


class Scene:
    """Everything that runs, and what is noted of it on the way.

    Attributes:
        settings: The settings of every process.
        primary: The Redis that counts.
        replicas: Those that follow it.
        wire: What all processes reach Redis through, if anything.
        disk: What makes Redis's disk slow, if anything can.
        clock: What steps Redis's clock, if anything can.
        places: The processes, by name.
        crashes: When Redis was ended, and what it knew afterwards.
        rollbacks: When Redis was allowed to forget.
        bounds: When acknowledgements or deliveries had to be prompt.
        probes: Requests for `/livez`.
        strangers: Responses to clients that sent nothing genuine.
        deleted: What an operator deleted.
        skewed: Receivers whose clock was wrong, and that said that they were not ready.
        exits: How processes ended that were told to end.
        restarts: How often something that had ended was started again.
    """

    def __init__(self, directory: Path, needs: Needs) -> None:
        self.directory = directory
        self.durability = needs.durability or DEFAULT_DURABILITY
        self.settings = {**SETTINGS, **needs.settings, "DURABILITY": self.durability}
        self.keys = Keys("idv", int(self.settings["PARTITIONS"]))
        self.disk = SlowDisk(directory) if needs.slow_disk else None
        self.clock = Clock(directory) if needs.clock else None
        self._appendfsync = needs.appendfsync or DEFAULT_FSYNC
        loaded = [one for one in (self.disk, self.clock) if one]
        self.primary = self._host("redis-a", *loaded)
        self.replicas = [self._host(f"redis-{letter}") for letter in "bc"[: needs.replicas]]
        self.wire: Proxy | None = None
        self.places: dict[str, Place] = {}
        self.crashes: list[Crash] = []
        self.rollbacks: list[Window] = []
        self.bounds: list[Bound] = []
        self.probes: list[Probe] = []
        self.strangers: list[StrangerAnswer] = []
        self.deleted: list[Transition] = []
        self.skewed: set[str] = set()
        self.exits: dict[str, int] = {}
        self.restarts = 0

    def _host(self, name: str, *loaded: SlowDisk | Clock) -> RedisHost:
        return RedisHost(self.directory / name, appendfsync=self._appendfsync, loaded=loaded)

    @property
    def handlers(self) -> list[str]:
        """All handlers, those without a journal included."""
        return self.settings["HANDLERS"].split(",")

    @property
    def url(self) -> str:
        """Where processes find Redis."""
        return self.wire.url if self.wire else self.primary.url

    def client(self) -> redis.Redis:
        """Return a client of the primary, past the wire.

        It tries once: called where Redis stands still, it must not hold up what lets Redis go on.
        """
        once = Retry(NoBackoff(), 0)
        return redis.Redis(port=self.primary.port, socket_timeout=CALL_TIMEOUT_S, retry=once)

    def mood(self, mood: Mood) -> None:
        """Set how the wayward sink behaves; a reader sees the old mood or the new one."""
        made = self.directory / "mood.new"
        made.write_text(mood)
        made.replace(self.directory / "mood")

    def of(self, command: str) -> list[Place]:
        """Return the places of one command."""
        return [place for place in self.places.values() if place.command == command]

    async def start(self, place: Place) -> None:
        """Start what bears a name, and wait until it listens."""
        settings = {
            **self.settings,
            "REDIS_URL": self.url,
            "PYTHONPATH": str(Path(__file__).parent),
            "CHAOS_DIRECTORY": str(self.directory),
        }
        logs = self.directory / "logs"
        logs.mkdir(exist_ok=True)
        place.start(logs, **settings)
        self.places[place.name] = place
        await until(lambda: place.is_up, START_DEADLINE_S)

    async def end(self, place: Place) -> None:
        """Tell a process to end, and note how it did."""
        await until(lambda: place.is_up, START_DEADLINE_S)
        place.told_to_end = True
        process = place.process
        if process.popen.poll() is not None:
            return
        process.popen.terminate()
        with contextlib.suppress(TimeoutError):
            await until(lambda: process.popen.poll() is not None, STOP_DEADLINE_S)
        process.end()
        if process.popen.returncode != SINK_EXIT_CODE:
            self.exits[f"{place.name} {place.generation}"] = process.popen.returncode

    async def supervise(self) -> None:
        """Start again what ended by itself, for ever."""
        while True:
            for place in list(self.places.values()):
                if not place.told_to_end and place.process.popen.poll() is not None:
                    self.restarts += 1
                    await self.start(place)
            await asyncio.sleep(0.1)

    def close(self) -> None:
        """End every process there is."""
        for place in self.places.values():
            place.told_to_end = True
            place.process.end()

    def close_redis(self) -> None:
        """End every Redis there is."""
        for host in (self.primary, *self.replicas):
            host.close()

    def readings(self) -> dict[str, Reading]:
        """Return what each process uses, by name and generation."""
        return {
            f"{place.name} {place.generation}": _reading(place.process.popen.pid)
            for place in self.places.values()
            if place.process.popen.poll() is None
        }

    def event_ids(self) -> frozenset[str]:
        """Return every event id that the primary knows."""
        with self.client() as client:
            pipeline = client.pipeline(transaction=False)
            for key in client.scan_iter("idv:*:session:*", count=1000):
                pipeline.hkeys(key)
            fields = (field for each in pipeline.execute() for field in each)
            return frozenset(field.decode() for field in fields if field.startswith(b"evt_"))

    async def redis_died(self, at: float) -> None:
        """Note what is left after Redis ended."""
        self.crashes.append(Crash(at, await asyncio.to_thread(self.event_ids)))


def _reading(pid: int) -> Reading:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return Reading(int(line.split()[1]) / 1024, len([*Path(f"/proc/{pid}/fd").iterdir()]))


@asynccontextmanager
async def scene(directory: Path, needs: Needs) -> AsyncIterator[Scene]:
    """Yield a running deployment of two receivers and two workers; leave nothing of it behind."""
    made = Scene(directory, needs)
    made.mood(Mood.FINE)
    async with AsyncExitStack() as running:
        running.callback(made.close_redis)
        made.primary.start()
        for replica in made.replicas:
            replica.link = await running.enter_async_context(proxy_to(made.primary.url))
            await replica.follow(made.primary)
        if needs.wire:
            made.wire = await running.enter_async_context(proxy_to(made.primary.url))
        running.callback(made.close)
        places = [
            *(Place(f"serve{n}", "serve", port=servers.free_port()) for n in (1, 2)),
            *(Place(f"work{n}", "work") for n in (1, 2)),
        ]
        await asyncio.gather(*(made.start(place) for place in places))
        supervising = asyncio.create_task(made.supervise())
        try:
            yield made
        finally:
            supervising.cancel()
            await asyncio.gather(supervising, return_exceptions=True)
