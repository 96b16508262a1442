"""Reads `GET /v1/events`: one window of seconds, or a long time window by window.

Stripe lists events newest first, but they must be admitted oldest first. So a window is read to its
end before anything of it is used. A window that is too long is cut, and its oldest part read first:

    it has more than MAX_PAGES pages      it is cut in half, and once more at the oldest event that
                                          was read: what came after that is short enough
    it is one second, and has more        it cannot be cut: all its pages are read

So no page is read more than about twice, whether a month is quiet, busy or has a burst.

Nothing here trusts a page. One that brings no new event, is out of order, or holds an event of
another second, type or mode than asked for ends the reading as `api_unexpected`.

The list shows an event up to a minute after it was created; callers have to look again.
https://docs.stripe.com/api/events/list
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec

from ..errors import ApiError, ApiErrorReason
from ..stripe.events import EventId, SessionId
from .client import ApiEndpoint, Caller, StripeApi, decode_answer
from .rate_limit import Priority

PAGE_EVENTS = 100
# 5,000 events: about 15 MB of memory.
MAX_PAGES = 50
MAX_PAGES_OF_ONE_SECOND = 1000


class ListedEvent(NamedTuple):
    """One event of a page.

    Attributes:
        event_id: `evt_…`.
        event_type: `identity.verification_session.` and a word.
        created: Unix seconds.
        session_id: The session that it is about.
        body: The event as it is listed: JSON.
    """

    event_id: str
    event_type: str
    created: int
    session_id: str
    body: bytes


class Window(NamedTuple):
    """The events of some seconds.

    Attributes:
        first: The first second, in Unix time.
        last: The last second; it belongs to the window.
        events: In the order in which they were created.
        pages: How many pages were read.
        is_complete: Whether these are all events; else there are older ones, which were not read.
    """

    first: int
    last: int
    events: list[ListedEvent]
    pages: int
    is_complete: bool


class _Session(msgspec.Struct, frozen=True, gc=False):
    id: SessionId


class _Wrapper(msgspec.Struct, frozen=True, gc=False):
    object: _Session


class _Placement(msgspec.Struct, frozen=True, gc=False):
    """What is needed of an event to place it; the rest is parsed where it is admitted."""

    object: Literal["event"]
    id: EventId
    type: str
    created: int
    livemode: bool
    data: _Wrapper


class _Page(msgspec.Struct, frozen=True, gc=False):
    object: Literal["list"]
    has_more: bool
    data: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=PAGE_EVENTS)]


_decode_page = msgspec.json.Decoder(_Page).decode
_decode_placement = msgspec.json.Decoder(_Placement).decode


async def read_windows(
    api: StripeApi,
    caller: Caller,
    types: Sequence[str],
    created_gte: int,
    created_lte: int,
    *,
    priority: Priority,
) -> AsyncGenerator[Window]:
    """Yield all events between two Unix seconds, window by window, the oldest first.

    Raises:
        ApiError: Stripe did not answer, or not as expected.
    """
    first, lasts = created_gte, [created_lte]
    while lasts and first <= created_lte:
        last = lasts[-1]
        window = await read_window(
            api,
            caller,
            types,
            first,
            last,
            priority=priority,
            max_pages=MAX_PAGES if first < last else MAX_PAGES_OF_ONE_SECOND,
        )
        if window.is_complete:
            first = lasts.pop() + 1
            # Many accounts may be read side by side: no window is kept while the next is awaited.
            held = [window]
            del window
            yield held.pop()
        elif first < last:
            cut, middle = min(window.events[0].created, last - 1), (first + last) // 2
            lasts += [cut, middle] if middle < cut else [cut]
        else:
            raise ApiError(ApiErrorReason.UNEXPECTED)


async def read_window(
    api: StripeApi,
    caller: Caller,
    types: Sequence[str],
    created_gte: int,
    created_lte: int,
    *,
    priority: Priority,
    max_pages: int,
) -> Window:
    """Return the events of one window, or the newest of them if there are too many pages.

    Args:
        api: Stripe's API.
        caller: Whose events.
        types: Their types, at most 20.
        created_gte: The first second, in Unix time.
        created_lte: The last second, which belongs to the window.
        priority: How this reading competes with others for the rate.
        max_pages: After how many pages to stop.

    Raises:
        ApiError: Stripe did not answer, or not as expected.
    """
    query = [
        *(("types[]", event_type) for event_type in types),
        ("created[gte]", str(created_gte)),
        ("created[lte]", str(created_lte)),
        ("limit", str(PAGE_EVENTS)),
    ]
    listed = _Listed(types, created_gte, created_lte, is_live=caller.is_live)
    while listed.has_more and listed.pages < max_pages:
        after = [("starting_after", listed.newest_first[-1].event_id)] if listed.pages else []
        body = await api.get(
            "/v1/events",
            [*query, *after],
            caller=caller,
            priority=priority,
            endpoint=ApiEndpoint.EVENTS,
        )
        listed.add_page(body)
    return Window(
        created_gte,
        created_lte,
        events=listed.newest_first[::-1],
        pages=listed.pages,
        is_complete=not listed.has_more,
    )


class _Listed:
    """The pages of one window so far."""

    def __init__(
        self, types: Sequence[str], created_gte: int, created_lte: int, *, is_live: bool
    ) -> None:
        self._types = types
        self._created_gte = created_gte
        self._created_lte = created_lte
        self._is_live = is_live
        self._ids: set[str] = set()
        self.newest_first: list[ListedEvent] = []
        self.has_more = True
        self.pages = 0

    def add_page(self, body: bytes) -> None:
        """Add the events of the next page.

        Raises:
            ApiError: It is not such a page.
        """
        page = decode_answer(_decode_page, body)
        for raw in page.data:
            self._add_event(bytes(raw))
        if page.has_more and not page.data:
            raise ApiError(ApiErrorReason.UNEXPECTED)
        self.has_more = page.has_more
        self.pages += 1

    def _add_event(self, body: bytes) -> None:
        found = decode_answer(_decode_placement, body)
        newest = self.newest_first[-1].created if self.newest_first else self._created_lte
        is_expected = (
            self._created_gte <= found.created <= newest
            and found.id not in self._ids
            and found.type in self._types
            and found.livemode == self._is_live
        )
        if not is_expected:
            raise ApiError(ApiErrorReason.UNEXPECTED)
        self._ids.add(found.id)
        self.newest_first.append(
            ListedEvent(found.id, found.type, found.created, found.data.object.id, body)
        )
