"""What the routes of the page share: where they read, how they answer, and the cached overview."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from ..config import Settings
from ..errors import Unavailable, UnavailableReason
from ..monitoring.handler_state import HandlerState
from ..monitoring.overview import Overview, collect, unavailable
from ..storage.connections import Connections
from ..storage.keys import Keys
from . import paths
from .letter_actions import LetterActions
from .logins import Logins

if TYPE_CHECKING:
    from .rendering import Renderer

# An overview is shown to all for so long: ten open pages read Redis as often as one.
KEPT_S = 5.0
# How long a viewer waits until the searches of others are over.
SEARCH_WAIT_S = 3.0

# For each endpoint the fingerprints of its signing secrets, each with its place.
LoadedSecrets = Mapping[str, Sequence[tuple[str, str]]]


class PageError(Exception):
    """A request that gets a page saying what is wrong with it.

    Attributes:
        status: The status code.
        title: What is wrong, in a few words.
        text: What to do about it.
    """

    def __init__(self, status: int, title: str, text: str = "") -> None:
        super().__init__(title)
        self.status, self.title, self.text = status, title, text


class Page:
    """What the routes read from, and render with.

    Args:
        settings: The settings.
        connections: Clients of Redis; not those that admit or deliver events.
        keys: The names of keys there.
        loaded_secrets: Returns the signing secrets of this process, by their fingerprints.
    """

    def __init__(
        self,
        settings: Settings,
        connections: Connections,
        keys: Keys,
        *,
        loaded_secrets: Callable[[], LoadedSecrets] = dict,
    ) -> None:
        self.settings = settings
        self.connections = connections
        self.keys = keys
        self.logins = Logins(settings)
        self.actions = LetterActions(connections, keys)
        self.loaded_secrets = loaded_secrets
        self._overview: Overview | None = None
        self._no_answer: UnavailableReason | None = None
        self._collected_at = -math.inf
        self._collecting = asyncio.Lock()
        self._searching = asyncio.Lock()
        self._renderer: Renderer | None = None
        self._loading = asyncio.Lock()

    async def load(self) -> None:
        """Import Jinja2 and compile the templates, once, beside the event loop.

        Raises:
            ImportError: Jinja2 is not installed.
        """
        async with self._loading:
            if self._renderer is None:
                self._renderer = await asyncio.to_thread(_make_renderer)

    def respond(
        self, request: Request, template: str, *, status: int = 200, **context: Any
    ) -> Response:
        """Return the response of a template; `load` has been called before."""
        if self._renderer is None:
            raise RuntimeError("not loaded")
        html = self._renderer.render(
            template,
            {
                "viewer": request.state.viewer,
                "prefix": self.settings.redis_prefix,
                "here": _way_back(request),
                **context,
            },
        )
        return HTMLResponse(html, status)

    def respond_error(self, request: Request, error: PageError) -> Response:
        """Return the response to a request with which something is wrong."""
        context = {"title": error.title, "text": error.text}
        return self.respond(request, "error.html", status=error.status, **context)

    @asynccontextmanager
    async def searching(self) -> AsyncIterator[None]:
        """Hold back all others who want to look at thousands of entries in Redis.

        One such call takes Redis milliseconds in which no event is admitted. One at a time, they
        delay an event by one call, however many ask.

        Raises:
            PageError: Others searched for too long.
        """
        try:
            async with asyncio.timeout(SEARCH_WAIT_S):
                await self._searching.acquire()
        except TimeoutError:
            raise PageError(503, "Too many search at once", "Try again in a moment.") from None
        try:
            yield
        finally:
            self._searching.release()

    async def overview(self) -> Overview:
        """Return the state of the deployment, at most `KEPT_S` old: also that Redis is away."""
        async with self._collecting:
            if self._overview is None or time.monotonic() - self._collected_at >= KEPT_S:
                self._overview = await self._collect()
                self._collected_at = time.monotonic()
            return self._overview

    async def handler_states(self) -> Sequence[HandlerState]:
        """Return each handler that is configured or has a consumer group.

        Raises:
            Unavailable: Redis did not answer.
        """
        found = await self.overview()
        if self._no_answer is not None:
            raise Unavailable(self._no_answer)
        return found.handlers

    async def handler_state(self, request: Request) -> HandlerState:
        """Return the handler that is named in a request's path.

        Raises:
            PageError: There is no such handler.
            Unavailable: Redis did not answer.
        """
        for state in await self.handler_states():
            if state.name == request.path_params["handler"]:
                return state
        raise PageError(404, "There is no such handler", "It is not configured and has no group.")

    async def _collect(self) -> Overview:
        self._no_answer = None
        try:
            return await collect(self.connections, self.keys, self.settings)
        except Unavailable as error:
            self._no_answer = error.reason
            return unavailable(error.reason)


def _way_back(request: Request) -> str:
    """Return what a login leads back to; empty where that cannot be loaded again."""
    is_page = request.method == "GET" and request.url.path != paths.LOGIN
    return paths.of(request) if is_page else ""


def _make_renderer() -> Renderer:
    from .rendering import Renderer  # noqa: PLC0415 - an extra

    return Renderer()
