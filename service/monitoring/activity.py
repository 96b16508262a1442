"""What the processes of a deployment have published of themselves: their life, counts, reversals.

Written by `publisher`. Each name and number here comes from our own processes; none is a value of a
session, except its id and its statuses. While a deployment is upgraded some of them run another
version of this service: what cannot be read is left out.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple

import msgspec

from ..config import DAY_S
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.scripts import Script
from ..stripe_api import watch_report
from ..stripe_api.watch_report import WatchReport
from .publisher import FORGET_AFTER_S, MINUTE_S, Life

# A process writes a sign of life every 5 s. Without one for so long it does not count as alive.
ALIVE_S = 15.0
MINUTES = 60
DAYS = 7
MAX_REVERSALS_SHOWN = 20

_READ_ACTIVITY = Script(__package__, "read_activity.lua")
_decode_life = msgspec.json.Decoder(Life).decode
_EPOCH = date(1970, 1, 1)


class Process(NamedTuple):
    """One process of the deployment.

    Attributes:
        name: Its host and process id.
        kind: `receiver`, `worker`, or `dev`, which is both.
        version: The version of this service that it runs.
        started_at: When it started.
        seen_s: Seconds since its last sign of life.
        ready: None while it is ready, else why it is not, as one word.
        works: The handlers that it calls.
        last_event_at: When it got its last verified event; None before the first.
    """

    name: str
    kind: str
    version: str
    started_at: datetime
    seen_s: float
    ready: str | None
    works: tuple[str, ...]
    last_event_at: datetime | None

    @property
    def is_alive(self) -> bool:
        """Whether its last sign of life is recent."""
        return self.seen_s <= ALIVE_S

    @property
    def receives(self) -> bool:
        """Whether it listens for Stripe."""
        return self.kind != "worker"


class Minute(NamedTuple):
    """What all processes counted within one minute.

    Attributes:
        at: The minute's beginning.
        received: Requests on the webhook path, by outcome or reason of rejection.
        delivered: For each handler its calls, by outcome: delivered, failed, retried,
            dead_lettered, selftest. A failed call is counted again as retried or dead_lettered.
    """

    at: datetime
    received: Mapping[str, int]
    delivered: Mapping[str, Mapping[str, int]]


def sum_received(minutes: Iterable[Minute]) -> Counter[str]:
    """Return the requests of some minutes, by outcome or reason of rejection."""
    found: Counter[str] = Counter()
    for minute in minutes:
        found.update(minute.received)
    return found


def sum_calls(minutes: Iterable[Minute]) -> dict[str, Counter[str]]:
    """Return for each handler its calls in some minutes, by outcome."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for minute in minutes:
        for handler, counts in minute.delivered.items():
            found[handler].update(counts)
    return dict(found)


class Day(NamedTuple):
    """What all processes counted within one day (UTC).

    Attributes:
        at: The day.
        reversals: Changes from a final status to another one that is not redacted.
        recovered: Events that no webhook had brought and the reconciler found.
        dead_lettered: Transitions whose delivery was given up.
    """

    at: date
    reversals: int
    recovered: int
    dead_lettered: int


class Reversal(NamedTuple):
    """A change from a final status to another one that is not redacted.

    Attributes:
        at: When it was admitted.
        session_id: The session.
        previous: The final status that it had.
        current: Its new status.
        event_id: The event that brought the change.
    """

    at: datetime
    session_id: str
    previous: str
    current: str
    event_id: str


class Activity(NamedTuple):
    """What the processes have published.

    Attributes:
        processes: All that gave a sign of life within ten minutes, receivers first, by name.
        minutes: The 60 minutes up to the present one, the oldest first; an empty one has no counts.
        days: The 7 days up to today, the oldest first.
        reversals: The latest, the newest first.
        last_event_at: When the last verified event came; None if none came within 7 days.
        watch_report: What the worker that reconciles has reported; None for nothing.
    """

    processes: tuple[Process, ...] = ()
    minutes: tuple[Minute, ...] = ()
    days: tuple[Day, ...] = ()
    reversals: tuple[Reversal, ...] = ()
    last_event_at: datetime | None = None
    watch_report: WatchReport | None = None

    @property
    def receivers(self) -> tuple[Process, ...]:
        """The processes that listen for Stripe."""
        return tuple(one for one in self.processes if one.receives)

    @property
    def workers(self) -> tuple[Process, ...]:
        """The processes that call handlers."""
        return tuple(one for one in self.processes if one.works)


async def read_activity(connections: Connections, keys: Keys) -> Activity:
    """Return what the processes have published, in one round trip.

    Raises:
        RedisError: Redis did not answer.
    """
    now = time.time()
    last_minute, today = int(now // MINUTE_S), int(now // DAY_S)
    minutes = range(last_minute - MINUTES + 1, last_minute + 1)
    days = range(today - DAYS + 1, today + 1)
    now_ms, processes, reversals, report, *counts = await connections.run_one(
        _READ_ACTIVITY,
        [
            *(keys.processes, keys.reversals, keys.endpoints),
            *map(keys.minute, minutes),
            *map(keys.day, days),
        ],
        [MAX_REVERSALS_SHOWN],
    )
    of_days = [_pairs(one) for one in counts[MINUTES:]]
    last_event_ms = max(_number(one, "last_event_ms") for one in of_days)
    return Activity(
        processes=_processes(now_ms, _pairs(processes)),
        minutes=tuple(map(_minute, minutes, map(_pairs, counts))),
        days=tuple(map(_day, days, of_days)),
        reversals=tuple(_reversals(_pairs(fields) for _, fields in reversals)),
        last_event_at=_time(last_event_ms / 1000),
        watch_report=watch_report.decode(report) if report else None,
    )


def _pairs(flat: Sequence[bytes]) -> dict[str, Any]:
    """Return a hash or the fields of an entry as Redis's scripts return them."""
    texts = [each.decode(errors="replace") for each in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def _number(counts: Mapping[str, str], field: str) -> int:
    with suppress(ValueError):
        return int(counts.get(field, 0))
    return 0


def _time(seconds: float) -> datetime | None:
    with suppress(ValueError, OverflowError):
        return datetime.fromtimestamp(seconds, UTC) if seconds else None
    return None


def _processes(now_ms: int, stored: Mapping[str, str]) -> tuple[Process, ...]:
    found = []
    for name, value in stored.items():
        # Another version of this service may describe itself in another way.
        with suppress(ValueError, OverflowError, msgspec.MsgspecError):
            seen_ms, _, description = value.split(" ", 2)
            # A sign of life that is later than now dates from before Redis's clock was set back.
            seen_s = abs(now_ms - int(seen_ms)) / 1000
            if seen_s <= FORGET_AFTER_S:
                shown_name = name.partition(" ")[0]
                found.append(_process(shown_name, seen_s, _decode_life(description)))
    return tuple(sorted(found, key=lambda one: (not one.receives, one.name)))


def _process(name: str, seen_s: float, life: Life) -> Process:
    return Process(
        name,
        life.kind,
        life.version,
        datetime.fromtimestamp(life.started_at, UTC),
        seen_s,
        life.reason,
        life.works,
        _time(life.last_event_at),
    )


def _minute(number: int, counts: Mapping[str, str]) -> Minute:
    received: dict[str, int] = {}
    delivered: dict[str, dict[str, int]] = {}
    for field in counts:
        match field.split(":", 2):
            case "received", outcome:
                received[outcome] = _number(counts, field)
            case "delivered", outcome, handler:
                delivered.setdefault(handler, {})[outcome] = _number(counts, field)
            # Anything else was counted by another version of this service.
    return Minute(datetime.fromtimestamp(number * MINUTE_S, UTC), received, delivered)


def _day(number: int, counts: Mapping[str, str]) -> Day:
    names = ("reversals", "recovered", "dead_lettered")
    return Day(_EPOCH + timedelta(days=number), *(_number(counts, name) for name in names))


def _reversals(entries: Iterable[Mapping[str, str]]) -> Iterator[Reversal]:
    names = ("session_id", "previous", "current", "event_id")
    for fields in entries:
        # What is not ours, or another version's, is left out.
        with suppress(KeyError, ValueError, OverflowError):
            at = datetime.fromtimestamp(float(fields["at"]), UTC)
            yield Reversal(at, *(fields[name] for name in names))
