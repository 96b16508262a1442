"""Every fault by its name, with its lane and its needs.

Faults of one lane come one after the other, lanes run concurrently, the faults of `ALONE` one
by one at the end. The seed decides every choice.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random
from typing import NamedTuple

from tests.system.chaos import api_faults as api
from tests.system.chaos import failover_faults as failovers
from tests.system.chaos import process_faults as processes
from tests.system.chaos import redis_faults as one_redis
from tests.system.chaos import sink_faults as sinks
from tests.system.chaos.deployment import HANDLERS, Deployment
from tests.system.chaos.needs import Needs
from tests.system.chaos.sinks import Behavior
from tests.system.chaos.stripe_client import Stripe

Act = Callable[[Deployment, Stripe, Random], Awaitable[None]]

ANYWHERE = Needs()
PROXIED = Needs(proxy=True)
WAITED = Needs(proxy=True, replicas=1, durability="replica")
WAITED_FOR_TWO = Needs(proxy=True, replicas=2, durability="replica")
UNWAITED = Needs(proxy=True, replicas=1, durability="none")
UNSURE = Needs(durability="none")
SLOW_DISK = Needs(slow_disk=True, durability="fsync", appendfsync="always")
BUSY_DISK = Needs(slow_disk=True, durability="none", appendfsync="everysec")
CLOCK = Needs(clock=True)
STRIPE_API = Needs(stripe_api=True)
SMALL_STREAMS = Needs(settings={"STREAM_MAX_ENTRIES": str(one_redis.STREAM_CAP)})
# So that hundreds of failing sessions are in one partition, and go on failing.
ONE_PARTITION = Needs(
    settings={"PARTITIONS": "1", "RETRY_MAX_ATTEMPTS": "1000", "RETRY_MAX_DELAY_S": "8"}
)
FEW_CONNECTIONS = Needs(settings={"MAX_CONNECTIONS": "64", "MAX_IN_FLIGHT": "2"})
LOGGED = Needs(settings={"HANDLERS": ",".join([*HANDLERS, "log"])})


# The lane of faults after which answers or deliveries must be prompt.
ALONE = "alone"


class Fault(NamedTuple):
    """One kind of fault.

    Attributes:
        act: Injects it.
        lane: The part of the deployment that it affects.
        needs: What the deployment must be.
    """

    act: Act
    lane: str
    needs: Needs = ANYWHERE


FAULTS = {
    "worker-killed": Fault(processes.worker_killed, "workers"),
    "worker-stopped": Fault(processes.worker_stopped, "workers"),
    "worker-restarted": Fault(processes.worker_restarted, "workers"),
    "receiver-killed": Fault(processes.receiver_killed, "receivers"),
    "receiver-stopped": Fault(processes.receiver_stopped, "receivers"),
    "receivers-restarted": Fault(processes.receivers_restarted, "receivers"),
    "clock-skewed": Fault(processes.clock_skewed, "receivers"),
    "output-stalled": Fault(processes.output_stalled, ALONE, LOGGED),
    "hostile-clients": Fault(processes.hostile_clients, "hostile-clients", FEW_CONNECTIONS),
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
    "replies-lost": Fault(one_redis.replies_lost, "redis", PROXIED),
    "connections-reset": Fault(one_redis.connections_reset, "redis", PROXIED),
    "redis-far-away": Fault(one_redis.redis_far_away, "redis", PROXIED),
    "sink-down": Fault(sinks.behaving(Behavior.DOWN, 6), "sink"),
    "sink-raises": Fault(sinks.behaving(Behavior.RAISING, 3), "sink"),
    "sink-refuses": Fault(sinks.behaving(Behavior.REFUSING, 3), "sink"),
    "sink-refuses-oddly": Fault(sinks.behaving(Behavior.REFUSING_ODDLY, 3), "sink"),
    "sink-fails-in-groups": Fault(sinks.behaving(Behavior.FAILING_IN_GROUPS, 3), "sink"),
    "sink-hangs": Fault(sinks.behaving(Behavior.HANGING, 3), "sink"),
    "sink-lags": Fault(sinks.behaving(Behavior.LAGGING, 5), "sink"),
    "sink-exits": Fault(sinks.sink_exits, "sink"),
    "sink-poisoned": Fault(sinks.sink_poisoned, "sink"),
    "webhooks-lost": Fault(api.webhooks_lost, "webhooks", STRIPE_API),
    "api-fails": Fault(api.api_fails, "api", STRIPE_API),
    "sessions-fail": Fault(sinks.sessions_fail, ALONE, ONE_PARTITION),
}
