"""What runs together in one process: the composition of `serve`, `work` and `dev`.

The only place where clients, apps and workers are put together; signals end here. No logic.
"""

from __future__ import annotations

import asyncio
import gc
import math
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import structlog
import uvloop
from redis.exceptions import RedisError
from starlette.types import ASGIApp

from . import blocking, config, handlers, layout, metrics, signals, tasks, tracing
from .config import Settings
from .connections import Connections, connect, shortage
from .errors import ServiceError, Unavailable
from .health import Health, await_redis
from .inbox import Inbox
from .keyring import Keyring
from .layout import Keys
from .loop_lag import LAG
from .receiver import Receiver
from .reloading import Reloader
from .server import Listener
from .sources import AllowList, Network
from .tracing import TracedReceiver, Tracing
from .web import create_admin_app, create_app
from .worker import Worker

REDIS_WAIT_S = 10.0
# Objects a receiver makes, over those it drops, before they are looked through for cycles.
MOST_UNCOLLECTED = 20_000
# For probes and Prometheus.
MOST_ADMIN_CONNECTIONS = 64

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class _Stopped(Exception):
    """The process was told to stop before it had started."""


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
    traced: Tracing | None


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
        with tracing.opened(environ) as traced:
            uvloop.run(
                _run(
                    settings,
                    environ,
                    receive=receive,
                    work=work,
                    traced=traced,
                    started=started,
                )
            )
    except _Stopped:
        log.info("process.stopped")
    except Exception as error:  # noqa: BLE001 - told apart below
        raise _cause(error) from None


async def _run(
    settings: Settings,
    environ: Mapping[str, str],
    *,
    receive: bool,
    work: Sequence[str],
    traced: Tracing | None,
    started: Callable[[Ports], None],
) -> None:
    openers = handlers.find(settings.handlers)
    reloaders: list[Reloader[Any]] = []
    stopping = signals.stopping()
    signals.reload(reloaders, stopping)
    async with _ground(settings, stopping, traced, work=bool(work)) as ground:
        listeners = [admin := _admin(ground)]
        if receive:
            listeners.insert(0, _receiver(ground, environ, reloaders))
        parts = [asyncio.create_task(listener.run()) for listener in listeners]
        if work:
            parts.append(asyncio.create_task(_work(ground, openers, environ, work, stopping)))
        watches = [
            ground.health.watch(),
            LAG.watch(),
            *(reloader.follow() for reloader in reloaders),
        ]
        watching = [asyncio.create_task(watch) for watch in watches]
        ports = Ports(listeners[0].port if receive else None, admin.port)
        _spare_the_collector(often=bool(work))
        started(ports)
        log.info(
            "process.started",
            pid=os.getpid(),
            port=ports.web,
            admin_port=ports.admin,
            works=list(work),
        )
        # A part that ends by itself has failed: it takes the others with it, in the same order.
        await _first_of(asyncio.create_task(stopping.wait()), *watching, *parts)
        stopping.set()
        await _stop(ground, listeners, drain_s=settings.drain_s if receive else 0)
        for task in watching:
            await tasks.end(task)
        ended = await asyncio.gather(*parts, *watching, return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, Exception):
            raise outcome
    log.info("process.stopped")


async def _first_of(*tasks: asyncio.Task[Any]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


@asynccontextmanager
async def _ground(
    settings: Settings, stopping: asyncio.Event, traced: Tracing | None, *, work: bool
) -> AsyncIterator[_Ground]:
    """Connect, wait for Redis, and make sure that its layout is ours and worked groups exist."""
    keys = Keys(settings.redis_prefix, settings.partitions)
    async with connect(settings.redis_url) as connections:
        await _unless(stopping, await_redis(connections, REDIS_WAIT_S))
        await layout.guard(connections, keys)
        if work:
            for handler in await layout.open_groups(connections, keys, settings.handlers):
                log.info("group.created", handler=handler)
        yield _Ground(settings, connections, keys, Health(connections, settings), traced)


async def _unless(stopping: asyncio.Event, waiting: Coroutine[Any, Any, None]) -> None:
    """Wait for something, but not when told to stop meanwhile."""
    task = asyncio.create_task(waiting)
    told = asyncio.create_task(stopping.wait())
    await _first_of(task, told)
    await tasks.end(told)
    if stopping.is_set():
        await tasks.end(task)
        raise _Stopped
    await task


def _receiver(
    ground: _Ground, environ: Mapping[str, str], reloaders: list[Reloader[Any]]
) -> Listener:
    settings = ground.settings
    keyring = Keyring(settings.secrets)
    metrics.secrets_loaded(keyring.places())
    reloaders.append(_reloading_secrets(keyring, environ))
    allow_list = None
    if settings.allowed_networks:
        allow_list = AllowList(settings.allowed_networks, proxies=settings.forwarded_allow_ips)
        reloaders.append(_reloading_networks(allow_list, settings.allowed_networks, environ))
    inbox = Inbox(ground.connections, ground.keys, settings)
    build = Receiver if ground.traced is None else partial(TracedReceiver, ground.traced)
    receiver = build(
        inbox,
        tolerance_s=settings.signature_tolerance_s,
        livemode=settings.livemode,
        account_name=settings.account_name,
    )
    app = create_app(receiver, ground.health, replace(settings, secrets=keyring), allow_list)
    return _listener(ground, app, settings.port, settings.max_connections, room=app.room)


def _reloading_secrets(keyring: Keyring, environ: Mapping[str, str]) -> Reloader[Any]:
    def use(secrets: Mapping[str, Any]) -> dict[str, Any]:
        keyring.exchange(secrets)
        metrics.secrets_loaded(keyring.places())
        return {"fingerprints": keyring.fingerprints()}

    return Reloader(
        "secrets", dict(keyring), read=lambda: dict(config.signing_secrets(environ)), use=use
    )


def _reloading_networks(
    allow_list: AllowList, networks: Sequence[Network], environ: Mapping[str, str]
) -> Reloader[Any]:
    def use(networks: Sequence[Network]) -> dict[str, Any]:
        allow_list.exchange(networks)
        return {"networks": len(networks)}

    return Reloader("networks", networks, read=lambda: config.allowed_networks(environ), use=use)


def _admin(ground: _Ground) -> Listener:
    app = create_admin_app(ground.health)
    return _listener(ground, app, ground.settings.admin_port, MOST_ADMIN_CONNECTIONS)


def _listener(
    ground: _Ground,
    app: ASGIApp,
    port: int,
    max_connections: int,
    *,
    room: Callable[[], float] = lambda: math.inf,
) -> Listener:
    settings = ground.settings
    return Listener(
        app,
        host=settings.host,
        port=port,
        max_connections=max_connections,
        receive_timeout_s=settings.receive_timeout_s,
        keep_alive_s=settings.keep_alive_s,
        grace_s=settings.shutdown_grace_s,
        room=room,
    )


async def _work(
    ground: _Ground,
    openers: Mapping[str, handlers.OpenHandler],
    environ: Mapping[str, str],
    names: Sequence[str],
    stopping: asyncio.Event,
) -> None:
    """Work until told to stop; a handler that is still being opened then is not waited for."""
    opened = asyncio.Event()
    chosen = {name: openers[name] for name in names}

    async def open_and_work() -> None:
        async with handlers.open_all(chosen, environ) as ready:
            await _examine(ready)
            opened.set()
            called = ground.traced.following(ready) if ground.traced else ready
            with blocking.watched():
                await Worker(ground.connections, ground.keys, ground.settings, called).run(stopping)

    working = asyncio.create_task(open_and_work())
    waits = [asyncio.create_task(event.wait()) for event in (stopping, opened)]
    await _first_of(working, *waits)
    if stopping.is_set() and not opened.is_set():
        await tasks.end(working)
    for wait in waits:
        await tasks.end(wait)
    await asyncio.wait({working})
    if not working.cancelled():
        await working


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


def _spare_the_collector(*, often: bool) -> None:
    """Take what lives as long as the process out of every later collection.

    Requests leave next to no cycles behind, but what handlers raise does: workers collect often.
    """
    gc.collect()
    gc.freeze()
    if not often:
        gc.set_threshold(MOST_UNCOLLECTED, 20, 50)
