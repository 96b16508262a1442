"""The signing secrets in use, which can be replaced while the service is running.

Where secrets come from is decided in `config`, when they are read again in `reloading`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..secret import Secret
from .signatures import fingerprint


class SigningSecrets(Mapping[str, tuple[Secret[bytes], ...]]):
    """The current signing secrets of every endpoint."""

    def __init__(self, secrets: Mapping[str, tuple[Secret[bytes], ...]]) -> None:
        self._secrets = secrets

    def __getitem__(self, endpoint: str) -> tuple[Secret[bytes], ...]:
        return self._secrets[endpoint]

    def __iter__(self) -> Iterator[str]:
        return iter(self._secrets)

    def __len__(self) -> int:
        return len(self._secrets)

    def replace(self, secrets: Mapping[str, tuple[Secret[bytes], ...]]) -> None:
        """Use only *secrets* from the next request on."""
        self._secrets = secrets

    def fingerprints(self) -> list[str]:
        """Return the fingerprint of every secret in use, sorted and without repetitions."""
        return sorted({each for each, _ in self.fingerprints_and_places()})

    def fingerprints_and_places(self) -> list[tuple[str, str]]:
        """Return the fingerprint of each secret with its place: `current` (first) or `old`."""
        return [each for secrets in self.fingerprints_by_endpoint().values() for each in secrets]

    def fingerprints_by_endpoint(self) -> dict[str, list[tuple[str, str]]]:
        """Return the fingerprints of each endpoint's secrets, each with its place."""
        return {
            endpoint: [
                (fingerprint(secret), "old" if place else "current")
                for place, secret in enumerate(secrets)
            ]
            for endpoint, secrets in self._secrets.items()
        }
