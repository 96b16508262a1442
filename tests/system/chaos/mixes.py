"""Which faults come together in one run."""

from __future__ import annotations

from tests.system.chaos.faults import ANYWHERE, FAULTS, PROXIED

_ANYWHERE = tuple(name for name, fault in FAULTS.items() if fault.needs == ANYWHERE)
_PROXIED = tuple(name for name, fault in FAULTS.items() if fault.needs == PROXIED)

# The same few runs for every change, in about two and a half minutes; the longest come first.
SHORT = {
    "Stripe's API": (
        *("webhooks-lost", "api-fails", "failed-over"),
        *("worker-killed", "worker-killed", "receiver-killed", "receiver-killed"),
    ),
    "disk, clock, hostile clients": (
        *("slow-disk", "redis-clock-days-ahead"),
        *("output-stalled", "hostile-clients", "sink-refuses"),
    ),
    "proxy": (
        *("replies-lost", "connections-reset", "failed-over", "demoted"),
        *("worker-killed", "receiver-killed"),
        *("sink-exits", "sink-lags"),
    ),
    "processes": (
        *("worker-killed", "worker-stopped", "worker-restarted"),
        *("receiver-killed", "receivers-restarted", "clock-skewed"),
        *("redis-killed", "scripts-flushed", "redis-stopped", "redis-filled"),
        *("sink-down", "sink-refuses-oddly", "sink-hangs", "sink-fails-in-groups"),
    ),
}

LONG = {
    "everything": _ANYWHERE,
    "proxy": (
        *_PROXIED,
        *_PROXIED,
        "redis-killed",
        "worker-stopped",
        "receiver-killed",
        "sink-lags",
    ),
    "failed over": (
        *("failed-over", "demoted", "failed-over", "demoted"),
        *("worker-killed", "receiver-killed", "sink-down"),
    ),
    "failed over, unwaited": ("failed-over-unwaited", "worker-killed", "sink-lags"),
    "two replicas": ("less-current-promoted", "worker-killed", "receiver-killed", "sink-lags"),
    "older copy": (*["redis-restored"] * 4, "worker-killed", "sink-lags"),
    "slow disk": ("slow-disk", "slow-disk", "worker-killed", "receiver-killed", "sink-lags"),
    "busy disk": ("busy-disk", "worker-killed", "sink-lags"),
    "Redis's clock": (
        *("redis-clock-stepped", "redis-clock-days-ahead", "redis-clock-stepped"),
        *("receiver-killed", "sink-lags"),
    ),
    "Stripe's API": (
        *("webhooks-lost", "api-fails", "api-fails", "failed-over", "failed-over"),
        *("worker-killed", "worker-stopped", "worker-restarted", "receiver-killed", "sink-lags"),
    ),
    "Stripe's API, unwaited": ("webhooks-lost", "failed-over-unwaited", "worker-killed"),
    "full streams": ("streams-filled", "worker-killed", "receiver-killed"),
    "failing sessions": ("sessions-fail",),
    "hostile clients": ("hostile-clients", "hostile-clients", "output-stalled", "sink-lags"),
    "poison": ("sink-poisoned", "worker-stopped", "receiver-killed"),
}
