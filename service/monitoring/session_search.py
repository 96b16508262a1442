"""Sessions, found by an event id or by your own reference."""

from __future__ import annotations

from typing import NamedTuple


class Found(NamedTuple):
    """What one search has found.

    Attributes:
        session_ids: The sessions, the one with the newest transition first.
        goes_on_at: Where to search on, further back; None if all was searched.
        searched: How many transitions were looked at.
    """

    session_ids: tuple[str, ...]
    goes_on_at: str | None
    searched: int
