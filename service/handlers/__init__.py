"""Handlers: where transitions go. The protocol, and how a name becomes an open handler.

One file per built-in handler beside this one, imported only when named. When and how often a
handler is called is `dispatch`'s business.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from contextvars import copy_context
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol

from ..errors import ConfigError
from ..transitions import StatusTransition

BUILT_IN = {
    name: f"{__name__}.{name}:open"
    for name in ("kafka", "log", "nats", "rabbitmq", "redis_stream", "sqs")
}
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
    known = _known()
    found: dict[str, OpenHandler] = {}
    problems = []
    for name in names:
        try:
            found[name] = _import(known.get(name, name))
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
        ConfigError: What a handler opens cannot be called, or its own settings are wrong.
    """
    async with AsyncExitStack() as stack:
        yield {
            name: _awaitable(name, await stack.enter_async_context(opener(environ)))
            for name, opener in openers.items()
        }


async def examine(handler: Handler) -> bool:
    """Let a handler look at its queue, if it can; say whether it could.

    Raises:
        ConfigError: Its configuration cannot be right.
        ConnectionError: Its queue cannot be reached, now.
    """
    check: Callable[[], Awaitable[None]] | None = getattr(handler, "check", None)
    if check is None:
        return False
    await check()
    return True


def _known() -> dict[str, str]:
    installed = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    return installed | BUILT_IN


def _awaitable(name: str, handler: Handler) -> Handler:
    """Return *handler*, run in threads when it is a plain callable."""
    if not callable(handler):
        raise ConfigError([f"HANDLERS: {name}: what it opens cannot be called"])
    if any(map(inspect.iscoroutinefunction, (handler, handler.__call__))):
        return handler
    return _InThreads(handler)


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
