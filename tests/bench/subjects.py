"""Handlers to measure a worker with, named as `subjects:silent`: none of them knows a queue."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from service.handlers import Handler
from service.transitions.transition import StatusTransition


@asynccontextmanager
async def silent(environ: Mapping[str, str]) -> AsyncIterator[Handler]:
    """Yield a handler that does nothing."""

    async def handle(transition: StatusTransition) -> None:
        pass

    yield handle


# Five names are five handlers, with five consumer groups.
one = two = three = four = five = silent


@asynccontextmanager
async def stamping(environ: Mapping[str, str]) -> AsyncIterator[Handler]:
    """Yield a handler that writes each event id and the time in nanoseconds to WAY_STAMPS."""
    with open(environ["WAY_STAMPS"], "a", encoding="ascii") as stamps:  # noqa: ASYNC230, PTH123 - before and after

        async def handle(transition: StatusTransition) -> None:
            stamps.write(f"{transition.event_id} {time.time_ns()}\n")

        yield handle


@asynccontextmanager
async def unreachable(environ: Mapping[str, str]) -> AsyncIterator[Handler]:
    """Yield a handler whose queue is away for ever."""

    async def handle(transition: StatusTransition) -> None:
        raise ConnectionError("away")

    yield handle


@asynccontextmanager
async def failing(environ: Mapping[str, str]) -> AsyncIterator[Handler]:
    """Yield a handler that fails every time."""

    async def handle(transition: StatusTransition) -> None:
        raise RuntimeError("failed")

    yield handle
