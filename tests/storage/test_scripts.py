"""Laws of what a reply is worth: not sent where it would not be kept, not told before it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from service.config import Durability, Settings
from service.delivery.consumer_groups import create_groups
from service.errors import Unavailable, UnavailableReason
from service.inbox.admission import Inbox, Outcome
from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.layout import Keys, claim
from service.storage.scripts import Needs, NotReplicatedError, Script, ScriptCall
from service.stripe.events import Event, parse
from service.stripe.signatures import VerifiedPayload
from service.transitions.transition import make_change
from tests.support.harness import soon
from tests.support.proxy import proxy_to
from tests.support.servers import Server, free_port, sentinel, server, until, until_answers

RELEASE = Script("service.delivery", "lua/release.lua")
CALL = ScriptCall(RELEASE, ["{1}:lease"], ["token"])
KEPT = {
    "appendonly": "yes",
    "appendfsync": "always",
    "no-appendfsync-on-rewrite": "no",
    "maxmemory-policy": "noeviction",
}
Admit = Callable[[Connections, str], Any]


def options(**changes: str) -> list[str]:
    """Return what starts a server that keeps everything, but for some changes."""
    said = KEPT | {name.replace("_", "-"): value for name, value in changes.items()}
    return [word for name, value in said.items() for word in (f"--{name}", value)]


def event(session: str) -> Event:
    """Return a session's first event."""
    created = int(time.time())
    parsed = parse(
        VerifiedPayload(
            b'{"id": "evt_%s", "type": "identity.verification_session.created", "created": %d,'
            b' "data": {"object": {"id": "%s", "status": "requires_input"}}}'
            % (session.encode(), created, session.encode()),
            "fingerprint",
        )
    )
    assert isinstance(parsed, Event)
    return parsed


@pytest.fixture
def admit(make_settings: Callable[..., Settings]) -> Admit:
    """Return what admits a session's first event under DURABILITY=fsync."""
    settings = make_settings(durability=Durability.FSYNC)
    inboxes: dict[Connections, Inbox] = {}

    async def admitted(connections: Connections, session: str) -> str:
        if connections not in inboxes:
            keys = Keys("idv", 8)
            await claim(connections, keys)
            await create_groups(connections, keys, ["log"])
            inboxes[connections] = Inbox(connections, keys, settings)
        one = event(session)
        try:
            # Sooner than any deadline: what cannot be kept is said at once.
            async with asyncio.timeout(settings.admit_deadline_s / 2):
                return (await inboxes[connections].admit(one, make_change(one))).outcome
        except Unavailable as error:
            return error.reason

    return admitted


class TestFsync:
    """DURABILITY=fsync: a 200 means that it is on disk, or there is no 200."""

    async def test_on_disk_it_is_admitted(self, tmp_path: Path, admit: Admit) -> None:
        """Where Redis syncs before it answers, events are admitted."""
        with server(tmp_path, *options()) as started:
            async with connect(Secret(started.url)) as connections:
                assert await admit(connections, "vs_1") is Outcome.ADMITTED

    @pytest.mark.parametrize(
        "wrong",
        [
            {"appendonly": "no"},
            {"appendfsync": "everysec"},
            {"appendfsync": "no"},
            {"no_appendfsync_on_rewrite": "yes"},
        ],
        ids=str,
    )
    async def test_elsewhere_nothing_is_until_it_is_mended(
        self, tmp_path: Path, admit: Admit, wrong: dict[str, str]
    ) -> None:
        """The first event is refused, nothing is written; mended, the next one is admitted."""
        with server(tmp_path, *options(**wrong)) as started, started.client() as client:
            async with connect(Secret(started.url)) as connections:
                assert await admit(connections, "vs_1") is UnavailableReason.NOT_DURABLE
                assert client.keys("*session*") == []
                for name, value in KEPT.items():
                    client.config_set(name, value)
                assert await admit(connections, "vs_1") is Outcome.ADMITTED

    async def test_what_may_not_be_read_does_not_hold(self, tmp_path: Path, admit: Admit) -> None:
        """Where we may not know, we promise nothing."""
        with server(tmp_path, *options()) as started, started.client() as client:
            client.acl_setuser(
                "limited", enabled=True, passwords=["+pass"], keys="*",
                commands=["+@all", "-config"],
            )  # fmt: skip
            limited = started.url.replace("://", "://limited:pass@")
            async with connect(Secret(limited)) as connections:
                assert await admit(connections, "vs_1") is UnavailableReason.NOT_DURABLE
                assert client.keys("*session*") == []

    async def test_every_new_connection_is_asked_again(self, tmp_path: Path, admit: Admit) -> None:
        """Behind the same address another server, or the same one started anew, may sync less."""
        directory, port = tmp_path / "redis", free_port()
        async with (
            proxy_to(f"redis://127.0.0.1:{port}") as proxy,
            connect(Secret(proxy.url)) as connections,
        ):
            with server(directory, *options(), port=port):
                assert await admit(connections, "vs_1") is Outcome.ADMITTED
                assert await admit(connections, "vs_2") is Outcome.ADMITTED
            await until(lambda: not proxy.connections)
            with server(directory, *options(appendfsync="everysec"), port=port) as started:
                assert await admit(connections, "vs_3") is UnavailableReason.NOT_DURABLE
                with started.client() as client:
                    assert len(client.keys("*session*")) == 2

    async def test_what_reads_is_not_held_up(self, tmp_path: Path, admit: Admit) -> None:
        """A worker on the same connections goes on: it makes nothing worse."""
        with server(tmp_path, *options(appendfsync="no")) as started:
            async with connect(Secret(started.url)) as connections:
                assert await admit(connections, "vs_1") is UnavailableReason.NOT_DURABLE
                assert await connections.run([CALL]) == [0]

    async def test_behind_sentinel_it_is_the_same(self, tmp_path: Path, admit: Admit) -> None:
        """The primary that the Sentinels name is asked."""
        wrong = options(appendfsync="everysec")
        with (
            server(tmp_path / "primary", *wrong) as primary,
            sentinel(tmp_path / "sentinel", service="main", primary=primary) as watcher,
            primary.client() as client,
        ):
            url = f"redis+sentinel://127.0.0.1:{watcher.port}/main/0"
            async with connect(Secret(url)) as connections:
                assert await admit(connections, "vs_1") is UnavailableReason.NOT_DURABLE
                client.config_set("appendfsync", "always")
                assert await admit(connections, "vs_1") is Outcome.ADMITTED

    async def test_in_cluster_it_is_the_same(self, tmp_path: Path, admit: Admit) -> None:
        """Each primary is asked before it is written to."""
        as_cluster = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        wrong = options(appendfsync="everysec")
        with server(tmp_path, *wrong, *as_cluster) as started, started.client() as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
            url = Secret(f"redis+cluster://127.0.0.1:{started.port}")
            async with connect(url) as connections:
                await until_answers(connections)
                await until(lambda: _takes_writes(connections))
                assert await admit(connections, "vs_1") is UnavailableReason.NOT_DURABLE
                client.config_set("appendfsync", "always")
                assert await admit(connections, "vs_1") is Outcome.ADMITTED
                client.config_set("appendfsync", "everysec")
                connections.replace_all()
                assert await admit(connections, "vs_2") is UnavailableReason.NOT_DURABLE
                client.config_set("appendfsync", "always")
                assert await admit(connections, "vs_2") is Outcome.ADMITTED
                client.config_set("appendfsync", "everysec")
                client.client_kill_filter(_type="normal", skipme=True)
                assert await admit(connections, "vs_3") is UnavailableReason.NOT_DURABLE


async def _takes_writes(connections: Connections) -> bool:
    return await connections.run([CALL]) == [0]


async def test_a_redis_that_drops_keys_is_given_none(
    connections: Connections, keys: Keys, settings: Settings
) -> None:
    """With any DURABILITY: what may be evicted is not acknowledged, until that is mended."""
    inbox, one = Inbox(connections, keys, settings), event("vs_1")
    await connections.client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(Unavailable) as refused:
            await inbox.admit(one, make_change(one))
        assert refused.value.reason is UnavailableReason.NOT_DURABLE
    finally:
        await connections.client.config_set("maxmemory-policy", "noeviction")
    assert (await inbox.admit(one, make_change(one))).outcome is Outcome.ADMITTED


class Family:
    """A primary and two replicas."""

    def __init__(self, primary: Server, replicas: list[Server]) -> None:
        self.primary = primary
        self.replicas = replicas

    def commands(self) -> dict[str, int]:
        """Return how often the primary was sent each command."""
        with self.primary.client() as client:
            stats = client.info("commandstats")
        return {name.removeprefix("cmdstat_"): one["calls"] for name, one in stats.items()}


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    """Yield a primary and two replicas, in step."""
    quick = ("--repl-diskless-sync-delay", "0")
    with server(tmp_path / "primary", *quick) as primary, primary.client() as client:
        of = ("--replicaof", f"127.0.0.1 {primary.port}", "--repl-timeout", "600")
        with server(tmp_path / "one", *of) as one, server(tmp_path / "two", *of) as two:
            client.config_set("repl-timeout", 600)
            soon(lambda: client.wait(2, 100) == 2)
            yield Family(primary, [one, two])


class TestReplicas:
    """DURABILITY=replica: a fail-over may promote any replica, so each must have it."""

    async def test_one_of_two_is_not_enough(self, family: Family) -> None:
        """While either replica stands still nothing is confirmed, whatever the other says."""
        async with connect(Secret(family.primary.url)) as connections:
            assert await self.written(connections, "before") == 1
            for replica in family.replicas:
                with replica.frozen():
                    assert isinstance(
                        await self.written(connections, str(replica.port)), NotReplicatedError
                    )
                    # Nor is it on a connection that has not met the replicas yet.
                    async with connect(Secret(family.primary.url)) as other:
                        assert isinstance(await self.written(other, "other"), NotReplicatedError)
            assert await self.written(connections, "after") == 1

    async def test_the_usual_call_waits_once(self, family: Family) -> None:
        """That there are two is known from the first call on: each other one has one WAIT."""
        async with connect(Secret(family.primary.url)) as connections:
            assert await self.written(connections, "first") == 1
            before = family.commands()
            for n in range(5):
                assert await self.written(connections, str(n)) == 1
            after = family.commands()
        assert {name: after[name] - before[name] for name in ("wait", "role")} == {
            "wait": 5,
            "role": 5,
        }

    async def test_who_leaves_and_comes_is_counted(self, family: Family) -> None:
        """A replica that is gone is waited for no more; one that comes back is again."""
        gone = family.replicas[0]
        with family.primary.client() as client, gone.client() as leaving:
            async with connect(Secret(family.primary.url)) as connections:
                assert await self.written(connections, "both") == 1
                leaving.replicaof("NO", "ONE")
                soon(lambda: client.info("replication")["connected_slaves"] == 1)
                assert await self.written(connections, "one") == 1
                leaving.replicaof("127.0.0.1", family.primary.port)
                soon(lambda: client.wait(2, 100) == 2)
                with gone.frozen():
                    assert isinstance(await self.written(connections, "x"), NotReplicatedError)
                assert await self.written(connections, "again") == 1

    async def test_without_any_nothing_is_confirmed(self, tmp_path: Path) -> None:
        """No replica has nothing."""
        with server(tmp_path) as alone:
            async with connect(Secret(alone.url)) as connections:
                assert isinstance(await self.written(connections, "key"), NotReplicatedError)

    async def test_whoever_may_not_ask_is_told_so(self, family: Family) -> None:
        """A user that may not use ROLE gets that refusal, not a confirmation."""
        with family.primary.client() as client:
            client.acl_setuser(
                "limited", enabled=True, passwords=["+pass"], keys="*", commands=["+@all", "-role"]
            )
        limited = family.primary.url.replace("://", "://limited:pass@")
        async with connect(Secret(limited)) as connections:
            refused = await self.written(connections, "key")
        assert isinstance(refused, redis.exceptions.NoPermissionError)

    async def written(self, connections: Connections, key: str) -> Any:
        """Write a key, with all replicas; return the reply."""
        await connections.client.set(key, "token")
        call = ScriptCall(RELEASE, [key], ["token"])
        [reply] = await connections.run([call], needs=Needs(replicas=1))
        return reply
