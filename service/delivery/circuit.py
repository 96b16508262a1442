"""The circuit of one destination: while it cannot be reached, sessions wait and one probes.

Knows nothing of entries, Redis or any queue. The rules:

    opens    when a call cannot reach the destination, unless that counts as the session's own
             failure
    counts   a call that cannot reach the destination is an attempt of its session whenever another
             session has succeeded since this session's last try: the message may be to blame
    probes   while open one call at a time, for the session that was probed least; so one session
             that can never succeed does not keep the circuit open
    closes   when any call reaches the destination. One that ran out of time proves nothing
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from dataclasses import dataclass
from typing import Protocol

import structlog

from ..telemetry import metrics

# While a handler cannot reach its destination, it is asked again at least this often.
PROBE_CEILING_S = 30.0
# Of one handler, each with a circuit of its own; the rest share one.
MAX_DESTINATIONS = 256
_NEVER = -1

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Caller:
    """What the circuit knows of a session whose first entry is tried.

    Attributes:
        key: Its name.
        circuit: That of the destination its entry is for; None before that is known.
        probes: How often it has probed.
        seen: How many calls of all sessions had succeeded when its last try ended.
    """

    __slots__ = ("circuit", "key", "probes", "seen")

    def __init__(self, key: str) -> None:
        self.key = key
        self.begin()

    def begin(self) -> None:
        """Start anew, with another entry."""
        self.circuit: Circuit | None = None
        self.probes, self.seen = 0, _NEVER


class Owner(Protocol):
    """Whoever lets callers wait here."""

    def resume(self, caller: Caller, /) -> None:
        """Let *caller* try again: it is its turn to probe, or the circuit has closed."""


@dataclass
class _Turn:
    """Whose turn it is to probe."""

    caller: Caller
    owner: Owner
    has_begun: bool = False


class Circuits:
    """The circuits of one handler: one for each destination it tells apart, usually one.

    Args:
        handler: The handler's name.
        first_s: A caller's first probe comes within this many seconds, each later one within twice
            that.
    """

    def __init__(self, handler: str, *, first_s: float) -> None:
        self._handler = handler
        self._first_s = first_s
        self._circuits: dict[str, Circuit] = {}
        metrics.CIRCUIT_OPEN.labels(handler).set(0)

    @property
    def is_open(self) -> bool:
        """Whether any destination cannot be reached."""
        return any(circuit.is_open for circuit in self._circuits.values())

    def of(self, destination: str) -> Circuit:
        """Return the circuit of a destination."""
        if destination not in self._circuits:
            if len(self._circuits) >= MAX_DESTINATIONS:
                destination = ""
            fresh = Circuit(self._handler, destination, first_s=self._first_s)
            self._circuits.setdefault(destination, fresh)
        return self._circuits[destination]

    def leave(self, owner: Owner) -> None:
        """Forget the callers of an owner that is stopping, but for those that are calling."""
        for circuit in self._circuits.values():
            circuit.leave(owner)


class Circuit:
    """Open from the first call that cannot reach a destination until any call does.

    Args:
        handler: The handler's name.
        destination: What it calls this destination; empty where it has but one.
        first_s: As for `Circuits`.

    Attributes:
        is_open: Whether callers have to wait, but for the one whose turn it is to probe.
        succeeded: How many calls have succeeded.
        probes: How many callers have had a turn since it opened.
    """

    def __init__(self, handler: str, destination: str, *, first_s: float) -> None:
        self.is_open = False
        self.succeeded = 0
        self.probes = 0
        self._named = {"handler": handler, **({"destination": destination} if destination else {})}
        self._first_s = first_s
        self._order = itertools.count()
        # Heap of (probes, order of arrival, caller, owner): the least probed is in front.
        self._waiting: list[tuple[int, int, Caller, Owner]] = []
        self._turn: _Turn | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._next_level = 0
        self._reason = ""
        self._gauge = metrics.CIRCUIT_OPEN.labels(handler)

    def enter(self, caller: Caller) -> bool:
        """Say whether *caller* may call now: the circuit is closed, or it has its turn to probe."""
        if not self.is_open:
            return True
        if self._turn is None or self._turn.caller is not caller:
            return False
        self._turn.has_begun = True
        return True

    def wait(self, caller: Caller, owner: Owner) -> None:
        """Let *caller* wait until its owner is told to resume it."""
        heapq.heappush(self._waiting, (caller.probes, next(self._order), caller, owner))
        if self._timer is None or caller.probes < self._next_level:
            self._plan_probe()

    def leave(self, owner: Owner) -> None:
        """Forget the callers of an owner that is stopping, but for one that is calling."""
        self._waiting = [waiting for waiting in self._waiting if waiting[3] is not owner]
        heapq.heapify(self._waiting)
        if self._turn is not None and self._turn.owner is owner and not self._turn.has_begun:
            self._turn = None
        self._plan_probe()

    def succeed(self) -> None:
        """Note a call that succeeded."""
        self.succeeded += 1
        self.answer()

    def answer(self) -> None:
        """Note a call that reached the destination, whatever came of it."""
        if not self.is_open:
            return
        log.info("circuit.closed", **self._named, probes=self.probes)
        self.is_open, self._turn = False, None
        self._gauge.dec()
        waiting, self._waiting = self._waiting, []
        self._plan_probe()
        for _, _, caller, owner in waiting:
            owner.resume(caller)

    def fail(self, caller: Caller, reason: str, *, succeeded_before: int) -> bool:
        """Note a call that could not reach the destination; say whether that is to blame.

        Args:
            caller: The session that called.
            reason: The word for it.
            succeeded_before: `succeeded` when the call began.
        """
        is_first_try = caller.seen == _NEVER
        since = succeeded_before if is_first_try else caller.seen
        caller.seen = self.succeeded
        self.end_probe(caller)
        if self.succeeded > since and not (is_first_try and self.is_open):
            return False
        if not self.is_open:
            self.is_open, self.probes = True, 0
            self._gauge.inc()
            log.error("circuit.opened", **self._named, reason=reason)
        elif reason != self._reason:
            log.error("circuit.still_open", **self._named, reason=reason)
        self._reason = reason
        return True

    def end_probe(self, caller: Caller) -> None:
        """Give the turn to probe to the next, if it was this caller's."""
        if self._turn is not None and self._turn.caller is caller:
            self._turn = None
            self._plan_probe()

    def _plan_probe(self) -> None:
        """Set the timer for the next probe, unless there is one under way or nobody to probe."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._turn is None and self._waiting:
            self._next_level = self._waiting[0][0]
            longest = min(PROBE_CEILING_S, self._first_s * 2 ** min(self._next_level, 32))
            pause_s = random.uniform(0, longest)  # noqa: S311 - jitter
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._probe)

    def _probe(self) -> None:
        self._timer = None
        _, _, caller, owner = heapq.heappop(self._waiting)
        caller.probes += 1
        self.probes += 1
        self._turn = _Turn(caller, owner)
        owner.resume(caller)
