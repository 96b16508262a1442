"""Handlers: where transitions go. The protocol, and how a name becomes an open handler.

One file per built-in handler beside this one, imported only when named. When and how often a
handler is called is `dispatch`'s business.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib import import_module
from importlib.metadata import entry_points
from typing import Protocol

from ..errors import ConfigError
from ..transitions import StatusTransition

BUILT_IN = {"log": "service.handlers.log:open"}
ENTRY_POINT_GROUP = "verification_handlers"


class Handler(Protocol):
    """Takes one transition at a time of a session, many sessions side by side.

    Returning means: it is safe there. Raising `Undeliverable` means: no attempt can ever deliver
    it. Raising anything else, or taking too long, means: again later; an attempt is not counted
    while all that is raised is Python's own `ConnectionError`, for then the queue is away. A call
    may come twice for one transition, with the same event id and sequence.
    """

    async def __call__(self, transition: StatusTransition, /) -> None:
        """Deliver *transition*."""


class OpenHandler(Protocol):
    """Opens a handler from the environment: connect, yield, disconnect."""

    def __call__(self, environ: Mapping[str, str], /) -> AbstractAsyncContextManager[Handler]:
        """Return the context in which the handler lives."""


def find(names: Sequence[str]) -> dict[str, OpenHandler]:
    """Return what opens each of *names*: built-in, an entry point's name, or `package.module:name`.

    Raises:
        ConfigError: Some name means nothing, or cannot be imported; all are reported at once.
    """
    installed = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    known = installed | BUILT_IN
    found: dict[str, OpenHandler] = {}
    problems = []
    for name in names:
        try:
            found[name] = _import(known.get(name, name))
        except _UnknownError as error:
            listed = ", ".join(sorted(known))
            problems.append(f"HANDLERS: {name}: {error}; known names are {listed}")
    if problems:
        raise ConfigError(problems)
    return found


@asynccontextmanager
async def open_all(
    openers: Mapping[str, OpenHandler], environ: Mapping[str, str]
) -> AsyncIterator[dict[str, Handler]]:
    """Open every handler, and close them in reverse."""
    async with AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(opener(environ))
            for name, opener in openers.items()
        }


class _UnknownError(Exception):
    """A name that leads nowhere; says where the way ended."""


def _import(path: str) -> OpenHandler:
    """Import `package.module:name`."""
    module_name, separator, attribute = path.partition(":")
    if not (separator and module_name and attribute):
        raise _UnknownError("neither a known name nor a path like package.module:name")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise _UnknownError(f"module {error.name} is not installed") from None
    except ImportError:
        raise _UnknownError(f"module {module_name} cannot be imported") from None
    opener: OpenHandler | None = getattr(module, attribute, None)
    if not callable(opener):
        raise _UnknownError(f"module {module_name} has no callable {attribute}")
    return opener
