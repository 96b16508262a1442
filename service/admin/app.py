"""The application of the admin port: probes and metrics."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..telemetry import metrics
from ..web.app import QuietApplication, Readiness, probes


def create_admin_app(readiness: Readiness) -> Starlette:
    """Return the application of the admin port: metrics and the probes."""
    return QuietApplication([Route("/metrics", _metrics), *probes(readiness)])


async def _metrics(request: Request) -> Response:
    return Response(metrics.exposition(), media_type=metrics.CONTENT_TYPE)
