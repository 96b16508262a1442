"""What is known here of the events that Stripe lists. Only reads, so that asking costs little.

Whether an event is unknown is decided again when it is admitted: its webhook may come meanwhile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.scripts import Script, ScriptCall, raise_first
from ..transitions import thin_notification
from .event_pages import ListedEvent

# Bounds the time for which one call blocks Redis: about half a millisecond.
MAX_EVENTS_PER_CALL = 500
# How many waiting notifications of a partition are looked at.
MAX_NOTIFICATIONS = 10_000
# By how much a notification may be older, by Redis's clock, than Stripe says.
MAX_CLOCK_LAG_S = 300

_UNKNOWN = Script(__package__, "unknown_events.lua")


async def find_unknown(
    connections: Connections, keys: Keys, events: Sequence[ListedEvent]
) -> list[ListedEvent]:
    """Return those of *events* that no session record knows, in their order.

    Raises:
        RedisError: Redis did not answer.
    """
    asked: list[list[ListedEvent]] = []
    calls = []
    for partition, found in _by_partition(keys, events).items():
        for start in range(0, len(found), MAX_EVENTS_PER_CALL):
            few = found[start : start + MAX_EVENTS_PER_CALL]
            records = [keys.session_in(partition, event.session_id) for event in few]
            asked.append(few)
            calls.append(ScriptCall(_UNKNOWN, records, [event.event_id for event in few]))
    replies = await connections.run(calls)
    raise_first(replies)
    unknown = {
        few[number - 1].event_id
        for few, numbers in zip(asked, replies, strict=True)
        for number in numbers
    }
    return [event for event in events if event.event_id in unknown]


async def find_noted(
    connections: Connections, keys: Keys, events: Sequence[ListedEvent]
) -> set[str]:
    """Return the ids of those of *events* that wait as thin notifications, to be fetched.

    Where too many notifications wait to look at all of them, every event counts as one of them.

    Raises:
        RedisError: Redis did not answer.
    """
    noted: set[str] = set()
    for partition, found in _by_partition(keys, events).items():
        oldest_s = max(0, min(event.created for event in found) - MAX_CLOCK_LAG_S)
        entries = await connections.client.xrange(
            keys.notifications(partition), str(oldest_s * 1000), count=MAX_NOTIFICATIONS
        )
        waiting = {_change_of(fields) for _, fields in entries}
        noted |= {
            event.event_id
            for event in found
            if len(entries) == MAX_NOTIFICATIONS
            or (event.session_id, event.event_type, event.created) in waiting
        }
    return noted


def _change_of(fields: Mapping[bytes, bytes]) -> tuple[str, str, int] | None:
    """Return what a notification and its event share: session, type and second."""
    with suppress(ValueError):
        notification = thin_notification.unpack(fields)
        return notification.session_id, notification.event_type, notification.created
    return None


def _by_partition(keys: Keys, events: Iterable[ListedEvent]) -> dict[int, list[ListedEvent]]:
    found: dict[int, list[ListedEvent]] = defaultdict(list)
    for event in events:
        found[keys.partition(event.session_id)].append(event)
    return found
