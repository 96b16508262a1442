"""What is wrong with what Stripe is set up to send here, as findings.

Each finding says what is wrong, what it costs, and what to do about it. Its words are ours: of what
Stripe answers only ids are repeated. There is none about API versions, because no version is known
in which a needed field differs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Final, NamedTuple

from ..config import WEBHOOK_PATH, Livemode, Settings
from ..errors import ApiErrorReason
from ..findings import Finding, Promise, Severity
from .client import ApiEndpoint
from .destinations import REDACTED, Destination, Survey

WEBHOOKS: Final = "in Stripe's Dashboard under Workbench > Webhooks"
API_KEYS: Final = "in Stripe's Dashboard under Developers > API keys"


class EndpointFinding(StrEnum):
    """What may be wrong: a closed list for `check`, logs and metrics."""

    API = "stripe_api"
    MISSING = "endpoint_missing"
    DISABLED = "endpoint_disabled"
    DUPLICATE = "endpoint_duplicate"
    REDACTED_NOT_SELECTED = "redacted_not_selected"
    WILDCARD_SELECTED = "wildcard_selected"
    THIN_WITHOUT_KEY = "thin_without_key"
    LIVEMODE = "livemode_differs"
    CONNECT_MISSING = "connect_missing"


class _View(NamedTuple):
    """One mode as the rules see it."""

    survey: Survey
    settings: Settings
    holds_both_keys: bool

    @property
    def enabled(self) -> list[Destination]:
        """The destinations that get events at present."""
        return [one for one in self.survey.destinations if one.is_enabled]

    def lacks(self, one: Destination, event_type: str) -> bool:
        """Say whether of some account that *one* serves no events of a type come here."""
        return any(
            one.serves(connected=connected)
            and not any(
                event_type in other.types
                for other in self.enabled
                if other.serves(connected=connected)
            )
            for connected in (False, True)
        )


def assess(surveys: Sequence[Survey], settings: Settings) -> list[Finding]:
    """Return what is wrong with what the keys see."""
    found = []
    for one in surveys:
        found += [
            _finding(EndpointFinding.API, one, *_failure(endpoint, reason))
            for endpoint, reason in one.failures.items()
        ]
        if not one.failures:
            view = _View(one, settings, holds_both_keys=len(surveys) > 1)
            is_admitted = settings.livemode in {Livemode.BOTH, one.mode}
            rules = _RULES if is_admitted else _RULES_OF_AN_EXCLUDED_MODE
            found += [
                _finding(name, one, Severity.WARNING, meaning)
                for name, rule in rules.items()
                for meaning in rule(view)
            ]
    return found


def _finding(name: EndpointFinding, one: Survey, severity: Severity, meaning: str) -> Finding:
    return Finding(name.value, severity, (Promise.COMPLETE,), f"{one.mode} mode: {meaning}")


def _failure(endpoint: ApiEndpoint, reason: ApiErrorReason) -> tuple[Severity, str]:
    """Return what it means that a list cannot be read."""
    if reason is ApiErrorReason.FORBIDDEN:
        is_fatal, costs = endpoint is ApiEndpoint.EVENTS, _COSTS[endpoint]
        meaning = f"the key may not read {costs}; give it the permission {API_KEYS}"
    else:
        is_fatal, meaning = reason is ApiErrorReason.UNAUTHORIZED, _FAILURES[reason]
    return Severity.FATAL if is_fatal else Severity.WARNING, meaning


_CANNOT_CHECK: Final = "whether Stripe sends here what it should cannot be checked"
_CANNOT_FETCH: Final = "neither thin events nor missed ones can be fetched"
_COSTS: Final = {
    ApiEndpoint.EVENTS: f"events: {_CANNOT_FETCH}",
    ApiEndpoint.WEBHOOK_ENDPOINTS: f"webhook endpoints: {_CANNOT_CHECK}",
    ApiEndpoint.EVENT_DESTINATIONS: f"event destinations: {_CANNOT_CHECK}",
}
_FAILURES: Final = {
    ApiErrorReason.UNAUTHORIZED: (
        f"Stripe rejects the key: {_CANNOT_FETCH}; put a valid one into STRIPE_API_KEY ({API_KEYS})"
    ),
    ApiErrorReason.UNREACHABLE: (
        f"Stripe's API does not answer: {_CANNOT_FETCH} for now; open the way to STRIPE_API_BASE"
    ),
    ApiErrorReason.RATE_LIMITED: (
        f"Stripe's API refuses requests as too many: {_CANNOT_FETCH} for now; lower"
        " STRIPE_API_RATE, or see what else uses the account's API"
    ),
    ApiErrorReason.NOT_FOUND: f"STRIPE_API_BASE is not Stripe's API: {_CANNOT_FETCH}",
    ApiErrorReason.UNEXPECTED: (
        f"what answers at STRIPE_API_BASE is not Stripe's API as we know it: {_CANNOT_FETCH}"
    ),
}

# A rule yields the meaning of each case of a problem.
_Rule = Callable[[_View], Iterator[str]]


def _missing(view: _View) -> Iterator[str]:
    if not view.survey.destinations:
        yield (
            f"no destination has a URL that ends in {WEBHOOK_PATH} and selects events about"
            " verification sessions: Stripe sends nothing here; create one with the six types"
            f" {WEBHOOKS}"
        )


def _disabled(view: _View) -> Iterator[str]:
    for one in view.survey.destinations:
        if not one.is_enabled and any(view.lacks(one, event_type) for event_type in one.types):
            yield (
                f"{one.id} is disabled: what happens meanwhile is never sent, only reconciled;"
                f" enable it {WEBHOOKS}"
            )


def _duplicate(view: _View) -> Iterator[str]:
    alike: defaultdict[object, list[Destination]] = defaultdict(list)
    for one in view.enabled:
        for event_type in one.types:
            alike[one.url, one.is_thin, one.for_own, one.for_connected, event_type].append(one)
    doubled = {tuple(one.id for one in same) for same in alike.values() if len(same) > 1}
    for ids in sorted(doubled):
        yield (
            f"{' and '.join(ids)} send the same events to one URL: each comes {len(ids)} times;"
            f" delete all but one {WEBHOOKS}"
        )


def _redacted_not_selected(view: _View) -> Iterator[str]:
    for one in view.enabled:
        if not one.has_wildcard and view.lacks(one, REDACTED):
            yield (
                f"{one.id} does not select {REDACTED}: a session stays what it was when Stripe has"
                f" redacted it; select it {WEBHOOKS}"
            )


def _wildcard_selected(view: _View) -> Iterator[str]:
    for one in view.enabled:
        if one.has_wildcard and view.lacks(one, REDACTED):
            yield (
                f"{one.id} selects all events, which leaves {REDACTED} out: a session stays what it"
                f" was when Stripe has redacted it; select the six types by name {WEBHOOKS}"
            )


def _thin_without_key(view: _View) -> Iterator[str]:
    # A live destination of connected accounts gets the events of their test mode too.
    is_needed = view.survey.is_live and view.settings.livemode is Livemode.BOTH
    for one in view.enabled:
        if is_needed and not view.holds_both_keys and one.is_thin and one.for_connected:
            yield (
                f"{one.id} sends thin events of the connected accounts' test mode too, which get"
                " 503 without a key of that mode; add one to STRIPE_API_KEY, or set LIVEMODE=live"
            )


def _connect_missing(view: _View) -> Iterator[str]:
    if view.settings.stripe_accounts and not any(one.for_connected for one in view.enabled):
        yield (
            "STRIPE_ACCOUNTS is set, but no destination gets events of connected accounts: they are"
            f" only reconciled, a minute later; create one {WEBHOOKS}"
        )


def _excluded(view: _View) -> Iterator[str]:
    for one in view.enabled:
        yield (
            f"{one.id} sends here what LIVEMODE={view.settings.livemode} ignores: those events are"
            f" lost; change its URL {WEBHOOKS}, or LIVEMODE"
        )


_RULES: Final[Mapping[EndpointFinding, _Rule]] = {
    EndpointFinding.MISSING: _missing,
    EndpointFinding.DISABLED: _disabled,
    EndpointFinding.DUPLICATE: _duplicate,
    EndpointFinding.REDACTED_NOT_SELECTED: _redacted_not_selected,
    EndpointFinding.WILDCARD_SELECTED: _wildcard_selected,
    EndpointFinding.THIN_WITHOUT_KEY: _thin_without_key,
    EndpointFinding.CONNECT_MISSING: _connect_missing,
}
_RULES_OF_AN_EXCLUDED_MODE: Final[Mapping[EndpointFinding, _Rule]] = {
    EndpointFinding.LIVEMODE: _excluded
}
