"""The state of a whole deployment in one value, for the page and for `status`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal, NamedTuple

from ..errors import UnavailableReason
from ..storage.assessment import Finding, Severity
from .activity import Activity, Reversal

Verdict = Literal["all is well", "attention", "failing"]

_NO_ANSWERS = {
    UnavailableReason.REDIS_SLOW: "does not answer in time",
    UnavailableReason.REDIS_UNTRUSTED: "and this process do not trust each other's certificate",
    UnavailableReason.REDIS_UNAUTHORIZED: "refuses the user, its password or its command",
    UnavailableReason.REDIS_FULL: "is full",
    UnavailableReason.REDIS_REFUSED: "answers with an error",
    UnavailableReason.NOT_DURABLE: "cannot keep writes as DURABILITY asks",
}


class Reason(NamedTuple):
    """One thing that someone should know or do.

    Attributes:
        severity: `fatal`: events are not accepted or not delivered now. `warning`: something has to
            be done. `fine`: only a hint, which does not change the verdict.
        subject: What it is about, such as `receivers` or `handler rabbitmq`.
        meaning: What is the case, as a sentence without its full stop.
        help: What to do, in the same form; empty if nothing.
        path: The path on the page that shows more; empty if none does.
    """

    severity: Severity
    subject: str
    meaning: str
    help: str = ""
    path: str = ""


class HandlerState(NamedTuple):
    """One handler's consumer group, over all partitions.

    Attributes:
        name: The handler's name.
        kind: What it gets: `transitions`, or for `fetch` `notifications`.
        is_configured: Whether it is among HANDLERS, or is `fetch`.
        lag: What it has not acknowledged of its stream; None when Redis cannot tell.
        replays: Replays that it has not acknowledged.
        oldest_s: Seconds since the oldest of those was appended; 0 for none.
        dead_letters: Its dead letters.
        is_circuit_open: Whether its destination is unreachable, so that it is only probed.
        workers: How many live workers call it.
        leases: For each partition the name of the worker that has its lease; None for no worker.
        failing: How many entries have failed and are retried; at most 100 are counted in each
            partition.
    """

    name: str
    kind: str
    is_configured: bool
    lag: int | None
    replays: int
    oldest_s: float
    dead_letters: int
    is_circuit_open: bool
    workers: int
    leases: tuple[str | None, ...]
    failing: int


class DestinationState(NamedTuple):
    """A webhook endpoint or event destination at Stripe that leads here.

    Attributes:
        id: `we_…` or `ed_…`.
        mode: `live` or `test`.
        path: The path of its URL as this service knows it; neither host nor query.
        is_thin: Whether it gets thin events.
        is_enabled: Whether Stripe sends to it at present.
        is_for_connected: Whether it gets the events of connected accounts.
        types: How many of the types about verification sessions it selects.
    """

    id: str
    mode: str
    path: str
    is_thin: bool
    is_enabled: bool
    is_for_connected: bool
    types: int


class AccountState(NamedTuple):
    """How far one account's events have been compared with Stripe's list.

    Attributes:
        name: `live` or `test`, and the id of a connected account.
        lag_s: Seconds since the second up to which they were compared; None before the first time.
        outcome: That of the last pass: `ok` or the reason of the failure; empty before the first.
    """

    name: str
    lag_s: float | None
    outcome: str


class Reconciliation(NamedTuple):
    """What the worker that reconciles published last.

    Attributes:
        seen_s: Seconds since then.
        lag_s: The greatest lag of an account; None while no account was compared.
        accounts: Each account.
        recovered: How many events were recovered within 7 days.
    """

    seen_s: float
    lag_s: float | None
    accounts: tuple[AccountState, ...]
    recovered: int


class Overview(NamedTuple):
    """The state of a deployment.

    Attributes:
        at: When it was collected.
        verdict: The worst of the reasons, in words.
        reasons: What someone should know or do, the worst first.
        is_available: Whether Redis answered; if not, all that follows is empty.
        activity: What the processes published.
        handlers: Each handler that is configured or has a consumer group.
        redis_findings: What the state of Redis means, fine findings included.
        endpoint_findings: What is wrong with what Stripe is set up to send here.
        destinations: What Stripe is set up to send here.
        reconciliation: None where no worker has a key of Stripe's API.
        took_s: How long the collection took.
    """

    at: datetime
    verdict: Verdict
    reasons: tuple[Reason, ...]
    is_available: bool = True
    activity: Activity = Activity()
    handlers: tuple[HandlerState, ...] = ()
    redis_findings: tuple[Finding, ...] = ()
    endpoint_findings: tuple[Finding, ...] = ()
    destinations: tuple[DestinationState, ...] = ()
    reconciliation: Reconciliation | None = None
    took_s: float = 0.0

    @property
    def reversals(self) -> tuple[Reversal, ...]:
        """The latest reversals, the newest first."""
        return self.activity.reversals


def unavailable(reason: UnavailableReason) -> Overview:
    """Return the overview that says only that Redis does not answer, and why."""
    meaning = f"Redis {describe_no_answer(reason)} ({reason})"
    known = Reason(
        Severity.FATAL,
        "Redis",
        f"{meaning}: events get 503, and Stripe sends them again for three days",
        "look at Redis, at the network and at REDIS_URL",
    )
    return Overview(datetime.now(UTC), "failing", (known,), is_available=False)


def describe_no_answer(reason: UnavailableReason) -> str:
    """Return what Redis does instead of answering, to be put behind its name."""
    return _NO_ANSWERS.get(reason, "does not answer")
