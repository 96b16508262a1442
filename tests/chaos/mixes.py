"""Which faults come together in one run."""

from __future__ import annotations

from faults import FAULTS, WIRED

_ANYWHERE = tuple(name for name, fault in FAULTS.items() if not any(fault.needs))
_WIRED = tuple(name for name, fault in FAULTS.items() if fault.needs == WIRED)

# The same few runs for every change: each kind of fault once, in well under four minutes.
SHORT = {
    "processes": (
        *("worker-killed", "worker-stopped", "worker-rolled"),
        *("receiver-killed", "receivers-rolled", "clock-skewed"),
        *("redis-killed", "scripts-flushed", "redis-stopped", "redis-filled"),
        *("sink-down", "sink-refuses", "sink-hangs"),
    ),
    "wire": (
        *("replies-lost", "connections-reset", "failed-over"),
        *("worker-killed", "receiver-killed"),
        *("sink-exits", "sink-lags"),
    ),
}

LONG = {
    "everything": _ANYWHERE,
    "wire": (*_WIRED, *_WIRED, "redis-killed", "worker-stopped", "receiver-killed", "sink-lags"),
    "failed over": ("failed-over", "failed-over", "worker-killed", "receiver-killed", "sink-down"),
    "failed over, unwaited": ("failed-over-unwaited", "worker-killed", "sink-lags"),
    "poison": ("sink-poisoned", "worker-stopped", "receiver-killed"),
}
