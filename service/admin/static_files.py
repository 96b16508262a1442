"""The static files of the page: read once, and served for ever under the hash of what they hold."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from . import paths

_TYPES = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
# A path with the hash never gets another content.
_FOR_EVER = "public, max-age=31536000, immutable"


def path_of(name: str) -> str:
    """Return the path that serves a file as it is now."""
    return paths.to(paths.STATIC, digest=_digest(name), name=name)


def route() -> Route:
    """Return the route of all static files."""
    return Route(paths.STATIC, _serve)


async def _serve(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _TYPES or request.path_params["digest"] != _digest(name):
        raise HTTPException(404)
    headers = {"Cache-Control": _FOR_EVER}
    return Response(_read(name), media_type=_TYPES[name], headers=headers)


@cache
def _read(name: str) -> bytes:
    return resources.files(__package__).joinpath("static", name).read_bytes()


@cache
def _digest(name: str) -> str:
    return hashlib.sha256(_read(name)).hexdigest()[:16]
