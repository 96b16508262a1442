"""Several commands on one connection, in one write, and whether what they write will last.

To which server is not decided here. What must last is judged for each call, on the connection that
writes it:

On this Redis: with a `maxmemory-policy` other than `noeviction` it may drop what it acknowledged;
and it answers after its fsync only with the settings in `ON_DISK`. Both are read once for each
connection, before its first write; what is not so, or may not be read, is read again the next time.

On replicas: WAIT counts those that have this connection's last write, but not which. A fail-over
may promote any of them, so all that are connected must have it. ROLE says how many those are; it
goes in the same write as the call and WAIT, for which the number of last time is taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from hiredis import pack_command
from redis.exceptions import RedisError, ResponseError

REPLICA_WAIT_MS = 500
# What must be configured for an answer to mean "on disk".
ON_DISK = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no"}
_ON_DISK_REPLY = {name.encode(): value.encode() for name, value in ON_DISK.items()}

Commands = Sequence[tuple[Any, ...]]


class NotKeptError(RedisError):
    """As it is configured, this Redis may lose what it acknowledges, or does not let us know."""


class NotReplicatedError(RedisError):
    """Fewer replicas than are connected, or than asked for, have confirmed a write in time."""


class Needs(NamedTuple):
    """What must hold before a reply to a write may be relied on.

    Attributes:
        replicas: How many replicas must have what was written, at least; all that are connected
            must then. 0 for none.
        kept: Whether Redis must not drop it later. Where it might, nothing is sent.
        fsync: Whether it must be on disk as well. Where Redis does not see to it, nothing is sent.
    """

    replicas: int = 0
    kept: bool = False
    fsync: bool = False


NOTHING = Needs()


async def exchange(connection: Any, commands: Commands, needs: Needs = NOTHING) -> list[Any]:
    """Send *commands* and return a reply or an error for each.

    A pipeline of redis-py's does the same and packs in Python, at several times the cost.

    Raises:
        RedisError: Nobody knows which of them were executed; the connection is closed.
    """
    if needs.kept and connection.met != needs:
        if error := await _not_kept(connection, needs):
            return [error] * len(commands)
        connection.met = needs
    if needs.replicas:
        return await _replicated(connection, commands, needs.replicas)
    await connection.send_packed_command([pack_command(command) for command in commands])
    return [await _reply(connection) for _ in commands]


class Exchanger:
    """Exchanges over a pool's connections, and keeps the one that was used last.

    Taking it from the pool each time costs as much as a short exchange.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._kept: Any = None

    async def exchange(self, commands: Commands, needs: Needs) -> list[Any]:
        """Do what `exchange` does on a connection that nobody else uses meanwhile.

        Raises:
            RedisError: As `exchange`, or there is no connection to be had.
        """
        connection, self._kept = self._kept, None
        if connection is None:
            connection = await self._pool.get_connection()
        try:
            await self._pool.ensure_connection(connection)
            return await exchange(connection, commands, needs)
        finally:
            await self._give_back(connection)

    async def _give_back(self, connection: Any) -> None:
        if self._kept is None:
            self._kept = connection
        else:
            await self._pool.release(connection)


async def _reply(connection: Any) -> Any:
    """Read one reply; a refusal is one too, whatever else goes wrong closes the connection."""
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error


async def _not_kept(connection: Any, needs: Needs) -> RedisError | None:
    """Return what keeps the server of *connection* from keeping what it is given."""
    config = [("CONFIG", "GET", *ON_DISK)] if needs.fsync else []
    memory, *said = await exchange(connection, [("INFO", "memory"), *config])
    if isinstance(memory, RedisError):
        return memory
    policy = re.search(rb"maxmemory_policy:(\S+)", memory)
    if (policy and policy[1] != b"noeviction") or said not in ([], [_ON_DISK_REPLY]):
        return NotKeptError()
    return None


async def _replicated(connection: Any, commands: Commands, at_least: int) -> list[Any]:
    *replies, role, confirmed = await exchange(
        connection, [*commands, ("ROLE",), _wait(connection.replicas)]
    )
    for refused in (role, confirmed):
        if isinstance(refused, Exception):
            return _unless_failed(replies, refused)
    needed = max(at_least, len(role[2]))
    asked_for, connection.replicas = connection.replicas, needed
    if confirmed < needed and asked_for < needed:
        [confirmed] = await exchange(connection, [_wait(needed)])
    if isinstance(confirmed, Exception) or confirmed < needed:
        return _unless_failed(replies, NotReplicatedError())
    return replies


def _wait(replicas: int) -> tuple[Any, ...]:
    return ("WAIT", replicas, REPLICA_WAIT_MS)


def _unless_failed(replies: list[Any], error: Exception) -> list[Any]:
    """Return *error* for each command but those that have an error of their own."""
    return [reply if isinstance(reply, Exception) else error for reply in replies]
