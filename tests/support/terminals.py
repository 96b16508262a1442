"""Processes whose standard output is a terminal. No tests."""

from __future__ import annotations

import contextlib
import os
import pty
import threading
from pathlib import Path
from typing import Any, BinaryIO

from tests.support.processes import PROCESS_DEADLINE_S, Process


class OnTerminal(Process):
    """A process whose standard output is a terminal; `out` is what that shows."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        # With a locale of its own it is started anew: a forked one buffers as if for a file.
        super().__init__(*arguments, **{"LC_ALL": "C.UTF-8", "TERM": "xterm", **options})
        os.close(self._terminal)

    def wait(self, deadline_s: float = PROCESS_DEADLINE_S) -> int:
        """Return its exit code, once the terminal has shown everything."""
        code = super().wait(deadline_s)
        self._showing.join()
        return code

    def _stdout(self, out: BinaryIO) -> int:
        screen, self._terminal = pty.openpty()
        self._showing = threading.Thread(target=_show, args=(screen, out.name), daemon=True)
        self._showing.start()
        return self._terminal


def _show(screen: int, path: str) -> None:
    # A terminal ends with an error.
    with contextlib.suppress(OSError), Path(path).open("ab", buffering=0) as out:
        while shown := os.read(screen, 65536):
            out.write(shown)
    os.close(screen)
