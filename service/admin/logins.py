"""Who looks at the page: tokens, the cookie that stands for one, and what its holder may do.

A cookie holds a name, when it expires, and an HMAC of both with the token of that name. So any
process that has the token can check it, nothing is kept, and a token that is taken away ends its
logins. Which requests need a login is decided in `guard`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..config import Settings
from ..parsers import AdminToken

LOGIN_S = 12 * 3600
# How long the sender of a wrong token waits. A request that waits holds one of the admin port's
# connections, so only some wait; a right token never does.
WRONG_TOKEN_S = 1.0
MAX_WAITING = 16

_COOKIE = re.compile(
    r"(?P<name>[a-z0-9_-]{1,32})\.(?P<expires>[0-9]{1,11})\.(?P<signature>[0-9a-f]{64})"
)


class Viewer(NamedTuple):
    """Who looks at the page.

    Attributes:
        name: The name of the token they logged in with; None without a login.
        may_act: Whether they may replay and drop dead letters.
        can_log_in: Whether there are tokens to log in with.
    """

    name: str | None = None
    may_act: bool = False
    can_log_in: bool = False


class Logins:
    """The tokens in use, which can be replaced while they are in use.

    Attributes:
        acting: The tokens of those who may act.
        reading: The tokens of those who may only read; where there are none, reading needs no
            login.
    """

    def __init__(self, settings: Settings) -> None:
        self.cookie = f"idv_admin_{settings.redis_prefix}"
        self.acting: Sequence[AdminToken] = settings.admin_tokens
        self.reading: Sequence[AdminToken] = settings.admin_read_tokens
        self._waiting = 0

    def log_in(self, token: str, now: float) -> tuple[str, str] | None:
        """Return the name of a token and the value of its cookie; None for a wrong one."""
        found = None
        # All are compared, so that the time says nothing about how far the search came.
        for kind, each in self._all():
            if hmac.compare_digest(token.encode(), each.token.reveal().encode()) and not found:
                found = kind, each
        if found is None:
            return None
        kind, each = found
        expires = str(int(now) + LOGIN_S)
        return each.name, f"{each.name}.{expires}.{self._sign(kind, each, expires)}"

    def viewer(self, cookie: str | None, now: float) -> Viewer:
        """Return who sent a request with a cookie, or without one."""
        can_log_in = bool(self.acting or self.reading)
        parts = _COOKIE.fullmatch(cookie or "")
        if parts is None or int(parts["expires"]) <= now:
            return Viewer(can_log_in=can_log_in)
        for kind, each in self._all():
            expected = self._sign(kind, each, parts["expires"])
            if each.name == parts["name"] and hmac.compare_digest(parts["signature"], expected):
                return Viewer(each.name, kind == "act", can_log_in)
        return Viewer(can_log_in=can_log_in)

    async def delay_wrong_token(self) -> None:
        """Let the sender of a wrong token wait, unless too many do already."""
        if self._waiting >= MAX_WAITING:
            return
        self._waiting += 1
        try:
            await asyncio.sleep(WRONG_TOKEN_S)
        finally:
            self._waiting -= 1

    def _all(self) -> Iterator[tuple[str, AdminToken]]:
        yield from (("act", each) for each in self.acting)
        yield from (("read", each) for each in self.reading)

    def _sign(self, kind: str, token: AdminToken, expires: str) -> str:
        message = f"{self.cookie} {kind} {token.name} {expires}".encode()
        return hmac.new(token.token.reveal().encode(), message, "sha256").hexdigest()


def fingerprints(tokens: Sequence[AdminToken]) -> dict[str, str]:
    """Return a short hash of each token under its name, for the log."""
    return {
        each.name: hashlib.sha256(each.token.reveal().encode()).hexdigest()[:8] for each in tokens
    }
