"""The pages of `GET /v1/events`: every event once, the oldest first, and no page is trusted."""

from __future__ import annotations

from collections.abc import Sequence
from types import AsyncGeneratorType
from typing import Any

import orjson
import pytest

from service.errors import ApiError, ApiErrorReason
from service.stripe_api import event_pages
from service.stripe_api.client import Caller, StripeApi
from service.stripe_api.event_pages import ListedEvent, read_window, read_windows
from service.stripe_api.rate_limit import Priority
from service.transitions.lifecycle import TYPE_RANKS
from tests.support.stripe_api import StripeStandIn, answer

TYPES = [*TYPE_RANKS]
TEST = Caller(is_live=False)
NOW = 1_790_000_000


def create(stand_in: StripeStandIn, sessions: int, *, at: float) -> None:
    """Create sessions in one second, with one event each."""
    stand_in.clock.stop(at)
    for _ in range(sessions):
        stand_in.sessions.create()


def made(stand_in: StripeStandIn) -> list[str | None]:
    """Return the ids of all events, in the order in which they were made."""
    return [event.id for event in stand_in.events.all]


async def read_all(
    api: StripeApi, first: int, last: int, *, types: Sequence[str] = TYPES, caller: Caller = TEST
) -> list[ListedEvent]:
    """Return the events of some seconds, read window by window."""
    windows = read_windows(api, caller, types, first, last, priority=Priority.RECONCILE)
    found, next_first = [], first
    async for window in windows:
        assert window.first == next_first
        assert window.is_complete
        assert all(window.first <= event.created <= window.last for event in window.events)
        next_first = window.last + 1
        found += window.events
    assert next_first == last + 1
    return found


async def test_no_window_is_kept(stand_in: StripeStandIn, api: StripeApi) -> None:
    """While many accounts are read side by side, none keeps what has been used of it."""
    create(stand_in, 1, at=NOW)
    windows = read_windows(api, TEST, TYPES, NOW, NOW, priority=Priority.BACKFILL)

    window = await anext(windows)

    assert len(window.events) == 1
    assert isinstance(windows, AsyncGeneratorType)
    assert windows.ag_frame is not None
    kept = windows.ag_frame.f_locals.values()
    assert window not in kept
    assert [window] not in kept
    await windows.aclose()


async def test_ten_thousand_events_in_one_window(stand_in: StripeStandIn, api: StripeApi) -> None:
    """A window with too many pages is cut; no event is missed, none comes twice."""
    for second in range(100):
        create(stand_in, 100, at=NOW + second)

    found = await read_all(api, NOW - 3600, NOW + 100)

    assert [event.event_id for event in found] == made(stand_in)
    assert [event.created for event in found] == [NOW + n // 100 for n in range(10_000)]
    assert len(stand_in.requests) < 220


async def test_bursts_within_one_second(
    stand_in: StripeStandIn, api: StripeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second that cannot be cut is read to its end, across the borders of pages."""
    monkeypatch.setattr(event_pages, "MAX_PAGES", 2)
    for second in (0, 1, 7):
        create(stand_in, 250, at=NOW + second)

    found = await read_all(api, NOW, NOW + 10)

    assert [event.event_id for event in found] == made(stand_in)


async def test_a_second_that_does_not_end(
    stand_in: StripeStandIn, api: StripeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages of one second are bounded."""
    monkeypatch.setattr(event_pages, "MAX_PAGES_OF_ONE_SECOND", 2)
    create(stand_in, 250, at=NOW)
    with pytest.raises(ApiError, match=ApiErrorReason.UNEXPECTED):
        await read_all(api, NOW, NOW)


async def test_a_burst_in_a_quiet_month(
    stand_in: StripeStandIn, api: StripeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows are short only where much has happened."""
    monkeypatch.setattr(event_pages, "MAX_PAGES", 4)
    month = 29 * 86_400
    create(stand_in, 1, at=NOW - month)
    for second in range(10):
        create(stand_in, 100, at=NOW - 86_400 + second)
    create(stand_in, 1, at=NOW)

    found = await read_all(api, NOW - month, NOW)

    assert [event.event_id for event in found] == made(stand_in)
    assert len(stand_in.requests) < 60


async def test_the_newest_pages_of_a_window(stand_in: StripeStandIn, api: StripeApi) -> None:
    """A reader that wants few pages gets the newest events, in order."""
    for second in range(3):
        create(stand_in, 60, at=NOW + second)

    window = await read_window(api, TEST, TYPES, NOW, NOW + 2, priority=Priority.FETCH, max_pages=1)

    assert not window.is_complete
    assert window.pages == 1
    assert [event.event_id for event in window.events] == made(stand_in)[-100:]


async def test_types_account_and_bodies(stand_in: StripeStandIn, api: StripeApi) -> None:
    """Only events of the account and types that were asked for are read, as they are."""
    connected = stand_in.directory.connect()
    create(stand_in, 1, at=NOW)
    session = stand_in.sessions.create_verified(stand_in.scope(connected.id))

    [event] = await read_all(
        api, NOW, NOW, types=[TYPES[3]], caller=Caller(is_live=False, account=connected.id)
    )

    expected = stand_in.events.about(session.id)[-1]
    assert (event.event_id, event.session_id) == (expected.id, session.id)
    assert (event.event_type, event.created) == (TYPES[3], NOW)
    assert orjson.loads(event.body) == expected.as_snapshot()


def listed(*, id: str = "evt_1", session: str = "vs_1", **changes: Any) -> dict[str, Any]:
    """Return an event as a page may hold it."""
    return {
        "object": "event",
        "id": id,
        "type": TYPES[0],
        "created": NOW,
        "livemode": False,
        "data": {"object": {"id": session}},
        **changes,
    }


def page(*events: Any, has_more: bool = False, **changes: Any) -> bytes:
    """Return a page."""
    return orjson.dumps({"object": "list", "data": events, "has_more": has_more, **changes})


UNEXPECTED = {
    "empty": b"",
    "another kind of JSON": b"[]",
    "broken": b'{"object":"list","has_more":false,"data":[}',
    "not UTF-8": b"\xff",
    "nested too deeply": b"[" * 100_000,
    "no list": page(object="event"),
    "more without any": page(has_more=True),
    "one event twice": page(listed(), listed()),
    "the oldest first": page(listed(created=NOW - 1), listed(id="evt_2")),
    "too many events": page(*(listed(id=f"evt_{n}") for n in range(101))),
    "no events": page(listed(object="v2.core.event")),
    "an id with a path": page(listed(id="evt_../x")),
    "a session with a path": page(listed(session="vs_1/reports")),
    "another type": page(listed(type="charge.succeeded")),
    "another mode": page(listed(livemode=True)),
    "after the window": page(listed(created=NOW + 1)),
    "before the window": page(listed(created=NOW - 61)),
    "a time in words": page(listed(created="today")),
    "without fields": page({"id": "evt_1"}),
    "null": page(None),
}


@pytest.mark.parametrize("body", UNEXPECTED.values(), ids=UNEXPECTED.keys())
async def test_what_is_no_such_page(body: bytes, stand_in: StripeStandIn, api: StripeApi) -> None:
    """A page that is not as asked for ends the reading, and nothing of it is kept."""
    stand_in.faults.add(answer(body))
    with pytest.raises(ApiError, match=ApiErrorReason.UNEXPECTED) as caught:
        await read_all(api, NOW - 60, NOW)
    assert caught.value.__context__ is caught.value.__cause__ is None


async def test_pages_that_repeat(stand_in: StripeStandIn, api: StripeApi) -> None:
    """Pages that bring nothing new do not keep the reader for ever."""
    stand_in.faults.add(answer(page(listed(), has_more=True)))
    with pytest.raises(ApiError, match=ApiErrorReason.UNEXPECTED):
        await read_all(api, NOW - 60, NOW)
