"""Ids as long as Stripe's, and canaries: values that must not appear where they do not belong.

Every secret and every personal text that the stand-in serves contains `CANARY`; every day, month
and year of a date in a person's life is one of `CANARY_NUMBERS`. What else is personal has too
little room for a canary: countries, and words from closed lists such as the sex.
"""

from __future__ import annotations

import string
from random import Random
from typing import Final

CANARY: Final = "canary0"
CANARY_NUMBERS: Final = range(48_151_600, 48_151_700)

_ALPHABET: Final = string.ascii_letters + string.digits
_ID_LENGTH: Final = 24
# The ids of thin events and of their destinations are longer than others.
_LONG_ID_LENGTH: Final = 52


class Tokens:
    """A source of ids and secrets: each gives the same ones."""

    def __init__(self) -> None:
        self._random = Random(0)

    def new_id(self, prefix: str) -> str:
        """Return an id of an object under /v1, such as `vs_…`."""
        return f"{prefix}_{self._letters(_ID_LENGTH)}"

    def new_long_id(self, prefix: str, *, livemode: bool) -> str:
        """Return an id of an object under /v2, such as `evt_test_…`."""
        mode = "" if livemode else "test_"
        return f"{prefix}_{mode}{self._letters(_LONG_ID_LENGTH)}"

    def new_secret(self, prefix: str) -> str:
        """Return a secret that begins with *prefix* and contains the canary."""
        return f"{prefix}{CANARY}{self._letters(_ID_LENGTH)}"

    def _letters(self, count: int) -> str:
        return "".join(self._random.choices(_ALPHABET, k=count))


def canary(word: str) -> str:
    """Return a personal text with the canary in it."""
    return f"{CANARY}_{word}"
