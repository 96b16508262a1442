"""The keys of Stripe's API in use, one for each mode, which can be replaced while they are in use.

Where keys come from is decided in `config`, when they are read again in `reloading`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ..secret import Secret


class ApiKeys:
    """The current keys.

    Args:
        keys: At most one of each mode, as `config` accepts them.
    """

    def __init__(self, keys: Sequence[Secret[str]]) -> None:
        self._keys = _by_mode(keys)

    def replace(self, keys: Sequence[Secret[str]]) -> None:
        """Use only *keys* from the next request on."""
        self._keys = _by_mode(keys)

    def holds(self, is_live: bool) -> bool:  # noqa: FBT001 - passed on as a function of the mode
        """Say whether there is a key of a mode."""
        return is_live in self._keys

    def authorization(self, *, is_live: bool) -> str | None:
        """Return the header that carries the key of a mode; None if there is no such key."""
        key = self._keys.get(is_live)
        return None if key is None else f"Bearer {key.reveal()}"

    def fingerprints(self) -> dict[str, str]:
        """Return a name for each key under which it may be logged, by its mode."""
        return {
            "live" if is_live else "test": hashlib.sha256(key.reveal().encode()).hexdigest()[:8]
            for is_live, key in self._keys.items()
        }


def _by_mode(keys: Sequence[Secret[str]]) -> dict[bool, Secret[str]]:
    return {key.reveal().split("_")[1] == "live": key for key in keys}
