"""The signing secrets in use, which may be exchanged while requests are verified with them.

Where secrets stand is `config`'s business, when they are looked at again `reloading`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..secret import Secret
from .signatures import fingerprint


class SigningSecrets(Mapping[str, tuple[Secret[bytes], ...]]):
    """Every endpoint's signing secrets, as they are now."""

    def __init__(self, secrets: Mapping[str, tuple[Secret[bytes], ...]]) -> None:
        self._secrets = secrets

    def __getitem__(self, endpoint: str) -> tuple[Secret[bytes], ...]:
        return self._secrets[endpoint]

    def __iter__(self) -> Iterator[str]:
        return iter(self._secrets)

    def __len__(self) -> int:
        return len(self._secrets)

    def replace(self, secrets: Mapping[str, tuple[Secret[bytes], ...]]) -> None:
        """Use *secrets* from the next request on, and none of those before."""
        self._secrets = secrets

    def fingerprints(self) -> list[str]:
        """Return the names under which all secrets in use may be logged."""
        found = {fingerprint(secret) for secrets in self._secrets.values() for secret in secrets}
        return sorted(found)

    def places(self) -> list[tuple[str, str]]:
        """Return the name of each with its place among its endpoint's: current (first) or old."""
        return [
            (fingerprint(secret), "old" if place else "current")
            for secrets in self._secrets.values()
            for place, secret in enumerate(secrets)
        ]
