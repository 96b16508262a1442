"""Connections in whose calls a test may let replies and requests be lost, in a loop of its own.

Holds no test; the state machines over the scripts work with it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.scripts import NO_NEEDS, Needs, ScriptCall


class Tapped(Connections):
    """Connections that record every call, and lose those that a test chooses.

    Attributes:
        calls: Every call that was sent.
        faults: What happens to the next calls: "request" is lost before it arrives, "reply" after.
    """

    def __init__(self, opened: Connections) -> None:
        super().__init__(
            opened.client, opened.blocking_client, opened._generation, is_cluster=False
        )
        self.calls: list[ScriptCall] = []
        self.faults: deque[str] = deque()

    async def run(self, calls: Sequence[ScriptCall], *, needs: Needs = NO_NEEDS) -> list[Any]:
        """Carry *calls*, or lose them, or their replies."""
        self.calls += calls
        fault = self.faults.popleft() if self.faults else ""
        if fault == "request":
            return [RedisConnectionError()] * len(calls)
        replies = await super().run(calls, needs=needs)
        return [RedisTimeoutError()] * len(calls) if fault else replies


@contextmanager
def tapped(url: Secret[str]) -> Iterator[tuple[asyncio.Runner, Tapped]]:
    """Yield an event loop, and connections open in it, for all the examples of a search."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        opened = runner.run(stack.enter_async_context(connect(url)))
        try:
            yield runner, Tapped(opened)
        finally:
            runner.run(stack.aclose())
