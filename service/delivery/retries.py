"""Whether and when a failed call is tried again: the retry policy, and the circuit breakers.

Knows no entry, no Redis and no queue. A failed call is one of two things:

    failure of the session    counts as an attempt; retried after a delay that doubles
                              (`RetryPolicy`), until the attempts are used up
    destination unreachable   counts nothing; the circuit opens, all sessions of the destination
                              wait, and one at a time probes (`CircuitBreaker`)

The rules of a circuit breaker:

    opens     when a call cannot reach the destination, unless it counts as a failure of its session
    counts    a call that cannot reach the destination is a failure of its session if another
              session has succeeded since this session's last call: the message may be to blame
    probes    while open, one call at a time, from the session that has probed least. So a session
              that can never succeed does not keep the circuit open
    closes    when any call reaches the destination, or nothing waits for it any more. A call that
              timed out proves nothing
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import structlog

from ..telemetry import metrics

# While a destination cannot be reached, each session that waits for it probes at least this often.
MAX_PROBE_DELAY_S = 30.0
# Per handler. Destinations beyond it share one circuit breaker.
MAX_DESTINATIONS = 256
# 2**32 times the initial delay is beyond any maximum; the float must not overflow.
MAX_DOUBLINGS = 32
_NO_CALL_YET = -1

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class RetryPolicy(NamedTuple):
    """The limits of calls of one handler.

    Attributes:
        concurrency: Calls at the same time, each for another session.
        timeout_s: Seconds one call may take.
        initial_delay_s: Upper bound of the delay before the first retry; it doubles with each.
        max_delay_s: Upper bound of all delays.
        max_attempts: Failed calls after which an entry becomes a dead letter.
    """

    concurrency: int
    timeout_s: float
    initial_delay_s: float
    max_delay_s: float
    max_attempts: int

    def delay_s(self, failed: int) -> float | None:
        """Return a random delay in seconds after the *failed*-th failure, from 1; None: give up."""
        if failed >= self.max_attempts:
            return None
        return _full_jitter(failed - 1, self.initial_delay_s, self.max_delay_s)


class CircuitSession:
    """What a circuit breaker keeps of a session.

    Attributes:
        key: Its name.
        circuit: The circuit breaker of the destination its first entry is for, once known.
        probes: How often it has probed.
        successes_seen: The circuit's `successes` when this session's last call ended.
    """

    __slots__ = ("circuit", "key", "probes", "successes_seen")

    def __init__(self, key: str) -> None:
        self.key = key
        self.circuit: CircuitBreaker | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all about the entry before, which is done with."""
        if self.circuit is not None:
            self.circuit.leave(self)
        self.circuit = None
        self.probes, self.successes_seen = 0, _NO_CALL_YET


class Scheduler(Protocol):
    """Runs sessions; a dispatcher."""

    def resume(self, session: CircuitSession, /) -> None:
        """Call again for *session*: it is its turn to probe, or the circuit has closed."""


@dataclass
class _Turn:
    """Which session is to probe, or is probing."""

    session: CircuitSession
    scheduler: Scheduler
    has_begun: bool = False


class CircuitBreakers:
    """The circuit breakers of one handler, one for each of its destinations.

    Args:
        handler: The handler's name.
        initial_delay_s: Upper bound of the delay before a session's first probe; it doubles with
            each.
    """

    def __init__(self, handler: str, *, initial_delay_s: float) -> None:
        self._handler = handler
        self._initial_delay_s = initial_delay_s
        self._circuits: dict[str, CircuitBreaker] = {}
        metrics.CIRCUIT_OPEN.labels(handler).set(0)

    @property
    def is_open(self) -> bool:
        """Whether any destination cannot be reached."""
        return any(circuit.is_open for circuit in self._circuits.values())

    def for_destination(self, destination: str) -> CircuitBreaker:
        """Return the circuit breaker of a destination."""
        if destination not in self._circuits:
            if len(self._circuits) >= MAX_DESTINATIONS:
                destination = ""
            fresh = CircuitBreaker(
                self._handler, destination, initial_delay_s=self._initial_delay_s
            )
            self._circuits.setdefault(destination, fresh)
        return self._circuits[destination]

    def remove_waiting(self, scheduler: Scheduler) -> None:
        """Remove the waiting sessions of a scheduler that is stopping."""
        for circuit in self._circuits.values():
            circuit.remove_waiting(scheduler)


class CircuitBreaker:
    """Open from the first call that cannot reach a destination until any call does.

    Args:
        handler: The handler's name.
        destination: The handler's name for this destination; empty if it has only one.
        initial_delay_s: As for `CircuitBreakers`.

    Attributes:
        is_open: Whether only the session whose turn it is to probe may call.
        successes: How many calls have succeeded.
        probes: How many turns to probe were given since the circuit opened.
    """

    def __init__(self, handler: str, destination: str, *, initial_delay_s: float) -> None:
        self.is_open = False
        self.successes = 0
        self.probes = 0
        self._described = {"handler": handler}
        if destination:
            self._described["destination"] = destination
        self._initial_delay_s = initial_delay_s
        self._order = itertools.count()
        # Heap of (probes, order of arrival, session, scheduler): the least probed is in front.
        self._waiting: list[tuple[int, int, CircuitSession, Scheduler]] = []
        self._turn: _Turn | None = None
        self._timer: asyncio.TimerHandle | None = None
        # The probes of the session the timer was set for.
        self._timer_probes = 0
        self._reason = ""
        self._gauge = metrics.CIRCUIT_OPEN.labels(handler)

    def begin_call(self, session: CircuitSession) -> bool:
        """Return whether *session* may call now; if it is its turn to probe, the turn begins."""
        if not self.is_open:
            return True
        if self._turn is None or self._turn.session is not session:
            return False
        self._turn.has_begun = True
        return True

    def add_waiting(self, session: CircuitSession, scheduler: Scheduler) -> None:
        """Let *session* wait until its scheduler is asked to resume it."""
        heapq.heappush(self._waiting, (session.probes, next(self._order), session, scheduler))
        if self._timer is None or session.probes < self._timer_probes:
            self._plan_probe()

    def remove_waiting(self, scheduler: Scheduler) -> None:
        """Remove the waiting sessions of a scheduler that is stopping.

        A turn to probe that has not begun goes to another session; a call under way ends its own.
        """
        self._waiting = [waiting for waiting in self._waiting if waiting[3] is not scheduler]
        heapq.heapify(self._waiting)
        turn = self._turn
        if turn is not None and turn.scheduler is scheduler and not turn.has_begun:
            self._turn = None
        self._plan_probe()
        self._close_if_unused()

    def leave(self, session: CircuitSession) -> None:
        """Note that *session* is done with the entry that was for this destination."""
        self.end_probe(session)
        self._close_if_unused()

    def record_success(self) -> None:
        """Record a call that succeeded."""
        self.successes += 1
        self.record_response()

    def record_response(self) -> None:
        """Record a call that reached the destination, even if it failed there: close."""
        if self.is_open:
            self._close("reached")

    def _close_if_unused(self) -> None:
        """Close where nothing waits: no probe would ever find out that the destination is back."""
        if self.is_open and not self._waiting and self._turn is None:
            self._close("nothing_waits")

    def _close(self, reason: str) -> None:
        log.info("circuit.closed", **self._described, reason=reason, probes=self.probes)
        self.is_open, self._turn = False, None
        self._gauge.dec()
        waiting, self._waiting = self._waiting, []
        self._plan_probe()
        for _, _, session, scheduler in waiting:
            scheduler.resume(session)

    def record_failure(self, session: CircuitSession, *, is_timeout: bool) -> None:
        """Record a call that failed for any other reason than an unreachable destination."""
        session.successes_seen = self.successes
        if is_timeout:
            # The handler may have been waiting for the destination.
            self.end_probe(session)
        else:
            self.record_response()

    def record_unreachable(
        self, session: CircuitSession, reason: str, *, successes_before: int
    ) -> bool:
        """Record a call that could not reach the destination.

        Args:
            session: The session that called.
            reason: The word for the error.
            successes_before: `successes` when the call began.

        Returns:
            True if the destination is to blame; False if this counts as a failure of the session.
        """
        is_first_call = session.successes_seen == _NO_CALL_YET
        since = successes_before if is_first_call else session.successes_seen
        session.successes_seen = self.successes
        self.end_probe(session)
        # A first call may have begun before an outage of which other sessions know by now.
        if self.successes > since and not (is_first_call and self.is_open):
            return False
        if not self.is_open:
            self.is_open, self.probes = True, 0
            self._gauge.inc()
            log.error("circuit.opened", **self._described, reason=reason)
        elif reason != self._reason:
            log.error("circuit.still_open", **self._described, reason=reason)
        self._reason = reason
        return True

    def end_probe(self, session: CircuitSession) -> None:
        """End the turn to probe, if it is this session's, and plan the next one."""
        if self._turn is not None and self._turn.session is session:
            self._turn = None
            self._plan_probe()

    def _plan_probe(self) -> None:
        """Set the timer for the next turn, unless a turn is under way or no session waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._turn is None and self._waiting:
            self._timer_probes = self._waiting[0][0]
            delay_s = _full_jitter(self._timer_probes, self._initial_delay_s, MAX_PROBE_DELAY_S)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._begin_turn)

    def _begin_turn(self) -> None:
        self._timer = None
        _, _, session, scheduler = heapq.heappop(self._waiting)
        session.probes += 1
        self.probes += 1
        self._turn = _Turn(session, scheduler)
        scheduler.resume(session)


def _full_jitter(doublings: int, initial_delay_s: float, max_delay_s: float) -> float:
    """Return a random delay up to a bound that doubles.

    Random from zero on, so that sessions that failed together are not retried together.
    """
    bound_s = min(max_delay_s, initial_delay_s * 2 ** min(doublings, MAX_DOUBLINGS))
    return random.uniform(0, bound_s)  # noqa: S311 - jitter
