"""What signals mean to a process: stop, and read the reloadable settings again.

In which order a process stops is decided in `process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from typing import Any

from .reloading import Reloader


def stop_event() -> asyncio.Event:
    """Return the event that SIGTERM or SIGINT sets; a second signal ends the process at once."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGTERM)

    def stop() -> None:
        stopping.set()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
        # That of a container's first process: see `__main__`.
        signal.signal(signal.SIGTERM, before)

    for each in (signal.SIGTERM, signal.SIGINT):
        # Outside the main thread signals cannot be handled.
        with contextlib.suppress(ValueError):
            loop.add_signal_handler(each, stop)
    return stopping


def reload_on_hangup(reloaders: Sequence[Reloader[Any]], stopping: asyncio.Event) -> None:
    """Let SIGHUP start *reloaders*; if it is sent because the terminal closed, it means stop."""
    had_terminal = os.isatty(0)

    def hang_up() -> None:
        if had_terminal and not os.isatty(0):
            stopping.set()
        for reloader in reloaders:
            reloader.request()

    with contextlib.suppress(ValueError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)
