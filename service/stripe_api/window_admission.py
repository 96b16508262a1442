"""Admits what the session records lack of the events of a window, the oldest first.

An event that is known costs one look into its session's record, and nothing is written for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from typing import NamedTuple

import msgspec

from ..config import Settings
from ..errors import ApiError, ApiErrorReason, Rejected, Unavailable
from ..inbox.admission import MAX_EVENTS_PER_BATCH, Admission, Inbox
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..stripe.events import ApiPayload, Event, parse
from ..transitions.transition import Origin, SessionChange, make_change
from .client import Caller
from .event_pages import ListedEvent
from .unknown_events import find_noted, find_unknown


class Decided(NamedTuple):
    """What became of an event that was admitted.

    Attributes:
        event: The event.
        change: The part of it that may leave the process.
        admission: The decision on it.
        was_noted: Whether it was to be fetched anyway, because its thin notification had come.
    """

    event: Event
    change: SessionChange
    admission: Admission
    was_noted: bool


class Unusable(NamedTuple):
    """An event that cannot be admitted as it is, and why."""

    listed: ListedEvent
    rejected: Rejected


class WindowAdmission:
    """Admits the unknown events of windows.

    Args:
        connections: Open clients of Redis.
        keys: The layout.
        settings: How events are admitted.
    """

    def __init__(self, connections: Connections, keys: Keys, settings: Settings) -> None:
        self._connections = connections
        self._keys = keys
        # Stripe lists no event that is too old to admit.
        self._inbox = Inbox(connections, keys, settings, judges_age=False)
        self._account_name = settings.account_name or None

    async def find_unknown(self, events: Sequence[ListedEvent]) -> list[ListedEvent]:
        """Return the events that no session record knows.

        Raises:
            RedisError: Redis did not answer.
        """
        return await find_unknown(self._connections, self._keys, events)

    async def admit_unknown(
        self, caller: Caller, events: Sequence[ListedEvent]
    ) -> AsyncGenerator[Decided | Unusable]:
        """Admit the events that no session record knows; yield what became of these.

        An event on which Redis does not decide holds up only the later ones of its session.

        Args:
            caller: Whose events they are.
            events: In the order in which they were created.

        Raises:
            ApiError: An event belongs to another account; it and those after it are not admitted.
            RedisError: Redis did not answer.
            Unavailable: Raised at the end: Redis did not decide on all of them.
        """
        unknown = await self.find_unknown(events)
        noted = await find_noted(self._connections, self._keys, unknown)
        undecided: dict[str, Unavailable] = {}
        while unknown:
            batch, unknown = unknown[:MAX_EVENTS_PER_BATCH], unknown[MAX_EVENTS_PER_BATCH:]
            # Batch by batch: a whole window of parsed events takes as much memory as its pages, and
            # to parse it takes longer than other tasks may wait.
            parsed = [_parse(caller, listed) for listed in batch]
            found = await asyncio.gather(*(self._admit(one, noted) for one in parsed))
            for listed, one in zip(batch, found, strict=True):
                if isinstance(one, Unavailable):
                    undecided[listed.session_id] = one
                else:
                    yield one
            if all(isinstance(one, Unavailable) for one in found):
                break
            unknown = [listed for listed in unknown if listed.session_id not in undecided]
        for error in undecided.values():
            raise error

    async def _admit(
        self, event: Event | Unusable, noted: Collection[str]
    ) -> Decided | Unusable | Unavailable:
        if isinstance(event, Unusable):
            return event
        change = make_change(event, origin=Origin.EVENTS_API, account_name=self._account_name)
        try:
            admission = await self._inbox.admit(event, change)
        except Unavailable as error:
            return error
        return Decided(event, change, admission, was_noted=event.id in noted)


def _parse(caller: Caller, listed: ListedEvent) -> Event | Unusable:
    """Return an event with the account that it was read from.

    Stripe names the account in the webhooks of connected accounts, but need not in what is read in
    the name of that account.
    """
    try:
        event = parse(ApiPayload(listed.body))
    except Rejected as rejected:
        return Unusable(listed, rejected)
    if not isinstance(event, Event):
        raise ApiError(ApiErrorReason.UNEXPECTED)
    if caller.account is None:
        return event
    if event.account not in {None, caller.account}:
        raise ApiError(ApiErrorReason.UNEXPECTED)
    return msgspec.structs.replace(event, account=caller.account)
