"""What can go wrong: every fault by its name, with its lane and what it needs.

Faults of one lane come one after the other, lanes run side by side, those of `ALONE` at the end.
Every choice is the seed's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random
from typing import NamedTuple

from tests.system.chaos import failover_faults as failovers
from tests.system.chaos import process_faults as processes
from tests.system.chaos import redis_faults as one_redis
from tests.system.chaos import sink_faults as sinks
from tests.system.chaos.needs import Needs
from tests.system.chaos.scene import HANDLERS, Scene
from tests.system.chaos.sinks import Mood
from tests.system.chaos.stripe_client import Stripe

Act = Callable[[Scene, Stripe, Random], Awaitable[None]]

ANYWHERE = Needs()
WIRED = Needs(wire=True)
WAITED = Needs(wire=True, replicas=1, durability="replica")
WAITED_FOR_TWO = Needs(wire=True, replicas=2, durability="replica")
UNWAITED = Needs(wire=True, replicas=1, durability="none")
UNSURE = Needs(durability="none")
SLOW_DISK = Needs(slow_disk=True, durability="fsync", appendfsync="always")
BUSY_DISK = Needs(slow_disk=True, durability="none", appendfsync="everysec")
CLOCK = Needs(clock=True)
SMALL_STREAMS = Needs(settings={"STREAM_MAX_ENTRIES": str(one_redis.STREAM_CAP)})
# So that hundreds of sessions that fail are one partition's, and go on failing.
ONE_PARTITION = Needs(
    settings={"PARTITIONS": "1", "RETRY_MAX_ATTEMPTS": "1000", "RETRY_MAX_DELAY_S": "8"}
)
FEW_CONNECTIONS = Needs(settings={"MAX_CONNECTIONS": "64", "MAX_IN_FLIGHT": "2"})
LOGGED = Needs(settings={"HANDLERS": ",".join([*HANDLERS, "log"])})


# Faults after which answers or deliveries must be prompt: nothing else may be to blame.
ALONE = "alone"


class Fault(NamedTuple):
    """One kind of fault.

    Attributes:
        act: Makes it so.
        lane: What it happens to.
        needs: What the deployment must be for it.
    """

    act: Act
    lane: str
    needs: Needs = ANYWHERE


FAULTS = {
    "worker-killed": Fault(processes.worker_killed, "workers"),
    "worker-stopped": Fault(processes.worker_stopped, "workers"),
    "worker-rolled": Fault(processes.worker_rolled, "workers"),
    "receiver-killed": Fault(processes.receiver_killed, "receivers"),
    "receiver-stopped": Fault(processes.receiver_stopped, "receivers"),
    "receivers-rolled": Fault(processes.receivers_rolled, "receivers"),
    "clock-skewed": Fault(processes.clock_skewed, "receivers"),
    "output-stalled": Fault(processes.output_stalled, ALONE, LOGGED),
    "strangers": Fault(processes.strangers, "strangers", FEW_CONNECTIONS),
    "redis-killed": Fault(one_redis.redis_killed, "redis"),
    "redis-stopped": Fault(one_redis.redis_stopped, "redis"),
    "redis-filled": Fault(one_redis.redis_filled, "redis"),
    "scripts-flushed": Fault(one_redis.scripts_flushed, "redis"),
    "leases-deleted": Fault(one_redis.leases_deleted, "redis"),
    "stream-deleted": Fault(one_redis.stream_deleted, "redis"),
    "streams-filled": Fault(one_redis.streams_filled, ALONE, SMALL_STREAMS),
    "slow-disk": Fault(one_redis.slow_disk, "redis", SLOW_DISK),
    "busy-disk": Fault(one_redis.busy_disk, "redis", BUSY_DISK),
    "redis-clock-stepped": Fault(one_redis.clock_stepped, ALONE, CLOCK),
    "redis-clock-days-ahead": Fault(one_redis.clock_days_ahead, ALONE, CLOCK),
    "redis-restored": Fault(one_redis.restored, "redis", UNSURE),
    "failed-over": Fault(failovers.failed_over, "redis", WAITED),
    "failed-over-unwaited": Fault(failovers.failed_over, "redis", UNWAITED),
    "less-current-promoted": Fault(failovers.less_current_promoted, "redis", WAITED_FOR_TWO),
    "demoted": Fault(failovers.demoted, ALONE, WAITED),
    "replies-lost": Fault(one_redis.replies_lost, "redis", WIRED),
    "connections-reset": Fault(one_redis.connections_reset, "redis", WIRED),
    "redis-far-away": Fault(one_redis.redis_far_away, "redis", WIRED),
    "sink-down": Fault(sinks.in_mood(Mood.DOWN, 6), "sink"),
    "sink-raises": Fault(sinks.in_mood(Mood.RAISING, 3), "sink"),
    "sink-refuses": Fault(sinks.in_mood(Mood.REFUSING, 3), "sink"),
    "sink-refuses-oddly": Fault(sinks.in_mood(Mood.REFUSING_ODDLY, 3), "sink"),
    "sink-fails-in-groups": Fault(sinks.in_mood(Mood.FAILING_IN_GROUPS, 3), "sink"),
    "sink-hangs": Fault(sinks.in_mood(Mood.HANGING, 3), "sink"),
    "sink-lags": Fault(sinks.in_mood(Mood.LAGGING, 5), "sink"),
    "sink-exits": Fault(sinks.sink_exits, "sink"),
    "sink-poisoned": Fault(sinks.sink_poisoned, "sink"),
    "sessions-fail": Fault(sinks.sessions_fail, ALONE, ONE_PARTITION),
}
