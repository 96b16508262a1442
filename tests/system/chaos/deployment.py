"""The deployment of a chaos run: Redis, maybe with replicas, and processes of the service.

A process that ends by itself is restarted, as by a supervisor. `faults` injects the faults,
`collecting` reads the evidence at the end.
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

from service.storage.keys import Keys
from tests.support import servers
from tests.support.harness import SECRET, WEBHOOK
from tests.support.preloads import Clock, SlowDisk
from tests.support.proxy import Proxy, proxy_to
from tests.support.stripe_api import READ_ONLY, StripeStandIn, lose_all, served
from tests.support.usage import memory_mib
from tests.support.waiting import until
from tests.system.chaos.evidence import (
    Bound,
    Crash,
    HostileResponse,
    Probe,
    Reading,
    Transition,
    Window,
)
from tests.system.chaos.hosts import RedisHost
from tests.system.chaos.instances import Instance
from tests.system.chaos.needs import DEFAULT_DURABILITY, DEFAULT_FSYNC, Needs
from tests.system.chaos.sinks import EXIT_CODE as SINK_EXIT_CODE
from tests.system.chaos.sinks import Behavior

LEASE_TTL_S = 2.0
HANDLERS = ("sinks:steady", "sinks:faulty")
STEADY = frozenset(HANDLERS[:1])
START_DEADLINE_S = 30.0
CALL_TIMEOUT_S = 5.0
STOP_DEADLINE_S = 30.0
LIST_LAG_S = 45.0
COMPLETE_PAUSE_S = 0.5
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
    "RECONCILE_EVERY_S": "5",
}
# `python -m service` with a clock that is 15 minutes ahead.
SKEWED = """
import sys, time
real, ahead_s = time.time, 900
time.time = lambda: real() + ahead_s
sys.argv = ["service", *sys.argv[1:]]
from service.cli import main
main()
"""


class Deployment:
    """Everything that runs, and what is noted during the run.

    Attributes:
        settings: The settings of every process.
        primary: The primary Redis.
        replicas: Its replicas.
        proxy: The proxy between all processes and Redis, if any.
        disk: The control of Redis's disk, if it can be slowed down.
        clock: The control of Redis's clock, if it can be stepped.
        stand_in: The stand-in for Stripe, if its API can be asked.
        instances: The processes, by name.
        crashes, rollbacks, bounds, probes, hostile_responses, deleted, exits, faults_ended: As in
            `evidence.Run`.
        skewed: Receivers with a wrong clock that reported that they are not ready.
        restarts: How many processes were restarted.
    """

    def __init__(self, directory: Path, needs: Needs) -> None:
        self.directory = directory
        self.durability = needs.durability or DEFAULT_DURABILITY
        self.settings = {**SETTINGS, **needs.settings, "DURABILITY": self.durability}
        self.keys = Keys("idv", int(self.settings["PARTITIONS"]))
        self.disk = SlowDisk(directory) if needs.slow_disk else None
        self.clock = Clock(directory) if needs.clock else None
        self.stand_in = _stand_in() if needs.stripe_api else None
        self._appendfsync = needs.appendfsync or DEFAULT_FSYNC
        loaded = [one for one in (self.disk, self.clock) if one]
        self.primary = self._host("redis-a", *loaded)
        self.replicas = [self._host(f"redis-{letter}") for letter in "bc"[: needs.replicas]]
        self.proxy: Proxy | None = None
        self.instances: dict[str, Instance] = {}
        self.crashes: list[Crash] = []
        self.rollbacks: list[Window] = []
        self.bounds: list[Bound] = []
        self.probes: list[Probe] = []
        self.hostile_responses: list[HostileResponse] = []
        self.deleted: list[Transition] = []
        self.skewed: set[str] = set()
        self.exits: dict[str, int] = {}
        self.faults_ended = 0.0
        self.restarts = 0

    def _host(self, name: str, *loaded: SlowDisk | Clock) -> RedisHost:
        return RedisHost(self.directory / name, appendfsync=self._appendfsync, loaded=loaded)

    @property
    def handlers(self) -> list[str]:
        """All handlers, those without a call log included."""
        return self.settings["HANDLERS"].split(",")

    @property
    def url(self) -> str:
        """The value of REDIS_URL."""
        return self.proxy.url if self.proxy else self.primary.url

    def client(self) -> redis.Redis:
        """Return a client of the primary, without the proxy.

        It tries once: while Redis is stopped, it must not delay the code that resumes it.
        """
        once = Retry(NoBackoff(), 0)
        return redis.Redis(port=self.primary.port, socket_timeout=CALL_TIMEOUT_S, retry=once)

    def behavior(self, behavior: Behavior) -> None:
        """Set how the faulty sink behaves, atomically."""
        made = self.directory / "behavior.new"
        made.write_text(behavior)
        made.replace(self.directory / "behavior")

    def of(self, command: str) -> list[Instance]:
        """Return the instances that run *command*."""
        return [instance for instance in self.instances.values() if instance.command == command]

    async def start(self, instance: Instance) -> None:
        """Start an instance, and wait until it listens."""
        settings = {
            **self.settings,
            "REDIS_URL": self.url,
            "PYTHONPATH": str(Path(__file__).parent),
            "CHAOS_DIRECTORY": str(self.directory),
        }
        logs = self.directory / "logs"
        logs.mkdir(exist_ok=True)
        instance.start(logs, **settings)
        self.instances[instance.name] = instance
        await until(lambda: instance.is_up, START_DEADLINE_S)

    async def end(self, instance: Instance) -> None:
        """Send SIGTERM to an instance, and note its exit code."""
        await until(lambda: instance.is_up, START_DEADLINE_S)
        instance.is_stopping = True
        process = instance.process
        if process.popen.poll() is not None:
            return
        process.popen.terminate()
        with contextlib.suppress(TimeoutError):
            await until(lambda: process.popen.poll() is not None, STOP_DEADLINE_S)
        process.end()
        if process.popen.returncode != SINK_EXIT_CODE:
            self.exits[f"{instance.name} {instance.generation}"] = process.popen.returncode

    async def supervise(self) -> None:
        """Restart what ends by itself, until canceled."""
        while True:
            for instance in list(self.instances.values()):
                if not instance.is_stopping and instance.process.popen.poll() is not None:
                    self.restarts += 1
                    await self.start(instance)
            await asyncio.sleep(0.1)

    def close(self) -> None:
        """End every process."""
        for instance in self.instances.values():
            instance.is_stopping = True
            instance.process.end()

    def close_redis(self) -> None:
        """End every Redis server."""
        for host in (self.primary, *self.replicas):
            host.close()

    def readings(self) -> dict[str, Reading]:
        """Return what each process uses, by name and number."""
        return {
            f"{instance.name} {instance.generation}": _reading(instance.process.popen.pid)
            for instance in self.instances.values()
            if instance.process.popen.poll() is None
        }

    def event_ids(self) -> frozenset[str]:
        """Return every event id that the primary knows, those of noted notifications included."""
        with self.client() as client:
            pipeline = client.pipeline(transaction=False)
            for key in client.scan_iter("idv:*:session:*", count=1000):
                pipeline.hkeys(key)
            fields = [field for each in pipeline.execute() for field in each]
            noted = client.scan_iter("idv:*:noted:*", count=1000)
            fields += [key.rpartition(b":")[2] for key in noted]
            return frozenset(field.decode() for field in fields if field.startswith(b"evt_"))

    async def is_complete(self) -> bool:
        """Return whether the primary knows every event of the stand-in."""
        assert self.stand_in
        await asyncio.sleep(COMPLETE_PAUSE_S)
        known = await asyncio.to_thread(self.event_ids)
        return all(event.id in known for event in self.stand_in.events.all)

    async def redis_died(self, at: float) -> None:
        """Note the event ids that Redis still has after its end."""
        self.crashes.append(Crash(at, await asyncio.to_thread(self.event_ids)))


def _reading(pid: int) -> Reading:
    return Reading(memory_mib(pid), len([*Path(f"/proc/{pid}/fd").iterdir()]))


def _stand_in() -> StripeStandIn:
    """Return a stand-in whose lists lag as long as Stripe's may, and that pushes nothing itself."""
    made = StripeStandIn()
    made.list_lag_s = LIST_LAG_S
    made.expands_everything = True
    made.pushes.loses = lose_all
    for payload in ("snapshot", "thin"):
        made.subscribe(f"http://127.0.0.1{WEBHOOK}", payload=payload)
    return made


@asynccontextmanager
async def deployment(directory: Path, needs: Needs) -> AsyncIterator[Deployment]:
    """Yield a running deployment of two receivers and two workers; end all of it afterwards."""
    made = Deployment(directory, needs)
    made.behavior(Behavior.FINE)
    async with AsyncExitStack() as running:
        running.callback(made.close_redis)
        made.primary.start()
        for replica in made.replicas:
            replica.link = await running.enter_async_context(proxy_to(made.primary.url))
            await replica.follow(made.primary)
        if made.stand_in:
            address = await running.enter_async_context(served(made.stand_in))
            key = made.stand_in.directory.add_key(permissions=READ_ONLY)
            made.settings |= {"STRIPE_API_BASE": address, "STRIPE_API_KEY": key.secret}
        if needs.proxy:
            made.proxy = await running.enter_async_context(proxy_to(made.primary.url))
        running.callback(made.close)
        instances = [
            *(Instance(f"serve{n}", "serve", port=servers.free_port()) for n in (1, 2)),
            *(Instance(f"work{n}", "work") for n in (1, 2)),
        ]
        await asyncio.gather(*(made.start(instance) for instance in instances))
        supervising = asyncio.create_task(made.supervise())
        try:
            yield made
        finally:
            supervising.cancel()
            await asyncio.gather(supervising, return_exceptions=True)
