"""Reconciles with Stripe's list of events what webhooks brought: one worker of the deployment does.

Each worker with a key runs a `Reconciler`. The one that holds the lease runs passes over the own
account and the connected ones (`account_pass`), and reports in Redis what it sees (`watch_report`);
the others wait for the lease. All of them measure how far the cursors are behind. Each account has
its own task, so that one that answers slowly, or refuses, does not hold up the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from functools import partial

import structlog
from redis.exceptions import RedisError

from .. import cancellation
from ..config import Livemode, Settings
from ..delivery.leases import Lease, LeaseLostError, ObservedLeases, take_or_renew
from ..errors import ApiError, ApiErrorReason, Unavailable, UnavailableReason
from ..parsers import parse_time
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.redis_errors import unavailable_reason
from ..telemetry import metrics
from .account_pass import AccountPasses, describe
from .client import Caller, StripeApi
from .cursors import account_field, read_cursors
from .endpoint_watch import EndpointWatch
from .watch_report import OK, AccountPass, WatchReport, publish
from .window_admission import WindowAdmission

HANDLER = "reconcile"
RENEWALS_PER_TTL = 3
# Bounds the memory: each pass holds one window of events.
MAX_CONCURRENT_PASSES = 4

LEASE_LOST, UNFORESEEN = "lease_lost", "unforeseen"
OUTCOMES = (OK, *ApiErrorReason, *UnavailableReason, LEASE_LOST, UNFORESEEN)

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Reconciler:
    """Runs passes over all accounts while it holds the lease.

    Args:
        api: Stripe's API.
        connections: Open clients of Redis.
        keys: The layout.
        settings: The accounts, the interval, where to begin, and the lease's time to live.
        clock: Returns the Unix time in seconds.
    """

    def __init__(
        self,
        api: StripeApi,
        connections: Connections,
        keys: Keys,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._admission = WindowAdmission(connections, keys, settings)
        self._connections = connections
        self._keys = keys
        self._settings = settings
        self._watch = EndpointWatch(settings)
        self._clock = clock
        self._callers = accounts(settings)
        self._start_of = partial(parse_time, settings.reconcile_from)
        self._interval_s = settings.lease_ttl_s / RENEWALS_PER_TTL
        self._observed_leases = ObservedLeases(settings.lease_ttl_s)
        self._lease = self._new_lease()
        self._outcomes: dict[str, str] = {}
        # One for each account, while the lease is held.
        self._tasks: list[asyncio.Task[None]] = []
        # Prometheus sees no increase in a series that appears with its first count.
        for outcome in OUTCOMES:
            metrics.RECONCILE_PASSES.labels(outcome)

    async def run(self, stopping: asyncio.Event) -> None:
        """Reconcile until *stopping* is set; then release the lease."""
        try:
            while not stopping.is_set():
                try:
                    await self._take_or_renew()
                    await self._measure()
                except Exception:
                    # Raised, it would end the process, and with it what the handlers do.
                    log.exception("reconcile.crashed")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s):
                        await stopping.wait()
        finally:
            await self._stop_passes()
            with contextlib.suppress(RedisError, OSError):
                await self._lease.release()

    async def _take_or_renew(self) -> None:
        """Take the lease, or renew it; run passes for as long as it is held."""
        ttl_s = self._settings.lease_ttl_s
        await take_or_renew(self._connections, [self._lease], ttl_s, self._observed_leases)
        if not self._lease.is_held():
            await self._stop_passes()
            self._watch.forget()
            # A lease that was refused or lost cannot be renewed, only taken anew.
            self._lease = self._new_lease()
        elif not self._tasks:
            log.info("reconcile.started", accounts=len(self._callers))
            slots = asyncio.Semaphore(MAX_CONCURRENT_PASSES)
            self._tasks = [
                asyncio.create_task(self._follow(caller, self._lease, slots))
                for caller in self._callers
            ]

    def _new_lease(self) -> Lease:
        return Lease(
            self._connections,
            self._keys,
            handler=HANDLER,
            partition=0,
            worker=f"{socket.gethostname()}-{os.getpid()}",
        )

    async def _stop_passes(self) -> None:
        """End the passes at once: what they have not finished is read again."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            await cancellation.cancel_and_wait(task)
        self._tasks = []

    async def _follow(self, caller: Caller, lease: Lease, slots: asyncio.Semaphore) -> None:
        """Run the passes of one account, for as long as the lease is held."""
        loop = asyncio.get_running_loop()
        passes = AccountPasses(
            caller,
            self._api,
            self._admission,
            self._connections,
            self._keys,
            select_types=self._watch.select_types,
            start_of=self._start_of,
        )
        while True:
            next_at = loop.time() + self._settings.reconcile_every_s
            # Keys may come and go while the process runs.
            if self._api.holds(caller.is_live):
                async with slots:
                    outcome = await self._run_pass(passes, lease)
                self._outcomes[account_field(caller)] = outcome
                metrics.RECONCILE_PASSES.labels(outcome).inc()
                if outcome != OK:
                    log.warning("reconcile.failed", reason=outcome, **describe(caller))
            await asyncio.sleep(next_at - loop.time())

    async def _run_pass(self, passes: AccountPasses, lease: Lease) -> str:
        """Run one pass, and return its outcome."""
        try:
            await passes.run(lease, self._clock())
        except (ApiError, Unavailable) as error:
            return error.reason
        except LeaseLostError:
            return LEASE_LOST
        except (RedisError, OSError) as error:
            return unavailable_reason(error)
        except Exception:
            log.exception("reconcile.crashed")
            return UNFORESEEN
        return OK

    async def _measure(self) -> None:
        """Measure how far the accounts are behind; leave a report if they are read here."""
        with contextlib.suppress(RedisError, OSError):
            now = self._clock()
            cursors = await read_cursors(self._connections, self._keys, now)
            fields = [
                account_field(each) for each in self._callers if self._api.holds(each.is_live)
            ]
            read_until = {field: cursors[field].read_until for field in fields if field in cursors}
            lag_s = now - min(read_until.values()) if read_until else 0.0
            metrics.RECONCILE_LAG_SECONDS.set(max(0.0, lag_s))
            if self._lease.is_held():
                passes = [
                    AccountPass(field, read_until.get(field), self._outcomes.get(field, ""))
                    for field in fields
                ]
                report = WatchReport(
                    now, tuple(self._watch.findings), tuple(self._watch.destinations), tuple(passes)
                )
                await publish(self._connections, self._keys, report)


def accounts(settings: Settings) -> list[Caller]:
    """Return the own account and the connected ones, in each mode that is received."""
    modes = {Livemode.LIVE: [True], Livemode.TEST: [False], Livemode.BOTH: [True, False]}
    return [
        Caller(is_live, account)
        for is_live in modes[settings.livemode]
        for account in (None, *settings.stripe_accounts)
    ]
