"""What tests need of a broker: run it, break it, and look at its queue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

import msgspec

from service.transitions.transition import StatusTransition


class Received(NamedTuple):
    """One message as a consumer finds it on the queue.

    Attributes:
        body: The bytes.
        id: The broker's message or deduplication id; None if it has none.
        key: What the broker orders or routes by; None if it has none.
        headers: Headers, properties or attributes as text, without those of the transport.
    """

    body: bytes
    id: str | None
    key: str | None
    headers: Mapping[str, str]


class Refused(NamedTuple):
    """A call that the broker refuses.

    Attributes:
        reason: The reason of the `Undeliverable` or `Unreachable` that the handler raises.
        environ: What to open the handler with.
        transition: What to deliver.
    """

    reason: str
    environ: Mapping[str, str]
    transition: StatusTransition


class WrongSettings(NamedTuple):
    """A configuration in which `check()` finds a problem.

    Attributes:
        setting: The variable that the problem begins with.
        environ: What to open the handler with.
    """

    setting: str
    environ: Mapping[str, str]


class Broker(Protocol):
    """A broker on 127.0.0.1 with one queue.

    The plain methods block and may take seconds. The asynchronous ones connect and disconnect
    within the call, in any event loop.

    Attributes:
        port: Where it listens; the same after a restart.
        is_durable: Whether confirmed messages are still there after `kill` and `start`.
        deduplicates: Whether a second message with the same id is dropped.
    """

    port: int
    is_durable: bool
    deduplicates: bool

    def environ(self, port: int | None = None, *, credentials: str = "") -> dict[str, str]:
        """Return the settings of the handler.

        Args:
            port: Another port, of a proxy or of nothing.
            credentials: Another `user:password`.
        """

    def undeliverable_messages(self) -> Iterable[Refused]:
        """Return calls with messages that the broker will never accept."""

    def refusing_destinations(self) -> Iterable[Refused]:
        """Return calls to destinations that accept no message or do not exist."""

    def queue_removed(self) -> AbstractAsyncContextManager[str]:
        """Remove the queue for the length of the block; yield the reason that calls fail with.

        The reason is empty if the broker cannot remove its queue.
        """

    def wrong_settings(self) -> Iterable[WrongSettings]:
        """Return what `check()` must find: refused credentials, no such queue."""

    async def empty(self) -> None:
        """Remove every message from the queue."""

    async def received(self) -> list[Received]:
        """Return every message on the queue, those of one key in the queue's order."""

    def kill(self) -> None:
        """End the process at once."""

    def start(self) -> None:
        """Start it again after `kill`, on the same port and files; return when it serves."""

    def frozen(self) -> AbstractContextManager[None]:
        """Stop the process for the length of the block."""


def transition(session: str, sequence: int, **changes: Any) -> StatusTransition:
    """Return the *sequence*-th transition of a session, with text that is hard to encode."""
    made = StatusTransition(
        event_id=f"evt_{session}_{sequence}",
        event_type="identity.verification_session.processing",
        occurred_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        livemode=True,
        account="acct_1",
        session_id=f"vs_{session}",
        session_type="document",
        current="processing",
        client_reference_id="Ünïcode ☃ \U0001f600 \x7f",
        metadata={"order": "6735", "näme": "\u2028"},
        previous="requires_input",
        sequence=sequence,
        epoch=1_790_000_000_000,
        expected=True,
    )
    return msgspec.structs.replace(made, **changes)
