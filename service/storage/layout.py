"""The layout of the data in Redis: one process claims it, and every other checks that it is ours.

Two processes with different numbers of partitions would look for one session in two places, and
admit its events twice. So the first process claims the layout, in one key. Each process that finds
its own layout there copies it into every partition, where the admission script compares it with its
caller's: when Redis has lost everything and a process has claimed another layout, no event is
admitted under the old one.
"""

from __future__ import annotations

from ..errors import ConfigError
from .connections import Connections
from .keys import LAYOUT_VERSION, Keys
from .scripts import Script, ScriptCall, raise_first

_COPY = Script(__package__, "copy_layout.lua")


async def is_claimed(connections: Connections, keys: Keys) -> bool:
    """Return whether a layout has been claimed, and check that it is ours.

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
    """Claim the layout on an empty server, or check that the one there is ours.

    Raises:
        ConfigError: The version or the number of partitions differs.
        RedisError: Redis did not answer.
    """
    while True:
        # Read first: workers must be able to start on a full server, which takes no writes.
        while not await is_claimed(connections, keys):
            for field, value in _fields(keys).items():
                await connections.client.hsetnx(keys.layout, field, value)
        await _copy(connections, keys)
        # Meanwhile Redis may have lost the layout, and another process claimed another one.
        if await is_claimed(connections, keys):
            return


async def _copy(connections: Connections, keys: Keys) -> None:
    """Copy the layout into each partition, over the copy of any other layout."""
    partitions = range(keys.partitions)
    calls = [ScriptCall(_COPY, [keys.layout_in(each)], [keys.layout_copy]) for each in partitions]
    raise_first(await connections.run(calls))


def _fields(keys: Keys) -> dict[str, int]:
    return {"version": LAYOUT_VERSION, "partitions": keys.partitions}
