"""The right to deliver a partition to a handler, and the heartbeats of workers, kept in Redis.

A lease is a key that holds its owner's token and expires. The rules:

    take      a lease that is free, or whose owner is dead
    renew     only while the key still holds our token. A lease that has expired is not renewed: its
              consumer may have lost entries to another one, and has to claim them again
    fence     each script that reads or changes entries compares the token first, so a worker that
              was paused past its lease can change nothing
    deadline  by our clock a lease ends no later than by Redis's: it is counted from before the
              request was sent
    dead      a lease that was not renewed for its time to live, by our clock

The last rule is there because Redis's clock may step back, on its host or by a fail-over to another
host. A key then outlives its owner by the length of the step. So each worker observes the leases it
wants, and the heartbeats of the other workers: a value that has not changed for its time to live is
void, whatever Redis says.

Knows nothing of entries: what is done under a lease is in `consumer`. How many leases a worker
takes, and of which partitions, is decided in `worker`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from ..storage.batching import ScriptBatcher
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.scripts import Argument, Needs, Script, ScriptCall, raise_first

_LEASE = Script(__package__, "lua/lease.lua")
_RELEASE = Script(__package__, "lua/release.lua")
_HEARTBEAT = Script(__package__, "lua/heartbeat.lua")

# A handler and a partition.
Assignment = tuple[str, int]
Key = TypeVar("Key", bound=Hashable)


class LeaseLostError(Exception):
    """The partition may have another owner: what was read or claimed of it is void."""


class Lease:
    """The lease of one handler on one partition, and the scripts that it fences.

    Args:
        connections: Run the fenced scripts.
        keys: The layout.
        handler: The handler's name.
        partition: The partition.
        worker: The name of the worker that takes the lease.
    """

    def __init__(
        self,
        connections: Connections | ScriptBatcher,
        keys: Keys,
        *,
        handler: str,
        partition: int,
        worker: str,
    ) -> None:
        self.handler = handler
        self.partition = partition
        self.worker = worker
        self.key = keys.lease(partition, handler)
        self.token = f"{worker}:{secrets.token_hex(16)}"
        self._connections = connections
        # In the event loop's time; None until the lease was taken or refused.
        self._deadline: float | None = None

    @property
    def assignment(self) -> Assignment:
        """The handler and the partition."""
        return self.handler, self.partition

    @property
    def was_asked_for(self) -> bool:
        """Whether the lease was taken or refused before: then it can only be renewed."""
        return self._deadline is not None

    def is_held(self) -> bool:
        """Say whether the lease is ours, by our clock."""
        deadline = self._deadline
        return deadline is not None and asyncio.get_running_loop().time() < deadline

    def extend(self, until: float) -> None:
        """Note that the lease is ours until a time of the event loop's clock."""
        self._deadline = until

    def lose(self) -> None:
        """Note that the lease is not, or no longer, ours."""
        self._deadline = 0.0

    async def release(self) -> None:
        """Delete the lease if it is still ours, so that another worker can take it at once."""
        self.lose()
        await self._connections.run_one(_RELEASE, [self.key], [self.token])

    async def run(
        self, script: Script, keys: Sequence[str], *arguments: Argument, replicas: int = 0
    ) -> Any:
        """Run *script* with the lease as first key and its token as first argument.

        Args:
            script: Returns false when the lease holds another token.
            keys: The keys behind the lease.
            arguments: The arguments behind the token.
            replicas: How many replicas must have what the script wrote before this returns.

        Raises:
            LeaseLostError: Another worker has the lease, or it has expired.
            RedisError: It is unknown what the script did, or too few replicas have it.
        """
        reply = await self._connections.run_one(
            script, [self.key, *keys], [self.token, *arguments], needs=Needs(replicas)
        )
        if reply is None:
            self.lose()
            raise LeaseLostError
        return reply


class ObservedValues(Generic[Key]):
    """Remembers for how long each of some values has not changed.

    Args:
        ttl_s: Seconds without a change after which a value is stale.
    """

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._seen: dict[Key, tuple[bytes, float]] = {}

    def observe(self, key: Key, value: bytes) -> None:
        """Note the present value of *key*; an empty one means that there is none."""
        if not value:
            self._seen.pop(key, None)
        elif self.last(key) != value:
            self._seen[key] = (value, asyncio.get_running_loop().time())

    def observe_all(self, values: Mapping[Key, bytes]) -> None:
        """Note all present values, and forget every other key."""
        for key in self._seen.keys() - values.keys():
            del self._seen[key]
        for key, value in values.items():
            self.observe(key, value)

    def last(self, key: Key) -> bytes:
        """Return the value that was observed last; empty for none."""
        return self._seen[key][0] if key in self._seen else b""

    def is_stale(self, key: Key) -> bool:
        """Say whether a value has not changed for its time to live."""
        if key not in self._seen:
            return False
        return asyncio.get_running_loop().time() - self._seen[key][1] >= self._ttl_s

    def stale(self) -> set[Key]:
        """Return the keys of all stale values."""
        return {key for key in self._seen if self.is_stale(key)}


class ObservedLeases(ObservedValues[Assignment]):
    """The leases of other workers. Each value is the owner's token and when the lease ends."""

    def owner(self, assignment: Assignment) -> str:
        """Return the name of the worker that was last seen to hold a lease; empty for none."""
        return self.last(assignment).decode().rpartition(" ")[0].rpartition(":")[0]


async def take_or_renew(
    connections: Connections,
    leases: Sequence[Lease],
    ttl_s: float,
    observed: ObservedLeases | None = None,
) -> list[float | Exception]:
    """Take the leases that were not asked for before and renew the others, in one round trip.

    Args:
        connections: Open clients.
        leases: The leases.
        ttl_s: Seconds for which they are held from now on.
        observed: The leases of other workers, as far as known; what this call sees is added.

    Returns:
        For each lease 0 when it is ours, else the seconds until it may be free. Where Redis did not
        answer, the error; such a lease keeps the deadline it has.
    """
    observed = observed or ObservedLeases(ttl_s)
    asked_at = asyncio.get_running_loop().time()
    calls = [_lease_call(lease, ttl_s, observed) for lease in leases]
    waits: list[float | Exception] = []
    for lease, reply in zip(leases, await connections.run(calls), strict=True):
        if isinstance(reply, Exception):
            waits.append(reply)
            continue
        wait_ms, current = reply
        if wait_ms == 0:
            lease.extend(asked_at + ttl_s)
        else:
            lease.lose()
        observed.observe(lease.assignment, current)
        waits.append(wait_ms / 1000)
    return waits


def _lease_call(lease: Lease, ttl_s: float, observed: ObservedLeases) -> ScriptCall:
    verb = "renew" if lease.was_asked_for else "take"
    is_dead = observed.is_stale(lease.assignment)
    take_from = observed.last(lease.assignment) if is_dead else b""
    return ScriptCall(_LEASE, [lease.key], [lease.token, int(ttl_s * 1000), verb, take_from])


class Heartbeats:
    """The heartbeats of one worker, and the number of live workers of each handler.

    Args:
        connections: Open clients.
        keys: The layout.
        worker: The name of the worker.
        ttl_s: Seconds after its last heartbeat for which a worker counts as alive.
    """

    def __init__(self, connections: Connections, keys: Keys, *, worker: str, ttl_s: float) -> None:
        self._connections = connections
        self._keys = keys
        self._worker = worker
        self._ttl_s = ttl_s
        self._observed: dict[str, ObservedValues[str]] = {}

    async def send(self, handlers: Sequence[str]) -> dict[str, int]:
        """Send a heartbeat for each handler; return how many live workers each of them has.

        This worker is counted as well.

        Raises:
            RedisError: Redis did not answer.
        """
        live_workers = {}
        for handler, beats in (await self._exchange(handlers, self._ttl_s)).items():
            observed = self._observed.setdefault(handler, ObservedValues(self._ttl_s))
            observed.observe_all(beats)
            live_workers[handler] = len(beats.keys() - observed.stale() | {self._worker})
        return live_workers

    async def remove(self, handlers: Sequence[str]) -> None:
        """Remove this worker from the live workers of each handler.

        Raises:
            RedisError: Redis did not answer.
        """
        await self._exchange(handlers, 0)

    async def _exchange(self, handlers: Sequence[str], ttl_s: float) -> dict[str, dict[str, bytes]]:
        """Return for each handler when each worker's last heartbeat was, by Redis's clock."""
        arguments = (self._worker, int(ttl_s * 1000))
        calls = [ScriptCall(_HEARTBEAT, [self._keys.workers(each)], arguments) for each in handlers]
        replies = await self._connections.run(calls)
        raise_first(replies)
        return {
            handler: dict(zip(map(bytes.decode, reply[::2]), reply[1::2], strict=True))
            for handler, reply in zip(handlers, replies, strict=True)
        }
