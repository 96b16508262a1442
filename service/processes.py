"""What runs together in one process: the composition of `serve`, `work` and `dev`.

The only place where clients, apps and workers are put together; signals end here. No logic.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import structlog
import uvloop
from redis.exceptions import RedisError
from starlette.types import ASGIApp

from . import handlers, layout, tasks
from .config import Settings
from .connections import Connections, connect, shortage
from .errors import ServiceError, Unavailable
from .health import Health, await_redis
from .inbox import Inbox
from .layout import Keys
from .receiver import Receiver
from .server import Listener
from .web import create_admin_app, create_app
from .worker import Worker

REDIS_WAIT_S = 10.0

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Ports(NamedTuple):
    """Where a process listens."""

    web: int | None
    admin: int | None


class _Ground(NamedTuple):
    """What every process stands on."""

    settings: Settings
    connections: Connections
    keys: Keys
    health: Health


def run(
    settings: Settings,
    environ: Mapping[str, str],
    *,
    receive: bool,
    work: Sequence[str] = (),
    started: Callable[[Ports], None] = lambda _: None,
) -> None:
    """Run one process until SIGTERM or SIGINT, then stop in good order.

    Args:
        settings: The settings.
        environ: What handlers read their own settings from.
        receive: Whether to listen for Stripe.
        work: The names of the handlers to work for: some of the settings' handlers.
        started: Called once everything listens.

    Raises:
        ConfigError: Something about the settings, the layout or a port cannot be.
        Unavailable: Redis did not answer in time.
        Exception: Whatever else ended the process; it has been logged.
    """
    try:
        uvloop.run(_run(settings, environ, receive=receive, work=work, started=started))
    except Exception as error:  # noqa: BLE001 - told apart below
        raise _cause(error) from None


async def _run(
    settings: Settings,
    environ: Mapping[str, str],
    *,
    receive: bool,
    work: Sequence[str],
    started: Callable[[Ports], None],
) -> None:
    openers = handlers.find(settings.handlers)
    stopping = _stopped_by_signals()
    async with _ground(settings) as ground:
        admin = _listener(ground, create_admin_app(ground.health), settings.admin_port)
        listeners = [_receiver(ground), admin] if receive else [admin]
        parts = [asyncio.create_task(listener.run()) for listener in listeners]
        if work:
            parts.append(asyncio.create_task(_work(ground, openers, environ, work, stopping)))
        watching = asyncio.create_task(ground.health.watch())
        ports = Ports(listeners[0].port if receive else None, admin.port)
        _spare_the_collector()
        started(ports)
        log.info("process.started", port=ports.web, admin_port=ports.admin, works=list(work))
        # A part that ends by itself has failed: it takes the others with it, in the same order.
        await _first_of(asyncio.create_task(stopping.wait()), watching, *parts)
        stopping.set()
        await _stop(ground, listeners, drain_s=settings.drain_s if receive else 0)
        await tasks.end(watching)
        ended = await asyncio.gather(*parts, watching, return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, Exception):
            raise outcome
    log.info("process.stopped")


async def _first_of(*tasks: asyncio.Task[Any]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


@asynccontextmanager
async def _ground(settings: Settings) -> AsyncIterator[_Ground]:
    """Connect, wait for Redis, and make sure that its layout is ours and all groups exist."""
    keys = Keys(settings.redis_prefix, settings.partitions)
    async with connect(settings.redis_url) as connections:
        await await_redis(connections, REDIS_WAIT_S)
        await layout.guard(connections, keys)
        for handler in await layout.open_groups(connections, keys, settings.handlers):
            log.info("group.created", handler=handler)
        yield _Ground(settings, connections, keys, Health(connections, settings))


def _receiver(ground: _Ground) -> Listener:
    settings = ground.settings
    inbox = Inbox(ground.connections, ground.keys, settings)
    receiver = Receiver(
        inbox, tolerance_s=settings.signature_tolerance_s, livemode=settings.livemode
    )
    app = create_app(receiver, ground.health, settings)
    return _listener(ground, app, settings.port, is_busy=app.is_busy)


def _listener(
    ground: _Ground, app: ASGIApp, port: int, *, is_busy: Callable[[], bool] = lambda: False
) -> Listener:
    settings = ground.settings
    return Listener(
        app,
        host=settings.host,
        port=port,
        max_connections=settings.max_connections,
        receive_timeout_s=settings.receive_timeout_s,
        keep_alive_s=settings.keep_alive_s,
        grace_s=settings.shutdown_grace_s,
        is_busy=is_busy,
    )


async def _work(
    ground: _Ground,
    openers: Mapping[str, handlers.OpenHandler],
    environ: Mapping[str, str],
    names: Sequence[str],
    stopping: asyncio.Event,
) -> None:
    chosen = {name: openers[name] for name in names}
    async with handlers.open_all(chosen, environ) as opened:
        await _examine(opened)
        await Worker(ground.connections, ground.keys, ground.settings, opened).run(stopping)


async def _examine(opened: Mapping[str, handlers.Handler]) -> None:
    """Refuse to start on what cannot be right; a queue out of reach only waits."""
    for name, handler in opened.items():
        try:
            await handlers.examine(handler)
        except ConnectionError as error:
            log.warning("handler.unreachable", handler=name, error=type(error).__name__)


async def _stop(ground: _Ground, listeners: Sequence[Listener], *, drain_s: float) -> None:
    """Be not ready first; close the listeners only when balancers have had time to notice."""
    ground.health.draining = True
    for listener in listeners:
        listener.drain()
    log.info("process.draining", drain_s=drain_s)
    await asyncio.sleep(drain_s)
    for listener in listeners:
        listener.stop()


def _cause(error: Exception) -> Exception:
    """Return the one error that ended the process; one that nobody meant is logged here."""
    if isinstance(error, RedisError):
        return Unavailable(shortage(error))
    if not isinstance(error, ServiceError):
        log.critical("process.failed", exc_info=error)
    return error


def _spare_the_collector() -> None:
    """Take what lives as long as the process out of every later collection."""
    gc.collect()
    gc.freeze()


def _stopped_by_signals() -> asyncio.Event:
    """Return the event that SIGTERM or SIGINT sets; a second signal ends the process at once."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        stopping.set()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)

    for each in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):
            loop.add_signal_handler(each, stop)
    return stopping
