"""Redis servers that can die, restart, lose their disk or get an older copy of it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.support import servers
from tests.support.preloads import Preload, redis_with
from tests.support.proxy import Proxy
from tests.support.waiting import until

FOLLOW_DEADLINE_S = 30.0


class RedisHost:
    """One server with a directory and a port of its own.

    Attributes:
        link: The proxy to its primary, if it is a replica.
    """

    def __init__(
        self, directory: Path, *, appendfsync: str, loaded: Sequence[Preload] = ()
    ) -> None:
        self.directory = directory
        self.port = servers.free_port()
        self.server: servers.Server
        self.link: Proxy | None = None
        self._appendfsync = appendfsync
        self._loaded = [*loaded]
        self._running = ExitStack()

    @property
    def url(self) -> str:
        """Its address."""
        return f"redis://127.0.0.1:{self.port}"

    def start(self, *options: str) -> None:
        """Start it on the data in its directory."""
        policy = ("--appendonly", "yes", "--appendfsync", self._appendfsync)
        ours = (*policy, "--rdbcompression", "no", *options)
        self.directory.mkdir(parents=True, exist_ok=True)
        program = redis_with(self._loaded, self.directory.parent) if self._loaded else None
        running = servers.server(self.directory, *ours, port=self.port, program=program)
        self.server = self._running.enter_context(running)

    async def follow(self, primary: RedisHost) -> None:
        """Become the replica of *primary*, running or not, and wait until it is one."""
        assert self.link
        self.link.aim(primary.url)
        self.link.cut()
        upstream = "127.0.0.1", str(self.link.port)
        if self.is_running:
            with self.server.client() as client:
                client.replicaof(*upstream)
        else:
            await asyncio.to_thread(self.start, "--replicaof", *upstream)
        with self.server.client() as client:
            await until(
                lambda: client.info("replication")["master_link_status"] == "up", FOLLOW_DEADLINE_S
            )

    def promote(self) -> None:
        """Become a primary."""
        with self.server.client() as client:
            client.replicaof("NO", "ONE")

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return hasattr(self, "server") and self.server.process.poll() is None

    def kill(self) -> None:
        """Kill it."""
        self.server.process.kill()
        self._running.close()

    def copy(self, to: Path) -> None:
        """Copy its append-only file while it runs; the copy may end in the middle of a command."""
        shutil.copytree(self.directory / "appendonlydir", to)

    def restore(self, copy: Path) -> None:
        """Replace its append-only file by an older copy."""
        shutil.rmtree(self.directory / "appendonlydir")
        copy.rename(self.directory / "appendonlydir")

    def forget(self) -> None:
        """Lose the disk too."""
        shutil.rmtree(self.directory)

    def close(self) -> None:
        """Stop it."""
        self._running.close()
