"""Where transitions go: the protocol of a handler, and the built-in handlers, one file each.

A handler's file is imported only when HANDLERS names it (`loading`). Retries, order and dead
letters are the job of `delivery`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeAlias

from ..transitions.transition import StatusTransition

BUILT_IN = {
    name: f"{__name__}.{name}:open"
    for name in ("kafka", "log", "nats", "rabbitmq", "redis_stream", "sqs")
}
ENTRY_POINT_GROUP = "verification_handlers"


class Handler(Protocol):
    """Delivers transitions: those of one session one at a time, many sessions concurrently.

    A call that returns has delivered its transition for good. A call fails by raising

    * `Undeliverable`: no attempt can ever deliver this transition. It becomes a dead letter.
    * `Unreachable`, or what counts as that (`failures.unreachable_reason`): the destination is
      down or rejects everything. The transition waits for it, and no attempt is counted.
    * anything else, or by taking too long: a failed attempt, to be repeated.

    A transition may be delivered more than once, with the same event id and sequence.

    A handler may have two more methods. `async check()` looks at the destination and raises what a
    call would raise, or `ConfigError`. `destination(transition)` is for a handler with several
    destinations: it returns a short text, and each text has a circuit breaker of its own.
    """

    async def __call__(self, transition: StatusTransition, /) -> None:
        """Deliver *transition*."""


# What `delivery` calls: a `Handler`, or the handler `fetch`, which takes notifications.
AnyHandler: TypeAlias = Callable[[Any], Awaitable[None]]


class OpenHandler(Protocol):
    """Opens a handler from the environment: read settings, yield the handler, disconnect."""

    def __call__(self, environ: Mapping[str, str], /) -> AbstractAsyncContextManager[Handler]:
        """Return the context in which the handler works."""


# Opens any of these.
AnyOpener: TypeAlias = Callable[[Mapping[str, str]], AbstractAsyncContextManager[AnyHandler]]


def destination_of(handler: AnyHandler) -> Callable[[Any], str] | None:
    """Return the handler's `destination` method, or None if it has one destination."""
    found: Callable[[Any], str] | None = getattr(handler, "destination", None)
    return found


def wrap(handler: AnyHandler, call: AnyHandler) -> AnyHandler:
    """Return *call*, which calls *handler*, with the `destination` method of *handler*."""
    if (destination := destination_of(handler)) is not None:
        call.destination = destination  # type: ignore[attr-defined]
    return call
