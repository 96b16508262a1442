"""Children that do not outlive their parent, whatever it dies of. Linux only; elsewhere a no-op.

What is started, and what it does when told to end, is its own business.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

# Asks the kernel for SIGTERM at the parent's death and becomes the program: the request survives
# exec, and unlike a preexec_fn no Python runs between fork and exec of a threaded process.
# A parent that died before the request was made is noticed by comparing its id.
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
    """Return *command* so that what it starts gets SIGTERM when this process dies.

    To the kernel the "parent" is the thread that starts the child: it must live as long, and be
    the only one left at the end, or the child gets the signal again for each that goes after it.
    https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _BIND_TO_PARENT, str(os.getpid()), *command]
