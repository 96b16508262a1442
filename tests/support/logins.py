"""The application of the admin port, and tokens for its page."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx2

from service.admin.app import AdminApp
from service.admin.page import Page
from service.parsers import AdminToken
from service.secret import Secret

ACTING, READING = "canary-acting-token", "canary-reading-token"
# The settings of a page to which three people may log in.
TOKENS: Any = {
    "admin_tokens": (AdminToken("alice", Secret(ACTING)), AdminToken("bob", Secret(ACTING[::-1]))),
    "admin_read_tokens": (AdminToken("carol", Secret(READING)),),
}
ORIGIN = {"Origin": "http://localhost"}

OpenPage = Callable[..., AbstractAsyncContextManager[httpx2.AsyncClient]]


def admin_app(page: Page) -> AdminApp:
    """Return the application of an admin port that no test asks whether the process is ready."""
    ready: Any = None
    return AdminApp(ready, page)
