"""Pushes events to destinations: signed, tried again, and lost where a test says so.

Retries fall due by the stand-in's clock, signatures hold the machine's time, since the receivers
under test have no other. https://docs.stripe.com/webhooks
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Final

import httpx2
import orjson

from .clock import Clock
from .destinations import Destination
from .events import Event

# Intervals are not published; in test mode there are three retries within a few hours.
RETRY_DELAYS_S: Final = (60.0, 3600.0, 7200.0)
TIMEOUT_S: Final = 10.0
MAX_CONCURRENT: Final = 64
POLL_S: Final = 0.02
HEADERS: Final = {
    "Accept": "*/*; q=0.5, application/xml",
    "Cache-Control": "no-cache",
    "Content-Type": "application/json; charset=utf-8",
    "User-Agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
}

Loses = Callable[[Event, Destination], bool]


def lose_nothing(event: Event, destination: Destination) -> bool:
    """Push everything."""
    return False


def lose_all(event: Event, destination: Destination) -> bool:
    """Push nothing."""
    return True


def thin_only(event: Event, destination: Destination) -> bool:
    """Lose each snapshot."""
    return destination.payload != "thin"


def in_one_form(event: Event, destination: Destination) -> bool:
    """Push each event in one form only: about half of them thin."""
    return destination.payload != Random(event.thin_id).choice(["snapshot", "thin"])


@dataclass(kw_only=True)
class Push:
    """The attempts to push one event to one destination.

    Attributes:
        event: The event.
        destination: Where.
        due: When the next attempt is, by the stand-in's clock.
        attempts: How many there have been.
    """

    event: Event
    destination: Destination
    due: float
    attempts: int = 0


def sign(body: bytes, secret: str, at: int) -> str:
    """Return the `Stripe-Signature` of a body."""
    digest = hmac.new(secret.encode(), b"%d.%b" % (at, body), hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"


class Pushes:
    """All pushes, and how they are to go.

    Attributes:
        loses: Decides for each push whether it is never sent.
        retry_delays_s: The seconds before each retry; after the last one a push has failed.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: list[tuple[float, int, Push]] = []
        self._order = count()
        self._running: set[asyncio.Task[None]] = set()
        self.loses: Loses = lose_nothing
        self.retry_delays_s: Sequence[float] = RETRY_DELAYS_S

    @property
    def is_idle(self) -> bool:
        """Whether no attempt is under way or planned."""
        return not self._waiting and not self._running

    def schedule(self, event: Event, destination: Destination) -> None:
        """Plan the push of an event, unless it is to be lost."""
        if destination.url is not None and not self.loses(event, destination):
            self._wait(Push(event=event, destination=destination, due=self._clock.time()))

    def _wait(self, push: Push) -> None:
        heapq.heappush(self._waiting, (push.due, next(self._order), push))

    async def run(self) -> None:
        """Push what is due, until canceled."""
        running = self._running
        async with httpx2.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
            try:
                while True:
                    for push in self._take_due(MAX_CONCURRENT - len(running)):
                        task = asyncio.create_task(self._attempt(client, push))
                        running.add(task)
                        task.add_done_callback(running.discard)
                    await asyncio.sleep(POLL_S)
            finally:
                for task in running:
                    task.cancel()

    def _take_due(self, max_count: int) -> list[Push]:
        now, taken = self._clock.time(), list[Push]()
        while self._waiting and self._waiting[0][0] <= now and len(taken) < max_count:
            taken.append(heapq.heappop(self._waiting)[-1])
        return taken

    async def _attempt(self, client: httpx2.AsyncClient, push: Push) -> None:
        destination = push.destination
        if not destination.is_enabled or destination.url is None:
            return
        body = self._render(push.event, destination)
        signature = sign(body, destination.secret, int(time.time()))
        push.attempts += 1
        try:
            answer = await client.post(
                destination.url, content=body, headers={**HEADERS, "Stripe-Signature": signature}
            )
            is_success = answer.is_success
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError):
            is_success = False
        if not is_success and push.attempts <= len(self.retry_delays_s):
            push.due = self._clock.time() + self.retry_delays_s[push.attempts - 1]
            self._wait(push)

    def _render(self, event: Event, destination: Destination) -> bytes:
        if destination.payload == "thin":
            return orjson.dumps(event.as_notification())
        return orjson.dumps(event.as_snapshot(), option=orjson.OPT_INDENT_2)
