"""The command that replays the past: what the streams still hold, to one handler."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import click

from ..delivery import consumer_groups, dead_letters
from ..delivery.dead_letters import Chunk, Entry, EntryFilter
from ..errors import ConfigError
from ..parsers import FETCH
from ..storage.connections import Connections
from ..storage.keys import Keys
from . import bulk, defaults, selection, terminal


@click.command()
@click.argument("handler")
@selection.filters
@selection.by_type
@selection.everything
@selection.dry_run
@selection.yes
@terminal.json_option
def replay(
    handler: str,
    *,
    everything: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **filters: Any,
) -> None:
    """Deliver past transitions to a HANDLER again.

    It replays what the streams still hold, marked as a replay. What the handler has not
    acknowledged yet is left out: it is delivered anyway. When interrupted and called again, the
    command begins again.
    """
    selection.require_any((), filters, everything=everything)
    if handler == FETCH:
        raise ConfigError(["fetch has no history: what it has fetched is deleted"])
    defaults.require_configured(handler)
    name = dead_letters.new_name()

    async def find(connections: Connections, keys: Keys) -> AsyncIterator[Chunk]:
        if handler not in await consumer_groups.group_names(connections, keys):
            raise ConfigError([f"{handler} has no group yet: start its worker first"])
        async for chunk in dead_letters.history_chunks(connections, keys, EntryFilter(**filters)):
            yield chunk

    def adding_to(result: dict[str, Any], *, dry_run: bool) -> bulk.Act:
        async def act(connections: Connections, keys: Keys, entries: Sequence[Entry]) -> None:
            done = await dead_letters.replay(
                connections, keys, handler, entries, name=name, dry_run=dry_run
            )
            result["left_out"] += done.left_out
            result["would_replay" if dry_run else "replayed"] += done.replayed

        return act

    # The dry run asks Redis about each entry, since only the group knows what it has acknowledged.
    planned: dict[str, Any] = {"would_replay": 0, "left_out": 0}
    if dry_run or not yes:
        bulk.look(handler, find, adding_to(planned, dry_run=True))
        if dry_run or not planned["would_replay"]:
            bulk.print_result(planned, as_json=as_json)
            return
        count = planned["would_replay"]
        click.confirm(f"Deliver {count} transitions to {handler} again?", abort=True, err=True)
    result = {"replay": name, "replayed": 0, "left_out": 0}
    act = adding_to(result, dry_run=False)
    bulk.change("replay.made", find, act, result, handler=handler, filters=filters, as_json=as_json)
