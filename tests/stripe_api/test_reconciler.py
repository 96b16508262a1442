"""The reconciler of a deployment: one at a time, over all accounts; none holds up the others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import pytest
import structlog.testing

from service.config import Livemode, Settings
from service.delivery.leases import LeaseLostError
from service.secret import Secret
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.stripe_api import account_pass, reconciler, watch_report
from service.stripe_api.client import Caller, StripeApi, open_api
from service.stripe_api.cursors import Cursor, read_cursors
from service.stripe_api.keys import ApiKeys
from service.stripe_api.reconciler import Reconciler, accounts
from service.telemetry import metrics
from tests.support.listing import transitions
from tests.support.stripe_api import Fault, StripeStandIn
from tests.support.waiting import until

NOW = int(time.time())


class Deployment:
    """A live and a test key, one connected account, and reconcilers."""

    def __init__(
        self,
        stand_in: StripeStandIn,
        connections: Connections,
        make_settings: Callable[..., Settings],
    ) -> None:
        self.stand_in = stand_in
        self.connections = connections
        self.make_settings = make_settings
        self.account = stand_in.directory.connect().id
        self.live, self.test = (
            stand_in.directory.add_key(livemode=livemode) for livemode in (True, False)
        )
        self.api_keys = ApiKeys([Secret(self.live.secret), Secret(self.test.secret)])
        stand_in.clock.stop(NOW)

    @asynccontextmanager
    async def running(self, api: StripeApi, **changes: Any) -> AsyncIterator[asyncio.Event]:
        """Run a reconciler until the block is left or the event is set."""
        settings = self.make_settings(
            **{"reconcile_every_s": 0.01, "stripe_accounts": (self.account,), **changes}
        )
        keys = Keys(settings.redis_prefix, settings.partitions)
        one = Reconciler(api, self.connections, keys, settings, clock=lambda: NOW)
        stopping = asyncio.Event()
        task = asyncio.create_task(one.run(stopping))
        try:
            yield stopping
        finally:
            stopping.set()
            await task

    def create(self, *, livemode: bool, account: str | None = None) -> str:
        """Create a session, whose webhook is never sent; return the id of its event."""
        self.stand_in.clock.stop(NOW - 100)
        scope = self.stand_in.scope(account, livemode=livemode)
        self.stand_in.sessions.create(scope=scope)
        self.stand_in.clock.stop(NOW)
        return self.stand_in.events.all[-1].id or ""

    async def admitted(self) -> set[str]:
        """Return the ids of the events that made transitions."""
        return {one.event_id for one in await transitions(self.connections, Keys("idv", 8))}

    async def until_admitted(self, *event_ids: str) -> None:
        """Wait until these events, and no others, have made transitions."""

        async def met() -> bool:
            return await self.admitted() == {*event_ids}

        await until(met)


@pytest.fixture
def deployment(
    stand_in: StripeStandIn, connections: Connections, make_settings: Callable[..., Settings]
) -> Deployment:
    """Return a deployment."""
    return Deployment(stand_in, connections, make_settings)


@pytest.fixture
async def keyed_api(deployment: Deployment, address: str) -> AsyncIterator[StripeApi]:
    """Yield a client with both keys."""
    async with open_api(address, deployment.api_keys) as opened:
        yield opened


def passes(outcome: str) -> float:
    """Return how many passes had this outcome."""
    return float(metrics.RECONCILE_PASSES.labels(outcome)._value.get())


async def test_all_accounts_of_both_modes(deployment: Deployment, keyed_api: StripeApi) -> None:
    """The own account and the connected one are reconciled in live mode and in test mode."""
    made = [
        deployment.create(livemode=livemode, account=account)
        for livemode in (True, False)
        for account in (None, deployment.account)
    ]
    async with deployment.running(keyed_api):
        await deployment.until_admitted(*made)
    cursors = await read_cursors(deployment.connections, Keys("idv", 8), NOW)
    assert cursors == dict.fromkeys(
        ("live", "test", f"live {deployment.account}", f"test {deployment.account}"),
        Cursor(read_until=NOW - 60, began_at=NOW),
    )


@pytest.mark.parametrize("trouble", ["revoked", "deauthorized", "hangs"])
async def test_trouble_of_one_account(
    trouble: str, deployment: Deployment, keyed_api: StripeApi
) -> None:
    """A revoked key, a deauthorised account and one that hangs stop only their own passes."""
    stand_in, account = deployment.stand_in, deployment.account
    healthy = [deployment.create(livemode=True)]
    sick = [deployment.create(livemode=False, account=account)]
    reason = "ok"
    if trouble == "revoked":
        deployment.test.is_revoked, reason = True, "api_unauthorized"
    elif trouble == "deauthorized":
        stand_in.directory.deauthorize(account)
        reason = "api_forbidden"
        healthy.append(deployment.create(livemode=False))
    else:
        stand_in.faults.add(Fault(kind="hang", account=account))
    before, fine = passes(reason), passes("ok")

    with structlog.testing.capture_logs() as logged:
        async with deployment.running(keyed_api):
            await deployment.until_admitted(*healthy)
            await until(lambda: passes(reason) > before and passes("ok") > fine + 10)
            assert not {*sick} & await deployment.admitted()
            deployment.test.is_revoked = False
            stand_in.directory.accounts[account].is_authorized = True
            stand_in.faults.clear()
            if trouble != "hangs":
                await deployment.until_admitted(*healthy, *sick)

    failed = [line for line in logged if line["event"] == "reconcile.failed"]
    assert {(line["reason"], line["livemode"]) for line in failed} <= {
        (reason, False),
        (reason, True),
    }
    assert bool(failed) == (trouble != "hangs")


async def test_modes_without_a_key_are_not_asked(
    deployment: Deployment, keyed_api: StripeApi
) -> None:
    """Keys may come and go while the process runs; the lag is that of accounts with a key."""
    deployment.api_keys.replace([Secret(deployment.live.secret)])
    live, test = (deployment.create(livemode=livemode) for livemode in (True, False))
    async with deployment.running(keyed_api):
        await deployment.until_admitted(live)
        assert {recorded.status for recorded in deployment.stand_in.requests} == {200}
        deployment.api_keys.replace([Secret(deployment.test.secret)])
        await deployment.until_admitted(live, test)


async def test_one_reconciles_and_the_next_takes_over(
    deployment: Deployment, keyed_api: StripeApi
) -> None:
    """While one worker holds the lease no other asks Stripe; when it stops, the next one does."""
    first = deployment.create(livemode=True)
    changes: dict[str, Any] = {"lease_ttl_s": 0.2, "livemode": Livemode.LIVE, "stripe_accounts": ()}
    async with deployment.running(keyed_api, **changes) as stopping:
        await deployment.until_admitted(first)
        async with open_api("http://127.0.0.1:1", deployment.api_keys) as nowhere:
            before = passes("api_unreachable")
            async with deployment.running(nowhere, **changes):
                second = deployment.create(livemode=True)
                await deployment.until_admitted(first, second)
                assert passes("api_unreachable") == before
                stopping.set()
                await until(lambda: passes("api_unreachable") > before)
    assert not await deployment.connections.client.exists(Keys("idv", 8).lease(0, "reconcile"))


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (LeaseLostError(), "lease_lost"),
        (ConnectionError(), "redis_unreachable"),
        (ZeroDivisionError(), "unforeseen"),
    ],
)
async def test_an_error_ends_one_pass(
    error: Exception,
    outcome: str,
    deployment: Deployment,
    keyed_api: StripeApi,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is counted by its word, and the next pass runs; what no code foresaw is logged."""
    event = deployment.create(livemode=True)
    before = passes(outcome)
    with monkeypatch.context() as patch, structlog.testing.capture_logs() as logged:
        patch.setattr(account_pass, "read_cursors", mock.AsyncMock(side_effect=error))
        async with deployment.running(keyed_api):
            await until(lambda: passes(outcome) > before)
            patch.undo()
            await deployment.until_admitted(event)
    is_crash = "reconcile.crashed" in {line["event"] for line in logged}
    assert is_crash is (outcome == "unforeseen")


@pytest.mark.parametrize("name", ["take_or_renew", "read_cursors"])
async def test_an_unforeseen_error_ends_no_process(
    name: str, deployment: Deployment, keyed_api: StripeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside a pass as well it is logged, and the work goes on."""
    event = deployment.create(livemode=True)
    with monkeypatch.context() as patch, structlog.testing.capture_logs() as logged:
        patch.setattr(reconciler, name, mock.AsyncMock(side_effect=ZeroDivisionError))
        async with deployment.running(keyed_api, lease_ttl_s=0.2):
            await until(lambda: "reconcile.crashed" in {line["event"] for line in logged})
            patch.undo()
            await deployment.until_admitted(event)


async def test_the_lag_is_that_of_the_oldest_cursor(
    deployment: Deployment, keyed_api: StripeApi
) -> None:
    """Without progress the lag grows, also where another worker has the lease."""
    keys = Keys("idv", 8)
    client = deployment.connections.client
    await client.set(keys.lease(0, "reconcile"), "another's")
    await client.hset(keys.reconcile, mapping={"live": f"{NOW - 70} 1", "test": f"{NOW - 900} 1"})
    await client.hset(keys.reconcile, "test acct_gone", "1 1")
    async with deployment.running(keyed_api):
        await until(lambda: metrics.RECONCILE_LAG_SECONDS._value.get() == 900)
        deployment.api_keys.replace([Secret(deployment.live.secret)])
    async with deployment.running(keyed_api):
        await until(lambda: metrics.RECONCILE_LAG_SECONDS._value.get() == 70)
    metrics.RECONCILE_LAG_SECONDS.set(0)


async def test_what_the_reconciling_worker_knows_is_left_in_redis(
    deployment: Deployment, keyed_api: StripeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Destinations with our part of their URL only, findings, and each account; it expires."""
    monkeypatch.setattr(reconciler, "RENEWALS_PER_TTL", 500)
    deployment.stand_in.subscribe(
        "https://user:canary@hooks.test/canary/webhooks/stripe/acme?canary=1",
        scope=deployment.stand_in.scope(livemode=True),
    )
    deployment.test.is_revoked = True
    client, key = deployment.connections.client, Keys("idv", 8).endpoints

    async def report() -> watch_report.WatchReport | None:
        found = watch_report.decode(await client.get(key) or b"")
        is_whole = found and all(one.outcome for one in found.accounts) and found.findings
        return found if is_whole else None

    async with deployment.running(keyed_api):
        found = await until(report)
    [destination] = found.destinations
    assert destination[1:] == ("live", "/webhooks/stripe/acme", False, True, False, 6)
    assert {one.name for one in found.findings} == {"stripe_api", "connect_missing"}
    assert {one.name: (one.read_until, one.outcome) for one in found.accounts} == {
        "live": (NOW - 60, "ok"),
        f"live {deployment.account}": (NOW - 60, "ok"),
        # The first reading begins three days back.
        "test": (NOW - 3 * 86400, "api_unauthorized"),
        f"test {deployment.account}": (NOW - 3 * 86400, "api_unauthorized"),
    }
    assert b"canary" not in await client.get(key)
    assert 0 < await client.ttl(key) <= watch_report.TTL_S
    # A worker that does not reconcile says nothing.
    await client.delete(key)
    await client.set(Keys("idv", 8).lease(0, "reconcile"), "another's")
    before = metrics.RECONCILE_LAG_SECONDS._value.get()
    metrics.RECONCILE_LAG_SECONDS.set(-1)
    async with deployment.running(keyed_api):
        await until(lambda: metrics.RECONCILE_LAG_SECONDS._value.get() >= 0)
    assert not await client.exists(key)
    metrics.RECONCILE_LAG_SECONDS.set(before)


@pytest.mark.parametrize(
    ("livemode", "modes"),
    [(Livemode.BOTH, [True, False]), (Livemode.LIVE, [True]), (Livemode.TEST, [False])],
)
def test_only_modes_that_are_received(livemode: Livemode, modes: list[bool]) -> None:
    """LIVEMODE says which accounts there are."""
    assert accounts(Settings(livemode=livemode, stripe_accounts=("acct_1",))) == [
        Caller(mode, account) for mode in modes for account in (None, "acct_1")
    ]


async def test_passes_are_bounded(
    deployment: Deployment, keyed_api: StripeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many accounts only a few are read at a time."""
    running, most = 0, 0
    run = account_pass.AccountPasses.run

    async def count(*arguments: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await run(*arguments)
        running -= 1

    monkeypatch.setattr(account_pass.AccountPasses, "run", count)
    some = tuple(deployment.stand_in.directory.connect().id for _ in range(10))
    event = deployment.create(livemode=False, account=some[-1])
    async with deployment.running(keyed_api, stripe_accounts=some):
        await deployment.until_admitted(event)
    assert most == reconciler.MAX_CONCURRENT_PASSES
