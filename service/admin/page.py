"""What the routes of the page share: where they read, how they answer, and the cached overview."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from ..config import Settings
from ..storage.connections import Connections
from ..storage.layout import Keys

if TYPE_CHECKING:
    from .rendering import Renderer


class Viewer(NamedTuple):
    """Who looks at the page.

    Attributes:
        name: The name of the token they logged in with; None without a login.
        may_act: Whether they may replay and drop dead letters.
        can_log_in: Whether there are tokens to log in with.
    """

    name: str | None = None
    may_act: bool = False
    can_log_in: bool = False


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
                "viewer": getattr(request.state, "viewer", Viewer()),
                "prefix": self.settings.redis_prefix,
                **context,
            },
        )
        return HTMLResponse(html, status)


def _make_renderer() -> Renderer:
    from .rendering import Renderer  # noqa: PLC0415 - an extra

    return Renderer()
