"""Several commands on one connection, in one write. Which connection is not decided here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hiredis import pack_command
from redis.exceptions import ResponseError


async def exchange(connection: Any, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Send *commands* and return a reply or a `ResponseError` for each.

    A pipeline of redis-py's does the same and packs in Python, at several times the cost.

    Raises:
        RedisError: Nobody knows which of them were executed; the connection is closed.
    """
    await connection.send_packed_command([pack_command(command) for command in commands])
    return [await _reply(connection) for _ in commands]


async def _reply(connection: Any) -> Any:
    """Read one reply; a refusal is one too, whatever else goes wrong closes the connection."""
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error
