"""The consumer groups, one for each handler: creating, measuring, listing and deleting them.

A handler has a group of the same name on the stream of every partition. What is read through a
group is in `consumer`; when entries that all groups have read are deleted is in `retention`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from ..storage.connections import Connections
from ..storage.layout import Keys, claim
from ..storage.scripts import Script, ScriptCall

_CREATE_GROUPS = Script(__package__, "lua/create_groups.lua")
_LAG = Script(__package__, "lua/lag.lua")
_GROUP_NAMES = Script(__package__, "lua/group_names.lua")
_LIVE_WORKERS = Script(__package__, "lua/live_workers.lua")
_RETIRE = Script(__package__, "lua/retire.lua")


class Lag(NamedTuple):
    """What one handler has not settled in one partition.

    Attributes:
        transitions: How many transitions; None when Redis does not know.
        replays: How much of what is replayed to it.
        oldest_s: Seconds since the oldest of the transitions was admitted; 0 when there is none.
        dead: How many dead letters there are.
    """

    transitions: int | None
    replays: int
    oldest_s: float
    dead: int

    @property
    def entries(self) -> int | None:
        """How many entries, replays included; None when Redis does not know."""
        return None if self.transitions is None else self.transitions + self.replays


class Group(NamedTuple):
    """What one handler's group stands at, in all partitions together.

    Attributes:
        handler: Its name.
        unsettled: Transitions it has not settled; None when Redis does not know.
        replays: What is replayed to it and not yet settled.
        dead: Its dead letters.
        oldest_s: Seconds since the oldest transition it has not settled was admitted; 0 for none.
    """

    handler: str
    unsettled: int | None
    replays: int
    dead: int
    oldest_s: float


async def create_groups(connections: Connections, keys: Keys, handlers: Sequence[str]) -> list[str]:
    """Create every handler's group on every partition's stream, where it is missing.

    Only workers call this. A receiver need not know the right handlers: a group that it created
    for a wrong one would let the right one's group begin after what has been admitted.

    Returns the names of those that were missing anywhere. On a stream that others already read a
    group begins at the end, else at the beginning.

    Raises:
        ConfigError: The layout in Redis is not ours; no group was created.
        RedisError: Redis did not answer; some groups may be missing still.
    """
    await claim(connections, keys)
    replies = await connections.run(
        [
            ScriptCall(_CREATE_GROUPS, [keys.transitions(partition)], handlers)
            for partition in range(keys.partitions)
        ]
    )
    created: set[str] = set()
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
        created.update(name.decode() for name in reply)
    return sorted(created)


async def measure_lags(
    connections: Connections, keys: Keys, assignments: Sequence[tuple[str, int]]
) -> list[Lag | Exception]:
    """Measure what is not settled, for each handler and partition, in one round trip."""
    if not assignments:
        return []
    replies = await connections.run([_call(keys, *assignment) for assignment in assignments])
    return [reply if isinstance(reply, Exception) else _lag(*reply) for reply in replies]


async def group_names(connections: Connections, keys: Keys) -> set[str]:
    """Return the names of all groups there are.

    Raises:
        RedisError: Redis did not answer.
    """
    partitions = range(keys.partitions)
    calls = [
        ScriptCall(_GROUP_NAMES, [keys.transitions(partition)], []) for partition in partitions
    ]
    return _names(_raised(await connections.run(calls)))


async def list_groups(connections: Connections, keys: Keys) -> list[Group]:
    """Return every group there is, whether a handler owns it or not, by name.

    Raises:
        RedisError: Redis did not answer.
    """
    names = sorted(await group_names(connections, keys))
    assignments = [(name, partition) for name in names for partition in range(keys.partitions)]
    found: dict[str, list[Lag]] = {name: [] for name in names}
    for (name, _), lag in zip(
        assignments, await measure_lags(connections, keys, assignments), strict=True
    ):
        if isinstance(lag, Lag):
            found[name].append(lag)
        # In a partition that holds nothing yet there are no groups.
        elif not isinstance(lag, ResponseError):
            raise lag
    return [_group(name, each) for name, each in found.items()]


async def is_worked(
    connections: Connections, keys: Keys, handler: str, *, lease_ttl_s: float
) -> bool:
    """Say whether any worker still works for a handler, or did so within a lease's time.

    Raises:
        RedisError: Redis did not answer.
    """
    arguments = [int(lease_ttl_s * 1000)]
    return bool(await connections.run_one(_LIVE_WORKERS, [keys.workers(handler)], arguments))


async def retire(connections: Connections, keys: Keys, handler: str) -> int:
    """Forget a handler, its place, its replays and its dead letters; return its partitions.

    Raises:
        RedisError: Redis did not answer, for some partition.
    """
    calls = [
        ScriptCall(
            _RETIRE,
            [
                keys.transitions(partition),
                keys.lease(partition, handler),
                keys.replays(partition, handler),
                keys.dead(partition, handler),
            ],
            [handler],
        )
        for partition in range(keys.partitions)
    ]
    return sum(_raised(await connections.run(calls)))


def _group(name: str, each: Sequence[Lag]) -> Group:
    known = [lag.transitions for lag in each if lag.transitions is not None]
    return Group(
        name,
        unsettled=sum(known) if len(known) == len(each) else None,
        replays=sum(lag.replays for lag in each),
        dead=sum(lag.dead for lag in each),
        oldest_s=max((lag.oldest_s for lag in each), default=0.0),
    )


def _lag(transitions: int, replays: int, oldest_ms: int, dead: int) -> Lag:
    return Lag(None if transitions < 0 else transitions, replays, oldest_ms / 1000, dead)


def _call(keys: Keys, handler: str, partition: int) -> ScriptCall:
    streams = [keys.transitions(partition), keys.replays(partition, handler)]
    return ScriptCall(_LAG, [*streams, keys.dead(partition, handler)], [handler])


def _names(found: Iterable[Iterable[bytes]]) -> set[str]:
    return {name.decode() for names in found for name in names}


def _raised(replies: Sequence[Any]) -> Sequence[Any]:
    """Return *replies*, unless one of them is an error."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies
