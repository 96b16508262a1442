"""Children that end when their parent dies, of whatever cause. Linux only; elsewhere a no-op.

What is started, and how it shuts down, is not known here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

# Asks the kernel for SIGTERM at the parent's death, then becomes the program: the request survives
# exec. Unlike a preexec_fn, no Python code of ours runs between fork and exec.
# A parent that died before the request was made shows in a changed parent id.
_BIND_TO_PARENT: Final = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
PR_SET_PDEATHSIG = 1
if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
    sys.exit("prctl failed")
if os.getppid() == int(parent):
    os.execv(command[0], command)
"""


def bind_to_parent(command: Sequence[str]) -> list[str]:
    """Return *command*, changed so that what it starts gets SIGTERM when this process dies.

    To the kernel the parent is the thread that starts the child, so start it from the main thread.
    https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _BIND_TO_PARENT, str(os.getpid()), *command]
