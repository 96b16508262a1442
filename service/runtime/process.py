"""What runs together in one process: the composition of `serve`, `work` and `dev`.

The only place where clients, apps and workers are put together; signals end here. No logic.

A process listens first, so that its probes can say what it waits for, and then waits for Redis as
long as it takes. A worker opens its handlers meanwhile; groups are created once both are there.
"""

from __future__ import annotations

import asyncio
import gc
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import structlog
import uvloop
from redis.exceptions import RedisError
from starlette.types import ASGIApp

from .. import cancellation, config
from ..config import Network, Settings
from ..delivery import blocking
from ..delivery.consumer_groups import create_groups
from ..delivery.worker import Worker
from ..errors import ServiceError, Unreachable
from ..handlers import Handler, OpenHandler, loading
from ..inbox.admission import Inbox
from ..inbox.receiver import Receiver
from ..server.listener import Listener
from ..storage.connections import Connections, connect
from ..storage.health import Health
from ..storage.layout import Keys
from ..storage.redis_errors import unavailable_reason
from ..stripe.signing_secrets import SigningSecrets
from ..telemetry import metrics, tracing
from ..telemetry.loop_lag import LOOP_LAG
from ..telemetry.tracing import Tracing
from ..web.allow_list import AllowList
from ..web.app import create_admin_app, create_app
from . import signals
from .reloading import Reloader
from .traced import TracedReceiver, traced_handlers

# Between two tries of a worker to create its groups.
RETRY_S = 1.0
# Objects a receiver makes, over those it drops, before they are looked through for cycles.
MAX_UNCOLLECTED = 20_000
# For probes and Prometheus.
MAX_ADMIN_CONNECTIONS = 64

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
    traced: Tracing | None


def run(
    settings: Settings,
    environ: Mapping[str, str],
    *,
    receive: bool,
    work: Sequence[str] = (),
    tracebacks: bool = False,
    started: Callable[[Ports], None] = lambda _: None,
) -> None:
    """Run one process until SIGTERM or SIGINT, then stop in good order.

    Args:
        settings: The settings.
        environ: What handlers read their own settings from.
        receive: Whether to listen for Stripe.
        work: The names of the handlers to work for: some of the settings' handlers.
        tracebacks: Whether to print the whole traceback of each failed call of a handler, which
            may quote what it was called with.
        started: Called once everything listens.

    Raises:
        ConfigError: Something about the settings, the layout or a port cannot be.
        Exception: Whatever else ended the process; it has been logged.
    """
    try:
        with tracing.open_tracing(environ) as traced:
            uvloop.run(
                _run(
                    settings,
                    environ,
                    receive=receive,
                    work=work,
                    traced=traced,
                    tracebacks=tracebacks,
                    started=started,
                )
            )
    except Exception as error:
        if not isinstance(error, ServiceError):
            log.critical("process.failed", exc_info=error)
        raise


async def _run(
    settings: Settings,
    environ: Mapping[str, str],
    *,
    receive: bool,
    work: Sequence[str],
    traced: Tracing | None,
    tracebacks: bool,
    started: Callable[[Ports], None],
) -> None:
    openers = loading.find(settings.handlers)
    chosen = {name: openers[name] for name in work}
    shown = loading.print_tracebacks if tracebacks else None
    reloaders: list[Reloader[Any]] = []
    stopping = signals.stopping()
    signals.reload(reloaders, stopping)
    keys = Keys(settings.redis_prefix, settings.partitions)
    async with connect(settings.redis_url) as connections:
        health = Health(connections, settings)
        ground = _Ground(settings, connections, keys, health, traced)
        listeners = [admin := _admin(ground)]
        if receive:
            listeners.insert(0, _receiver(ground, environ, reloaders))
        parts = [asyncio.create_task(listener.run()) for listener in listeners]
        if work:
            parts.append(asyncio.create_task(_work(ground, chosen, environ, stopping, shown)))
        follows = [reloader.follow() for reloader in reloaders]
        watches = [health.watch(), LOOP_LAG.watch(), *follows]
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
        await _stop(ground, listeners, receives=receive)
        for task in watching:
            await cancellation.cancel_and_wait(task)
        ended = await asyncio.gather(*parts, *watching, return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, Exception):
            raise outcome
    log.info("process.stopped")


async def _first_of(*tasks: asyncio.Task[Any]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _receiver(
    ground: _Ground, environ: Mapping[str, str], reloaders: list[Reloader[Any]]
) -> Listener:
    settings = ground.settings
    signing_secrets = SigningSecrets(settings.secrets)
    metrics.set_loaded_secrets(signing_secrets.places())
    reloaders.append(_reloading_secrets(signing_secrets, environ))
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
    app = create_app(
        receiver, ground.health, replace(settings, secrets=signing_secrets), allow_list
    )
    return _listener(
        ground, app, settings.port, settings.max_connections, available_slots=app.available_slots
    )


def _reloading_secrets(
    signing_secrets: SigningSecrets, environ: Mapping[str, str]
) -> Reloader[Any]:
    def use(secrets: Mapping[str, Any]) -> dict[str, Any]:
        signing_secrets.replace(secrets)
        metrics.set_loaded_secrets(signing_secrets.places())
        return {"fingerprints": signing_secrets.fingerprints()}

    return Reloader(
        "secrets",
        dict(signing_secrets),
        read=lambda: dict(config.read_signing_secrets(environ)),
        use=use,
    )


def _reloading_networks(
    allow_list: AllowList, networks: Sequence[Network], environ: Mapping[str, str]
) -> Reloader[Any]:
    def use(networks: Sequence[Network]) -> dict[str, Any]:
        allow_list.replace(networks)
        return {"networks": len(networks)}

    return Reloader(
        "networks", networks, read=lambda: config.read_allowed_networks(environ), use=use
    )


def _admin(ground: _Ground) -> Listener:
    app = create_admin_app(ground.health)
    return _listener(ground, app, ground.settings.admin_port, MAX_ADMIN_CONNECTIONS)


def _listener(
    ground: _Ground,
    app: ASGIApp,
    port: int,
    max_connections: int,
    *,
    available_slots: Callable[[], float] = lambda: math.inf,
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
        available_slots=available_slots,
    )


async def _work(
    ground: _Ground,
    openers: Mapping[str, OpenHandler],
    environ: Mapping[str, str],
    stopping: asyncio.Event,
    shown: Callable[[Handler], Handler] | None,
) -> None:
    """Work until told to stop; what is not ready for it by then is not waited for."""
    opened = asyncio.Event()

    async def open_and_work() -> None:
        async with loading.open_all(openers, environ) as ready:
            await _examine(ready)
            await ground.health.usable.wait()
            await _create_groups(ground)
            opened.set()
            called = traced_handlers(ground.traced, ready) if ground.traced else ready
            if shown is not None:
                called = {name: shown(handler) for name, handler in called.items()}
            with blocking.detecting():
                await Worker(ground.connections, ground.keys, ground.settings, called).run(stopping)

    working = asyncio.create_task(open_and_work())
    waits = [asyncio.create_task(event.wait()) for event in (stopping, opened)]
    await _first_of(working, *waits)
    if stopping.is_set() and not opened.is_set():
        await cancellation.cancel_and_wait(working)
    for wait in waits:
        await cancellation.cancel_and_wait(wait)
    await asyncio.wait({working})
    if not working.cancelled():
        await working


async def _examine(opened: Mapping[str, Handler]) -> None:
    """Refuse to start on what cannot be right; a queue out of reach only waits."""
    for name, handler in opened.items():
        try:
            await loading.check(name, handler)
        except Unreachable as error:
            log.warning("handler.unreachable", handler=name, reason=error.reason)


async def _create_groups(ground: _Ground) -> None:
    """Create the groups that are missing; handlers that could not be opened leave none behind."""
    while True:
        try:
            created = await create_groups(ground.connections, ground.keys, ground.settings.handlers)
        except (RedisError, OSError) as error:
            log.warning("group.not_created", reason=unavailable_reason(error))
            await asyncio.sleep(RETRY_S)
        else:
            break
    for handler in created:
        log.info("group.created", handler=handler)


async def _stop(ground: _Ground, listeners: Sequence[Listener], *, receives: bool) -> None:
    """Be not ready first; close the listeners only when balancers have had time to notice."""
    ground.health.draining = True
    for listener in listeners:
        listener.drain()
    # A receiver that was never ready has no balancer that needs time to notice.
    drain_s = ground.settings.drain_s if receives and ground.health.usable.is_set() else 0.0
    log.info("process.draining", drain_s=drain_s)
    await asyncio.sleep(drain_s)
    for listener in listeners:
        listener.stop()


def _spare_the_collector(*, often: bool) -> None:
    """Take what lives as long as the process out of every later collection.

    Requests leave next to no cycles behind, but what handlers raise does: workers collect often.
    """
    gc.collect()
    gc.freeze()
    if not often:
        gc.set_threshold(MAX_UNCOLLECTED, 20, 50)
