"""Servers that replace each other: three Sentinels over a pair, and a Cluster.

All on loopback; everything that is started ends with the block.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import redis

from tests.support.servers import Server, free_port, sentinel, server
from tests.support.waiting import wait_until

SERVICE = "main"
# Long enough that a busy machine is not taken for a dead one.
DOWN_AFTER_MS = 1500
# An error of Redis means that it is not ready yet.
wait_for = partial(wait_until, ignoring=redis.RedisError)
_DURABLE = ("--appendonly", "yes", "--repl-diskless-sync-delay", "0")


def command(server_: Server, *words: str | int) -> Any:
    """Send one command to a server."""
    with server_.client() as client:
        return client.execute_command(*words)


class Pair:
    """A primary, its replicas, and three Sentinels.

    Args:
        directory: Where their files are.
        stack: Stops them.
        acl: Their users, if they have any.
        priorities: The `replica-priority` of each replica, where there is more than one.

    Attributes:
        servers: The running servers, by port.
    """

    def __init__(
        self,
        directory: Path,
        stack: ExitStack,
        acl: Path | None,
        priorities: Sequence[int] = (100,),
    ) -> None:
        self._directory = directory
        self._stack = stack
        self._options: tuple[str, ...] = _DURABLE
        self._administrator: str | None = None
        self._for_sentinels: tuple[str, ...] = ()
        if acl:
            known = ("--aclfile", str(acl), "--masteruser", "replica", "--masterauth", "replica")
            self._options = (*_DURABLE, *known)
            self._administrator = "administrator"
            self._for_sentinels = (
                f"sentinel auth-user {SERVICE} sentinel",
                f"sentinel auth-pass {SERVICE} sentinel",
            )
        self.servers: dict[int, Server] = {}
        self._replicas = len(priorities)
        primary = self._start(free_port())
        for priority in priorities:
            of = ("--replicaof", f"127.0.0.1 {primary.port}")
            self._start(free_port(), *of, "--replica-priority", str(priority))
        wait_for(lambda: self._info(primary)["connected_slaves"] == self._replicas)
        wait_for(lambda: all(map(self._follows, self.replicas())))
        self._sentinels = [self._watch(n, primary) for n in range(3)]
        wait_for(lambda: all(map(self._is_whole, self._sentinels)))

    @property
    def url(self) -> str:
        """The value of REDIS_URL."""
        hosts = ",".join(f"127.0.0.1:{one.port}" for one in self._sentinels)
        return f"redis+sentinel://{hosts}/{SERVICE}/0"

    def primary(self) -> Server:
        """Return the server that the Sentinels call the primary."""
        found = wait_for(lambda: self._asked(self._sentinels[0]))
        return self.servers[int(found[1])]

    def replicas(self) -> list[Server]:
        """Return the servers that follow another, as they were started."""
        return [one for one in self.servers.values() if self._info(one)["role"] == "slave"]

    def kill(self) -> Server:
        """Kill the primary, and return the one that took its place."""
        killed = self.primary()
        killed.process.kill()
        self._replaced(killed)
        del self.servers[killed.port]
        self._killed = killed.port
        return self.primary()

    def revive(self) -> None:
        """Start the killed primary again, which the Sentinels make a replica."""
        revived = self._start(self._killed)
        wait_for(lambda: self._info(revived)["role"] == "slave")
        wait_for(lambda: self._info(revived).get("master_link_status") == "up")

    def switch(self) -> Server:
        """Make the replica the primary as an operator does, and return it."""
        before = self.primary()
        command(self._sentinels[0], "SENTINEL", "FAILOVER", SERVICE)
        self._replaced(before)
        wait_for(lambda: self._info(before).get("master_link_status") == "up")
        return self.primary()

    def _follows(self, replica: Server) -> bool:
        return bool(self._info(replica).get("master_link_status") == "up")

    def _replaced(self, before: Server) -> None:
        def agree() -> bool:
            found = {int(self._asked(one)[1]) for one in self._sentinels}
            return len(found) == 1 and before.port not in found

        wait_for(agree)
        wait_for(lambda: self._info(self.primary())["role"] == "master")

    def _start(self, port: int, *more: str) -> Server:
        started = server(
            self._directory / str(port), *self._options, *more, port=port, user=self._administrator
        )
        self.servers[port] = self._stack.enter_context(started)
        return self.servers[port]

    def _watch(self, number: int, primary: Server) -> Server:
        settings = (
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}",
            f"sentinel failover-timeout {SERVICE} 4000",
            *self._for_sentinels,
        )
        directory = self._directory / f"sentinel-{number}"
        started = sentinel(directory, *settings, service=SERVICE, primary=primary, quorum=2)
        return self._stack.enter_context(started)

    def _is_whole(self, sentinel: Server) -> bool:
        with sentinel.client() as client:
            state = client.sentinel_masters()[SERVICE]
        return bool(state["num-other-sentinels"] == 2 and state["num-slaves"] == self._replicas)

    def _asked(self, sentinel: Server) -> Any:
        return command(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)

    def _info(self, asked: Server) -> Any:
        with asked.client() as client:
            return client.info("replication")


@contextmanager
def watched_pair(
    directory: Path, acl: Path | None = None, *, priorities: Sequence[int] = (100,)
) -> Iterator[Pair]:
    """Run a primary and its replicas under three Sentinels; the arguments are those of `Pair`."""
    with ExitStack() as stack:
        yield Pair(directory, stack, acl, priorities)


class Cluster:
    """Three primaries that share the slots, each with a replica unless there are to be none.

    Attributes:
        servers: The running servers, by port.
    """

    def __init__(
        self,
        directory: Path,
        stack: ExitStack,
        options: tuple[str, ...],
        *,
        has_replicas: bool = True,
    ) -> None:
        self._directory = directory
        self._stack = stack
        self._options = options
        self._buses: dict[int, int] = {}
        self.servers: dict[int, Server] = {}
        for _ in range(6 if has_replicas else 3):
            port = free_port()
            self._buses[port] = free_port()
            self._start(port)
        self._ports = [*self.servers]
        self._meet()

    @property
    def url(self) -> str:
        """The value of REDIS_URL."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._ports)
        return f"redis+cluster://{hosts}"

    def home(self, slot: int) -> Server:
        """Return the primary of a slot."""
        found = wait_for(lambda: self._home(slot))
        assert found
        return found

    def other(self, slot: int) -> Server:
        """Return a primary that does not have a slot."""
        homes = {int(row[2][1]) for row in self._slots()}
        return self.servers[min(homes - {self.home(slot).port})]

    def replica_of(self, primary: Server) -> Server:
        """Return the replica of a primary."""
        [(_, port, *_)] = command(primary, "ROLE")[2]
        return self.servers[int(port)]

    def kill(self, slot: int) -> Server:
        """Kill the primary of a slot, and return the one that took its place."""
        killed = self.home(slot)
        killed.process.kill()
        del self.servers[killed.port]
        self._killed = killed.port
        return self.home(slot)

    def revive(self) -> None:
        """Start the killed server again, which then follows the one that took its place."""
        revived = self._start(self._killed)
        wait_for(lambda: command(revived, "ROLE")[0] == b"slave")
        wait_for(lambda: command(revived, "ROLE")[3] == b"connected")

    @contextmanager
    def moving(self, slot: int, pause_s: float = 0.0) -> Iterator[Server]:
        """Begin to move a slot to another primary, and finish at the end of the block.

        Args:
            slot: The slot.
            pause_s: Seconds between two keys, in which the slot's keys lie on either side.
        """
        source, target = self.home(slot), self.other(slot)
        ids = {one.port: command(one, "CLUSTER", "MYID").decode() for one in (source, target)}
        command(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
        command(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])
        yield target
        while keys := command(source, "CLUSTER", "GETKEYSINSLOT", slot, 1):
            command(source, "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
            time.sleep(pause_s)
        for one in (target, source):
            command(one, "CLUSTER", "SETSLOT", slot, "NODE", ids[target.port])

    def move(self, slot: int, pause_s: float) -> None:
        """Move a slot to another primary."""
        with self.moving(slot, pause_s):
            pass

    def _home(self, slot: int) -> Server | None:
        for first, last, primary, *_ in self._slots():
            if first <= slot <= last:
                return self.servers.get(int(primary[1]))
        return None

    def _slots(self) -> Any:
        asked = next(iter(self.servers.values()))
        return command(asked, "CLUSTER", "SLOTS")

    def _start(self, port: int) -> Server:
        ours = ("--cluster-enabled", "yes", "--cluster-port", str(self._buses[port]),
                "--cluster-node-timeout", "2000")  # fmt: skip
        started = server(self._directory / str(port), *ours, *_DURABLE, *self._options, port=port)
        self.servers[port] = self._stack.enter_context(started)
        return self.servers[port]

    def _meet(self) -> None:
        servers = [*self.servers.values()]
        for n, one in enumerate(servers):
            command(one, "CLUSTER", "SET-CONFIG-EPOCH", n + 1)
            if n:
                first = servers[0]
                command(first, "CLUSTER", "MEET", "127.0.0.1", one.port, self._buses[one.port])
        for n, one in enumerate(servers[:3]):
            slots = n * 16384 // 3, (n + 1) * 16384 // 3 - 1
            command(one, "CLUSTER", "ADDSLOTSRANGE", *slots)
        for primary, replica in zip(servers, servers[3:], strict=False):
            name = command(primary, "CLUSTER", "MYID").decode()
            wait_for(partial(_follow, replica, name))
        wait_for(lambda: all(_is_whole(one, len(servers)) for one in servers))
        for replica in servers[3:]:
            wait_for(partial(_is_linked, replica))


@contextmanager
def lone_cluster(directory: Path, *options: str) -> Iterator[Server]:
    """Run a Cluster of one server, which has all slots."""
    ours = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    with server(directory, *options, *ours) as started:
        command(started, "CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_for(lambda: command(started, "CLUSTER INFO")["cluster_state"] == "ok")
        yield started


def _is_linked(replica: Server) -> bool:
    return bool(command(replica, "ROLE")[3] == b"connected")


def _follow(replica: Server, primary: str) -> bool:
    return bool(command(replica, "CLUSTER", "REPLICATE", primary))


def _is_whole(one: Server, size: int) -> bool:
    state = command(one, "CLUSTER INFO")
    nodes = command(one, "CLUSTER NODES")
    linked = sum(node["connected"] for node in nodes.values())
    return bool(state["cluster_state"] == "ok" and len(nodes) == size and linked == size)


@contextmanager
def cluster(directory: Path, *options: str, has_replicas: bool = True) -> Iterator[Cluster]:
    """Run a Cluster; the arguments are those of `Cluster`."""
    with ExitStack() as stack:
        yield Cluster(directory, stack, options, has_replicas=has_replicas)
