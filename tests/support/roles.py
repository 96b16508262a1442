"""The users of deploy/redis/users.acl on a test's server, and clients that speak as them.

With TEST_REDIS_ACL=1 every test speaks as these users: a process as the user of its command, and,
inside a test, each module of the service as the user of the command that runs it. Only what a test
does itself, to look or to break something, it does as the administrator.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import redis

from service.secret import Secret
from service.storage.connections import Connections, connect

USERS = Path(__file__).parents[2] / "deploy" / "redis" / "users.acl"
RECEIVER, WORKER, OPERATOR = ROLES = ("receiver", "worker", "operator")
PLACEHOLDER = re.compile(r"#[A-Z]+_PASSWORD_SHA256")

# `dev` is receiver and worker at once: no user of the file is both.
_BY_COMMAND = {"serve": RECEIVER, "work": WORKER, "backfill": WORKER, "dev": ""}
_BY_MODULE = {
    "inbox.admission": RECEIVER,
    "inbox.full_streams": RECEIVER,
    "inbox.session_record": OPERATOR,
    # What receivers do with it is what `test_users` runs.
    "storage.layout": WORKER,
    "storage.health": OPERATOR,
    # What only health asks of it.
    "storage.connections": OPERATOR,
    "storage.batching": WORKER,
    "delivery.consumer": WORKER,
    "delivery.stream_watcher": WORKER,
    "delivery.leases": WORKER,
    "delivery.maintenance": WORKER,
    "delivery.dead_letter_expiry": WORKER,
    "delivery.worker": WORKER,
    "delivery.consumer_groups": WORKER,
    "delivery.retention": WORKER,
    "delivery.dead_letters": OPERATOR,
    "delivery.letter_pages": OPERATOR,
    "admin.forms": OPERATOR,
    "admin.letter_actions": OPERATOR,
    "admin.views.letter_actions": OPERATOR,
    "stripe_api.cursors": WORKER,
    "stripe_api.rate_limit": WORKER,
    "stripe_api.unknown_events": WORKER,
    "stripe_api.watch_report": WORKER,
    # What receivers write is a part of it, which `test_users` runs.
    "monitoring.publisher": WORKER,
    "monitoring.activity": OPERATOR,
    "monitoring.handler_state": OPERATOR,
    "monitoring.finished_attempts": OPERATOR,
    "monitoring.session_search": OPERATOR,
    "monitoring.session_timeline": OPERATOR,
    "monitoring.unfetched": OPERATOR,
    "operations.check": OPERATOR,
    "operations.selftest_redis": OPERATOR,
    "cli.dead_letters": OPERATOR,
}
# The functions of `delivery.consumer_groups` that only commands call.
_OPERATORS_FUNCTIONS = {"group_names", "count_workers", "retire", "list_groups"}


def are_wanted() -> bool:
    """Say whether all tests shall speak as these users."""
    return os.environ.get("TEST_REDIS_ACL") == "1"


def rules() -> dict[str, list[str]]:
    """Return what is said of each user, without its password."""
    lines = [PLACEHOLDER.sub("", line).split() for line in USERS.read_text().splitlines()]
    return {name: granted for _, name, *granted in lines}


def grant(client: redis.Redis) -> None:
    """Make the users known to a server; the name of each is its password."""
    for name, granted in rules().items():
        if name != "default":
            whole = " ".join(granted)
            # Each selector is one argument.
            words = re.findall(r"\([^)]*\)|\S+", whole)
            client.execute_command(  # type: ignore[no-untyped-call]
                "ACL", "SETUSER", name, "reset", f">{name}", *words
            )


def as_user(url: str, name: str) -> str:
    """Return the address of a server for one of the users."""
    return url.replace("://", f"://{name}:{name}@", 1)


def of_page(url: str) -> dict[str, str]:
    """Return the settings with which the page on the admin port speaks as the operator."""
    return {"ADMIN_REDIS_URL": as_user(url, OPERATOR)} if are_wanted() else {}


def by_command(command: str) -> str:
    """Return the user that a command of the service speaks as; empty for the administrator."""
    return _BY_COMMAND.get(command, OPERATOR)


@asynccontextmanager
async def connect_as_users(url: str) -> AsyncIterator[Connections]:
    """Yield clients that speak as the user of whichever module uses them."""
    with redis.Redis.from_url(url) as client:
        grant(client)
    async with AsyncExitStack() as opened:
        inner = await opened.enter_async_context(connect(Secret(url)))
        roles = {
            role: await opened.enter_async_context(connect(Secret(as_user(url, role))))
            for role in ROLES
        }
        yield _AsUsers(inner, roles)


class _AsUsers(Connections):
    """Clients of all users at once; who calls decides which it gets."""

    def __init__(self, own: Connections, roles: dict[str, Connections]) -> None:
        self.is_cluster = own.is_cluster
        self._generation = own._generation
        self._own = own
        self._roles = roles

    @property
    def client(self) -> Any:
        """The caller's client."""
        return self._of(sys._getframe(1)).client

    @property
    def blocking_client(self) -> Any:
        """The caller's client for blocking reads."""
        return self._of(sys._getframe(1)).blocking_client

    def run(self, *arguments: Any, **options: Any) -> Any:
        """Run scripts as the caller's user."""
        return self._of(sys._getframe(1)).run(*arguments, **options)

    def run_one(self, *arguments: Any, **options: Any) -> Any:
        """Run a script as the caller's user."""
        return self._of(sys._getframe(1)).run_one(*arguments, **options)

    def _of(self, caller: FrameType) -> Connections:
        package, _, module = caller.f_globals["__name__"].partition(".")
        if package != "service":
            return self._own
        if caller.f_code.co_name in _OPERATORS_FUNCTIONS:
            return self._roles[OPERATOR]
        return self._roles[_BY_MODULE[module]]


def write_acl(path: Path) -> Path:
    """Write the file as an operator would: with a password for each user, here its name."""

    def hashed(found: re.Match[str]) -> str:
        name = found[0][1:].partition("_")[0].lower()
        return f"#{hashlib.sha256(name.encode()).hexdigest()}"

    path.write_text(PLACEHOLDER.sub(hashed, USERS.read_text()))
    return path
