"""Finds the events of many notifications with few requests.

One by one takes two requests each, and many notifications at once would exceed the rate. The list
of events brings a hundred for one request, but it shows an event up to a minute late. So, for each
account, in rounds:

    at most MAX_SINGLY wait    each is read singly (`single_events`)
    more wait                  pages of the list are read; what they lack waits for the next round.
                               What they have lacked for PATIENCE_S is read singly, the oldest
                               first, MAX_SINGLY at a time

Usually the list is a second or two late. Without patience, under load, single reads would use up
the rate of the whole deployment, and bring only a few events that much earlier.

A listed event is that of a notification if both have the same session, type and second, and no
other event and no other notification has them. Where there are others, the notification is read
singly.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple, TypeAlias
from weakref import WeakValueDictionary

from .. import cancellation
from ..errors import ApiError, ApiErrorReason
from ..stripe.events import Event
from ..transitions.thin_notification import Notification
from .client import Caller, StripeApi
from .event_pages import ListedEvent, read_window
from .rate_limit import Priority
from .single_events import caller_of, parse_snapshot, read_event

# Of one account, and of all accounts of this process together.
MAX_SINGLY = 10
# How long the first notification waits for others.
GATHER_S = 0.05
# After a round with pages, so that each page answers many.
ROUND_S = 0.5
PATIENCE_S = 3.0
MAX_PAGES_PER_WINDOW = 10
# For so many events it is remembered which notification got them.
MAX_REMEMBERED = 10_000

# The event of one notification, or None once it is to be read singly.
Turn: TypeAlias = "asyncio.Future[Event | None]"


class Rounds:
    """Finds the events of notifications, of all accounts; made by `open_rounds`."""

    def __init__(self, api: StripeApi) -> None:
        self._api = api
        self._slots = asyncio.Semaphore(MAX_SINGLY)
        # Each lives as long as a notification waits in it or its task runs.
        self._accounts: WeakValueDictionary[Caller, _Account] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._owners: dict[str, Notification] = {}

    async def find(self, notification: Notification) -> Event:
        """Return the event that *notification* announces.

        Raises:
            ApiError: Stripe has neither the event nor the session, or did not answer as it should.
            Unavailable: Redis, where the budget of requests is, did not answer.
        """
        account = self._account(caller_of(notification))
        turn = account.wait(notification)
        try:
            event = await turn or await self._read_singly(notification)
        finally:
            account.leave(turn)
        self._remember(event, notification)
        return event

    async def close(self) -> None:
        """End all rounds."""
        for task in [*self._tasks]:
            await cancellation.cancel_and_wait(task)

    async def _read_singly(self, notification: Notification) -> Event:
        async with self._slots:
            event = await read_event(self._api, notification)
            owner = self._owners.get(event.id, notification)
            if owner.event_id == notification.event_id:
                return event
            # The list had this event before one that looks alike, so another notification got it.
            # The event of that one is still missing.
            return await read_event(self._api, owner)

    def _account(self, caller: Caller) -> _Account:
        account = self._accounts.get(caller)
        if account is None:
            account = self._accounts[caller] = _Account(self._api, caller, self._may_get)
        if not account.is_running:
            account.is_running = True
            task = asyncio.create_task(account.run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return account

    def _may_get(self, notification: Notification, event: ListedEvent) -> bool:
        """Say whether no other notification has got *event*.

        Notifications of one session come one after the other. If the list lacks the second of two
        events that look alike, the first one must not be taken for it.
        """
        return self._owners.get(event.event_id, notification).event_id == notification.event_id

    def _remember(self, event: Event, notification: Notification) -> None:
        self._owners.setdefault(event.id, notification)
        if len(self._owners) > MAX_REMEMBERED:
            del self._owners[next(iter(self._owners))]


@asynccontextmanager
async def open_rounds(api: StripeApi) -> AsyncIterator[Rounds]:
    """Yield rounds, and end them afterwards."""
    rounds = Rounds(api)
    try:
        yield rounds
    finally:
        await rounds.close()


class _Look(NamedTuple):
    """By what a listed event and a notification are matched."""

    session_id: str
    event_type: str
    created: int


class _Waiting(NamedTuple):
    """One notification that waits for its turn, since a time of the loop's clock."""

    notification: Notification
    turn: Turn
    since: float

    @property
    def created(self) -> int:
        return self.notification.created

    @property
    def look(self) -> _Look:
        one = self.notification
        return _Look(one.session_id, one.event_type, one.created)


class _Account:
    """The notifications that wait for events of one account.

    Args:
        api: Reads the list.
        caller: The account and its mode.
        may_get: Says whether a notification may get a listed event.

    Attributes:
        is_running: Whether `run` was started and goes on.
    """

    def __init__(
        self, api: StripeApi, caller: Caller, may_get: Callable[[Notification, ListedEvent], bool]
    ) -> None:
        self.is_running = False
        self._api = api
        self._caller = caller
        self._may_get = may_get
        self._waiting: dict[Turn, _Waiting] = {}
        self._being_read: set[Turn] = set()

    def wait(self, notification: Notification) -> Turn:
        """Let *notification* wait for its turn."""
        loop = asyncio.get_running_loop()
        turn: Turn = loop.create_future()
        self._waiting[turn] = _Waiting(notification, turn, loop.time())
        return turn

    def leave(self, turn: Turn) -> None:
        """Forget a notification that has its event or gave up."""
        self._waiting.pop(turn, None)
        self._being_read.discard(turn)

    async def run(self) -> None:
        """Go on with rounds for as long as a notification waits."""
        try:
            await asyncio.sleep(GATHER_S)
            while self._waiting:
                pause_s = await self._run_round()
                await asyncio.sleep(pause_s)
        finally:
            self.is_running = False

    async def _run_round(self) -> float:
        """Give turns to those that wait; return the seconds until the next round."""
        waiting = sorted(self._waiting.values(), key=lambda one: one.created)
        are_many = len(waiting) + len(self._being_read) > MAX_SINGLY
        if are_many:
            await self._try_pages(waiting)
            came_before = asyncio.get_running_loop().time() - PATIENCE_S
            waiting = [
                one for one in waiting if one.turn in self._waiting and one.since <= came_before
            ]
        for one in waiting[: MAX_SINGLY - len(self._being_read)]:
            self._being_read.add(one.turn)
            self._give(one, None)
        return ROUND_S if are_many else GATHER_S

    async def _try_pages(self, waiting: Sequence[_Waiting]) -> None:
        """Read pages. If Stripe refuses, all that wait fail; after a wrong answer they wait on."""
        try:
            await self._read_pages(waiting)
        except Exception as error:  # noqa: BLE001 - each notification receives it
            if isinstance(error, ApiError) and error.reason is ApiErrorReason.UNEXPECTED:
                return
            for one in [*self._waiting.values()]:
                self._give(one, error)

    async def _read_pages(self, unread: Sequence[_Waiting]) -> None:
        """Read the list, newest first, for as long as each page answers a notification or more.

        Args:
            unread: Those that wait, the oldest first.
        """
        while unread:
            first, last = unread[0].created, unread[-1].created
            window = await read_window(
                self._api,
                self._caller,
                sorted({one.notification.event_type for one in unread}),
                first,
                last,
                priority=Priority.FETCH,
                max_pages=MAX_PAGES_PER_WINDOW,
            )
            # Of an incomplete window the oldest second may lack events.
            read_from = first if window.is_complete else window.events[0].created + 1
            covered = [one for one in unread if one.created >= read_from]
            unread = [one for one in unread if one.created < read_from]
            if self._match(covered, window.events) < window.pages:
                break

    def _match(self, waiting: Sequence[_Waiting], events: Sequence[ListedEvent]) -> int:
        """Give events to those that wait for them; return to how many."""
        looks = [_Look(one.session_id, one.event_type, one.created) for one in events]
        listed, times_listed = dict(zip(looks, events, strict=True)), Counter(looks)
        times_waiting = Counter(one.look for one in waiting)
        matched = 0
        for one in waiting:
            is_unique = times_listed[one.look] == times_waiting[one.look] == 1
            if is_unique and self._may_get(one.notification, listed[one.look]):
                with suppress(ApiError):
                    event = listed[one.look]
                    self._give(one, parse_snapshot(event.body, one.notification, event.event_id))
                    matched += 1
        return matched

    def _give(self, one: _Waiting, answer: Event | Exception | None) -> None:
        self._waiting.pop(one.turn, None)
        if one.turn.done():
            return
        if isinstance(answer, Exception):
            one.turn.set_exception(answer)
        else:
            one.turn.set_result(answer)
