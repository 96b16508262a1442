"""Redis, the way in: one atomic step that remembers an event, judges it and hands it over.

Policy stays in `transitions`: the script only compares numbers and words. Reading what was
handed over is `mailbox`'s business. Retrying is ours, not the client's, and bounded: a lost
reply is asked for again under the same nonce, so the first answer is heard.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from . import metrics, wire
from .coalesce import Coalescer
from .config import Durability, Settings
from .connections import Connections, Script, ScriptCall, shortage
from .errors import Shortage, Unavailable
from .events import Event
from .layout import Keys
from .transitions import SessionChange, created_at, fingerprint, position

DAY_S = 86_400
MOST_EVENTS_PER_FLIGHT = 128
RETRY_CEILING_S = 0.5
RETRY_FIRST_S = 0.02

_ADMIT = Script("admit")
_VALUES_PER_REPLY = 4
_FULL = "full"


class Outcome(StrEnum):
    """What became of a genuine event: the closed list that answers, logs and metrics share."""

    ADMITTED = "admitted"
    DUPLICATE = "duplicate"
    LATE = "late"
    EXPIRED = "expired"
    UNCHANGED = "unchanged"
    IGNORED = "ignored"


class Admission(NamedTuple):
    """What the ledger said to one event.

    Attributes:
        outcome: The verdict.
        sequence: The session's sequence number after it; 0 when it has none.
        previous: The status before; None when the ledger had no memory.
        contradicts: The event is late, although it was created after what the session already
            is: something happened after a final status.
    """

    outcome: Outcome
    sequence: int
    previous: str | None
    contradicts: bool


class _Request(NamedTuple):
    """One event on its way into the ledger."""

    partition: int
    key: str
    judged_by: tuple[str, ...]
    packed: bytes
    created: int
    deadline: float


class Inbox:
    """Admits events into the ledger; those that wait in one loop turn travel together."""

    def __init__(self, connections: Connections, keys: Keys, settings: Settings) -> None:
        self._connections = connections
        self._keys = keys
        self._deadline_s = settings.admit_deadline_s
        self._replicas = 1 if settings.durability is Durability.REPLICA else 0
        self._policy = (
            settings.dedup_horizon_days * DAY_S,
            settings.session_retention_days * DAY_S,
            settings.stream_max_entries,
        )
        self._coalescer = Coalescer(self._commit, most=MOST_EVENTS_PER_FLIGHT)

    async def admit(self, event: Event, change: SessionChange) -> Admission:
        """Remember *event*, judge it, and hand *change* over when it moves the session on.

        Raises:
            Unavailable: Redis did not commit it within the deadline; nothing is decided.
        """
        session = event.session
        judged_by = (
            event.id,
            secrets.token_urlsafe(6),
            str(event.created),
            str(position(event.type, event.created, session)),
            fingerprint(event.type, session),
            change.current,
        )
        return await self._coalescer.submit(
            _Request(
                partition=self._keys.partition(session.id),
                key=self._keys.session(session.id),
                judged_by=judged_by,
                packed=wire.pack(change),
                created=event.created,
                deadline=time.monotonic() + self._deadline_s,
            )
        )

    async def drained(self) -> None:
        """Wait until every event in hand is decided."""
        await self._coalescer.drained()

    async def _commit(self, requests: list[_Request]) -> Sequence[Admission | Exception]:
        """Carry one flight, again and again until each request is decided or out of time."""
        metrics.ADMISSION_BATCH.observe(len(requests))
        decided: dict[int, Admission | Exception] = dict.fromkeys(
            range(len(requests)), _Undecided(Shortage.REDIS_SLOW)
        )
        attempt = 0
        while pending := _undecided_in_time(requests, decided):
            if attempt:
                await asyncio.sleep(_pause_s(attempt))
            await self._attempt(requests, pending, decided)
            attempt += 1
        return [decided[i] for i in range(len(requests))]

    async def _attempt(
        self,
        requests: Sequence[_Request],
        pending: Iterable[int],
        decided: dict[int, Admission | Exception],
    ) -> None:
        """Ask the script once about the *pending* ones, one call per partition."""
        partitions: dict[int, list[int]] = {}
        for i in pending:
            partitions.setdefault(requests[i].partition, []).append(i)
        calls = [
            self._call(partition, [requests[i] for i in members])
            for partition, members in partitions.items()
        ]
        replies = await self._connections.run(calls, replicas=self._replicas)
        for members, reply in zip(partitions.values(), replies, strict=True):
            if isinstance(reply, Exception):
                decided.update(dict.fromkeys(members, _failure(reply)))
                continue
            for n, i in enumerate(members):
                values = reply[n * _VALUES_PER_REPLY : (n + 1) * _VALUES_PER_REPLY]
                decided[i] = _admission(values, requests[i].created)

    def _call(self, partition: int, requests: Sequence[_Request]) -> ScriptCall:
        return ScriptCall(
            _ADMIT,
            [self._keys.transitions(partition), *(request.key for request in requests)],
            [
                *self._policy,
                *(value for request in requests for value in request.judged_by),
                *(request.packed for request in requests),
            ],
        )


class _Undecided(Unavailable):
    """Redis did not say; the same nonce may ask again."""


def _undecided_in_time(
    requests: Sequence[_Request], decided: dict[int, Admission | Exception]
) -> list[int]:
    """Return which requests are still worth asking for."""
    now = time.monotonic()
    return [
        i
        for i, request in enumerate(requests)
        if isinstance(decided[i], _Undecided) and request.deadline > now
    ]


def _failure(error: Exception) -> Unavailable:
    """Return what a failed call means for its events; on a full server asking again is no use."""
    reason = shortage(error)
    metrics.REDIS_ERRORS.labels(reason).inc()
    return Unavailable(reason) if reason is Shortage.REDIS_FULL else _Undecided(reason)


def _admission(values: Sequence[Any], created: int) -> Admission | Unavailable:
    """Read one event's four values of the script's reply."""
    outcome, sequence, previous, before = (value.decode() for value in values)
    if outcome == _FULL:
        return Unavailable(Shortage.BACKLOG_FULL)
    return Admission(
        outcome=Outcome(outcome),
        sequence=int(sequence),
        previous=previous or None,
        contradicts=outcome == Outcome.LATE and created > created_at(int(before)),
    )


def _pause_s(attempt: int) -> float:
    """Return a full-jitter pause in seconds before the next attempt."""
    return random.uniform(0, min(RETRY_CEILING_S, RETRY_FIRST_S * 2**attempt))  # noqa: S311 - jitter
