"""How far the events that came have been compared with Stripe's list of them."""

from __future__ import annotations

from typing import NamedTuple

from ..stripe_api.watch_report import OK, WatchReport


class AccountState(NamedTuple):
    """How far one account's events have been compared with Stripe's list.

    Attributes:
        name: `live` or `test`, and the id of a connected account.
        lag_s: Seconds since the second up to which they were compared; None before the first time.
        failure: Why the last pass failed, as one word; empty if none has.
    """

    name: str
    lag_s: float | None
    failure: str


class Reconciliation(NamedTuple):
    """What the worker that reconciles reported last.

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


def assess_report(report: WatchReport, *, now: float, recovered: int) -> Reconciliation:
    """Return what a report means at *now*, in Unix seconds."""
    accounts = tuple(
        AccountState(
            one.name,
            None if one.read_until is None else max(0.0, now - one.read_until),
            "" if one.outcome == OK else one.outcome,
        )
        for one in report.accounts
    )
    lags = [one.lag_s for one in accounts if one.lag_s is not None]
    return Reconciliation(max(0.0, now - report.at), max(lags, default=None), accounts, recovered)
