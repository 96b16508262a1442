"""What each handler has to do, and who does it: the state of the consumer groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..config import Settings
from ..delivery import consumer_groups
from ..delivery.consumer import FAILURE_WEIGHT
from ..delivery.consumer_groups import Group
from ..delivery.sources import source_of
from ..parsers import FETCH
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.scripts import Script, ScriptCall, raise_first

# Per handler and partition.
MAX_FAILING_COUNTED = 100

CIRCUIT = Script(__package__, "circuit.lua")
_HANDLER_STATE = Script(__package__, "handler_state.lua")


class HandlerState(NamedTuple):
    """One handler's consumer group, over all partitions.

    Attributes:
        name: The handler's name.
        kind: What it gets: `transitions`, or for `fetch` `notifications`.
        is_configured: Whether it is among HANDLERS, or a worker calls it, or it is `fetch`.
        lag: What it has not acknowledged of its stream; None when unknown.
        replays: Replays that it has not acknowledged.
        oldest_s: Seconds since the oldest of those was appended; 0 for none.
        dead_letters: Its dead letters.
        is_circuit_open: Whether its destination is unreachable, so that it is only probed.
        workers: How many live workers call it.
        leases: For each partition the name of the process that has its lease; None for none.
        failing: How many entries have failed and are retried; at most 100 are counted in each
            partition.
    """

    name: str
    kind: str
    is_configured: bool
    lag: int | None
    replays: int
    oldest_s: float
    dead_letters: int
    is_circuit_open: bool
    workers: int
    leases: tuple[str | None, ...]
    failing: int


async def read_handlers(
    connections: Connections, keys: Keys, settings: Settings
) -> tuple[HandlerState, ...]:
    """Return the state of each consumer group, in the order of HANDLERS and then by name.

    Workers create the groups of all HANDLERS when they start; before that there are none.

    Raises:
        RedisError: Redis did not answer.
    """
    groups = await consumer_groups.list_groups(connections, keys)
    if not groups:
        return ()
    names = [group.handler for group in groups]
    partitions = range(keys.partitions)
    live_workers = await consumer_groups.count_workers(
        connections, keys, names, lease_ttl_s=settings.lease_ttl_s
    )
    calls = [_call(keys, name, partition) for name in names for partition in partitions]
    replies = await connections.run(
        [*calls, *(ScriptCall(CIRCUIT, [keys.circuit(name)], []) for name in names)]
    )
    raise_first(replies)
    states = [
        _state(
            group,
            settings,
            replies[i * len(partitions) : (i + 1) * len(partitions)],
            is_circuit_open=bool(replies[len(calls) + i]),
            workers=live_workers[i],
        )
        for i, group in enumerate(groups)
    ]
    order = {name: place for place, name in enumerate([*settings.handlers, FETCH])}
    return tuple(sorted(states, key=lambda one: (order.get(one.name, len(order)), one.name)))


def _state(
    group: Group,
    settings: Settings,
    parts: Sequence[tuple[int, bytes | None]],
    *,
    is_circuit_open: bool,
    workers: int,
) -> HandlerState:
    name = group.handler
    return HandlerState(
        name=name,
        kind=source_of(name).kind,
        # The settings of who looks may be others than those of the workers.
        is_configured=name in (*settings.handlers, FETCH) or bool(workers),
        lag=group.lag,
        replays=group.replays,
        oldest_s=group.oldest_s,
        dead_letters=group.dead_letters,
        is_circuit_open=is_circuit_open,
        workers=workers,
        leases=tuple(_process_name(token) for _, token in parts),
        failing=sum(failing for failing, _ in parts),
    )


def _call(keys: Keys, handler: str, partition: int) -> ScriptCall:
    return ScriptCall(
        _HANDLER_STATE,
        [source_of(handler).stream(keys, partition), keys.lease(partition, handler)],
        [handler, FAILURE_WEIGHT, MAX_FAILING_COUNTED],
    )


def _process_name(token: bytes | None) -> str | None:
    """Return the process of a lease's token: `host-pid-number of the worker:secret`."""
    text = (token or b"").decode(errors="replace")
    return text.rpartition(":")[0].rpartition("-")[0] or None
