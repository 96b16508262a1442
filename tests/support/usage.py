"""What processes and calls use of the machine: CPU time and memory. No test limits a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cost(call: Callable[[], object], *, times: int = 1) -> float:
    """Return the minimum CPU time of *call*, for comparison with that of another."""
    found = []
    for _ in range(7):
        began = time.thread_time()
        for _ in range(times):
            call()
        found.append(time.thread_time() - began)
    return min(found)


def cpu_s(pid: int) -> float:
    """Return the CPU time a process has used, user and system together, all threads.

    It is read to the nanosecond, by the clock of the process (clock_getcpuclockid(3)).
    """
    return time.clock_gettime(~pid << 3 | 2)


def memory_mib(pid: int, which: str = "VmRSS") -> float:
    """Return the memory a process has in use, in MiB, or has had at most: `VmHWM`."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    [line] = [line for line in status.splitlines() if line.startswith(f"{which}:")]
    return int(line.split()[1]) / 1024
