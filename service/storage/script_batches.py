"""Single calls of scripts, by many callers, in few round trips.

A worker may have hundreds of mailboxes, each with a call under way. Each on a connection of its
own, they would exhaust the pool as soon as Redis is some milliseconds away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .batching import Batcher
from .connections import Argument, Connections, Script, ScriptCall
from .pipeline import NOTHING, Needs

# Bounds what one reply may hold, and for how long it keeps the others waiting.
MAX_CALLS_PER_BATCH = 128


class ScriptBatches:
    """Runs scripts; what is asked for in one turn of the event loop shares a round trip.

    In Cluster only calls to one primary do: while one fails, the others' calls go on.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._batchers: dict[tuple[str, Needs], Batcher[ScriptCall, Any]] = {}

    async def run_one(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[Argument],
        *,
        needs: Needs = NOTHING,
    ) -> Any:
        """Run one script and return its reply; *needs* as for `Connections.run`.

        Raises:
            RedisError: The call failed, or nobody knows whether it did.
        """
        lane = (self._connections.place(keys[0]), needs)
        batcher = self._batchers.get(lane)
        if batcher is None:

            async def run(calls: Sequence[ScriptCall]) -> list[Any]:
                return await self._connections.run(calls, needs=needs)

            batcher = self._batchers[lane] = Batcher(run, most=MAX_CALLS_PER_BATCH)
        return await batcher.submit(ScriptCall(script, keys, arguments))
