"""Laws of reloading: what is new is used whole, what is wrong changes nothing and is said once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from service.errors import ConfigError
from service.runtime import reloading
from service.runtime.reloading import Reloader
from service.secret import Secret
from service.stripe.signatures import fingerprint
from service.stripe.signing_secrets import SigningSecrets
from tests.support.harness import eventually

OLD, NEW = (Secret(b"whsec_old"),), (Secret(b"whsec_new"),)


class Log:
    """Stands in for the logger and keeps what was written."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def _write(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    info = error = _write


class Source:
    """Where a setting stands: a list of what each look finds, the last for ever."""

    def __init__(self, *looks: str | ConfigError) -> None:
        self.looks = list(looks)
        self.looked = 0

    def read(self) -> str:
        """Return or raise what comes next."""
        self.looked += 1
        found = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(found, ConfigError):
            raise found
        return found


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Record what is logged, and look often."""
    recorded = Log()
    monkeypatch.setattr(reloading, "log", recorded)
    monkeypatch.setattr(reloading, "READ_EVERY_S", 0.001)
    return recorded


async def followed(
    source: Source, *, looks: int, ask: Callable[[Reloader[str]], None] = lambda _: None
) -> list[str]:
    """Return what was taken into use within so many looks, beginning with `old`."""
    used: list[str] = []

    def use(found: str) -> dict[str, Any]:
        used.append(found)
        return {"now": found}

    reloader = Reloader("secrets", "old", read=source.read, apply=use)
    ask(reloader)
    following = asyncio.create_task(reloader.run())
    await eventually(lambda: source.looked > looks)
    following.cancel()
    return used


BAD, WORSE = ConfigError(["SECRETS: expected one"]), ConfigError(["SECRETS: expected a file"])


async def test_what_stays_the_same_is_not_mentioned(log: Log) -> None:
    """While nothing changes nothing is exchanged and nothing is said."""
    assert await followed(Source("old"), looks=5) == []
    assert log.lines == []


async def test_what_is_new_is_used_once_it_is_sure(log: Log) -> None:
    """A new value is used when two looks agree, once, and said to be."""
    assert await followed(Source("old", "ne", "new", "new", "new"), looks=8) == ["new"]
    assert log.lines == [("secrets.reloaded", {"now": "new"})]


async def test_who_asks_is_believed_at_once(log: Log) -> None:
    """Asked for, a new value is used at the first look; asked again, what is in use is said."""
    assert await followed(Source("new"), looks=3, ask=Reloader.request) == ["new"]
    assert await followed(Source("old"), looks=3, ask=Reloader.request) == ["old"]
    assert log.lines == [("secrets.reloaded", {"now": now}) for now in ("new", "old")]


async def test_what_is_wrong_keeps_the_old_and_is_said_once(log: Log) -> None:
    """A bad source changes nothing; each fault is said once, and again after it was mended."""
    looks: list[str | ConfigError] = [BAD, BAD, BAD, WORSE, WORSE, "old", "old", BAD, BAD, "new"]
    assert await followed(Source(*looks), looks=15) == ["new"]
    kept = [("secrets.reload_failed", {"problems": each.problems}) for each in (BAD, WORSE, BAD)]
    assert log.lines == [*kept, ("secrets.reloaded", {"now": "new"})]


async def test_what_is_wrong_for_a_moment_is_not_said(log: Log) -> None:
    """A file that is missing for one look is one that is being replaced."""
    assert await followed(Source("old", BAD, "new"), looks=6) == ["new"]
    assert [event for event, _ in log.lines] == ["secrets.reloaded"]


def test_a_keyring_is_exchanged_whole() -> None:
    """After an exchange only the new secrets count, and are known by their fingerprints."""
    signing_secrets = SigningSecrets({"": OLD, "eu": OLD})
    before = signing_secrets[""]
    signing_secrets.replace({"": (*NEW, *OLD), "us": NEW})
    assert before == OLD
    assert dict(signing_secrets) == {"": (*NEW, *OLD), "us": NEW}
    assert len(signing_secrets) == 2
    assert signing_secrets.get("eu") is None
    assert signing_secrets.fingerprints() == sorted({fingerprint(OLD[0]), fingerprint(NEW[0])})
