"""Needs of a write: nothing is sent where it would not last, or confirmed before it is safe."""

from __future__ import annotations

import asyncio
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
from service.storage.keys import Keys
from service.storage.layout import claim
from service.storage.scripts import Needs, NotReplicatedError, Script, ScriptCall
from service.transitions.transition import make_change
from tests.support.admissions import make_event
from tests.support.proxy import proxy_to
from tests.support.servers import Server, free_port, sentinel, server
from tests.support.topologies import lone_cluster
from tests.support.troubles import changed_config
from tests.support.waiting import until, wait_until

RELEASE = Script("service.delivery", "lua/release.lua")
CALL = ScriptCall(RELEASE, ["{1}:lease"], ["token"])
SAFE = {
    "appendonly": "yes",
    "appendfsync": "always",
    "no-appendfsync-on-rewrite": "no",
    "maxmemory-policy": "noeviction",
}
Admit = Callable[[Connections, str], Any]


def options(**changes: str) -> list[str]:
    """Return options of a server that keeps everything, but for some changes."""
    settings = SAFE | {name.replace("_", "-"): value for name, value in changes.items()}
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


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
        one = make_event(session=session, id=f"evt_{session}")
        try:
            # At once, and not at the deadline.
            async with asyncio.timeout(settings.admit_deadline_s / 2):
                return (await inboxes[connections].admit(one, make_change(one))).outcome
        except Unavailable as error:
            return error.reason

    return admitted


class TestFsync:
    """DURABILITY=fsync: nothing is admitted where a reply does not mean that it is on disk."""

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
    async def test_nothing_is_admitted_until_the_settings_are_right(
        self, tmp_path: Path, admit: Admit, wrong: dict[str, str]
    ) -> None:
        """With one wrong setting nothing is written; with the right one the event is admitted."""
        with server(tmp_path, *options(**wrong)) as started, started.client() as client:
            async with connect(Secret(started.url)) as connections:
                assert await admit(connections, "vs_1") is UnavailableReason.NOT_DURABLE
                assert client.keys("*session*") == []
                for name, value in SAFE.items():
                    client.config_set(name, value)
                assert await admit(connections, "vs_1") is Outcome.ADMITTED

    async def test_settings_that_may_not_be_read_do_not_count(
        self, tmp_path: Path, admit: Admit
    ) -> None:
        """Without permission to read the settings nothing is admitted."""
        with server(tmp_path, *options()) as started, started.client() as client:
            client.acl_setuser(
                "limited", enabled=True, passwords=["+pass"], keys="*",
                commands=["+@all", "-config"],
            )  # fmt: skip
            limited = started.url.replace("://", "://limited:pass@")
            async with connect(Secret(limited)) as connections:
                assert await admit(connections, "vs_1") is UnavailableReason.NOT_DURABLE
                assert client.keys("*session*") == []

    async def test_every_new_connection_is_verified(self, tmp_path: Path, admit: Admit) -> None:
        """Behind the same address a restarted server may have other settings."""
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

    async def test_calls_without_needs_are_sent(self, tmp_path: Path, admit: Admit) -> None:
        """A worker goes on over the same connections."""
        with server(tmp_path, *options(appendfsync="no")) as started:
            async with connect(Secret(started.url)) as connections:
                assert await admit(connections, "vs_1") is UnavailableReason.NOT_DURABLE
                assert await connections.run([CALL]) == [0]

    async def test_behind_sentinel(self, tmp_path: Path, admit: Admit) -> None:
        """The settings of the primary that the Sentinels name count."""
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

    async def test_in_cluster(self, tmp_path: Path, admit: Admit) -> None:
        """The settings of each primary count before it is written to."""
        wrong = options(appendfsync="everysec")
        with lone_cluster(tmp_path, *wrong) as started, started.client() as client:
            url = Secret(f"redis+cluster://127.0.0.1:{started.port}")
            async with connect(url) as connections:
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


async def test_nothing_is_admitted_that_may_be_evicted(
    connections: Connections, keys: Keys, settings: Settings
) -> None:
    """With any DURABILITY nothing is admitted while Redis may evict keys."""
    inbox, one = Inbox(connections, keys, settings), make_event()
    async with changed_config(connections, maxmemory_policy="allkeys-lru"):
        with pytest.raises(Unavailable, match=r"^not_durable$"):
            await inbox.admit(one, make_change(one))
    assert (await inbox.admit(one, make_change(one))).outcome is Outcome.ADMITTED


class Replicated:
    """A primary and two replicas."""

    def __init__(self, primary: Server, replicas: list[Server]) -> None:
        self.primary = primary
        self.replicas = replicas

    def wait_until_current(self) -> None:
        """Wait until both replicas have all that was written."""
        with self.primary.client() as client:
            client.set("current", "")
            wait_until(lambda: client.wait(2, 100) == 2)

    def commands(self) -> dict[str, int]:
        """Return how often the primary received each command."""
        with self.primary.client() as client:
            stats = client.info("commandstats")
        return {name.removeprefix("cmdstat_"): one["calls"] for name, one in stats.items()}


@pytest.fixture
def replicated(tmp_path: Path) -> Iterator[Replicated]:
    """Yield a primary and two replicas that are up to date."""
    quick = ("--repl-diskless-sync-delay", "0")
    with server(tmp_path / "primary", *quick) as primary, primary.client() as client:
        of = ("--replicaof", f"127.0.0.1 {primary.port}", "--repl-timeout", "600")
        with server(tmp_path / "one", *of) as one, server(tmp_path / "two", *of) as two:
            client.config_set("repl-timeout", 600)
            started = Replicated(primary, [one, two])
            started.wait_until_current()
            yield started


class TestReplicas:
    """DURABILITY=replica: a fail-over may promote any replica, so all must have the write."""

    async def test_one_of_two_is_not_enough(self, replicated: Replicated) -> None:
        """While either replica hangs no write is confirmed."""
        async with connect(Secret(replicated.primary.url)) as connections:
            assert await self.write(connections, "before") == 1
            for replica in replicated.replicas:
                with replica.frozen():
                    assert isinstance(
                        await self.write(connections, str(replica.port)), NotReplicatedError
                    )
                    # Nor on a connection that does not know the number of replicas yet.
                    async with connect(Secret(replicated.primary.url)) as other:
                        assert isinstance(await self.write(other, "other"), NotReplicatedError)
            replicated.wait_until_current()
            assert await self.write(connections, "after") == 1

    async def test_the_usual_call_has_one_wait(self, replicated: Replicated) -> None:
        """After the first call the number of replicas is known, so that one WAIT is enough."""
        async with connect(Secret(replicated.primary.url)) as connections:
            assert await self.write(connections, "first") == 1
            before = replicated.commands()
            for n in range(5):
                assert await self.write(connections, str(n)) == 1
            after = replicated.commands()
        assert {name: after[name] - before[name] for name in ("wait", "role")} == {
            "wait": 5,
            "role": 5,
        }

    async def test_replicas_may_leave_and_return(self, replicated: Replicated) -> None:
        """A replica that has left need not confirm; one that has returned must."""
        gone = replicated.replicas[0]
        with replicated.primary.client() as client, gone.client() as leaving:
            async with connect(Secret(replicated.primary.url)) as connections:
                assert await self.write(connections, "both") == 1
                leaving.replicaof("NO", "ONE")
                wait_until(lambda: client.info("replication")["connected_slaves"] == 1)
                assert await self.write(connections, "one") == 1
                leaving.replicaof("127.0.0.1", replicated.primary.port)
                replicated.wait_until_current()
                with gone.frozen():
                    assert isinstance(await self.write(connections, "x"), NotReplicatedError)
                replicated.wait_until_current()
                assert await self.write(connections, "again") == 1

    async def test_without_replicas_no_write_is_confirmed(self, tmp_path: Path) -> None:
        """A server without replicas confirms nothing."""
        with server(tmp_path) as alone:
            async with connect(Secret(alone.url)) as connections:
                assert isinstance(await self.write(connections, "key"), NotReplicatedError)

    async def test_role_may_not_be_permitted(self, replicated: Replicated) -> None:
        """A user that may not use ROLE gets that error, and no confirmation."""
        with replicated.primary.client() as client:
            client.acl_setuser(
                "limited", enabled=True, passwords=["+pass"], keys="*", commands=["+@all", "-role"]
            )
        limited = replicated.primary.url.replace("://", "://limited:pass@")
        async with connect(Secret(limited)) as connections:
            refused = await self.write(connections, "key")
        assert isinstance(refused, redis.exceptions.NoPermissionError)

    async def write(self, connections: Connections, key: str) -> Any:
        """Delete a key with all replicas; return the reply."""
        await connections.client.set(key, "token")
        call = ScriptCall(RELEASE, [key], ["token"])
        [reply] = await connections.run([call], needs=Needs(replicas=1))
        return reply
