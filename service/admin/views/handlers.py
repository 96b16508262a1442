"""Handlers: all of them, and one with its latest attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...monitoring import finished_attempts
from .. import paths
from ..page import Page


def routes(page: Page) -> list[Route]:
    """Return the routes that show handlers."""

    async def show_all(request: Request) -> Response:
        return page.respond(request, "handlers.html", handlers=await page.handler_states())

    async def show(request: Request) -> Response:
        state = await page.handler_state(request)
        attempts = await finished_attempts.read_latest(page.connections, page.keys, state.name)
        return page.respond(
            request, "handler.html", state=state, attempts=attempts, leases=by_worker(state.leases)
        )

    return [Route(paths.HANDLERS, show_all), Route(paths.HANDLER, show)]


def by_worker(leases: Sequence[str | None]) -> Mapping[str | None, Sequence[int]]:
    """Return the partitions of each worker, and of None those without one."""
    partitions: dict[str | None, list[int]] = {}
    for partition, worker in enumerate(leases):
        partitions.setdefault(worker, []).append(partition)
    return partitions
