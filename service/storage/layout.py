"""Where everything lies in Redis: the names of all keys, and the guard over their layout.

Keys of one session share a partition tag, so one script may touch them all, in Cluster too. What
the keys hold is in `inbox` and `consumer`.

Two processes with different numbers of partitions would look for one session in two places, and
admit its events twice. So the first process claims the layout, in one key. Whoever finds its own
layout there copies it into each partition, where the admission script compares it with its
caller's: when Redis has lost everything and another process has claimed another layout, nothing is
admitted under the old one.
"""

from __future__ import annotations

from typing import NamedTuple
from zlib import crc32

from ..errors import ConfigError
from .connections import Connections
from .scripts import Script, ScriptCall

LAYOUT_VERSION = 3

_COPY = Script(__package__, "copy_layout.lua")


class Keys(NamedTuple):
    """The names of all keys under one prefix."""

    prefix: str
    partitions: int

    def partition(self, session_id: str) -> int:
        """Return the partition a session belongs to, for ever."""
        return crc32(session_id.encode()) % self.partitions

    def session(self, session_id: str) -> str:
        """Return the key of a session's ledger: a hash."""
        return self.session_in(self.partition(session_id), session_id)

    def session_in(self, partition: int, session_id: str) -> str:
        """Return the same, where the session's partition is known."""
        return f"{self.prefix}:{{{partition}}}:session:{session_id}"

    def transitions(self, partition: int) -> str:
        """Return the key of a partition's stream of transitions."""
        return f"{self.prefix}:{{{partition}}}:transitions"

    def dead(self, partition: int, handler: str) -> str:
        """Return the key of a handler's stream of dead letters."""
        return f"{self.prefix}:{{{partition}}}:dead:{handler}"

    def replays(self, partition: int, handler: str) -> str:
        """Return the key of a handler's stream of what is replayed to it."""
        return f"{self.prefix}:{{{partition}}}:replays:{handler}"

    def lease(self, partition: int, handler: str) -> str:
        """Return the key that says who works a partition for a handler: a string."""
        return f"{self.prefix}:{{{partition}}}:lease:{handler}"

    def circuit(self, handler: str) -> str:
        """Return the key that is there while a handler's queue cannot be reached."""
        return f"{self.prefix}:circuit:{handler}"

    def workers(self, handler: str) -> str:
        """Return the key of a handler's living workers: a sorted set."""
        return f"{self.prefix}:workers:{handler}"

    @property
    def layout(self) -> str:
        """The key that holds layout version and number of partitions: a hash."""
        return f"{self.prefix}:layout"

    def layout_in(self, partition: int) -> str:
        """Return the key of a partition's copy of the layout: a string."""
        return f"{self.prefix}:{{{partition}}}:layout"

    @property
    def layout_copy(self) -> str:
        """What the copy of our layout in each partition says."""
        return f"{LAYOUT_VERSION} {self.partitions}"


async def is_claimed(connections: Connections, keys: Keys) -> bool:
    """Say whether a layout has been claimed; reads one key and claims nothing.

    Raises:
        ConfigError: The version or the number of partitions is not ours.
        RedisError: Redis did not answer.
    """
    ours = _fields(keys)
    found = await connections.client.hmget(keys.layout, list(ours))
    if None in found:
        return False
    names = ("layout version", "PARTITIONS")
    problems = [
        f"{name} is {value}, but the layout in Redis was made for {stored.decode()}"
        for name, value, stored in zip(names, ours.values(), found, strict=True)
        if stored != str(value).encode()
    ]
    if problems:
        raise ConfigError(problems)
    return True


async def claim(connections: Connections, keys: Keys) -> None:
    """Claim the layout on an empty server, or insist that it is the one we were made for.

    Raises:
        ConfigError: The version or the number of partitions differs.
        RedisError: Redis did not answer.
    """
    while True:
        # Looked at first: a full server answers this, and its workers must be able to start.
        while not await is_claimed(connections, keys):
            for field, value in _fields(keys).items():
                await connections.client.hsetnx(keys.layout, field, value)
        await _copy(connections, keys)
        # Redis may have lost the layout meanwhile, and another process have claimed another one.
        if await is_claimed(connections, keys):
            return


async def _copy(connections: Connections, keys: Keys) -> None:
    """Copy the layout into each partition; what a process of another layout left is replaced."""
    partitions = range(keys.partitions)
    calls = [ScriptCall(_COPY, [keys.layout_in(each)], [keys.layout_copy]) for each in partitions]
    for reply in await connections.run(calls):
        if isinstance(reply, Exception):
            raise reply


def _fields(keys: Keys) -> dict[str, int]:
    return {"version": LAYOUT_VERSION, "partitions": keys.partitions}
