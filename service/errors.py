"""The tree of errors: each class says whose turn it is, each instance holds a word from a list.

No error here ever carries input, a value of a setting, or another exception's text.

    ServiceError
    ├── ConfigError      the operator's turn: a setting is missing or wrong
    ├── Rejected         the sender's turn: the request is refused as it stands
    ├── Unavailable      ours: try the same again later, nothing is decided
    ├── Undeliverable    nobody's: a handler says that trying again cannot help
    └── Unreachable      the destination's: a handler says that it is away or refuses everybody
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum, StrEnum

# How long whoever meets `Unavailable` is asked to wait.
RETRY_AFTER_S = 5


class ServiceError(Exception):
    """The parent of every error this service raises on purpose."""


class ConfigError(ServiceError):
    """Settings are missing or wrong. Reports all problems at once, by name, never by value."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class RejectionReason(StrEnum):
    """Why a request is refused: the closed list that answers, logs and metrics share."""

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
    """The request is refused as it stands; `field` is a path into the event, never a value."""

    def __init__(self, reason: RejectionReason, field: str | None = None) -> None:
        super().__init__(reason.value if field is None else f"{reason.value} {field}")
        self.reason = reason
        self.field = field


class UnavailableReason(StrEnum):
    """Why nothing could be decided now: the closed list behind every 503."""

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
    """Nothing is decided: the same request may be sent again later."""

    def __init__(self, reason: UnavailableReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


UNDELIVERABLE = "undeliverable"
UNREACHABLE = "unreachable"
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Undeliverable(ServiceError):
    """Raised by a handler for a transition that no further attempt can deliver.

    `reason` is one short word for the dead letter, such as `message_too_large`: 1 to 64 letters,
    digits and `_.-`, or an enum's member with such a value. Anything else becomes `undeliverable`.
    It must not hold anything of the transition itself.
    """

    # For a subclass that does not call our __init__.
    reason: str = UNDELIVERABLE

    def __init__(self, reason: object = UNDELIVERABLE) -> None:
        self.reason = reason_word(reason, UNDELIVERABLE)
        super().__init__(self.reason)


class Unreachable(ServiceError, ConnectionError):
    """Raised by a handler whose destination is away, missing, or refuses everybody.

    Nothing is lost and no attempt is counted: the transition waits until the destination is back.
    `reason` is one short word for the log, as for `Undeliverable`; else it becomes `unreachable`.
    """

    reason: str = UNREACHABLE

    def __init__(self, reason: object = UNREACHABLE) -> None:
        self.reason = reason_word(reason, UNREACHABLE)
        super().__init__(self.reason)


def reason_word(reason: object, default: str) -> str:
    """Return *reason* if it is one short word, else *default*."""
    value = reason.value if isinstance(reason, Enum) else reason
    is_word = isinstance(value, str) and _WORD.fullmatch(value)
    return str(value) if is_word else default
