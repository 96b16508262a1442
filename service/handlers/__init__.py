"""Handlers: where transitions go. The protocol, and how a name becomes an open handler.

One file per built-in handler beside this one, imported only when named. When and how often a
handler is called is `dispatch`'s business; what its errors mean is in `failures`.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from contextvars import copy_context
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol

from ..errors import ConfigError, Unreachable
from ..transitions.transition import StatusTransition
from .failures import class_name, definition, is_foreign, place, unreachable

BUILT_IN = {
    name: f"{__name__}.{name}:open"
    for name in ("kafka", "log", "nats", "rabbitmq", "redis_stream", "sqs")
}
ENTRY_POINT_GROUP = "verification_handlers"


class Handler(Protocol):
    """Takes one transition at a time of a session, many sessions side by side.

    Returning means: it is safe there. Raising `Undeliverable` means: no attempt can ever deliver
    it. Raising `Unreachable`, or what counts as that (`failures.unreachable`), means: the
    destination is away or refuses everybody, so wait for it and count nothing. Raising anything
    else, or taking too long, is a failed attempt. A call may come twice for one transition, with
    the same event id and sequence.

    A handler may have two further methods. `async check()` looks at the destination and raises as a
    call would, or `ConfigError`. `destination(transition)` returns a short text where that depends
    on the transition: each destination is then waited for on its own.
    """

    async def __call__(self, transition: StatusTransition, /) -> None:
        """Deliver *transition*."""


class OpenHandler(Protocol):
    """Opens a handler from the environment: connect, yield, disconnect."""

    def __call__(self, environ: Mapping[str, str], /) -> AbstractAsyncContextManager[Handler]:
        """Return the context in which the handler lives."""


def find(names: Sequence[str]) -> dict[str, OpenHandler]:
    """Return what opens each of *names*: built-in, an entry point's name, or `package.module:name`.

    What takes a transition itself, such as `async def handle(transition)`, opens nothing. A plain
    function is taken for that if its first parameter is called `transition`.

    Raises:
        ConfigError: Some name means nothing, or cannot be imported; all are reported at once.
    """
    known = _known()
    found: dict[str, OpenHandler] = {}
    problems = []
    for name in names:
        try:
            found[name] = _opener(_import(known.get(name, name)))
        except _UnknownError as error:
            extra = f", it comes with the extra {name}" if name in BUILT_IN else ""
            listed = ", ".join(sorted(known))
            problems.append(f"HANDLERS: {name}: {error}{extra}; known names are {listed}")
    if problems:
        raise ConfigError(problems)
    return found


def origin(name: str) -> str:
    """Return where a handler comes from: `package.module:name`, and what installed it."""
    if name not in BUILT_IN:
        for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
            installed = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
            return point.value + installed
    return BUILT_IN.get(name, name)


@asynccontextmanager
async def open_all(
    openers: Mapping[str, OpenHandler], environ: Mapping[str, str]
) -> AsyncIterator[dict[str, Handler]]:
    """Open every handler, and close them in reverse.

    Raises:
        ConfigError: One cannot be opened or called, or its own settings are wrong.
    """
    async with AsyncExitStack() as stack:
        opened: dict[str, Handler] = {}
        for name, opener in openers.items():
            opened[name] = await _opened(stack, name, opener, environ)
        yield opened


async def examine(name: str, handler: Handler) -> bool:
    """Let a handler look at its destination, if it can; say whether it could.

    Raises:
        ConfigError: Its configuration cannot be right, or looking fails.
        Unreachable: Its destination cannot be reached, now.
    """
    check: Callable[[], Awaitable[None]] | None = getattr(handler, "check", None)
    if check is None:
        return False
    try:
        await check()
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - a handler may raise anything
        if (word := unreachable(error)) is not None:
            raise Unreachable(word) from None
        raise _cannot(name, "be checked", error, check) from None
    return True


def destination_of(handler: Handler) -> Callable[[StatusTransition], str] | None:
    """Return what says where a transition goes; None for a handler with one destination."""
    found: Callable[[StatusTransition], str] | None = getattr(handler, "destination", None)
    return found


def wrapped(handler: Handler, call: Handler) -> Handler:
    """Return *call*, which calls *handler*, with what else is asked of that."""
    if (destination := destination_of(handler)) is not None:
        call.destination = destination  # type: ignore[attr-defined]
    return call


def showing_tracebacks(handler: Handler) -> Handler:
    """Return *handler* with the whole traceback of each failed call on standard error."""

    async def handle(transition: StatusTransition, /) -> None:
        try:
            await handler(transition)
        except Exception as error:
            own = error.__traceback__
            traceback.print_exception(type(error), error, own and own.tb_next)
            raise

    return wrapped(handler, handle)


async def _opened(
    stack: AsyncExitStack, name: str, opener: OpenHandler, environ: Mapping[str, str]
) -> Handler:
    try:
        handler = await stack.enter_async_context(_context(name, opener, environ))
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - an opener may raise anything
        raise _cannot(name, "be opened", error, opener) from None
    return _awaitable(name, handler)


def _context(
    name: str, opener: OpenHandler, environ: Mapping[str, str]
) -> AbstractAsyncContextManager[Handler]:
    context = opener(environ)
    if not hasattr(context, "__aenter__"):
        missing = "is no async context manager: is @asynccontextmanager missing?"
        raise ConfigError([f"HANDLERS: {name}: what {definition(opener)} returns {missing}"])
    return context


def _cannot(name: str, what: str, error: BaseException, called: object) -> ConfigError:
    where = place(error) if is_foreign(error) else definition(called)
    return ConfigError([f"HANDLERS: {name} cannot {what}: {class_name(error)} ({where})"])


def _known() -> dict[str, str]:
    installed = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    return installed | BUILT_IN


def _awaitable(name: str, handler: Handler) -> Handler:
    """Return *handler*, run in threads when it is a plain callable."""
    if not callable(handler):
        raise ConfigError([f"HANDLERS: {name}: what it opens cannot be called"])
    return handler if _is_coroutine_function(handler) else wrapped(handler, _InThreads(handler))


def _is_coroutine_function(found: Any) -> bool:
    return any(map(inspect.iscoroutinefunction, (found, found.__call__)))


class _InThreads:
    """A plain callable as a handler: each call in a thread of its own.

    A thread cannot be ended. One that outlasts its time goes on, and until it ends the session's
    next call only waits; a process that ends does not.
    """

    def __init__(self, plain: Callable[[StatusTransition], object]) -> None:
        self._plain = plain
        self._running: dict[str, asyncio.Future[tuple[Any, BaseException | None]]] = {}

    async def __call__(self, transition: StatusTransition, /) -> None:
        session_id = transition.session_id
        while (before := self._running.get(session_id)) is not None:
            await asyncio.wait([before])
        self._running[session_id] = ended = self._start(transition)
        ended.add_done_callback(lambda _: self._running.pop(session_id))
        returned, error = await asyncio.shield(ended)
        if error is not None:
            raise error
        # What only looks plain, a decorated coroutine function say, has done nothing so far.
        if inspect.isawaitable(returned):
            await returned

    def _start(
        self, transition: StatusTransition
    ) -> asyncio.Future[tuple[Any, BaseException | None]]:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
        context = copy_context()

        def work() -> None:
            returned, error = None, None
            try:
                returned = context.run(self._plain, transition)
            except BaseException as raised:  # noqa: BLE001 - raised again where it is waited for
                error = raised
            with suppress(RuntimeError):  # nobody is there any more to hear of it
                loop.call_soon_threadsafe(ended.set_result, (returned, error))

        threading.Thread(target=work, daemon=True).start()
        return ended


_ANNOTATIONS = (StatusTransition, StatusTransition.__name__)


class _UnknownError(Exception):
    """A name that leads nowhere; says where the way ended."""


def _import(path: str) -> Callable[..., Any]:
    """Import `package.module:name`."""
    module_name, separator, attribute = path.partition(":")
    if not (separator and module_name and attribute):
        raise _UnknownError("neither a known name nor a path like package.module:name")
    try:
        found: Callable[..., Any] | None = getattr(import_module(module_name), attribute, None)
    except ModuleNotFoundError as error:
        missing = f"module {error.name} is not installed"
        is_named = f"{module_name}.".startswith(f"{error.name}.")
        raise _UnknownError(missing if is_named else f"{missing} ({place(error)})") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a module may do anything
        raised = f"{class_name(error)} ({place(error)})"
        raise _UnknownError(f"module {module_name} cannot be imported: {raised}") from None
    if not callable(found):
        raise _UnknownError(f"module {module_name} has no callable {attribute}")
    return found


def _opener(found: Callable[..., Any]) -> OpenHandler:
    """Return what opens a handler; for what is one itself, something that opens nothing."""
    if not _takes_transitions(found):
        return found

    @asynccontextmanager
    async def open_nothing(_: Mapping[str, str]) -> AsyncIterator[Handler]:
        yield found

    return open_nothing


def _takes_transitions(found: Callable[..., Any]) -> bool:
    """Say whether *found* is a handler. What opens one is never a coroutine function."""
    if isinstance(found, type):
        return False
    if _is_coroutine_function(found):
        return True
    with suppress(TypeError, ValueError):
        for first in [*inspect.signature(found).parameters.values()][:1]:
            return first.name == "transition" or first.annotation in _ANNOTATIONS
    return False
