"""The Redis clients of one process: one for short calls and scripts, one for blocking reads.

How a client is built is in `clients`, how scripts run in `scripts`, which keys exist in `keys`.
What a script does is known only to the package that it lies in.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.exceptions import RedisClusterException, RedisError

from ..errors import ConfigError
from ..secret import Secret
from . import clients, urls
from .redis_connection import Generation
from .scripts import (
    NO_NEEDS,
    Argument,
    Command,
    Needs,
    PipelineRunner,
    Script,
    ScriptCall,
    run_scripts,
)


class Connections:
    """The clients, and the running of scripts over them."""

    def __init__(
        self, calls: Any, blocking: Any, generation: Generation, *, is_cluster: bool
    ) -> None:
        self.client = calls
        self.blocking_client = blocking
        self.is_cluster = is_cluster
        self._generation = generation
        self._pipelines = None if is_cluster else PipelineRunner(calls.connection_pool)

    def run(
        self, calls: Sequence[ScriptCall], *, needs: Needs = NO_NEEDS
    ) -> Coroutine[Any, Any, list[Any]]:
        """Run *calls* in one round trip where the server's topology allows it.

        Args:
            calls: Scripts with their keys and arguments.
            needs: What must hold of what they write before this returns.

        Returns:
            One reply or one `RedisError` per call, in order. After a connection error or a
            time-out it is unknown whether the call was executed.
        """
        return run_scripts(self._send, calls, needs)

    async def run_one(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[Argument],
        *,
        needs: Needs = NO_NEEDS,
    ) -> Any:
        """Run one script and return its reply; *needs* as for `run`.

        Raises:
            RedisError: The call failed, or it is unknown whether it did.
        """
        [reply] = await self.run([ScriptCall(script, keys, arguments)], needs=needs)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def replica_priorities(self) -> list[int]:
        """Return the `replica-priority` of each replica that Sentinel knows; none without Sentinel.

        Raises:
            RedisError: No Sentinel answers.
        """
        return await clients.replica_priorities(self.client)

    def replace_all(self) -> None:
        """Replace every connection before its next use, and so what is known of its server."""
        self._generation.start_next()

    def primary_of(self, key: str) -> str:
        """Return a name that is the same for all keys that one primary holds."""
        return str(self.client.primary_of(key)) if self.is_cluster else ""

    async def _send(
        self, calls: Sequence[ScriptCall], commands: list[Command], needs: Needs
    ) -> list[Any]:
        try:
            if self._pipelines is not None:
                return await self._pipelines.run(commands, needs)
            keys = [call.keys[0] for call in calls]
            replies: list[Any] = await self.client.run_commands(
                [*zip(keys, commands, strict=True)], needs
            )
        except (RedisError, OSError) as error:
            return [error] * len(calls)
        return replies


@asynccontextmanager
async def connect(url: Secret[str], *, setting: str = "REDIS_URL") -> AsyncIterator[Connections]:
    """Yield the clients for *url*; connections are made on first use and closed at the end.

    Forms: `redis://`, `rediss://`, `unix://`, and with several `host:port` separated by commas
    `redis+sentinel://…/service/db` and `redis+cluster://…` (`rediss+…` for TLS). With TLS, options
    name files: `ssl_ca_certs`, and `ssl_certfile` and `ssl_keyfile` of our own certificate.
    *setting* is the name of the setting that holds the URL.

    Raises:
        ConfigError: The URL is not of these forms.
    """
    try:
        text = url.reveal()
        is_cluster = urls.topology(text) == "cluster"
        generation = Generation(one_server=not is_cluster)
        calls = clients.for_calls(text, generation)
        blocking = clients.for_blocking_reads(text, generation)
    except ConfigError as error:
        raise ConfigError([f"{setting}: {error}"]) from None
    except (ValueError, TypeError, RedisError, RedisClusterException):
        expected = "a usable URL, with special characters of a password percent-encoded"
        raise ConfigError([f"{setting}: expected {expected}"]) from None
    try:
        if is_cluster:
            # Used before this, a cluster client under concurrency runs some calls twice. Where no
            # node answers in time, the first call tries again.
            with contextlib.suppress(RedisError, OSError):
                async with asyncio.timeout(clients.CALL_TIMEOUT_S):
                    await calls.initialize()
                    await blocking.initialize()
        yield Connections(calls, blocking, generation, is_cluster=is_cluster)
    finally:
        await clients.close(calls)
        await clients.close(blocking)


def display_address(url: Secret[str]) -> str:
    """Return where *url* leads, as `host:port` or a path, with no user and no password."""
    return urls.display_address(url.reveal())
