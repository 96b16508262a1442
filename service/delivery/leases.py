"""Who works which partition: leases and heartbeats of workers, in Redis.

Both end by Redis's clock, which may step back: on the host, or by a fail-over to another host. What
was written before the step would then be valid for its length, though its owner is dead. So a
worker also watches the leases it wants and the heartbeats of the others: what has not been renewed
for its time to live, by the clock of this process's event loop, is void whatever Redis says. What
is done under a lease is `dispatch`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

from ..storage.connections import Connections
from ..storage.layout import Keys
from ..storage.scripts import Script, ScriptCall
from .consumer import Assignment, Consumer

_HEARTBEAT = Script(__package__, "lua/heartbeat.lua")

Key = TypeVar("Key", bound=Hashable)


class Watch(Generic[Key]):
    """Remembers since when each of some values has stood unchanged.

    Args:
        ttl_s: Seconds after which what stands unchanged is dead.
    """

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._seen: dict[Key, tuple[bytes, float]] = {}

    def see(self, key: Key, value: bytes) -> None:
        """Note what stands there now; an empty value is nothing."""
        if not value:
            self._seen.pop(key, None)
        elif self.last(key) != value:
            self._seen[key] = (value, asyncio.get_running_loop().time())

    def see_all(self, found: Mapping[Key, bytes]) -> None:
        """Note what stands anywhere now."""
        for key in self._seen.keys() - found.keys():
            del self._seen[key]
        for key, value in found.items():
            self.see(key, value)

    def last(self, key: Key) -> bytes:
        """Return what was last seen there; empty for nothing."""
        return self._seen[key][0] if key in self._seen else b""

    def is_dead(self, key: Key) -> bool:
        """Say whether what stands there has stood unchanged for too long."""
        if key not in self._seen:
            return False
        return asyncio.get_running_loop().time() - self._seen[key][1] >= self._ttl_s

    def dead(self) -> list[Key]:
        """Return the keys of all that has stood unchanged for too long."""
        return [key for key in self._seen if self.is_dead(key)]


class LeaseWatch(Watch[Assignment]):
    """The same, of the leases of others."""

    def owner(self, assignment: Assignment) -> str:
        """Return the name of the worker that was last seen to hold a lease; empty for none."""
        return self.last(assignment).decode().rpartition(" ")[0].rpartition(":")[0]


async def lease(
    connections: Connections,
    consumers: Sequence[Consumer],
    ttl_s: float,
    watch: LeaseWatch | None = None,
) -> list[float | Exception]:
    """Take or renew the leases of *consumers* in one round trip.

    Args:
        connections: Open clients.
        consumers: One that never had its lease takes it, any other renews it.
        ttl_s: Seconds for which a lease is held from now on.
        watch: What is known of the leases of others; what this call sees of them is added.

    Returns:
        For each, 0 when its lease is ours, else the seconds until it may be free. Where Redis
        did not answer, the error; that leaves a lease as it was: its deadline goes on running.
    """
    watch = watch or LeaseWatch(ttl_s)
    before = asyncio.get_running_loop().time()
    calls = [
        consumer.lease_call(ttl_s, watch.last(assignment) if watch.is_dead(assignment) else b"")
        for consumer in consumers
        for assignment in [consumer.assignment]
    ]
    waits: list[float | Exception] = []
    for consumer, reply in zip(consumers, await connections.run(calls), strict=True):
        if isinstance(reply, Exception):
            waits.append(reply)
            continue
        wait_ms, held = reply
        if wait_ms == 0:
            consumer.leased(before + ttl_s)
        else:
            consumer.lost()
        watch.see(consumer.assignment, held)
        waits.append(wait_ms / 1000)
    return waits


class Heartbeats:
    """Says that a worker lives, and counts the workers that do.

    Args:
        connections: Open clients.
        keys: The layout.
        worker: The name of the worker.
        ttl_s: Seconds for which a sign of life counts.
    """

    def __init__(self, connections: Connections, keys: Keys, *, worker: str, ttl_s: float) -> None:
        self._connections = connections
        self._keys = keys
        self._worker = worker
        self._ttl_s = ttl_s
        self._watches: dict[str, Watch[str]] = {}

    async def beat(self, handlers: Sequence[str]) -> dict[str, int]:
        """Say that the worker lives; return how many work for each handler, this one included.

        Raises:
            RedisError: Redis did not answer.
        """
        living = {}
        for handler, found in (await self._heartbeat(handlers, self._ttl_s)).items():
            watch = self._watches.setdefault(handler, Watch(self._ttl_s))
            watch.see_all(found)
            living[handler] = len(found.keys() - {*watch.dead()} | {self._worker})
        return living

    async def end(self, handlers: Sequence[str]) -> None:
        """Say that the worker leaves.

        Raises:
            RedisError: Redis did not answer.
        """
        await self._heartbeat(handlers, 0)

    async def _heartbeat(
        self, handlers: Sequence[str], ttl_s: float
    ) -> dict[str, dict[str, bytes]]:
        """Return for each handler the last sign of life of each worker, by Redis's clock."""
        arguments = (self._worker, int(ttl_s * 1000))
        calls = [ScriptCall(_HEARTBEAT, [self._keys.workers(each)], arguments) for each in handlers]
        found = {}
        for handler, reply in zip(handlers, await self._connections.run(calls), strict=True):
            if isinstance(reply, Exception):
                raise reply
            names = (name.decode() for name in reply[::2])
            found[handler] = dict(zip(names, reply[1::2], strict=True))
        return found
