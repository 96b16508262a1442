"""Measures how thin events are fetched: `python -m tests.bench.fetching`. Asserts no time.

A stand-in for Stripe's API makes the events of the busiest second of a busy year, second after
second, and notes a thin event for each; a worker fetches them within the default rate. Once while
the list shows events at once, and once while it shows them late. Takes under four minutes.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop

from service.config import Settings
from service.inbox.admission import Inbox
from service.secret import Secret
from service.storage.connections import connect
from service.storage.keys import Keys
from tests.support.notifications import notification_of
from tests.support.processes import Sandbox, open_sandbox
from tests.support.stripe_api import StripeStandIn, running
from tests.support.stripe_api.app import create_app
from tests.support.usage import cpu_s
from tests.support.waiting import until

EVENTS_PER_S = 254
SECONDS = 20
LIST_LAGS_S = (0, 1, 45)
DEADLINE_S = 300
LIST = "/v1/events"


def main() -> None:
    """Measure and say it line by line."""
    for lag_s in LIST_LAGS_S:
        with (
            tempfile.TemporaryDirectory(prefix="fetching-") as made,
            open_sandbox(Path(made)) as sandbox,
        ):
            uvloop.run(_fetch(sandbox, lag_s))


async def _fetch(sandbox: Sandbox, lag_s: float) -> None:
    """Let a worker fetch events that the list shows after *lag_s* seconds."""
    stand_in = StripeStandIn()
    stand_in.list_lag_s = lag_s
    key = stand_in.directory.add_key().secret
    settings = Settings(redis_url=Secret(sandbox.url))
    keys = Keys(settings.redis_prefix, settings.partitions)
    async with AsyncExitStack() as opened:
        address = await opened.enter_async_context(running(create_app(stand_in)))
        connections = await opened.enter_async_context(connect(settings.redis_url))
        worker = sandbox.start(
            "work", "--handlers", "fetch", STRIPE_API_KEY=key, STRIPE_API_BASE=address
        )
        await asyncio.to_thread(worker.ready)
        inbox = Inbox(connections, keys, settings)
        before_s = cpu_s(worker.popen.pid)
        peaks: list[float] = []
        watching = asyncio.create_task(_watch_rate(stand_in, peaks))
        await _make_events(stand_in, inbox)
        total = EVENTS_PER_S * SECONDS
        await until(lambda: worker.out.count(b'"event.fetched"') >= total, DEADLINE_S)
        watching.cancel()
        used_s = cpu_s(worker.popen.pid) - before_s
        assert worker.stop() == 0
    requests = Counter("list" if one.path == LIST else "single" for one in stand_in.requests)
    took_s = sorted(line["duration_ms"] / 1000 for line in worker.lines("event.fetched"))
    cuts = statistics.quantiles(took_s, n=100)
    _say(f"list lags {lag_s} s", f"{total:,} thin events in {SECONDS} s")
    _say("  requests", f"{dict(requests)}, {requests.total() / total:.3f} for each event")
    _say("  busiest 5 seconds", f"{max(peaks, default=0):.1f} requests/s")
    _say("  latency", f"p50 {cuts[49]:.2f} s, p99 {cuts[98]:.2f} s, most {took_s[-1]:.2f} s")
    _say("  worker's CPU", f"{used_s / total * 1e6:,.0f} us for each event")


async def _make_events(stand_in: StripeStandIn, inbox: Inbox) -> None:
    """Create sessions at an even pace, and note the thin event of each."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    notes: list[asyncio.Task[object]] = []
    for number in range(EVENTS_PER_S * SECONDS):
        await asyncio.sleep(max(0.0, begun + number / EVENTS_PER_S - loop.time()))
        stand_in.sessions.create()
        notification = notification_of(stand_in.events.all[-1])
        notes.append(asyncio.create_task(inbox.note(notification)))
    await asyncio.gather(*notes)


async def _watch_rate(stand_in: StripeStandIn, peaks: list[float]) -> None:
    """Add the requests/s of every five seconds to *peaks*."""
    loop = asyncio.get_running_loop()
    while True:
        begun, before = loop.time(), len(stand_in.requests)
        await asyncio.sleep(5)
        peaks.append((len(stand_in.requests) - before) / (loop.time() - begun))


def _say(what: str, figure: str) -> None:
    print(f"{what:20}{figure}", flush=True)  # noqa: T201 - what it is for


if __name__ == "__main__":
    main()
