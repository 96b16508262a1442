"""A server whose wall clock a test may step; its monotonic clock goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.preloads import Clock, redis_with
from tests.support.servers import Server, server
from tests.support.waiting import wait_until

needs_libfaketime = pytest.mark.skipif(Clock.missing() != "", reason=Clock.missing())

MAX_ERROR_S = 0.3
_TIME = "local time = redis.call('TIME') return time[1] .. string.format('.%06d', time[2])"


class Clocked(NamedTuple):
    """A server, and its clock."""

    server: Server
    clock: Clock

    def step(self, seconds: float) -> None:
        """Set its clock so many seconds ahead of ours, or behind, and wait until it goes by it."""
        self.clock.step(seconds)
        with self.server.client() as client:
            # A server caches the time for a moment, in particular the time that scripts get.

            def is_stepped() -> bool:
                error_s = float(client.eval(_TIME, 0)) - time.time() - seconds
                return abs(error_s) <= MAX_ERROR_S

            wait_until(is_stepped)


@contextmanager
def clocked_server(directory: Path) -> Iterator[Clocked]:
    """Run a server on *directory* until the block is left."""
    clock = Clock(directory)
    with server(directory, program=redis_with([clock], directory)) as started:
        yield Clocked(started, clock)
