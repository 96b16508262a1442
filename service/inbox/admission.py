"""Redis, the way in: one atomic step that remembers an event, judges it and hands it over.

Policy stays in `transitions`: the script only compares numbers and words. Reading what was
handed over is `consumer`'s business. Retrying is ours, not the client's, and bounded: a lost
reply is asked for again under the same nonce, so the first answer is heard.
"""

from __future__ import annotations

import asyncio
import random
import time
from binascii import b2a_base64
from collections.abc import Sequence
from enum import StrEnum
from itertools import chain, count
from typing import Any

import msgspec
from redis.exceptions import RedisError

from ..config import DAY_S, MAX_CLOCK_DIFFERENCE_S, Durability, Settings
from ..errors import ConfigError, Unavailable, UnavailableReason
from ..storage import layout
from ..storage.batching import Batcher, Deadlines
from ..storage.connections import Connections
from ..storage.layout import Keys
from ..storage.redis_errors import unavailable_reason
from ..storage.scripts import Needs, Script, ScriptCall, UnsafeConfigError
from ..stripe.events import Event
from ..telemetry import metrics
from ..transitions import stream_entry
from ..transitions.lifecycle import FINAL, SKEW_S, created_at, is_step, order_key, state_hash
from ..transitions.transition import SessionChange
from .headroom import Headroom

MAX_EVENTS_PER_BATCH = 128
RETRY_INITIAL_DELAY_S = 0.02
PAUSES_PER_DEADLINE = 10

_ADMIT = Script(__package__, "admit.lua")
_LAYOUT_DIFFERS = UnavailableReason.LAYOUT_DIFFERS.encode()
_FULL = b"full "
_REFUSALS = {"full": UnavailableReason.BACKLOG_FULL, "broken": UnavailableReason.REDIS_REFUSED}
_LASTING = (UnsafeConfigError, Unavailable)


class Outcome(StrEnum):
    """What became of a genuine event: the closed list that answers, logs and metrics share."""

    ADMITTED = "admitted"
    DUPLICATE = "duplicate"
    LATE = "late"
    EXPIRED = "expired"
    UNCHANGED = "unchanged"
    IGNORED = "ignored"


_OUTCOMES = {outcome.value: outcome for outcome in Outcome}


class Admission(msgspec.Struct, frozen=True, gc=False):
    """What the ledger said to one event.

    Attributes:
        outcome: The verdict.
        sequence: The session's sequence number after it; 0 when it has none.
        previous: The status before; None when the ledger had no memory. Also None for a duplicate.
        after_final: The event is late, although it was created after what the session already
            is: something began after a final status.
    """

    outcome: Outcome
    sequence: int
    previous: str | None
    after_final: bool


class _Request(msgspec.Struct, frozen=True, gc=False):
    """One event on its way into the ledger."""

    partition: int
    keys: tuple[str, str, str]
    judged_by: tuple[str | int | bytes, ...]
    created: int
    deadline: float


class Inbox:
    """Admits events into the ledger; those that wait in one loop turn travel together."""

    def __init__(self, connections: Connections, keys: Keys, settings: Settings) -> None:
        self._connections = connections
        self._keys = keys
        self._patience_s = settings.admit_deadline_s
        self._needs = Needs(
            settings.durability.replicas,
            no_eviction=True,
            fsync=settings.durability is Durability.FSYNC,
        )
        self._max_age_s = settings.max_event_age_days * DAY_S
        self._limits = (settings.session_retention_days * DAY_S, settings.stream_max_entries)
        self._headroom = Headroom(connections, keys)
        # In Cluster a failing primary must not hold up the partitions of the others.
        lanes = keys.partitions if connections.is_cluster else 1
        self._lanes = [Batcher(self._fly, max_items=MAX_EVENTS_PER_BATCH) for _ in range(lanes)]
        self._deadlines = Deadlines(self._overdue)
        # What keeps Redis from answering now; that nothing was heard of yet means that it is slow.
        self._trouble = UnavailableReason.REDIS_SLOW

    async def admit(self, event: Event, change: SessionChange) -> Admission:
        """Remember *event*, judge it, and hand *change* over when it moves the session on.

        Raises:
            Unavailable: Redis did not commit it within the deadline; nothing is decided.
        """
        request = self._request(event, change)
        reply = self._lanes[request.partition % len(self._lanes)].submit(request)
        self._deadlines.watch(request.deadline, reply)
        return await reply

    def _request(self, event: Event, change: SessionChange) -> _Request:
        session = event.session
        partition = self._keys.partition(session.id)
        return _Request(
            partition=partition,
            keys=(
                self._keys.layout_in(partition),
                self._keys.transitions(partition),
                self._keys.session_in(partition, session.id),
            ),
            judged_by=(
                event.id,
                _nonce(),
                event.created,
                order_key(event.type, event.created, session),
                _kind(change, session.status),
                state_hash(event.type, session),
                change.current,
                stream_entry.pack(change),
            ),
            created=event.created,
            deadline=asyncio.get_running_loop().time() + self._patience_s,
        )

    async def _fly(self, requests: list[_Request]) -> Sequence[Admission | Exception]:
        """Ask about *requests* until Redis has answered, or nobody waits for the answer."""
        metrics.ADMISSION_BATCH.observe(len(requests))
        for attempt in count(1):
            now = asyncio.get_running_loop().time()
            # Who came first has waited longest: the overdue, who have been told, are in front.
            asked = [request for request in requests if request.deadline > now]
            told = [self._overdue() for _ in requests[len(asked) :]]
            if not asked:
                break
            reply = await self._ask(asked)
            if not isinstance(reply, Exception):
                self._trouble = UnavailableReason.REDIS_SLOW
                pairs = zip(asked, reply, strict=True)
                full = {one.partition for one, answer in pairs if answer.startswith(_FULL)}
                if full and await self._headroom.make(full):
                    continue
                return [*told, *map(_admission, reply, asked)]
            self._trouble = _word(reply)
            metrics.REDIS_ERRORS.labels(self._trouble).inc()
            if self._trouble is UnavailableReason.REDIS_FULL or isinstance(reply, _LASTING):
                # While it is so, asking again is no use.
                return [self._overdue() for _ in requests]
            await asyncio.sleep(self._pause_s(attempt))
        return told

    async def _ask(self, requests: Sequence[_Request]) -> Any:
        """Return what the script says to each in one call, or the error of the call.

        The error is `Unavailable` where the script was not executed: it says why.
        """
        reply = await self._call(requests)
        if reply == _LAYOUT_DIFFERS:
            try:
                # Redis has lost our layout, or has another one: then nothing is admitted.
                await layout.claim(self._connections, self._keys)
            except ConfigError:
                return Unavailable(UnavailableReason.LAYOUT_DIFFERS)
            except (RedisError, OSError) as error:
                return error
            reply = await self._call(requests)
        return Unavailable(UnavailableReason(reply.decode())) if isinstance(reply, bytes) else reply

    async def _call(self, requests: Sequence[_Request]) -> Any:
        """Return a text for each request, or one for all of them, or the error of the call."""
        # The clock that has just verified the signatures; the script compares it with Redis's.
        now = int(time.time())
        call = ScriptCall(
            _ADMIT,
            list(chain.from_iterable(request.keys for request in requests)),
            [
                *(now, now - self._max_age_s, MAX_CLOCK_DIFFERENCE_S, self._keys.layout_copy),
                *(SKEW_S, *self._limits),
                *chain.from_iterable(request.judged_by for request in requests),
            ],
        )
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        [reply] = await self._connections.run([call], needs=self._needs)
        metrics.ADMISSION_SECONDS.observe(loop.time() - asked_at)
        return reply

    def _pause_s(self, attempt: int) -> float:
        """Return a full-jitter pause in seconds before the next attempt.

        Its ceiling is a small part of what anybody waits: who comes meanwhile waits behind it.
        """
        ceiling_s = self._patience_s / PAUSES_PER_DEADLINE
        return random.uniform(0, min(ceiling_s, RETRY_INITIAL_DELAY_S * 2**attempt))  # noqa: S311 - jitter

    def _overdue(self) -> Unavailable:
        return Unavailable(self._trouble)


def _kind(change: SessionChange, status: str) -> str:
    """Return what the script needs to know of an event's type and status: see `admit.lua`."""
    kind = "s" if is_step(change.event_type, status) else "r"
    return kind.upper() if change.current in FINAL else kind


def _word(error: Exception) -> UnavailableReason:
    return error.reason if isinstance(error, Unavailable) else unavailable_reason(error)


def _nonce() -> bytes:
    """Return what tells this asking from every other, in 8 characters; no secret."""
    return b2a_base64(random.getrandbits(48).to_bytes(6, "big"), newline=False)


def _admission(answer: bytes, request: _Request) -> Admission | Unavailable:
    """Read what the script said to one event."""
    outcome, sequence, before, previous = answer.decode().split(" ", 3)
    if outcome in _REFUSALS:
        return Unavailable(_REFUSALS[outcome])
    return Admission(
        outcome=_OUTCOMES[outcome],
        sequence=int(sequence),
        previous=previous or None,
        after_final=outcome == Outcome.LATE and request.created > created_at(int(before)) + SKEW_S,
    )
