"""What an error of Redis or redis-py means to us, in one word. Pure: nothing is asked or logged."""

from __future__ import annotations

import ssl

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from ..errors import UnavailableReason
from ..telemetry.loop_lag import LOOP_LAG
from .scripts import NotReplicatedError, UnsafeConfigError

_UNAUTHORIZED = (AuthenticationError, AuthorizationError, NoPermissionError)
# What a script was not permitted to call, in the words of Redis 7.2 and Valkey, and of Redis 7.0.
_SCRIPT_DENIED = ("ACL failure in script", "The user executing the script can't run this command")

_REASONS_BY_TEXT = {
    "NOREPLICAS": UnavailableReason.NOT_DURABLE,
    # A connection error to redis-py, but an answer.
    "max number of clients reached": UnavailableReason.REDIS_REFUSED,
}
_REASONS: tuple[tuple[tuple[type[BaseException], ...], UnavailableReason], ...]
_REASONS = (
    ((RedisTimeoutError, TimeoutError), UnavailableReason.REDIS_SLOW),
    # So is this.
    ((MasterDownError,), UnavailableReason.REDIS_REFUSED),
    ((RedisConnectionError, OSError, ClusterDownError), UnavailableReason.REDIS_UNREACHABLE),
    ((NotReplicatedError, UnsafeConfigError), UnavailableReason.NOT_DURABLE),
    ((OutOfMemoryError,), UnavailableReason.REDIS_FULL),
)


def unavailable_reason(error: BaseException) -> UnavailableReason:
    """Return why nothing could be decided, given the error of a call."""
    # redis-py reports some failures to connect as a lost connection, with the cause behind it; at a
    # Unix socket all of them.
    if isinstance(error.__cause__, RedisError):
        error = error.__cause__
    for each in (error, error.__context__):
        if isinstance(each, ssl.SSLError):
            return UnavailableReason.REDIS_UNTRUSTED
        if each is not None and is_unauthorized(each):
            return UnavailableReason.REDIS_UNAUTHORIZED
    for text, reason in _REASONS_BY_TEXT.items():
        if str(error).startswith(text):
            return reason
    for kinds, reason in _REASONS:
        if isinstance(error, kinds):
            # While our own event loop was blocked, a time-out says nothing about Redis.
            is_ours = reason is UnavailableReason.REDIS_SLOW and LOOP_LAG.was_blocked()
            return UnavailableReason.EVENT_LOOP_BLOCKED if is_ours else reason
    return UnavailableReason.REDIS_REFUSED


def is_unauthorized(error: BaseException) -> bool:
    """Return whether Redis does not know our user, or does not permit it the command."""
    return isinstance(error, _UNAUTHORIZED) or any(text in str(error) for text in _SCRIPT_DENIED)


def error_word(error: RedisError) -> str:
    """Return the first word of Redis's error reply, such as `READONLY`; empty for no reply."""
    if not isinstance(error, ResponseError):
        return ""
    return error.status_code or str(error).partition(" ")[0]
