"""What the routes of the page share: where they read, how they answer, and the cached overview."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from ..config import Settings
from ..storage.connections import Connections
from ..storage.layout import Keys
from .login import Logins

if TYPE_CHECKING:
    from .rendering import Renderer


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
    """

    def __init__(self, settings: Settings, connections: Connections, keys: Keys) -> None:
        self.settings = settings
        self.connections = connections
        self.keys = keys
        self.logins = Logins(settings)
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
                **context,
            },
        )
        return HTMLResponse(html, status)

    def respond_error(self, request: Request, error: PageError) -> Response:
        """Return the response to a request with which something is wrong."""
        context = {"title": error.title, "text": error.text}
        return self.respond(request, "error.html", status=error.status, **context)


def _make_renderer() -> Renderer:
    from .rendering import Renderer  # noqa: PLC0415 - an extra

    return Renderer()
