"""Several commands on one connection, in one write. To which server is not decided here."""

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


class Exchanger:
    """Exchanges over a pool's connections, and keeps the one that was used last.

    Taking it from the pool each time costs as much as a short exchange.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._kept: Any = None

    async def exchange(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Do what `exchange` does on a connection that nobody else uses meanwhile.

        Raises:
            RedisError: As `exchange`, or there is no connection to be had.
        """
        connection, self._kept = self._kept, None
        if connection is None:
            connection = await self._pool.get_connection()
        try:
            await self._pool.ensure_connection(connection)
            return await exchange(connection, commands)
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
