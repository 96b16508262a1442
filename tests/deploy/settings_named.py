"""The names of all settings, for the tests of files that name some."""

from __future__ import annotations

import re

from tests.support.programs import ROOT


def known_settings() -> set[str]:
    """Return the names of all settings, as .env.example lists them."""
    return set(re.findall(r"^([A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
