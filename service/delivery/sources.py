"""What a handler consumes: transitions, or the notifications of thin events.

Each partition has a stream of either kind. A handler of HANDLERS has a consumer group on the
streams of transitions. The reserved handler `fetch` alone has one on the streams of notifications,
so what it has acknowledged is deleted: all that such a stream holds is still to be fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from ..parsers import FETCH
from ..storage.keys import Keys
from ..transitions import stream_entry, thin_notification
from ..transitions.thin_notification import Notification
from ..transitions.transition import StatusTransition

Item: TypeAlias = StatusTransition | Notification


class Source(NamedTuple):
    """One kind of streams, and what its entries are.

    Attributes:
        kind: What its entries are, in the plural.
        stream: Returns the key of a partition's stream.
        unpack: Returns what an entry's fields hold; raises `ValueError` if it cannot be read.
        fields: The names of the fields that `unpack` needs, which are those that a replay copies.
        delete_on_ack: Whether an entry is deleted when it is acknowledged.
    """

    kind: str
    stream: Callable[[Keys, int], str]
    unpack: Callable[[Mapping[bytes, bytes]], Item]
    fields: tuple[str, ...]
    delete_on_ack: bool


TRANSITIONS = Source(
    "transitions",
    Keys.transitions,
    stream_entry.unpack,
    ("change", "previous", "sequence", "epoch"),
    delete_on_ack=False,
)
NOTIFICATIONS = Source(
    "notifications",
    Keys.notifications,
    thin_notification.unpack,
    ("notification",),
    delete_on_ack=True,
)

SOURCES = (TRANSITIONS, NOTIFICATIONS)


def source_of(handler: str) -> Source:
    """Return what a handler consumes."""
    return NOTIFICATIONS if handler == FETCH else TRANSITIONS


def log_fields(item: Item) -> dict[str, str | int]:
    """Return what log lines and spans may say about an item."""
    described: dict[str, str | int] = {"event_id": item.event_id, "session_id": item.session_id}
    if isinstance(item, StatusTransition):
        described["sequence"] = item.sequence
    return described
