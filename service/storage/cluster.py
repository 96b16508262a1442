"""redis-py's client of a Cluster, mended where it does what ours may not.

Every failure is a `RedisError`, and several commands may go to one node in one breath. What is
sent, and whether to ask again, is decided elsewhere: nothing is sent twice here but what a node has
refused because another one holds the key.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Sequence
from typing import Any

from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    RedisClusterException,
    RedisError,
)

from .pipeline import NOTHING, Commands, Needs, exchange
from .redis_connection import TcpConnection, Term, TlsConnection

# A slot that moves is at one of two nodes; more is a Cluster in disorder.
MAX_NODES_ASKED = 4
# Finding the primaries again costs every connection, so not each of many failures may do it.
SEARCH_EVERY_S = 0.5


class ClusterClient(RedisCluster):
    """A client that tells its failures like any other.

    Args:
        startup_nodes: Where it is asked which nodes there are. A Cluster that says of its nodes
            only their ports (`cluster-preferred-endpoint-type unknown-endpoint`) is on the host of
            the first.
        term: What its connections share with those of other clients.
        options: redis-py's.
    """

    _searched_at = float("-inf")

    def __init__(self, startup_nodes: Sequence[ClusterNode], term: Term, **options: Any) -> None:
        host = startup_nodes[0].host
        super().__init__(
            startup_nodes=[*startup_nodes],
            address_remap=lambda address: (address[0] or host, address[1]),
            **options,
        )
        # redis-py lets nobody choose the class of connections, and has already made these nodes.
        mended = TlsConnection if options.get("ssl") else TcpConnection
        self.connection_kwargs.update(connection_class=mended, term=term)
        seeds = [ClusterNode(one.host, one.port, **self.connection_kwargs) for one in startup_nodes]
        self.nodes_manager.startup_nodes = {seed.name: seed for seed in seeds}

    async def initialize(self, *arguments: Any, **options: Any) -> ClusterClient:
        """Find the primaries, unless they are known.

        Raises:
            RedisError: No node answers, or a slot has no primary.
        """
        try:
            await super().initialize(*arguments, **options)
        except RedisClusterException as error:
            cause = _cause(error)
        else:
            return self
        # Outside of the block, so that what the cause itself came from stays with it.
        raise cause

    async def execute_command(self, *arguments: Any, **options: Any) -> Any:
        """Send one command where it belongs.

        Raises:
            RedisError: It failed, or nobody knows whether it did.
        """
        try:
            return await super().execute_command(*arguments, **options)
        except RedisClusterException as error:
            cause = _cause(error)
        raise cause

    async def speak(self, key: str, commands: Commands, needs: Needs = NOTHING) -> list[Any]:
        """Send *commands* on one connection to the primary that holds *key*; return the replies.

        The first is about *key*: where the node says that another has it, all are sent there.
        redis-py itself sends ASKING and the command on any two connections, where the one means
        nothing to the other. Of *needs* speaks `exchange`.

        Raises:
            RedisError: Nobody knows whether they were executed.
        """
        await self.initialize()
        node, asking = self._primary(key), False
        for _ in range(MAX_NODES_ASKED):
            replies = await self._speak_to(node, commands, needs, asking=asking)
            elsewhere = replies[0]
            if not isinstance(elsewhere, AskError):
                break
            asking = not isinstance(elsewhere, MovedError)
            if not asking:
                await self.nodes_manager.move_slot(elsewhere)
            found = self.get_node(elsewhere.host, elsewhere.port)
            if found is None:
                await self._search()
                break
            node = found
        return replies

    async def speak_all(
        self, asked: Sequence[tuple[str, tuple[Any, ...]]], needs: Needs = NOTHING
    ) -> list[Any]:
        """Send commands, each to the primary that holds its key; return a reply or error for each.

        Those for one primary share a connection and a round trip: there may be more commands at
        once than connections.

        Raises:
            RedisError: No node answers; nothing was sent.
        """
        await self.initialize()
        by_place: dict[str, list[int]] = {}
        for i, (key, _) in enumerate(asked):
            by_place.setdefault(self.place(key), []).append(i)
        replies: list[Any] = [None] * len(asked)

        async def speak_to_one(these: list[int]) -> None:
            commands = [asked[i][1] for i in these]
            speaking = self._speak_to(self._primary(asked[these[0]][0]), commands, needs)
            found = await self._found(speaking, len(these))
            for i, reply in zip(these, found, strict=True):
                replies[i] = reply

        await asyncio.gather(*map(speak_to_one, by_place.values()))
        for i, (key, command) in enumerate(asked):
            if isinstance(replies[i], AskError):
                [replies[i]] = await self._found(self.speak(key, [command], needs), 1)
        return replies

    def place(self, key: str) -> str:
        """Return the name of the primary that holds *key*, as far as is known; empty for none."""
        try:
            return str(self._primary(key).name)
        except ClusterDownError:
            return ""

    @staticmethod
    async def _found(speaking: Awaitable[list[Any]], count: int) -> list[Any]:
        """Return the replies of an exchange, or its error for each of *count* commands."""
        try:
            return await speaking
        except (RedisError, OSError) as error:
            return [error] * count

    def _primary(self, key: str) -> ClusterNode:
        try:
            node = self.get_node_from_key(key)
        except RedisClusterException:
            node = None
        if node is None:
            raise _no_primary()
        return node

    async def _speak_to(
        self, node: ClusterNode, commands: Commands, needs: Needs, *, asking: bool = False
    ) -> list[Any]:
        asked = [("ASKING",), *commands] if asking else commands
        connection = node.acquire_connection()
        try:
            # Not left to the first command: what is known of another server must not count.
            await connection.connect()  # type: ignore[no-untyped-call]
            replies = await exchange(connection, asked, needs)
        except (RedisError, OSError):
            await self._search(node.name)
            raise
        finally:
            node.release(connection)
        return replies[asking:]

    async def _search(self, but_last: str | None = None) -> None:
        """Find the primaries again, now and then; a node that fails is asked last."""
        now = time.monotonic()
        if now >= self._searched_at + SEARCH_EVERY_S:
            self._searched_at = now
            with contextlib.suppress(RedisError, RedisClusterException, OSError):
                await self.nodes_manager.initialize(last_failed_node_name=but_last)


def _cause(error: RedisClusterException) -> RedisError:
    """Return what a node said for which redis-py gave up, where any did."""
    for inner in (error.__cause__, getattr(error.__cause__, "__context__", None)):
        if isinstance(inner, RedisError):
            return inner
    return _no_primary()


def _no_primary() -> ClusterDownError:
    return ClusterDownError("no node answers, or a slot has no primary")
