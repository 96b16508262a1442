"""What signals mean to one process. Who stops, and in which order, is decided by who asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from typing import Any

from .reloading import Reloader


def stopping() -> asyncio.Event:
    """Return the event that SIGTERM or SIGINT sets; a second signal ends the process at once."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        stopped.set()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)

    for each in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):
            loop.add_signal_handler(each, stop)
    return stopped


def reload(reloaders: Sequence[Reloader[Any]], stopping: asyncio.Event) -> None:
    """Have SIGHUP look at what can be reloaded; where the terminal has gone, it means stop."""
    on_terminal = os.isatty(0)

    def look() -> None:
        if on_terminal and not os.isatty(0):
            stopping.set()
        for reloader in reloaders:
            reloader.ask()

    with contextlib.suppress(ValueError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, look)
