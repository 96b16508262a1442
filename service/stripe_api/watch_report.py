"""What the reconciling worker knows of Stripe, left in Redis for those who look at a deployment."""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from ..config import DAY_S
from ..findings import Finding
from ..storage.connections import Connections
from ..storage.keys import Keys

# Longer than an outage of all workers, so that it can be seen how old it is.
TTL_S: Final = DAY_S
# The outcome of a pass that did not fail.
OK: Final = "ok"


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


class AccountPass(NamedTuple):
    """How far one account's events have been compared with Stripe's list.

    Attributes:
        name: `live` or `test`, and the id of a connected account.
        read_until: The Unix second up to which they were compared; None before the first time.
        outcome: That of the last pass: `ok` or the reason of the failure; empty before the first.
    """

    name: str
    read_until: int | None
    outcome: str


class WatchReport(msgspec.Struct, frozen=True):
    """All that is left in Redis.

    Attributes:
        at: Unix time in seconds.
        findings: What is wrong with what Stripe is set up to send here.
        destinations: What Stripe is set up to send here.
        accounts: The accounts that there is a key for.
    """

    at: float
    findings: tuple[Finding, ...]
    destinations: tuple[DestinationState, ...]
    accounts: tuple[AccountPass, ...]


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(WatchReport).decode


async def publish(connections: Connections, keys: Keys, report: WatchReport) -> None:
    """Replace the report in Redis.

    Raises:
        RedisError: Redis did not answer.
    """
    await connections.client.set(keys.endpoints, _encode(report), ex=TTL_S)


def decode(stored: bytes) -> WatchReport | None:
    """Return a report as it was stored; None where another version of this service stored it."""
    try:
        return _decode(stored)
    except msgspec.MsgspecError:
        return None
