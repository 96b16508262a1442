"""The consumer groups, one for each handler: create, measure, list and delete them.

A handler has a group of its own name on its stream of each partition (`sources`). Reading through a
group is in `consumer`; deleting what all groups have acknowledged is in `retention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from redis.exceptions import ResponseError

from ..parsers import FETCH
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.layout import claim
from ..storage.scripts import Script, ScriptCall, raise_first
from .leases import Assignment
from .sources import SOURCES, source_of

_CREATE_GROUPS = Script(__package__, "lua/create_groups.lua")
_GROUP_NAMES = Script(__package__, "lua/group_names.lua")
_LAG = Script(__package__, "lua/lag.lua")
_LIVE_WORKERS = Script(__package__, "lua/live_workers.lua")
_RETIRE = Script(__package__, "lua/retire.lua")


class Lag(NamedTuple):
    """What one handler has not acknowledged in one partition.

    Attributes:
        new: How many entries of its source, read or not; None when unknown.
        replays: How many replays.
        oldest_s: Seconds since the oldest of those entries was appended; 0 for none.
        dead_letters: How many dead letters there are.
    """

    new: int | None
    replays: int
    oldest_s: float
    dead_letters: int

    @property
    def entries(self) -> int | None:
        """How many entries, replays among them; None when unknown."""
        return None if self.new is None else self.new + self.replays


class Group(NamedTuple):
    """The sums of one handler's lag over all partitions.

    Attributes:
        handler: The handler's name.
        lag: Entries of its source that it has not acknowledged; None when unknown.
        replays: Replays that it has not acknowledged.
        dead_letters: Its dead letters.
        oldest_s: Seconds since the oldest of those entries was appended; 0 for none.
    """

    handler: str
    lag: int | None
    replays: int
    dead_letters: int
    oldest_s: float


async def create_groups(connections: Connections, keys: Keys, handlers: Sequence[str]) -> list[str]:
    """Create the missing groups of *handlers*; return the handlers of which one was missing.

    On a stream without groups they begin at its start, for nothing was read yet. On a stream with
    groups a new one begins at its end. So only workers call this: a receiver may know the wrong
    handlers, and the right ones' groups would begin after what was admitted until then.

    Raises:
        ConfigError: The layout in Redis is not ours; no group was created.
        RedisError: Redis did not answer; some groups may still be missing.
    """
    await claim(connections, keys)
    created: list[list[bytes]] = await connections.run(
        [
            ScriptCall(_CREATE_GROUPS, [source.stream(keys, partition)], consumers)
            for source in SOURCES
            if (consumers := [each for each in handlers if source_of(each) is source])
            for partition in range(keys.partitions)
        ]
    )
    raise_first(created)
    return sorted({name.decode() for names in created for name in names})


async def group_names(connections: Connections, keys: Keys) -> set[str]:
    """Return the names of all groups that exist.

    Raises:
        RedisError: Redis did not answer.
    """
    found: list[list[bytes]] = await connections.run(
        [
            ScriptCall(_GROUP_NAMES, [source.stream(keys, partition)], [])
            for source in SOURCES
            for partition in range(keys.partitions)
        ]
    )
    raise_first(found)
    return {read_name(name) for names in found for name in names}


def read_name(name: bytes) -> str:
    """Return a group's name. One that is not ours may be no text."""
    return name.decode(errors="backslashreplace")


async def measure_lags(
    connections: Connections, keys: Keys, assignments: Sequence[Assignment]
) -> list[Lag | Exception]:
    """Measure the lag of each handler and partition in one round trip, or return why not."""
    if not assignments:
        return []
    replies = await connections.run([_lag_call(keys, *each) for each in assignments])
    return [reply if isinstance(reply, Exception) else _lag(*reply) for reply in replies]


async def list_groups(connections: Connections, keys: Keys) -> list[Group]:
    """Return all groups that exist by name, also those of handlers that are not configured.

    `fetch` is also listed before it has a group, if notifications wait for it.

    Raises:
        RedisError: Redis did not answer.
    """
    existing = await group_names(connections, keys)
    names = sorted(existing | {FETCH})
    assignments = [(name, partition) for name in names for partition in range(keys.partitions)]
    lags: dict[str, list[Lag]] = {name: [] for name in names}
    measured = await measure_lags(connections, keys, assignments)
    for (name, _), lag in zip(assignments, measured, strict=True):
        if isinstance(lag, Lag):
            lags[name].append(lag)
        # An error reply: where nothing was admitted yet there is no stream, or no group.
        elif not isinstance(lag, ResponseError):
            raise lag
    groups = [_group(name, each) for name, each in lags.items()]
    return [group for group in groups if group.handler in existing or group.lag]


async def count_workers(
    connections: Connections, keys: Keys, handlers: Sequence[str], *, lease_ttl_s: float
) -> list[int]:
    """Return how many live workers each handler has, or had within the last *lease_ttl_s*.

    Raises:
        RedisError: Redis did not answer.
    """
    ttl_ms = int(lease_ttl_s * 1000)
    calls = [ScriptCall(_LIVE_WORKERS, [keys.workers(each)], [ttl_ms]) for each in handlers]
    found: list[int] = await connections.run(calls)
    raise_first(found)
    return found


async def retire(connections: Connections, keys: Keys, handler: str) -> int:
    """Delete all that a handler has; return in how many partitions.

    These are its groups, leases, replays, dead letters and finished attempts; with `fetch` also the
    notifications that it has not fetched.

    Raises:
        RedisError: Redis did not answer for some partition.
    """
    deleted = await connections.run(
        [_retire_call(keys, handler, partition) for partition in range(keys.partitions)]
    )
    raise_first(deleted)
    return sum(deleted)


def _lag_call(keys: Keys, handler: str, partition: int) -> ScriptCall:
    source = source_of(handler)
    streams = [source.stream(keys, partition), keys.replays(partition, handler)]
    return ScriptCall(
        _LAG,
        [*streams, keys.dead_letters(partition, handler)],
        [handler, int(source.delete_on_ack)],
    )


def _lag(new: int, replays: int, oldest_ms: int, dead_letters: int) -> Lag:
    return Lag(None if new < 0 else new, replays, oldest_ms / 1000, dead_letters)


def _retire_call(keys: Keys, handler: str, partition: int) -> ScriptCall:
    source = source_of(handler)
    stream = source.stream(keys, partition)
    alone = [
        keys.lease(partition, handler),
        keys.replays(partition, handler),
        keys.dead_letters(partition, handler),
        keys.finished_attempts(partition, handler),
        *([stream] if source.delete_on_ack else []),
    ]
    return ScriptCall(_RETIRE, [stream, *alone], [handler])


def _group(name: str, lags: Sequence[Lag]) -> Group:
    known = [lag.new for lag in lags if lag.new is not None]
    return Group(
        name,
        lag=sum(known) if len(known) == len(lags) else None,
        replays=sum(lag.replays for lag in lags),
        dead_letters=sum(lag.dead_letters for lag in lags),
        oldest_s=max((lag.oldest_s for lag in lags), default=0.0),
    )
