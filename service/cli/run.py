"""The commands that run until they are stopped: `dev`, `serve`, `work`."""

from __future__ import annotations

import faulthandler
import os

import click

from ..config import SECRETS, Settings
from ..errors import ConfigError
from ..parsers import FETCH
from ..runtime import process
from ..runtime.embedded_redis import EmbeddedServer, find_server
from ..telemetry import logs
from . import defaults, terminal


@click.command()
def dev() -> None:
    """Run receiver and worker with a private Valkey in .data/.

    HANDLERS names the handlers (log unless set): your own too, as my_handler:open for the function
    open in my_handler.py of this folder. REDIS_URL names another Redis.
    """
    # Only this machine may connect, and no balancer has to notice a stop.
    environ = {"HOST": defaults.LOOPBACK, "DRAIN_S": "0", **os.environ}
    if not defaults.is_address(environ["HOST"]):
        # Some shells, and conda, have a variable of that name for something else.
        terminal.print_note(f"HOST is not an IP address: dev listens on {defaults.LOOPBACK}")
        environ["HOST"] = defaults.LOOPBACK
    if defaults.names_redis(environ):
        _run_dev(environ)
        return
    with EmbeddedServer.start(find_server(environ), directory=defaults.DIRECTORY) as server:
        defaults.REDIS_URL.write_text(server.url + "\n")
        try:
            _run_dev(environ | {"REDIS_URL": server.url})
        finally:
            defaults.REDIS_URL.unlink(missing_ok=True)


@click.command()
def serve() -> None:
    """Run a receiver: verify and admit what Stripe sends."""
    settings = Settings.from_environ(os.environ, require_secrets=True)
    _configure_logging(settings)
    process.run(settings, os.environ, receive=True)


@click.command()
@click.option(
    "--handlers", "names", metavar="NAMES", help="Only these of HANDLERS and fetch, by commas."
)
def work(names: str | None) -> None:
    """Run a worker: deliver transitions to the handlers.

    With STRIPE_API_KEY it also fetches the events of thin events, as the handler fetch.
    """
    settings = Settings.from_environ(os.environ)
    _configure_logging(settings)
    chosen = settings.all_handlers if names is None else tuple(names.split(","))
    if FETCH in chosen and not settings.stripe_api_key:
        raise ConfigError([f"--handlers: {FETCH} needs STRIPE_API_KEY"])
    if unknown := sorted(set(chosen) - {*settings.handlers, FETCH}):
        raise ConfigError([f"--handlers: {name} is not among HANDLERS" for name in unknown])
    process.run(settings, os.environ, receive=False, work=chosen)


def _run_dev(environ: dict[str, str]) -> None:
    settings = Settings.from_environ(environ)
    makes_secret = "" not in settings.secrets
    if makes_secret:
        # From a file, so that a changed secret is reloaded like any other.
        defaults.make_signing_secret()
        environ = environ | {f"{SECRETS}_FILE": str(defaults.SIGNING_SECRET)}
        settings = Settings.from_environ(environ)
    _configure_logging(settings, tracebacks=True)
    try:
        process.run(
            settings,
            environ,
            receive=True,
            work=settings.all_handlers,
            on_started=lambda ports: _print_welcome(ports, makes_secret=makes_secret),
        )
    finally:
        defaults.ENDPOINT.unlink(missing_ok=True)


def _print_welcome(ports: process.Ports, *, makes_secret: bool) -> None:
    """Print where `dev` listens and what to type next, and note the endpoint for `send`."""
    endpoint = defaults.local_endpoint(ports.web)
    is_found_by_send = endpoint == defaults.local_endpoint(Settings().port)
    if defaults.DIRECTORY.exists():
        defaults.ENDPOINT.write_text(endpoint + "\n")
        is_found_by_send = True
    to = "" if is_found_by_send else f" --to {endpoint}"
    lines = {
        "endpoint": endpoint,
        "signing secret": defaults.SIGNING_SECRET.read_text().strip() if makes_secret else "yours",
        "page": f"http://{defaults.LOOPBACK}:{ports.admin}/",
        "metrics": f"http://{defaults.LOOPBACK}:{ports.admin}/metrics",
        "type next": f"{terminal.program()} send verified{to}",
    }
    for label, text in lines.items():
        terminal.print_note(f"{label:>15}  {text}")


def _configure_logging(settings: Settings, *, tracebacks: bool = False) -> None:
    """Log for as long as this process runs, its crashes included."""
    logs.configure(
        settings.log_level,
        settings.log_format,
        colors=defaults.allows_colors(),
        tracebacks=tracebacks,
    )
    logs.log_unhandled_errors()
    # A crash of the interpreter itself leaves no log line, but a stack on standard error.
    faulthandler.enable()
