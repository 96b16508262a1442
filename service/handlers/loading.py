"""From the names in HANDLERS to open handlers: import, open, check.

Every problem becomes a `ConfigError` with the handler's name and a file and line, and without any
message or value of an exception: those may quote settings.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import structlog

from ..errors import ConfigError, Unreachable
from . import BUILT_IN, ENTRY_POINT_GROUP, AnyHandler, AnyOpener, Handler, OpenHandler
from .failures import class_name, definition, is_raised_by_handler, place, unreachable_reason

# More than the connections of built-in handlers take.
STUCK_S = 10.0

_PLAIN = (
    "is no coroutine function: write `async def`, and call what blocks with `asyncio.to_thread`"
)

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class _LoadError(Exception):
    """A name cannot be resolved; the message says why."""


def find(names: Sequence[str]) -> dict[str, OpenHandler]:
    """Import the opener of each name: built-in, an entry point, or `package.module:attribute`.

    A coroutine function, such as `async def handle(transition)`, is a handler without an opener.

    Raises:
        ConfigError: With one problem for each name that cannot be resolved or imported.
    """
    installed = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    known = installed | BUILT_IN
    found: dict[str, OpenHandler] = {}
    problems = []
    for name in names:
        try:
            found[name] = _opener(_import(known.get(name, name)))
        except _LoadError as error:
            extra = f", it comes with the extra {name}" if name in BUILT_IN else ""
            listed = ", ".join(sorted(known))
            problems.append(f"HANDLERS: {name}: {error}{extra}; known names are {listed}")
    if problems:
        raise ConfigError(problems)
    return found


def origin(name: str) -> str:
    """Return a handler's `package.module:attribute`, and the distribution that installed it."""
    if name not in BUILT_IN:
        for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
            installed = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
            return point.value + installed
    return BUILT_IN.get(name, name)


@asynccontextmanager
async def open_all(
    openers: Mapping[str, AnyOpener], environ: Mapping[str, str]
) -> AsyncIterator[dict[str, AnyHandler]]:
    """Open every handler in order, and close them in reverse.

    Raises:
        ConfigError: A handler cannot be opened or called, or its settings are wrong.
    """
    async with AsyncExitStack() as stack:
        opened: dict[str, AnyHandler] = {}
        for name, opener in openers.items():
            try:
                with _naming_if_stuck(name):
                    handler = await stack.enter_async_context(_context(name, opener, environ))
            except ConfigError:
                raise
            except BaseException as error:  # noqa: BLE001 - an opener may raise anything
                _raise_again_if_stopped(error)
                raise _cannot(name, "be opened", error, opener) from None
            if not _is_coroutine_function(handler):
                raise ConfigError([f"HANDLERS: {name}: what it opens {_PLAIN}"])
            opened[name] = handler
        yield opened


async def check(name: str, handler: AnyHandler) -> bool:
    """Let a handler check its destination; return whether it has a `check` method.

    Raises:
        ConfigError: Its configuration is wrong, or the check fails.
        Unreachable: Its destination cannot be reached at present.
    """
    method: Callable[[], Awaitable[None]] | None = getattr(handler, "check", None)
    if method is None:
        return False
    try:
        with _naming_if_stuck(name):
            await method()
    except ConfigError:
        raise
    except BaseException as error:  # noqa: BLE001 - a handler may raise anything
        _raise_again_if_stopped(error)
        if (word := unreachable_reason(error)) is not None:
            raise Unreachable(word) from None
        raise _cannot(name, "be checked", error, method) from None
    return True


def _import(path: str) -> Callable[..., Any]:
    """Import `package.module:attribute`."""
    module_name, separator, attribute = path.partition(":")
    if not (separator and module_name and attribute):
        raise _LoadError("neither a known name nor a path like package.module:name")
    try:
        found: Callable[..., Any] | None = getattr(import_module(module_name), attribute, None)
    except ModuleNotFoundError as error:
        missing = f"module {error.name} is not installed"
        # The module that was named, or one that it imports.
        is_named = f"{module_name}.".startswith(f"{error.name}.")
        raise _LoadError(missing if is_named else f"{missing} ({place(error)})") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a module may do anything
        raised = f"{class_name(error)} ({place(error)})"
        raise _LoadError(f"module {module_name} cannot be imported: {raised}") from None
    if not callable(found):
        raise _LoadError(f"module {module_name} has no callable {attribute}")
    return found


def _opener(found: Callable[..., Any]) -> OpenHandler:
    """Return *found*, or for a handler an opener that yields it."""
    if isinstance(found, type) or not _is_coroutine_function(found):
        _reject_plain_handler(found)
        return found

    @asynccontextmanager
    async def open_nothing(_: Mapping[str, str]) -> AsyncIterator[Handler]:
        yield found

    return open_nothing


def _reject_plain_handler(found: Callable[..., Any]) -> None:
    """Raise for `def handle(transition)`, which as an opener would be handed the environment."""
    with suppress(TypeError, ValueError):
        if "transition" in inspect.signature(found).parameters:
            raise _LoadError(_PLAIN)


def _is_coroutine_function(found: Any) -> bool:
    return callable(found) and any(map(inspect.iscoroutinefunction, (found, found.__call__)))


def _context(
    name: str, opener: AnyOpener, environ: Mapping[str, str]
) -> AbstractAsyncContextManager[AnyHandler]:
    context = opener(environ)
    if not hasattr(context, "__aenter__"):
        missing = "is no async context manager: is @asynccontextmanager missing?"
        raise ConfigError([f"HANDLERS: {name}: what {definition(opener)} returns {missing}"])
    return context


@contextmanager
def _naming_if_stuck(name: str) -> Iterator[None]:
    """Log the handler once it holds up the start: the process delivers nothing until then."""
    loop = asyncio.get_running_loop()
    timer = loop.call_later(STUCK_S, lambda: log.error("handler.stuck", handler=name))
    try:
        yield
    finally:
        timer.cancel()


def _raise_again_if_stopped(error: BaseException) -> None:
    """Raise what comes from outside: Ctrl-C, or that our task is canceled."""
    task = asyncio.current_task()
    is_canceled = isinstance(error, asyncio.CancelledError) and task and task.cancelling()
    if is_canceled or isinstance(error, KeyboardInterrupt):
        raise error


def _cannot(name: str, what: str, error: BaseException, called: object) -> ConfigError:
    where = place(error) if is_raised_by_handler(error) else definition(called)
    return ConfigError([f"HANDLERS: {name} cannot {what}: {class_name(error)} ({where})"])
