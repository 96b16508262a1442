"""What an error of Redis or redis-py means."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis import exceptions

from service.errors import UnavailableReason
from service.secret import Secret
from service.storage import clients
from service.storage.connections import Connections, connect
from service.storage.redis_errors import unavailable_reason
from service.storage.scripts import NotReplicatedError, Script, ScriptCall, UnsafeConfigError
from tests.support.servers import Server, sentinel, server
from tests.support.topologies import command, lone_cluster
from tests.support.troubles import changed_config
from tests.support.waiting import until

RELEASE = Script("service.delivery", "lua/release.lua")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (exceptions.TimeoutError(), UnavailableReason.REDIS_SLOW),
        (TimeoutError(), UnavailableReason.REDIS_SLOW),
        (exceptions.ConnectionError(), UnavailableReason.REDIS_UNREACHABLE),
        (exceptions.BusyLoadingError(), UnavailableReason.REDIS_UNREACHABLE),
        (ConnectionResetError(), UnavailableReason.REDIS_UNREACHABLE),
        (
            exceptions.ConnectionError("max number of clients reached"),
            UnavailableReason.REDIS_REFUSED,
        ),
        (NotReplicatedError(), UnavailableReason.NOT_DURABLE),
        (exceptions.ResponseError("NOREPLICAS Not enough good"), UnavailableReason.NOT_DURABLE),
        (exceptions.OutOfMemoryError(), UnavailableReason.REDIS_FULL),
        (exceptions.ResponseError("MISCONF"), UnavailableReason.REDIS_REFUSED),
        (exceptions.ReadOnlyError(), UnavailableReason.REDIS_REFUSED),
        (exceptions.ClusterDownError("CLUSTERDOWN"), UnavailableReason.REDIS_UNREACHABLE),
        (exceptions.MasterDownError("MASTERDOWN"), UnavailableReason.REDIS_REFUSED),
        (exceptions.AuthenticationError("WRONGPASS"), UnavailableReason.REDIS_UNAUTHORIZED),
        (exceptions.NoPermissionError("NOPERM"), UnavailableReason.REDIS_UNAUTHORIZED),
        (UnsafeConfigError(), UnavailableReason.NOT_DURABLE),
    ],
)
def test_every_error_has_one_reason(error: Exception, reason: UnavailableReason) -> None:
    """Each error of redis-py has one reason of the closed list."""
    assert unavailable_reason(error) is reason


async def test_a_silent_server_behind_a_unix_socket_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that accepts connections and does not answer is not away."""
    monkeypatch.setattr(clients, "CALL_TIMEOUT_S", 0.05)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "redis.sock"))
        silent.listen()
        async with connect(Secret(f"unix://{tmp_path}/redis.sock")) as connections:
            with pytest.raises(exceptions.RedisError) as refused:
                await connections.client.ping()
    assert unavailable_reason(refused.value) is UnavailableReason.REDIS_SLOW


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a Cluster of one server that wants a password; a Cluster takes 2 s to start."""
    with lone_cluster(tmp_path_factory.mktemp("guarded")) as started:
        command(started, "CONFIG SET", "requirepass", "right")
        yield started


class TestUnauthorized:
    """A Redis that does not accept our user has another reason than one that is away."""

    @pytest.mark.parametrize("form", ["redis://{}", "redis+cluster://{}"])
    @pytest.mark.parametrize("user", ["", ":wrong@", "unknown:wrong@"])
    async def test_at_redis(self, guarded: Server, form: str, user: str) -> None:
        """A wrong password and a missing one are `redis_unauthorized`."""
        url = form.format(f"{user}127.0.0.1:{guarded.port}")
        async with connect(Secret(url)) as connections:
            for ask in (connections.client.ping, connections.blocking_client.ping):
                with pytest.raises(exceptions.RedisError) as refused:
                    await ask()
                assert unavailable_reason(refused.value) is UnavailableReason.REDIS_UNAUTHORIZED
            [reply] = await connections.run([ScriptCall(RELEASE, ["lease"], ["token"])])
            assert unavailable_reason(reply) is UnavailableReason.REDIS_UNAUTHORIZED

    async def test_at_a_sentinel(self, tmp_path: Path) -> None:
        """So are those that a Sentinel does not accept."""
        with (
            server(tmp_path / "primary") as primary,
            sentinel(tmp_path / "sentinel", service="main", primary=primary) as watcher,
        ):
            command(watcher, "ACL SETUSER", "default", "resetpass", ">right")
            url = f"redis+sentinel://127.0.0.1:{watcher.port}/main?sentinel_password=wrong"
            async with connect(Secret(url)) as connections:
                with pytest.raises(exceptions.RedisError) as refused:
                    await connections.client.ping()
        assert unavailable_reason(refused.value) is UnavailableReason.REDIS_UNAUTHORIZED

    async def test_within_a_script(self, guarded: Server) -> None:
        """So is a user that may run scripts, but not the commands in them."""
        with redis.Redis(port=guarded.port, password="right") as client:
            rights = ("on", ">pass", "~*", "+eval", "+evalsha", "+get", "+cluster", "+info")
            client.execute_command("ACL", "SETUSER", "limited", *rights)
            client.set("lease", "token")
        async with connect(Secret(f"redis://limited:pass@127.0.0.1:{guarded.port}")) as connections:
            [reply] = await connections.run([ScriptCall(RELEASE, ["lease"], ["token"])])
        assert unavailable_reason(reply) is UnavailableReason.REDIS_UNAUTHORIZED

    async def test_a_changed_password(self, guarded: Server) -> None:
        """So is a password that was right when the process started."""
        url = f"redis://:right@127.0.0.1:{guarded.port}"
        async with connect(Secret(url)) as connections:
            call = ScriptCall(RELEASE, ["absent"], ["token"])
            assert await connections.run([call]) == [0]
            with redis.Redis(port=guarded.port, password="right") as client:
                client.config_set("requirepass", "changed")
                client.client_kill_filter(_type="normal", skipme=True)
                await until(lambda: _is_unauthorized(connections, call))
                client.config_set("requirepass", "right")


async def _is_unauthorized(connections: Connections, call: ScriptCall) -> bool:
    [reply] = await connections.run([call])
    return unavailable_reason(reply) is UnavailableReason.REDIS_UNAUTHORIZED


async def test_too_few_replicas_are_not_durable(connections: Connections) -> None:
    """A primary that takes no writes because it lacks replicas is `not_durable`."""
    async with changed_config(connections, min_replicas_to_write="1"):
        [reply] = await connections.run([ScriptCall(RELEASE, ["lease"], ["token"])])
    assert unavailable_reason(reply) is UnavailableReason.NOT_DURABLE
