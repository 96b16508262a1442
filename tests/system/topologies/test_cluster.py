"""A Cluster whose slots move and whose primaries die, under load."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.exceptions import TryAgainError

from service.admin.page import Page
from service.config import Settings
from service.delivery.consumer_groups import create_groups
from service.errors import UnavailableReason
from service.monitoring.overview import collect
from service.monitoring.publisher import Publisher
from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.health import Health
from service.storage.keys import Keys
from service.storage.redis_errors import unavailable_reason
from service.storage.scripts import Needs, NotReplicatedError, Script, ScriptCall
from service.telemetry import metrics
from tests.support.depth import takes_long
from tests.support.load import AFTER, BEFORE, deployment, remembered
from tests.support.logins import ACTING, ORIGIN, TOKENS, admin_app
from tests.support.shown import Shown
from tests.support.topologies import Cluster, cluster, command
from tests.support.transitions import stored_entry
from tests.support.web_client import asgi_client

pytestmark = [pytest.mark.timeout(400), takes_long]

RELEASE = Script("service.delivery", "lua/release.lua")
# The slot of all keys of partition 3: the crc16 of its tag, modulo 16384.
SLOT_OF_PARTITION_3 = 1584


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Yield three primaries with a replica each."""
    with cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


@pytest.fixture
async def connections(nodes: Cluster) -> AsyncIterator[Connections]:
    """Yield clients of the Cluster."""
    async with connect(Secret(nodes.url)) as opened:
        yield opened


def call(key: str) -> ScriptCall:
    """Return a call that deletes a key which holds `x`."""
    return ScriptCall(RELEASE, [key], ["x"])


async def test_a_moving_slot_is_found(nodes: Cluster, connections: Connections) -> None:
    """While a slot moves, each call reaches the node that has its key, on busy connections too."""
    slot = SLOT_OF_PARTITION_3
    assert int(command(nodes.home(slot), "CLUSTER", "KEYSLOT", "{3}")) == slot
    # Many connections to either node: ASKING counts only on its own.
    await asyncio.gather(*(connections.run([call(f"{{{n}}}:a")] * 8) for n in range(8)))
    with nodes.moving(slot) as target:
        for _ in range(20):
            assert await connections.run([call("{3}:gone")] * 8) == [0] * 8
    assert nodes.home(slot).port == target.port
    assert await connections.run([call("{3}:gone")] * 8) == [0] * 8


async def test_a_new_session_waits_while_its_slot_moves(
    nodes: Cluster, connections: Connections
) -> None:
    """A call whose keys are on both nodes fails while the slot moves, and succeeds then."""
    both = ScriptCall(RELEASE, ["{3}:there", "{3}:new"], ["y"])
    await connections.client.set("{3}:there", "x")
    with nodes.moving(SLOT_OF_PARTITION_3):
        [reply] = await connections.run([both])
        assert isinstance(reply, TryAgainError)
        assert unavailable_reason(reply) is UnavailableReason.REDIS_REFUSED
    assert await connections.run([both]) == [0]


async def test_the_overview_of_a_cluster(nodes: Cluster, connections: Connections) -> None:
    """What processes publish, and what handlers have to do, is read from all primaries."""
    settings = Settings(redis_url=Secret(nodes.url), redis_prefix="seen")
    keys, health = Keys("seen", 8), Health(connections, settings)
    await create_groups(connections, keys, settings.handlers)
    for partition in range(8):
        await connections.client.xadd(keys.transitions(partition), {"change": "{}"})
        await connections.client.set(keys.lease(partition, "log"), "host-1-abc:token")
    health.usable.set()
    publisher = Publisher(connections, keys, health, kind="dev", works=settings.handlers)
    metrics.EVENTS.labels("late", "verified").inc()
    await publisher._try_to_publish()
    found = await collect(connections, keys, settings)
    assert [one.kind for one in found.activity.processes] == ["dev"]
    assert sum(minute.received.get("late", 0) for minute in found.activity.minutes) == 1
    [log] = found.handlers
    assert (log.lag, log.leases) == (8, ("host-1",) * 8)
    assert {one.name for one in found.redis_findings} >= {"clock", "writes"}


async def test_the_page_acts_in_a_cluster(nodes: Cluster, connections: Connections) -> None:
    """Letters of all partitions are listed, counted and replayed, each at its primary."""
    settings = Settings(redis_url=Secret(nodes.url), redis_prefix="acted", **TOKENS)
    keys, client = Keys("acted", 8), connections.client
    await create_groups(connections, keys, settings.handlers)
    for partition in range(8):
        letter = stored_entry(f"vs_{partition}", 1) | {"reason": "exhausted", "attempts": 3}
        await client.xadd(keys.dead_letters(partition, "log"), letter)
    page = Page(settings, connections, keys)
    async with asgi_client(admin_app(page)) as browser:
        browser.headers |= ORIGIN
        await browser.post("/login", data={"token": ACTING})
        for path in ("/", "/handlers/log", "/dead-letters/log", "/sessions/vs_0"):
            assert (await browser.get(path)).status_code in {200, 404}, path
        asked = await browser.get("/dead-letters/log/replay?all=1")
        assert "Replay 8 dead letters" in " ".join(Shown(asked.text).text.split())
        [token] = re.findall(r'name="form_token" value="([^"]+)"', asked.text)
        form = {"all": "1", "form_token": token}
        started = await browser.post("/dead-letters/log/replay", data=form)
        assert started.status_code == 303
        await page.actions.stop()
        assert "8 dead letters" in Shown((await browser.get(started.headers["location"])).text).text
    assert [await client.xlen(keys.replays(each, "log")) for each in range(8)] == [1] * 8


async def test_hundreds_of_calls_at_once_find_their_nodes(
    nodes: Cluster, connections: Connections
) -> None:
    """More calls than there are connections are answered, also while a slot moves."""
    many = [call(f"{{{n % 256}}}:a{n}") for n in range(1024)]
    for made in many:
        await connections.client.set(made.keys[0], "x")
    with nodes.moving(SLOT_OF_PARTITION_3):
        assert await connections.run(many) == [1] * 1024
    assert await connections.run(many) == [0] * 1024


async def test_a_replica_confirms(nodes: Cluster, connections: Connections) -> None:
    """WAIT counts the replicas of the primary that ran the script, and no others."""
    await connections.client.set("{3}:a", "x")
    await connections.client.set("{3}:b", "x")
    assert await connections.run([call("{3}:a")], needs=Needs(replicas=1)) == [1]
    home = nodes.home(SLOT_OF_PARTITION_3)
    with nodes.replica_of(home).frozen():
        [reply] = await connections.run([call("{3}:b")], needs=Needs(replicas=1))
        assert isinstance(reply, NotReplicatedError)


async def test_a_moved_slot_and_a_killed_primary_lose_nothing(
    nodes: Cluster, tmp_path: Path
) -> None:
    """With DURABILITY=replica every event answered 200 is kept, and all recovers by itself."""
    async with deployment(nodes.url, tmp_path, DURABILITY="replica") as deployed:
        await deployed.load.answered(BEFORE)
        await asyncio.to_thread(nodes.move, SLOT_OF_PARTITION_3, 0.05)
        await deployed.load.answered(BEFORE)
        await asyncio.to_thread(nodes.kill, SLOT_OF_PARTITION_3)
        await asyncio.to_thread(nodes.revive)
        await deployed.load.answered(AFTER)
        deployed.load.stop()
        await deployed.handed_over({*deployed.load.outcomes})
    primaries = {nodes.home(slot).port: nodes.home(slot) for slot in range(0, 16384, 1024)}
    deployed.assert_nothing_lost(remembered(primaries.values()))
