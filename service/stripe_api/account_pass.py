"""Reconciles one account: reads what Stripe lists, admits what is unknown, moves the cursor.

THE RULE. A pass reads from a little before the cursor up to a little before now, because Stripe
lists an event up to a minute after it was created. The cursor moves behind each window, once every
event of the window is known here. Now and then a pass begins earlier: for events that were listed
even later, and for those that a Redis which failed over has forgotten again.

An event that is admitted here although a webhook should have brought it counts as recovered. No
webhook was expected for events from before the account's first pass. A thin notification that waits
to be fetched has brought its event.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import NamedTuple

import structlog

from ..delivery.leases import Lease
from ..inbox.admission import Outcome
from ..inbox.decision_log import record_decision
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..telemetry import metrics
from .client import EVENTS_KEPT_S, Caller, StripeApi
from .cursors import Cursor, account_field, move_cursor, read_cursors
from .event_pages import read_windows
from .rate_limit import Priority
from .window_admission import Decided, Unusable, WindowAdmission

log: structlog.stdlib.BoundLogger = structlog.get_logger()

# Returns the types of the events that the endpoints of an account select.
SelectTypes = Callable[[StripeApi, Caller], Awaitable[Sequence[str]]]


class Lookback(NamedTuple):
    """A pass that begins earlier: how often, and how many seconds before now."""

    every_s: int
    reach_s: int


# How far behind now a pass ends, how far before the cursor it begins, and when it begins earlier.
DELAY_S = 60
OVERLAP_S = 90
LOOKBACKS = (Lookback(600, 900), Lookback(3600, 3 * 3600))


class AccountPasses:
    """The passes over the events of one account.

    Args:
        caller: The account.
        api: Stripe's API.
        admission: Admits what is unknown.
        connections: Open clients of Redis.
        keys: The layout.
        select_types: Chooses the types of the events.
        start_of: Returns where the first pass begins that begins at a given time.
    """

    def __init__(
        self,
        caller: Caller,
        api: StripeApi,
        admission: WindowAdmission,
        connections: Connections,
        keys: Keys,
        *,
        select_types: SelectTypes,
        start_of: Callable[[float], float],
    ) -> None:
        self._caller = caller
        self._api = api
        self._admission = admission
        self._connections = connections
        self._keys = keys
        self._select_types = select_types
        self._start_of = start_of
        # A worker that takes over does not know when the last one looked back.
        self._looked_back_at = dict.fromkeys(LOOKBACKS, 0.0)

    async def run(self, lease: Lease, now: float) -> None:
        """Read and admit everything up to a little before *now*, in Unix seconds.

        Raises:
            ApiError: Stripe did not answer, or not as expected.
            LeaseLostError: Another worker reconciles now.
            RedisError: Redis did not answer.
            Unavailable: Redis did not decide on an event.
        """
        cursors = await read_cursors(self._connections, self._keys, now)
        cursor = cursors.get(account_field(self._caller)) or await self._begin(lease, int(now))
        # A clock that was set back must not put off what finds the events missed meanwhile.
        due = [
            each for each, at in self._looked_back_at.items() if not 0 <= now - at < each.every_s
        ]
        windows = read_windows(
            self._api,
            self._caller,
            await self._select_types(self._api, self._caller),
            self._first_second(cursor, due, int(now)),
            int(now) - DELAY_S,
            priority=Priority.RECONCILE,
        )
        async with aclosing(windows):
            async for window in windows:
                async for each in self._admission.admit_unknown(self._caller, window.events):
                    _record(each, cursor)
                read = cursor._replace(read_until=window.last)
                await move_cursor(lease, self._keys, self._caller, read)
        self._looked_back_at |= dict.fromkeys(due, now)

    async def _begin(self, lease: Lease, now: int) -> Cursor:
        """Make the cursor of an account that has none: what follows may be much history."""
        cursor = Cursor(read_until=max(0, int(self._start_of(now))), began_at=now)
        await move_cursor(lease, self._keys, self._caller, cursor)
        log.warning("reconcile.began", **describe(self._caller), read_from=cursor.read_until)
        return cursor

    def _first_second(self, cursor: Cursor, due: Sequence[Lookback], now: int) -> int:
        """Return where a pass begins; never before the first pass did."""
        usual = cursor.read_until - OVERLAP_S
        # After an outage the late ones are those from before it.
        read_until = min(cursor.read_until, now)
        wanted = min([usual, *(read_until - each.reach_s for each in due)])
        began_from = int(self._start_of(cursor.began_at))
        # If it is later than the cursor, the setting was changed after the first pass.
        if began_from <= cursor.read_until:
            wanted = max(wanted, began_from)
        return max(wanted, now - EVENTS_KEPT_S)


def describe(caller: Caller) -> dict[str, bool | str | None]:
    """Return what log lines say about an account."""
    return {"livemode": caller.is_live, "account": caller.account}


def _record(found: Decided | Unusable, cursor: Cursor) -> None:
    """Count and log what became of an event that was not known."""
    if isinstance(found, Unusable):
        log.error(
            "event.unusable",
            event_id=found.listed.event_id,
            event_type=found.listed.event_type,
            reason=found.rejected.reason,
            field=found.rejected.field,
        )
        return
    fields, is_warning = record_decision(found.event, found.change, found.admission)
    outcome = found.admission.outcome
    is_recovered = (
        outcome is Outcome.ADMITTED
        and found.event.created > cursor.began_at
        and not found.was_noted
    )
    if is_recovered:
        metrics.EVENTS_RECOVERED.inc()
    write = log.warning if is_recovered or is_warning else log.info
    fields |= {"outcome": outcome, "created": found.event.created}
    write("event.recovered" if is_recovered else "event.reconciled", **fields)
