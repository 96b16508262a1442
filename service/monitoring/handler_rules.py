"""What the state of one handler means. Pure."""

from __future__ import annotations

from typing import Final

from ..config import DAY_S
from ..findings import Severity
from ..parsers import FETCH
from .handler_state import HandlerState
from .verdict import Reason
from .words import counted, duration

# DeliveryDelayed, FetchDelayed.
MAX_WAIT_S: Final = 300.0
MAX_FETCH_WAIT_S: Final = 3 * DAY_S
# NoWorkers.
NO_WORKER: Final = "no worker calls it"
NO_FETCHER: Final = "no worker fetches"


def judge_handler(state: HandlerState) -> list[Reason]:
    """Return what is wrong with one handler."""
    reasons = find_obstacles(state, expects_worker=True)
    is_late = state.oldest_s > MAX_WAIT_S
    if state.name == FETCH and state.oldest_s > MAX_FETCH_WAIT_S:
        reasons.append(
            _of_handler(
                state,
                Severity.FATAL,
                f"a notification waits for {duration(state.oldest_s)}; Stripe keeps events for 30"
                " days",
                "`circuit.opened` and `delivery.retried` in the worker's log say why",
            )
        )
    elif is_late and not reasons:
        reasons.append(
            _of_handler(
                state,
                Severity.WARNING,
                f"the oldest of its {state.kind} waits for {duration(state.oldest_s)}",
                "add workers, raise HANDLER_CONCURRENCY, or make the handler faster",
            )
        )
    if state.dead_letters:
        letters = counted(state.dead_letters, "dead letter")
        reasons.append(
            Reason(
                Severity.WARNING,
                f"handler {state.name}",
                f"{letters}: given up until replayed or dropped",
                f"`dead list {state.name}` says why; `dead replay {state.name} --all` delivers them"
                " again",
                f"/dead-letters/{state.name}",
            )
        )
    return reasons


def find_obstacles(state: HandlerState, *, expects_worker: bool) -> list[Reason]:
    """Return what keeps a handler from getting what waits for it.

    Args:
        state: Its state.
        expects_worker: Whether it needs a worker even if nothing waits for long.
    """
    obstacles = []
    if not state.is_configured:
        obstacles.append(
            _of_handler(
                state,
                Severity.WARNING,
                "not among HANDLERS: what it has not acknowledged is kept until it is retired",
                f"add it to HANDLERS, or type `handlers retire {state.name}`",
            )
        )
    elif state.is_circuit_open:
        is_fetch = state.name == FETCH
        queue = "Stripe's API, or an account there," if is_fetch else "its queue"
        obstacles.append(
            _of_handler(
                state,
                Severity.WARNING,
                f"{queue} is unreachable: its worker probes until it answers",
                "`circuit.opened` in the worker's log says why",
            )
        )
    elif not state.workers and _needs_worker(state, expects_worker=expects_worker):
        obstacles.append(_without_worker(state))
    if state.failing:
        obstacles.append(
            _of_handler(
                state,
                Severity.WARNING,
                f"{state.failing} of its {state.kind} failed and are retried",
                "see `delivery.retried` in the worker's log",
            )
        )
    return obstacles


def _needs_worker(state: HandlerState, *, expects_worker: bool) -> bool:
    if state.name == FETCH:
        # Only workers with a key fetch. Where none has one, notifications would wait for ever.
        return bool(state.lag or state.replays)
    return expects_worker or state.oldest_s > MAX_WAIT_S


def _without_worker(state: HandlerState) -> Reason:
    if state.name == FETCH:
        return _of_handler(state, Severity.FATAL, NO_FETCHER, "start workers with STRIPE_API_KEY")
    return _of_handler(
        state, Severity.FATAL, NO_WORKER, "start workers, or name it in their --handlers"
    )


def _of_handler(state: HandlerState, severity: Severity, meaning: str, what_to_do: str) -> Reason:
    return Reason(severity, f"handler {state.name}", meaning, what_to_do, "/handlers")
