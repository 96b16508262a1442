"""A server whose wall clock a test may step, by libfaketime; its monotonic clock goes on.

It is the embedded one, whatever server is under test: Debian's redis-server has an allocator that
libfaketime cannot be loaded beside.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from service.runtime.embedded_redis import find_server
from tests.support.servers import Server, free_port, running
from tests.support.waiting import wait_until

# Debian's package `libfaketime`, on any architecture.
LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
needs_libfaketime = pytest.mark.skipif(not LIBRARIES, reason="libfaketime is not installed")

MAX_ERROR_S = 0.3
_TIME = "local time = redis.call('TIME') return time[1] .. string.format('.%06d', time[2])"


class Clocked(NamedTuple):
    """A server, and the file that holds how far its clock is from ours."""

    server: Server
    offset: Path

    def step(self, seconds: float) -> None:
        """Set its clock so many seconds ahead of ours, or behind, and wait until it goes by it."""
        written = self.offset.with_suffix(".new")
        written.write_text(f"{seconds:+}s")
        written.rename(self.offset)
        with self.server.client() as client:
            # A server caches the time for a moment, in particular the time that scripts get.

            def is_stepped() -> bool:
                error_s = float(client.eval(_TIME, 0)) - time.time() - seconds
                return abs(error_s) <= MAX_ERROR_S

            wait_until(is_stepped)


@contextmanager
def clocked_server(directory: Path) -> Iterator[Clocked]:
    """Run a server on *directory* until the block is left."""
    directory.mkdir(parents=True, exist_ok=True)
    port, offset = free_port(), directory / "clock"
    faked = {
        "LD_PRELOAD": str(LIBRARIES[0]),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    variables = [f"{name}={value}" for name, value in faked.items()]
    options = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", "")
    offset.write_text("+0s")
    program = find_server({**os.environ, "REDIS_SERVER": ""})
    command = ["/usr/bin/env", *variables, str(program), *options]
    with running(command, port, directory) as started:
        yield Clocked(started, offset)
