"""How far handlers are behind, whoever works for them. What follows is others' business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .connections import Connections, Script, ScriptCall
from .layout import Keys

_LAG = Script("lag")


class Lag(NamedTuple):
    """What one handler has not settled in one partition.

    Attributes:
        entries: How many, replays included; None when Redis does not know.
        oldest_s: Seconds since the oldest of them was admitted; 0 when there is none.
        dead: How many dead letters there are.
    """

    entries: int | None
    oldest_s: float
    dead: int


async def lags(
    connections: Connections, keys: Keys, places: Sequence[tuple[str, int]]
) -> list[Lag | Exception]:
    """Measure what is not settled, for each handler and partition, in one round trip."""
    replies = await connections.run([_call(keys, *place) for place in places])
    return [
        reply
        if isinstance(reply, Exception)
        else Lag(None if reply[0] < 0 else reply[0], oldest_s=reply[1] / 1000, dead=reply[2])
        for reply in replies
    ]


def _call(keys: Keys, handler: str, partition: int) -> ScriptCall:
    streams = [keys.transitions(partition), keys.replays(partition, handler)]
    return ScriptCall(_LAG, [*streams, keys.dead(partition, handler)], [handler])
