"""redis-py's client of a Cluster, amended where it does what ours must not.

Every failure is a `RedisError`, and several commands may go to one node in one pipeline. Nothing is
sent twice but what a node has refused because another node holds the key; whether to retry is
decided elsewhere.
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

from .redis_connection import Generation, TcpConnection, TlsConnection
from .scripts import NO_NEEDS, Command, Needs, run_pipeline

# A slot that moves is at one of two nodes; more redirections mean that the nodes disagree.
MAX_NODES_ASKED = 4
# Finding the primaries again replaces every connection, so not each of many failures may do it.
REFRESH_EVERY_S = 0.5


class ClusterClient(RedisCluster):
    """A client whose failures are those of any other client.

    Args:
        startup_nodes: The nodes that are asked which nodes there are. Where a Cluster announces
            only the ports of its nodes (`cluster-preferred-endpoint-type unknown-endpoint`), their
            host is that of the first.
        generation: What its connections share with those of other clients.
        options: redis-py's.
    """

    _refreshed_at = float("-inf")

    def __init__(
        self, startup_nodes: Sequence[ClusterNode], generation: Generation, **options: Any
    ) -> None:
        host = startup_nodes[0].host
        super().__init__(
            startup_nodes=[*startup_nodes],
            address_remap=lambda address: (address[0] or host, address[1]),
            **options,
        )
        # redis-py takes no connection class as an option, and has already made these nodes.
        ours = TlsConnection if options.get("ssl") else TcpConnection
        self.connection_kwargs.update(connection_class=ours, generation=generation)
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
        # Outside of the block, so that the cause keeps its own context.
        raise cause

    async def execute_command(self, *arguments: Any, **options: Any) -> Any:
        """Send one command to the node that it belongs to.

        Raises:
            RedisError: It failed, or it is unknown whether it did.
        """
        try:
            return await super().execute_command(*arguments, **options)
        except RedisClusterException as error:
            cause = _cause(error)
        raise cause

    async def run_pipeline(
        self, key: str, commands: Sequence[Command], needs: Needs = NO_NEEDS
    ) -> list[Any]:
        """Send *commands* on one connection to the primary that holds *key*; return the replies.

        The first command is about *key*: where the node replies that another node has it, all are
        sent there. redis-py itself sends ASKING and the command on two connections, where ASKING
        has no effect on the command. *needs* as for `scripts.run_pipeline`.

        Raises:
            RedisError: It is unknown whether they were executed.
        """
        await self.initialize()
        node, asking = self._primary(key), False
        for _ in range(MAX_NODES_ASKED):
            replies = await self._run_on(node, commands, needs, asking=asking)
            redirection = replies[0]
            if not isinstance(redirection, AskError):
                break
            asking = not isinstance(redirection, MovedError)
            if not asking:
                await self.nodes_manager.move_slot(redirection)
            found = self.get_node(redirection.host, redirection.port)
            if found is None:
                await self._refresh()
                break
            node = found
        return replies

    async def run_commands(
        self, keyed: Sequence[tuple[str, Command]], needs: Needs = NO_NEEDS
    ) -> list[Any]:
        """Send commands, each to the primary that holds its key; return a reply or error for each.

        Those for one primary share a connection and a round trip: there may be more commands at
        once than connections.

        Raises:
            RedisError: No node answers; nothing was sent.
        """
        await self.initialize()
        by_primary: dict[str, list[int]] = {}
        for i, (key, _) in enumerate(keyed):
            by_primary.setdefault(self.primary_of(key), []).append(i)
        replies: list[Any] = [None] * len(keyed)

        async def run_on_one(indexes: list[int]) -> None:
            commands = [keyed[i][1] for i in indexes]
            running = self._run_on(self._primary(keyed[indexes[0]][0]), commands, needs)
            found = await self._replies_or_errors(running, len(indexes))
            for i, reply in zip(indexes, found, strict=True):
                replies[i] = reply

        await asyncio.gather(*map(run_on_one, by_primary.values()))
        for i, (key, command) in enumerate(keyed):
            if isinstance(replies[i], AskError):
                running = self.run_pipeline(key, [command], needs)
                [replies[i]] = await self._replies_or_errors(running, 1)
        return replies

    def primary_of(self, key: str) -> str:
        """Return the name of the primary that holds *key*, as far as is known; empty for none."""
        try:
            return str(self._primary(key).name)
        except ClusterDownError:
            return ""

    @staticmethod
    async def _replies_or_errors(running: Awaitable[list[Any]], count: int) -> list[Any]:
        """Return the replies of a pipeline, or its error for each of *count* commands."""
        try:
            return await running
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

    async def _run_on(
        self, node: ClusterNode, commands: Sequence[Command], needs: Needs, *, asking: bool = False
    ) -> list[Any]:
        sent = [("ASKING",), *commands] if asking else commands
        connection = node.acquire_connection()
        try:
            # Before the pipeline: what was verified of an earlier server must not count.
            await connection.connect()  # type: ignore[no-untyped-call]
            replies = await run_pipeline(connection, sent, needs)
        except (RedisError, OSError):
            await self._refresh(node.name)
            raise
        finally:
            node.release(connection)
        return replies[asking:]

    async def _refresh(self, ask_last: str | None = None) -> None:
        """Find the primaries again, but not too often; a node that fails is asked last."""
        now = time.monotonic()
        if now >= self._refreshed_at + REFRESH_EVERY_S:
            self._refreshed_at = now
            with contextlib.suppress(RedisError, RedisClusterException, OSError):
                await self.nodes_manager.initialize(last_failed_node_name=ask_last)


def _cause(error: RedisClusterException) -> RedisError:
    """Return the error of a node for which redis-py gave up, where there is one."""
    for inner in (error.__cause__, getattr(error.__cause__, "__context__", None)):
        if isinstance(inner, RedisError):
            return inner
    return _no_primary()


def _no_primary() -> ClusterDownError:
    return ClusterDownError("no node answers, or a slot has no primary")
