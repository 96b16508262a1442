"""How far handlers are behind, whoever works for them. What follows is others' business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..storage.connections import Connections
from ..storage.layout import Keys
from ..storage.scripts import Script, ScriptCall

_LAG = Script(__package__, "lua/lag.lua")


class Lag(NamedTuple):
    """What one handler has not settled in one partition.

    Attributes:
        transitions: How many transitions; None when Redis does not know.
        replays: How much of what is replayed to it.
        oldest_s: Seconds since the oldest of the transitions was admitted; 0 when there is none.
        dead: How many dead letters there are.
    """

    transitions: int | None
    replays: int
    oldest_s: float
    dead: int

    @property
    def entries(self) -> int | None:
        """How many entries, replays included; None when Redis does not know."""
        return None if self.transitions is None else self.transitions + self.replays


async def lags(
    connections: Connections, keys: Keys, places: Sequence[tuple[str, int]]
) -> list[Lag | Exception]:
    """Measure what is not settled, for each handler and partition, in one round trip."""
    if not places:
        return []
    replies = await connections.run([_call(keys, *place) for place in places])
    return [reply if isinstance(reply, Exception) else _lag(*reply) for reply in replies]


def _lag(transitions: int, replays: int, oldest_ms: int, dead: int) -> Lag:
    return Lag(None if transitions < 0 else transitions, replays, oldest_ms / 1000, dead)


def _call(keys: Keys, handler: str, partition: int) -> ScriptCall:
    streams = [keys.transitions(partition), keys.replays(partition, handler)]
    return ScriptCall(_LAG, [*streams, keys.dead(partition, handler)], [handler])
