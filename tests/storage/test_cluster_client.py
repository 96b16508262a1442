"""Cluster: all partitions are reached, slots may move, and one primary may hang."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.config import Settings
from service.delivery.consumer_groups import create_groups
from service.errors import Unavailable
from service.inbox import session_record
from service.inbox.admission import Inbox, Outcome
from service.monitoring.session_search import search
from service.monitoring.session_timeline import State, read_timeline
from service.secret import Secret
from service.storage import health
from service.storage.connections import connect
from service.storage.keys import Keys
from service.storage.layout import claim
from service.storage.scripts import Script, ScriptCall
from service.stripe.events import Event
from service.transitions.transition import make_change
from tests.support.admissions import make_event
from tests.support.servers import until_answers
from tests.support.topologies import Cluster, cluster, command, lone_cluster
from tests.support.waiting import PATIENCE_S

RELEASE = Script("service.delivery", "lua/release.lua")


# A busy machine is not taken for a dead one.
PATIENT = ("--cluster-node-timeout", "15000")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    """Yield three primaries that share the slots."""
    with cluster(tmp_path, *PATIENT, has_replicas=False) as started:
        yield started


async def test_a_cluster_may_hang_while_the_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connecting waits no longer than one call; the clients find the primaries later."""
    monkeypatch.setattr("service.storage.clients.CALL_TIMEOUT_S", 0.5)
    with lone_cluster(tmp_path) as node:
        url = Secret(f"redis+cluster://127.0.0.1:{node.port}")
        async with contextlib.AsyncExitStack() as stack:
            with node.frozen():
                connections = await stack.enter_async_context(connect(url))
            await until_answers(connections)
            assert await connections.client.set("key", "value")


async def test_events_are_admitted_across_primaries(
    nodes: Cluster, make_settings: Callable[..., Settings]
) -> None:
    """Events of all partitions are admitted across primaries, scripts flushed or not."""
    settings = make_settings(redis_url=Secret(nodes.url))
    keys = Keys("idv", 8)
    events = [make_event(session=f"vs_{n}", id=f"evt_{n}") for n in range(40)]
    async with connect(settings.redis_url) as connections:
        assert connections.is_cluster
        await until_answers(connections)
        await claim(connections, keys)
        assert await create_groups(connections, keys, settings.handlers) == ["log"]
        inbox = Inbox(connections, keys, settings)

        async def admitted() -> set[Outcome]:
            answers = await asyncio.gather(*(inbox.admit(one, make_change(one)) for one in events))
            return {answer.outcome for answer in answers}

        assert await admitted() == {Outcome.ADMITTED}
        for node in nodes.servers.values():
            command(node, "SCRIPT FLUSH")
        assert await admitted() == {Outcome.DUPLICATE}
        record = await session_record.read(connections, keys, "vs_7")
        assert record is not None
        assert (record.sequence, record.duplicates) == (1, 1)
        timeline = await read_timeline(connections, keys, "vs_7")
        assert timeline is not None
        assert [one.state for step in timeline.steps for one in step.outcomes] == [State.WAITING]
        assert (await search(connections, keys, "evt_7")).session_ids == ("vs_7",)
        findings = await health.inspect(connections, settings)
        assert {"clock", "eviction", "persistence"} < {one.name for one in findings}
        homes = [connections.client.get_node_from_key(keys.transitions(n)).port for n in range(8)]
        assert len(set(homes)) > 1


async def test_a_slot_moves_to_a_node_without_a_name(nodes: Cluster) -> None:
    """Nodes that announce only their ports are all on one host, also those that a slot moves to."""
    for node in nodes.servers.values():
        command(node, "CONFIG SET", "cluster-preferred-endpoint-type", "unknown-endpoint")
    keys = [f"{{{n}}}:lease" for n in range(8)]
    async with connect(Secret(nodes.url)) as connections:
        assert {node.host for node in connections.client.get_nodes()} == {"127.0.0.1"}
        calls = [ScriptCall(RELEASE, [key], ["token"]) for key in keys]
        assert await connections.run(calls) == [0] * 8
        for key in keys[:2]:
            nodes.move(connections.client.keyslot(key), 0.0)
        assert await connections.run(calls) == [0] * 8
        for key in keys[2:4]:
            nodes.move(connections.client.keyslot(key), 0.0)
        # redis-py's own way, which blocking reads take.
        for key in keys:
            assert await connections.client.execute_command("EXISTS", key) == 0
        assert {node.host for node in connections.client.get_nodes()} == {"127.0.0.1"}


async def test_a_hung_primary_does_not_hold_up_the_others(
    nodes: Cluster, make_settings: Callable[..., Settings]
) -> None:
    """While one primary hangs, events of sessions on the others are admitted."""
    # Shorter than the time-out of a call: an event that waited for the hung primary would be late.
    deadline_s = PATIENCE_S * 2 / 3
    settings = make_settings(redis_url=Secret(nodes.url), admit_deadline_s=deadline_s)
    keys = Keys("idv", 8)
    async with connect(settings.redis_url) as connections:
        await claim(connections, keys)
        inbox = Inbox(connections, keys, settings)

        def home(session: str) -> int:
            return int(connections.client.get_node_from_key(keys.session(session)).port)

        async def outcome(event: Event) -> str:
            try:
                return str((await inbox.admit(event, make_change(event))).outcome)
            except Unavailable as error:
                return str(error)

        hung = nodes.servers[home("vs_0")]
        events = [make_event(session=f"vs_{n}", id=f"evt_{n}") for n in range(60)]
        healthy = [one for one in events if home(one.session.id) != hung.port]
        with hung.frozen():
            stuck = asyncio.create_task(outcome(make_event(session="vs_0", id="evt_0")))
            others = await asyncio.gather(*(outcome(one) for one in healthy))
            assert set(others) == {"admitted"}
            assert not stuck.done()
        assert await stuck in ("admitted", "duplicate")
