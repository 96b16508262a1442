"""What a process consists of: its receiver, its listeners, its reloaders, its handlers.

The only place where these are put together. Nothing here waits for anything: what is built here is
started and stopped in `process`.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from starlette.types import ASGIApp

from .. import config
from ..admin.app import AdminApp
from ..admin.logins import fingerprints
from ..admin.page import Page
from ..config import Settings
from ..handlers import AnyHandler, AnyOpener
from ..inbox.admission import Inbox
from ..inbox.receiver import Receiver
from ..monitoring.publisher import Kind, Publisher
from ..parsers import AdminToken, Network
from ..secret import Secret
from ..server.listener import Listener
from ..storage.connections import Connections, connect
from ..storage.health import Health
from ..storage.keys import Keys
from ..stripe.signing_secrets import SigningSecrets
from ..stripe_api import client
from ..stripe_api.client import StripeApi
from ..stripe_api.fetch import Fetcher, open_fetcher
from ..stripe_api.keys import ApiKeys
from ..stripe_api.rate_limit import RateLimiter
from ..stripe_api.reconciler import Reconciler
from ..telemetry import metrics
from ..telemetry.tracing import Tracing
from ..web.allow_list import AllowList
from ..web.app import create_app
from .reloading import Reloader
from .traced import TracedReceiver, trace_handlers

# Enough for probes, Prometheus and a dozen browsers.
MAX_ADMIN_CONNECTIONS = 64


class Context(NamedTuple):
    """What every part of a process is built from.

    Attributes:
        settings: The settings.
        environment: What handlers, and settings that are read again, are read from.
        connections: Clients of Redis.
        keys: The names of keys there.
        health: What is known of Redis.
        tracing: Makes spans; None when tracing is off.
        api_keys: The keys of Stripe's API.
        secrets: The signing secrets.
    """

    settings: Settings
    environment: Mapping[str, str]
    connections: Connections
    keys: Keys
    health: Health
    tracing: Tracing | None
    api_keys: ApiKeys
    secrets: SigningSecrets


@asynccontextmanager
async def open_context(
    settings: Settings, environment: Mapping[str, str], traced: Tracing | None
) -> AsyncIterator[Context]:
    """Yield what every part is built from, with open clients of Redis."""
    async with connect(settings.redis_url) as connections:
        yield Context(
            settings,
            environment,
            connections,
            Keys(settings.redis_prefix, settings.partitions),
            Health(connections, settings),
            traced,
            ApiKeys(settings.stripe_api_key),
            SigningSecrets(settings.secrets),
        )


def open_stripe_api(context: Context) -> AbstractAsyncContextManager[StripeApi]:
    """Return a client of Stripe's API, to be entered; requests share the deployment's budget."""
    settings = context.settings
    return client.open_api(
        settings.stripe_api_base,
        context.api_keys,
        RateLimiter(context.connections, context.keys, settings.stripe_api_rate),
        nullcontext if context.tracing is None else context.tracing.api_span,
    )


def fetch_opener(context: Context) -> AnyOpener:
    """Return the opener of the handler that fetches the events of thin events."""

    @asynccontextmanager
    async def open_fetch(_: Mapping[str, str]) -> AsyncIterator[Fetcher]:
        # The age of an event was judged when its thin event arrived.
        inbox = Inbox(context.connections, context.keys, context.settings, judges_age=False)
        async with open_stripe_api(context) as api, open_fetcher(api, inbox) as fetcher:
            yield fetcher

    return open_fetch


def build_reconciler(context: Context, api: StripeApi) -> Reconciler:
    """Return what compares the events that came with Stripe's list of them."""
    return Reconciler(api, context.connections, context.keys, context.settings)


def build_key_reloaders(context: Context) -> list[Reloader[Any]]:
    """Return what reloads the keys of Stripe's API; nothing where the process began without."""
    if not context.settings.stripe_api_key:
        return []
    return [_keys_reloader(context)]


def build_receiver(context: Context) -> tuple[Listener, list[Reloader[Any]]]:
    """Return the listener for Stripe, and what reloads its secrets and its allow list."""
    settings, secrets = context.settings, context.secrets
    metrics.set_loaded_secrets(secrets.fingerprints_and_places())
    reloaders = [_secrets_reloader(secrets, context.environment)]
    allow_list = None
    if settings.allowed_networks:
        allow_list = AllowList(settings.allowed_networks, proxies=settings.forwarded_allow_ips)
        reloaders.append(
            _networks_reloader(allow_list, settings.allowed_networks, context.environment)
        )
    make = Receiver if context.tracing is None else partial(TracedReceiver, context.tracing)
    receiver = make(
        Inbox(context.connections, context.keys, settings),
        tolerance_s=settings.signature_tolerance_s,
        livemode=settings.livemode,
        account_name=settings.account_name,
        has_api_key=context.api_keys.holds,
    )
    app = create_app(receiver, context.health, replace(settings, secrets=secrets), allow_list)
    listener = _listener(
        settings,
        app,
        settings.port,
        max_connections=settings.max_connections,
        available_slots=app.available_slots,
    )
    return listener, reloaders


@asynccontextmanager
async def open_page(context: Context) -> AsyncIterator[Page]:
    """Yield the page, which has clients of its own; at the end what it has started is stopped."""
    settings = context.settings
    url, name = settings.redis_url, "REDIS_URL"
    if settings.admin_redis_url:
        url, name = settings.admin_redis_url, "ADMIN_REDIS_URL"
    async with connect(url, setting=name) as connections:
        loaded = context.secrets.fingerprints_by_endpoint
        page = Page(settings, connections, context.keys, loaded_secrets=loaded)
        try:
            yield page
        finally:
            await page.actions.stop()


def build_admin(context: Context, page: Page) -> tuple[Listener, list[Reloader[Any]]]:
    """Return the listener for probes, metrics and the page, and what reloads the page's tokens."""
    settings = context.settings
    app = AdminApp(context.health, page)
    listener = _listener(settings, app, settings.admin_port, max_connections=MAX_ADMIN_CONNECTIONS)
    return listener, [_tokens_reloader(page, context), _read_tokens_reloader(page, context)]


def build_publisher(context: Context, *, receives: bool, works: Sequence[str]) -> Publisher:
    """Return what publishes in Redis that the process lives, and what it counts."""
    kind: Kind = "dev" if receives and works else "receiver" if receives else "worker"
    return Publisher(context.connections, context.keys, context.health, kind=kind, works=works)


def wrap_handlers(context: Context, opened: Mapping[str, AnyHandler]) -> Mapping[str, AnyHandler]:
    """Return open handlers, each call in a span if the process is traced."""
    return opened if context.tracing is None else trace_handlers(context.tracing, opened)


def _secrets_reloader(secrets: SigningSecrets, environ: Mapping[str, str]) -> Reloader[Any]:
    def apply(changed: Mapping[str, Any]) -> dict[str, Any]:
        secrets.replace(changed)
        metrics.set_loaded_secrets(secrets.fingerprints_and_places())
        return {"fingerprints": secrets.fingerprints()}

    return Reloader(
        "secrets",
        dict(secrets),
        read=lambda: dict(config.read_signing_secrets(environ)),
        apply=apply,
    )


def _tokens_reloader(page: Page, context: Context) -> Reloader[Any]:
    def read() -> Any:
        found = config.read_again(context.environment, "ADMIN_TOKENS", may_be_empty=True)
        config.check_tokens(found, page.logins.reading)
        return found

    def apply(changed: Sequence[AdminToken]) -> dict[str, Any]:
        page.logins.acting = changed
        return {"fingerprints": fingerprints(changed)}

    return Reloader("admin_tokens", context.settings.admin_tokens, read=read, apply=apply)


def _read_tokens_reloader(page: Page, context: Context) -> Reloader[Any]:
    def read() -> Any:
        # Without these tokens reading is open: a file that is gone must not open it.
        is_open = not page.logins.reading
        found = config.read_again(context.environment, "ADMIN_READ_TOKENS", may_be_empty=is_open)
        config.check_tokens(page.logins.acting, found)
        return found

    def apply(changed: Sequence[AdminToken]) -> dict[str, Any]:
        page.logins.reading = changed
        return {"fingerprints": fingerprints(changed)}

    return Reloader("admin_read_tokens", context.settings.admin_read_tokens, read=read, apply=apply)


def _keys_reloader(context: Context) -> Reloader[Any]:
    def apply(changed: Sequence[Secret[str]]) -> dict[str, Any]:
        context.api_keys.replace(changed)
        return {"fingerprints": context.api_keys.fingerprints()}

    return Reloader(
        "api_keys",
        context.settings.stripe_api_key,
        read=lambda: config.read_again(context.environment, "STRIPE_API_KEY"),
        apply=apply,
    )


def _networks_reloader(
    allow_list: AllowList, networks: Sequence[Network], environ: Mapping[str, str]
) -> Reloader[Any]:
    def apply(changed: Sequence[Network]) -> dict[str, Any]:
        allow_list.replace(changed)
        return {"networks": len(changed)}

    return Reloader(
        "networks",
        networks,
        read=lambda: config.read_again(environ, "ALLOWED_NETWORKS"),
        apply=apply,
    )


def _listener(
    settings: Settings,
    app: ASGIApp,
    port: int,
    *,
    max_connections: int,
    available_slots: Callable[[], float] = lambda: math.inf,
) -> Listener:
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
