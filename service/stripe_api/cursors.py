"""How far the events of each account have been read: a cursor in Redis, moved under a lease."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..config import MAX_CLOCK_DIFFERENCE_S
from ..delivery.leases import Lease
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.scripts import Script
from .client import Caller

_MOVE = Script(__package__, "move_cursor.lua")
_STORED = re.compile(rb"([0-9]{1,12}) ([0-9]{1,12})")


class Cursor(NamedTuple):
    """How far the events of one account have been read.

    Attributes:
        read_until: All events that were created up to this Unix second are known here.
        began_at: When the first reading began, in Unix seconds. No webhook was expected for an
            event from before.
    """

    read_until: int
    began_at: int


async def read_cursors(connections: Connections, keys: Keys, now: float) -> dict[str, Cursor]:
    """Return all cursors, each by the `account_field` of its account.

    One that is further ahead of *now* than clocks may differ was moved by a clock that was wrong.
    It says nothing about what has been read, so it counts as missing.

    Raises:
        RedisError: Redis did not answer.
    """
    stored = await connections.client.hgetall(keys.reconcile)
    return {
        field.decode(errors="replace"): Cursor(int(found[1]), int(found[2]))
        for field, value in stored.items()
        if (found := _STORED.fullmatch(value)) and int(found[1]) <= now + MAX_CLOCK_DIFFERENCE_S
    }


async def move_cursor(lease: Lease, keys: Keys, caller: Caller, cursor: Cursor) -> None:
    """Move the cursor of an account, but not beyond the present second of Redis's clock.

    One that is there already or further stays.

    Raises:
        LeaseLostError: Another worker reconciles now.
        RedisError: It is unknown whether it was moved.
    """
    await lease.run(
        _MOVE,
        [keys.reconcile],
        *(account_field(caller), cursor.read_until, cursor.began_at, MAX_CLOCK_DIFFERENCE_S),
    )


def account_field(caller: Caller) -> str:
    """Return the name of an account: `live` or `test`, and the id of a connected account."""
    mode = "live" if caller.is_live else "test"
    return mode if caller.account is None else f"{mode} {caller.account}"
