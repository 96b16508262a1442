"""Run scripts on one connection, in one write, and know that what they wrote will last.

Which server that is, and who shares the connection, is decided elsewhere. How long a write lasts is
decided for each call, on the connection that carries it:

On this Redis: with a `maxmemory-policy` other than `noeviction` it may evict what it acknowledged,
and it replies after its fsync only with the settings in `FSYNC_SETTINGS`. Both are read once for
each connection, before its first write. Where they are not as they must be, or may not be read,
nothing is written, and they are read again the next time.

On its replicas: WAIT counts the replicas that have this connection's last write, but does not say
which. A fail-over may promote any of them, so all that are connected must have it. ROLE says how
many are connected. It travels in the same write as the call and its WAIT, so that WAIT has to ask
for the number of the last time; where more are connected now, a second WAIT follows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from hiredis import pack_command
from redis.exceptions import NoScriptError, RedisError, ResponseError

REPLICA_WAIT_MS = 500
# The settings under which a reply means "on disk".
FSYNC_SETTINGS = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no"}
_FSYNC_REPLY = {name.encode(): value.encode() for name, value in FSYNC_SETTINGS.items()}

Argument = str | bytes | int | float
Command = tuple[Any, ...]


class Script:
    """A Lua script of a package of ours, addressed by its hash."""

    def __init__(self, package: str, name: str) -> None:
        self.source = files(package).joinpath(name).read_text()
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


class ScriptCall(NamedTuple):
    """One call of a script; all its keys are of one partition."""

    script: Script
    keys: Sequence[str]
    arguments: Sequence[Argument]

    def by_hash(self) -> Command:
        """Return the command for a server that has seen the script."""
        return ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.arguments)

    def by_source(self) -> Command:
        """Return the command for a server that has not."""
        return ("EVAL", self.script.source, len(self.keys), *self.keys, *self.arguments)


class Needs(NamedTuple):
    """What must hold before a reply to a write may be relied on.

    Attributes:
        replicas: The fewest replicas that must have the write; where it is not 0, all that are
            connected must.
        no_eviction: Whether Redis must be configured never to evict it. Where it may, nothing is
            sent.
        fsync: Whether it must be on disk as well. Where Redis replies before its fsync, nothing is
            sent.
    """

    replicas: int = 0
    no_eviction: bool = False
    fsync: bool = False


NO_NEEDS = Needs()


class UnsafeConfigError(RedisError):
    """As this Redis is configured, it may lose what it acknowledges, or does not let us know."""


class NotReplicatedError(RedisError):
    """Fewer replicas than are connected, or than are needed, have confirmed a write in time."""


# Sends the commands of some calls, and returns a reply or an error for each.
Send = Callable[[Sequence[ScriptCall], list[Command], Needs], Awaitable[list[Any]]]


async def run_scripts(send: Send, calls: Sequence[ScriptCall], needs: Needs) -> list[Any]:
    """Run *calls* by hash, and by source those whose script the server does not know."""
    replies = await send(calls, [call.by_hash() for call in calls], needs)
    unknown = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
    if unknown:
        again = [calls[i] for i in unknown]
        found = await send(again, [call.by_source() for call in again], needs)
        for i, reply in zip(unknown, found, strict=True):
            replies[i] = reply
    return replies


def raise_first(replies: Sequence[Any]) -> None:
    """Raise the first error among the replies of some calls."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply


class PipelineRunner:
    """Runs pipelines over a pool's connections, and keeps the connection that was used last.

    Taking a connection from the pool costs as much as a short pipeline.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._last_used: Any = None

    async def run(self, commands: Sequence[Command], needs: Needs) -> list[Any]:
        """Do what `run_pipeline` does, on a connection that no other call uses meanwhile.

        Raises:
            RedisError: As `run_pipeline`, or the pool has no connection to give.
        """
        connection, self._last_used = self._last_used, None
        if connection is None:
            connection = await self._pool.get_connection()
        try:
            await self._pool.ensure_connection(connection)
            return await run_pipeline(connection, commands, needs)
        finally:
            await self._give_back(connection)

    async def _give_back(self, connection: Any) -> None:
        if self._last_used is None:
            self._last_used = connection
        else:
            await self._pool.release(connection)


async def run_pipeline(
    connection: Any, commands: Sequence[Command], needs: Needs = NO_NEEDS
) -> list[Any]:
    """Send *commands* in one write and return a reply or an error for each.

    A pipeline of redis-py's does the same, and packs commands in Python at several times the cost.

    Raises:
        RedisError: It is unknown which of them were executed; the connection is closed.
    """
    if needs.no_eviction and connection.verified_needs != needs:
        if error := await _config_error(connection, needs):
            return [error] * len(commands)
        connection.verified_needs = needs
    if needs.replicas:
        return await _run_replicated(connection, commands, needs.replicas)
    await connection.send_packed_command([pack_command(command) for command in commands])
    return [await _read_reply(connection) for _ in commands]


async def _read_reply(connection: Any) -> Any:
    """Read one reply. An error reply is returned; any other failure closes the connection."""
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error


async def _config_error(connection: Any, needs: Needs) -> RedisError | None:
    """Return why the server of *connection*, as it is configured, cannot meet *needs*."""
    config = [("CONFIG", "GET", *FSYNC_SETTINGS)] if needs.fsync else []
    memory, *settings = await run_pipeline(connection, [("INFO", "memory"), *config])
    if isinstance(memory, RedisError):
        return memory
    policy = re.search(rb"maxmemory_policy:(\S+)", memory)
    if (policy and policy[1] != b"noeviction") or settings not in ([], [_FSYNC_REPLY]):
        return UnsafeConfigError()
    return None


async def _run_replicated(
    connection: Any, commands: Sequence[Command], min_replicas: int
) -> list[Any]:
    """Run *commands*, and give an error for each unless all connected replicas confirm in time."""
    *replies, role, confirmed = await run_pipeline(
        connection, [*commands, ("ROLE",), _wait(connection.expected_replicas)]
    )
    for reply in (role, confirmed):
        if isinstance(reply, Exception):
            return _unless_failed(replies, reply)
    needed = max(min_replicas, len(role[2]))
    asked_for, connection.expected_replicas = connection.expected_replicas, needed
    if confirmed < needed and asked_for < needed:
        [confirmed] = await run_pipeline(connection, [_wait(needed)])
    if isinstance(confirmed, Exception) or confirmed < needed:
        return _unless_failed(replies, NotReplicatedError())
    return replies


def _wait(replicas: int) -> Command:
    return ("WAIT", replicas, REPLICA_WAIT_MS)


def _unless_failed(replies: list[Any], error: Exception) -> list[Any]:
    """Return *error* for each command but those that have an error of their own."""
    return [reply if isinstance(reply, Exception) else error for reply in replies]
