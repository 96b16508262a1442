"""Admits by hand what is unknown of the events in a stretch of time, as the reconciler does.

It may run beside the reconciler, live webhooks and itself: what is known is not written again, and
admission decides on the rest. So it may be interrupted at any time, and begun again. After Redis
has lost everything, it makes the latest change of each session right again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from .. import cancellation
from ..config import Settings
from ..errors import ApiError, ApiErrorReason
from .client import Caller, StripeApi
from .destinations import survey_all
from .event_pages import Window, read_windows
from .keys import ApiKeys
from .rate_limit import Priority
from .reconciler import accounts
from .window_admission import Decided, WindowAdmission

# What became of events, besides the outcomes of admission.
KNOWN, UNKNOWN, UNUSABLE = "known", "unknown", "unusable"


def find_callers(settings: Settings, keys: ApiKeys, account: str | None) -> list[Caller]:
    """Return the accounts to read: in each mode that is received and that there is a key of.

    Args:
        settings: The modes, and the connected accounts.
        keys: The keys.
        account: The only account to read; None for the own account and all connected ones.
    """
    callers = [caller for caller in accounts(settings) if keys.holds(caller.is_live)]
    if account is None:
        return callers
    return [caller._replace(account=account) for caller in callers if caller.account is None]


async def select_types(api: StripeApi, callers: Sequence[Caller]) -> dict[Caller, Sequence[str]]:
    """Return for each account the types of events that Stripe is set up to send here.

    Raises:
        Unavailable: Redis, where the budget of requests is, did not answer.
    """
    surveys = {one.is_live: one for one in await survey_all(api, Priority.BACKFILL)}
    return {
        caller: surveys[caller.is_live].selected_types(connected=caller.account is not None)
        for caller in callers
    }


class Backfill:
    """Reads some accounts side by side, window by window, always the one that is read least.

    Args:
        api: Stripe's API.
        admission: Admits what is unknown.
        types: The types of events to read, for each account.
        first: The first second, in Unix time.
        last: The last second, which belongs to it.
        is_dry_run: Whether to admit nothing.

    Attributes:
        counts: How many events were known, and what became of the others.
        failures: Why accounts could not be read to their end.
        is_dry_run: Whether nothing is admitted.
    """

    def __init__(
        self,
        api: StripeApi,
        admission: WindowAdmission,
        types: Mapping[Caller, Sequence[str]],
        *,
        first: int,
        last: int,
        is_dry_run: bool,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: dict[Caller, ApiErrorReason] = {}
        self.is_dry_run = is_dry_run
        self._admission = admission
        self._windows = {
            caller: read_windows(api, caller, wanted, first, last, priority=Priority.BACKFILL)
            for caller, wanted in types.items()
        }
        # The first second of each account that is not read yet.
        self._next = dict.fromkeys(types, first)
        self._last = last

    @property
    def next_second(self) -> int:
        """Where to go on: before it everything is read of every account."""
        return min(self._next.values())

    @property
    def is_complete(self) -> bool:
        """Whether everything was read."""
        return self.next_second > self._last

    async def run(self, stopping: asyncio.Event, on_progress: Callable[[int], None]) -> None:
        """Read until the end, or until *stopping* is set.

        Args:
            stopping: Takes effect between two pages, and between two windows.
            on_progress: Called with the number of seconds that were read of an account.

        Raises:
            RedisError: Redis did not answer.
            Unavailable: Redis did not decide on an event.
        """
        try:
            while (waiting := self._waiting()) and not stopping.is_set():
                caller = min(waiting, key=self._next.__getitem__)
                try:
                    window = await _next_unless(stopping, self._windows[caller])
                    if window is None:
                        return
                    await self._admit(caller, window)
                except ApiError as error:
                    self.failures[caller] = error.reason
                else:
                    self._next[caller] = window.last + 1
                    on_progress(window.last - window.first + 1)
        finally:
            for windows in self._windows.values():
                await windows.aclose()

    def _waiting(self) -> list[Caller]:
        """Return the accounts of which something is left to read."""
        return [
            caller
            for caller, second in self._next.items()
            if second <= self._last and caller not in self.failures
        ]

    async def _admit(self, caller: Caller, window: Window) -> None:
        found: Counter[str] = Counter()
        if self.is_dry_run:
            found[UNKNOWN] = len(await self._admission.find_unknown(window.events))
        else:
            async for one in self._admission.admit_unknown(caller, window.events):
                found[one.admission.outcome if isinstance(one, Decided) else UNUSABLE] += 1
        found[KNOWN] = len(window.events) - found.total()
        self.counts += found


async def _next_unless(
    stopping: asyncio.Event, windows: AsyncGenerator[Window, None]
) -> Window | None:
    """Return the next window, or None as soon as *stopping* is set."""
    reading = asyncio.ensure_future(anext(windows))
    stopped = asyncio.ensure_future(stopping.wait())
    await asyncio.wait({reading, stopped}, return_when=asyncio.FIRST_COMPLETED)
    await cancellation.cancel_and_wait(stopped)
    if reading.done():
        return await reading
    await cancellation.cancel_and_wait(reading)
    return None
