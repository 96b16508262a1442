"""The tree of errors: the class says who has to act, the reason is a word from a closed list.

No error here ever holds input, the value of a setting, or the text of another exception.

    ServiceError
    ├── ConfigError      the operator: a setting is missing or wrong
    ├── Rejected         the sender: the request cannot be accepted as it is
    ├── Unavailable      the sender, later: nothing was decided, the same request may be repeated
    ├── ApiError         Stripe's API did not answer a request as it should
    ├── Undeliverable    a handler says that no further attempt can deliver the transition
    └── Unreachable      a handler says that its destination is down or rejects everything
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum, StrEnum

# How long a sender is asked to wait after `Unavailable`.
RETRY_AFTER_S = 5


class ServiceError(Exception):
    """The parent of every error this service raises on purpose."""


class ConfigError(ServiceError):
    """Settings are missing or wrong. Holds all problems, with names but never with values."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class RejectionReason(StrEnum):
    """Why a request is rejected: a closed list for responses, logs and metrics."""

    REQUEST_MALFORMED = "request_malformed"
    HEADERS_TOO_LARGE = "headers_too_large"
    TOO_MANY_CHUNKS = "too_many_chunks"
    SOURCE_NOT_ALLOWED = "source_not_allowed"
    ENDPOINT_UNKNOWN = "endpoint_unknown"
    TRAILING_SLASH = "trailing_slash"
    SIGNATURE_MISSING = "signature_missing"
    SIGNATURE_MALFORMED = "signature_malformed"
    SIGNATURE_MISMATCH = "signature_mismatch"
    SIGNATURE_OF_OTHER_ENDPOINT = "signature_of_other_endpoint"
    TIMESTAMP_TOO_OLD = "timestamp_too_old"
    TIMESTAMP_TOO_NEW = "timestamp_too_new"
    BODY_TOO_LARGE = "body_too_large"
    BODY_NOT_JSON = "body_not_json"
    BODY_NOT_AN_EVENT = "body_not_an_event"
    FIELD_MISSING = "field_missing"
    FIELD_MISTYPED = "field_mistyped"


class Rejected(ServiceError):
    """The request cannot be accepted; `field` is a path into the event, never a value."""

    def __init__(self, reason: RejectionReason, field: str | None = None) -> None:
        super().__init__(reason.value if field is None else f"{reason.value} {field}")
        self.reason = reason
        self.field = field


class UnavailableReason(StrEnum):
    """Why nothing could be decided: a closed list, the reason of every 503."""

    REDIS_UNREACHABLE = "redis_unreachable"
    REDIS_UNTRUSTED = "redis_untrusted"
    REDIS_UNAUTHORIZED = "redis_unauthorized"
    REDIS_SLOW = "redis_slow"
    REDIS_FULL = "redis_full"
    REDIS_REFUSED = "redis_refused"
    EVENT_LOOP_BLOCKED = "event_loop_blocked"
    NOT_DURABLE = "not_durable"
    CLOCKS_DIFFER = "clocks_differ"
    LAYOUT_DIFFERS = "layout_differs"
    BACKLOG_FULL = "backlog_full"
    API_KEY_MISSING = "api_key_missing"
    BUSY = "busy"


class Unavailable(ServiceError):
    """Nothing was decided: the same request may be sent again later."""

    def __init__(self, reason: UnavailableReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class ApiErrorReason(StrEnum):
    """What became of a request to Stripe's API: a closed list for logs, metrics and findings."""

    UNAUTHORIZED = "api_unauthorized"
    FORBIDDEN = "api_forbidden"
    NOT_FOUND = "api_not_found"
    RATE_LIMITED = "api_rate_limited"
    UNREACHABLE = "api_unreachable"
    UNEXPECTED = "api_unexpected"


class ApiError(ServiceError):
    """A request to Stripe's API failed. Nothing of its answer is kept."""

    def __init__(self, reason: ApiErrorReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


UNDELIVERABLE = "undeliverable"
UNREACHABLE = "unreachable"
REASON_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Undeliverable(ServiceError):
    """Raised by a handler for a transition that no further attempt can deliver.

    `reason` is one short word for the dead letter, such as `message_too_large`: 1 to 64 letters,
    digits and `_.-`, or an enum member with such a value. Anything else becomes `undeliverable`.
    It must not contain data of the transition.

    `unreachable` is the word for what `fetch` cannot reach or may not read, where it is too late to
    wait for that: the circuit opens with this word, as with `Unreachable`.
    """

    # The defaults for subclasses that do not call this __init__.
    reason: str = UNDELIVERABLE
    unreachable: str | None = None

    def __init__(self, reason: object = UNDELIVERABLE, *, unreachable: str | None = None) -> None:
        self.reason = reason_word(reason, UNDELIVERABLE)
        self.unreachable = unreachable
        super().__init__(self.reason)


class Unreachable(ServiceError, ConnectionError):
    """Raised by a handler whose destination is down, missing, or rejects every transition.

    Nothing is lost and no attempt is counted: the transition waits until the destination is back.
    `reason` is one short word for the log, as in `Undeliverable`; anything else becomes
    `unreachable`.
    """

    reason: str = UNREACHABLE

    def __init__(self, reason: object = UNREACHABLE) -> None:
        self.reason = reason_word(reason, UNREACHABLE)
        super().__init__(self.reason)


def reason_word(reason: object, default: str) -> str:
    """Return *reason* if it is one short word, else *default*."""
    value = reason.value if isinstance(reason, Enum) else reason
    is_word = isinstance(value, str) and REASON_WORD.fullmatch(value)
    return str(value) if is_word else default
