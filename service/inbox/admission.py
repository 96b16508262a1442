"""Admission: Redis decides in one script what becomes of an event, and remembers that it did.

The first rule that holds decides (`admit.lua` has them in full):

    1  the event id is known                                             duplicate
    2  created before the age limit                                      expired
    3  a result before the latest result, or older than the step that    late
       is the present status
    4  a step before the latest event, or when a result of about its     late
       time, a final status or redaction is known
    5  its state hash is the session's                                   unchanged
    6  otherwise: a transition is appended to the stream                 admitted

A thin notification is noted by the same script: rules 1 and 2 are judged, then it is appended to
a stream of its own (`queued`). The others are judged once its event is fetched and admitted.

Order keys, kinds and hashes come from `transitions`; the script only compares them. Retries are
ours, not the client's, and end with the deadline. A request that is sent again carries the same
nonce, so that after a lost reply it gets its first answer again, and never `duplicate`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from functools import partial
from itertools import chain, count
from typing import Any

import msgspec
from redis.exceptions import RedisError

from ..config import DAY_S, MAX_CLOCK_DIFFERENCE_S, Durability, Settings
from ..errors import ConfigError, Unavailable, UnavailableReason
from ..storage import layout
from ..storage.batching import Batcher, Deadlines
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.redis_errors import unavailable_reason
from ..storage.scripts import Needs, Script, ScriptCall, UnsafeConfigError
from ..stripe.events import Event
from ..telemetry import metrics
from ..transitions import stream_entry, thin_notification
from ..transitions.lifecycle import FINAL
from ..transitions.ordering import SKEW_S, created_at, is_step, order_key, state_hash
from ..transitions.thin_notification import Notification
from ..transitions.transition import SessionChange
from .full_streams import FullStreamTrimmer, Stream

MAX_EVENTS_PER_BATCH = 128
RETRY_INITIAL_DELAY_S = 0.02
# Events that arrive during a pause wait behind it, so it may be a tenth of the deadline at most.
MIN_RETRIES_PER_DEADLINE = 10
# The clock of another receiver may be behind by so much: it must still know an event that it does
# not take for expired.
MAX_CLOCK_LAG_S = 2 * MAX_CLOCK_DIFFERENCE_S

_ADMIT = Script(__package__, "admit.lua")
_LAYOUT_DIFFERS = UnavailableReason.LAYOUT_DIFFERS.encode()
_NOTIFICATION = "n"
_FULL = b"full "
_UNDECIDED = {"full": UnavailableReason.BACKLOG_FULL, "broken": UnavailableReason.REDIS_REFUSED}
# Errors after which a retry within the deadline is of no use.
_LASTING = (UnsafeConfigError, Unavailable)


class Outcome(StrEnum):
    """What became of a genuine event: the closed list that answers, logs and metrics share."""

    ADMITTED = "admitted"
    DUPLICATE = "duplicate"
    LATE = "late"
    EXPIRED = "expired"
    UNCHANGED = "unchanged"
    QUEUED = "queued"
    IGNORED = "ignored"


_OUTCOMES = {outcome.value: outcome for outcome in Outcome}


class Admission(msgspec.Struct, frozen=True, gc=False):
    """The decision on one event or notification.

    Attributes:
        outcome: What became of it.
        sequence: The session's sequence number after it; 0 when it has none.
        previous: The status before; None for a session that was not known, and for a duplicate.
        after_final: The event is late, although it was created after what the session already
            is: something began after a final status.
    """

    outcome: Outcome
    sequence: int
    previous: str | None
    after_final: bool


class _Submission(msgspec.Struct, frozen=True, gc=False):
    """One event or notification that waits for its decision."""

    partition: int
    keys: tuple[str, str, str]
    arguments: tuple[str | int | bytes, ...]
    created: int
    deadline: float


class _Shard:
    """Submissions that share a primary, and so their calls and their troubles.

    Args:
        flush: Decides a batch of them.

    Attributes:
        reason: Why those whose deadline passes are not decided: until a call fails, Redis is slow.
    """

    def __init__(
        self,
        flush: Callable[[_Shard, list[_Submission]], Awaitable[Sequence[Admission | Exception]]],
    ) -> None:
        self.reason = UnavailableReason.REDIS_SLOW
        self._batcher: Batcher[_Submission, Admission] = Batcher(
            partial(flush, self), max_items=MAX_EVENTS_PER_BATCH
        )
        self._deadlines = Deadlines(self.unavailable)

    def submit(self, submission: _Submission) -> Awaitable[Admission]:
        """Have *submission* decided by its deadline."""
        reply = self._batcher.submit(submission)
        self._deadlines.watch(submission.deadline, reply)
        return reply

    def unavailable(self) -> Unavailable:
        """Return why one of them is not decided."""
        return Unavailable(self.reason)


class Inbox:
    """Admits events and notes notifications; what arrives in one loop turn shares one script call.

    Args:
        connections: Open clients.
        keys: The layout.
        settings: The settings.
        judges_age: Whether events are expired by their age. Where Stripe was asked for them it has
            been judged: of a notification on its arrival, of a list by what was asked for.
    """

    def __init__(
        self,
        connections: Connections,
        keys: Keys,
        settings: Settings,
        *,
        judges_age: bool = True,
    ) -> None:
        self._connections = connections
        self._keys = keys
        # Made once: these two would be 0.7 % of the instructions of an event.
        self._partition_keys = [
            (keys.layout_in(each), keys.transitions(each)) for each in range(keys.partitions)
        ]
        self._deadline_s = settings.admit_deadline_s
        self._needs = Needs(
            settings.durability.replicas,
            no_eviction=True,
            fsync=settings.durability is Durability.FSYNC,
        )
        self._judges_age = judges_age
        self._max_age_s = settings.max_event_age_days * DAY_S
        self._limits = (settings.session_retention_days * DAY_S, settings.stream_max_entries)
        self._trimmer = FullStreamTrimmer(connections)
        # In Cluster a failing primary must not hold up the partitions of the others.
        shards = keys.partitions if connections.is_cluster else 1
        self._shards = [_Shard(self._flush) for _ in range(shards)]

    async def admit(self, event: Event, change: SessionChange) -> Admission:
        """Decide what becomes of *event*; append *change* when it moves the session on.

        Raises:
            Unavailable: Redis did not commit it within the deadline; nothing is decided.
        """
        return await self._submit(self._submission(event, change))

    async def note(self, notification: Notification) -> Admission:
        """Remember *notification* until its event is fetched.

        Raises:
            Unavailable: As `admit`.
        """
        partition = self._keys.partition(notification.session_id)
        submission = _Submission(
            partition=partition,
            keys=(
                self._keys.layout_in(partition),
                self._keys.notifications(partition),
                self._keys.noted(partition, notification.event_id),
            ),
            # Order key, state hash and status are the event's: a notification has none.
            arguments=(
                notification.event_id,
                _nonce(),
                notification.created,
                "",
                _NOTIFICATION,
                "",
                "",
                thin_notification.pack(notification),
            ),
            created=notification.created,
            deadline=asyncio.get_running_loop().time() + self._deadline_s,
        )
        return await self._submit(submission)

    def _submit(self, submission: _Submission) -> Awaitable[Admission]:
        return self._shards[submission.partition % len(self._shards)].submit(submission)

    def _submission(self, event: Event, change: SessionChange) -> _Submission:
        session = event.session
        partition = self._keys.partition(session.id)
        return _Submission(
            partition=partition,
            keys=(
                *self._partition_keys[partition],
                self._keys.session_in(partition, session.id),
            ),
            arguments=(
                event.id,
                _nonce(),
                event.created,
                order_key(change, event.created),
                _kind(change),
                state_hash(change),
                change.current,
                stream_entry.pack(change),
            ),
            created=event.created,
            deadline=asyncio.get_running_loop().time() + self._deadline_s,
        )

    async def _flush(
        self, shard: _Shard, submissions: list[_Submission]
    ) -> Sequence[Admission | Exception]:
        """Call the script until it has decided, or the deadline of every submission has passed.

        A full stream is trimmed between two calls. An event that then still finds no room, or that
        Redis did not decide in time, is `Unavailable`.
        """
        metrics.ADMISSION_BATCH.observe(len(submissions))
        for attempt in count(1):
            now = asyncio.get_running_loop().time()
            # They are in order of arrival: the overdue ones, which are answered, come first.
            waiting = [submission for submission in submissions if submission.deadline > now]
            overdue = [shard.unavailable() for _ in range(len(submissions) - len(waiting))]
            if not waiting:
                break
            reply = await self._decide(waiting)
            if not isinstance(reply, Exception):
                shard.reason = UnavailableReason.REDIS_SLOW
                answered = zip(waiting, reply, strict=True)
                full = {
                    Stream(one.keys[1], one.partition)
                    for one, answer in answered
                    if answer.startswith(_FULL)
                }
                if full and await self._trimmer.trim(full):
                    continue
                return [*overdue, *map(_admission, reply, waiting)]
            shard.reason = _reason(reply)
            metrics.REDIS_ERRORS.labels(shard.reason).inc()
            if shard.reason is UnavailableReason.REDIS_FULL or isinstance(reply, _LASTING):
                return [shard.unavailable() for _ in submissions]
            await asyncio.sleep(self._pause_s(attempt))
        return overdue

    async def _decide(self, submissions: Sequence[_Submission]) -> Any:
        """Return the script's answer to each submission, or why there is none.

        That is the error of the call, or `Unavailable` where the script has refused to decide.
        """
        reply = await self._call(submissions)
        if reply == _LAYOUT_DIFFERS:
            try:
                # Redis has lost our layout, or holds another one: then nothing is admitted.
                await layout.claim(self._connections, self._keys)
            except ConfigError:
                return Unavailable(UnavailableReason.LAYOUT_DIFFERS)
            except (RedisError, OSError) as error:
                return error
            reply = await self._call(submissions)
        return Unavailable(UnavailableReason(reply.decode())) if isinstance(reply, bytes) else reply

    async def _call(self, submissions: Sequence[_Submission]) -> Any:
        """Return one text for each submission, or one for all of them, or the error of the call."""
        # The clock by which signatures were verified; the script compares it with Redis's.
        now = int(time.time())
        min_created = now - self._max_age_s
        call = ScriptCall(
            _ADMIT,
            list(chain.from_iterable(submission.keys for submission in submissions)),
            [
                *(now, min_created if self._judges_age else 0, min_created - MAX_CLOCK_LAG_S),
                *(MAX_CLOCK_DIFFERENCE_S, self._keys.layout_copy, SKEW_S, *self._limits),
                *chain.from_iterable(submission.arguments for submission in submissions),
            ],
        )
        loop = asyncio.get_running_loop()
        called_at = loop.time()
        [reply] = await self._connections.run([call], needs=self._needs)
        metrics.ADMISSION_SECONDS.observe(loop.time() - called_at)
        return reply

    def _pause_s(self, attempt: int) -> float:
        """Return a full-jitter pause in seconds before the next attempt."""
        ceiling_s = self._deadline_s / MIN_RETRIES_PER_DEADLINE
        return random.uniform(0, min(ceiling_s, RETRY_INITIAL_DELAY_S * 2**attempt))  # noqa: S311 - jitter


def _kind(change: SessionChange) -> str:
    """Return the kind of an event: a step or a result, in capitals where its status is final."""
    kind = "s" if is_step(change) else "r"
    return kind.upper() if change.current in FINAL else kind


def _reason(error: Exception) -> UnavailableReason:
    return error.reason if isinstance(error, Unavailable) else unavailable_reason(error)


def _nonce() -> str:
    """Return 8 characters that mark all attempts for one submission; they are no secret."""
    return f"{random.getrandbits(32):08x}"


def _admission(answer: bytes, submission: _Submission) -> Admission | Unavailable:
    """Read the script's answer to one event or notification."""
    outcome, sequence, before, previous = answer.decode().split(" ", 3)
    if outcome in _UNDECIDED:
        return Unavailable(_UNDECIDED[outcome])
    return Admission(
        outcome=_OUTCOMES[outcome],
        sequence=int(sequence),
        previous=previous or None,
        after_final=outcome == Outcome.LATE
        and submission.created > created_at(int(before)) + SKEW_S,
    )
