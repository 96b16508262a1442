"""deploy/redis: the files load, and each user can do its work and nothing else."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.keys import Keys
from service.storage.layout import claim
from tests.support import roles
from tests.support.depth import takes_long
from tests.support.harness import event, signed, thin_event
from tests.support.processes import Processes
from tests.support.roles import OPERATOR, RECEIVER, WORKER
from tests.support.servers import Server, binary, free_port, server, until_answers
from tests.support.topologies import watched_pair
from tests.support.waiting import wait_until

CONFIGURATION = roles.USERS.with_name("redis.conf")
FAILING = """
from contextlib import asynccontextmanager
from service.errors import Undeliverable

@asynccontextmanager
async def open(environ):
    async def refuse(transition):
        raise Undeliverable("refused")
    yield refuse
"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server started from the files in deploy/redis, with only paths and port changed."""
    directory = tmp_path_factory.mktemp("guarded")
    acl = roles.write_acl(directory / "users.acl")
    configuration = directory / "redis.conf"
    text = CONFIGURATION.read_text().replace("/var/lib/redis", str(directory))
    configuration.write_text(text.replace("/etc/redis/users.acl", str(acl)))
    with server(directory, str(configuration), user="administrator") as running:
        yield running


def _as(guarded: Server, name: str) -> redis.Redis:
    return redis.Redis.from_url(roles.as_user(guarded.url, name))


def test_without_passwords_nothing_starts(tmp_path: Path) -> None:
    """As shipped, the users' file keeps the server from starting, and the server says why."""
    (tmp_path / "users.acl").write_bytes(roles.USERS.read_bytes())
    command = [str(binary()), "--port", str(free_port()), "--aclfile", str(tmp_path / "users.acl")]

    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, check=False)

    assert ended.returncode != 0
    assert b"password hash must be exactly 64 characters" in ended.stdout


def test_nobody_is_let_in_without_a_name(guarded: Server) -> None:
    """There is no default user, and no user has a placeholder as password."""
    for user, password in ((None, None), ("default", ""), (RECEIVER, "RECEIVER_PASSWORD_SHA256")):
        with (
            redis.Redis(
                port=guarded.port, username=user, password=password, retry=Retry(NoBackoff(), 0)
            ) as client,
            pytest.raises(redis.exceptions.RedisError),
        ):
            client.ping()


def test_every_line_is_explained_and_in_force(guarded: Server) -> None:
    """Each setting of redis.conf has a comment before it, and is in effect."""
    changed_by_the_test = {"dir", "aclfile", "bind", "port", "save"}
    explained, found = False, {}
    for line in CONFIGURATION.read_text().splitlines():
        if not line:
            explained = False
        elif line.startswith("#"):
            explained = True
        else:
            assert explained, line
            name, _, value = line.partition(" ")
            found[name] = value.strip('"')
    assert {"appendonly", "appendfsync", "maxmemory-policy", "protected-mode"} <= found.keys()
    with guarded.client() as client:
        for name in found.keys() - changed_by_the_test:
            [taken] = client.config_get(name).values()
            assert taken == found[name].replace("2gb", str(2 << 30)).replace("64mb", "67108864")


@pytest.mark.timeout(180)
@takes_long
def test_each_user_can_do_its_work(guarded: Server, tmp_path: Path) -> None:
    """Receiver, worker and every command can do everything as their users."""
    (tmp_path / "failing.py").write_text(FAILING)
    urls = {name: roles.as_user(guarded.url, name) for name in roles.ROLES}
    with contextlib.closing(Processes(guarded.url, tmp_path)) as processes:
        # Each process is started as in service: `python -m service`.
        both = {"HANDLERS": "log,failing:open", "DURABILITY": "fsync", "program": ""}
        receiver = processes.start(
            "serve", REDIS_URL=urls[RECEIVER], STRIPE_API_KEY="sk_test_tests", **both
        ).ready()
        worker = processes.start("work", REDIS_URL=urls[WORKER], **both).ready()
        # Enough events of one session for its record to be pruned once.
        now = int(time.time())
        bodies = [event(id=f"evt_{n}", created=now - 100 + n) for n in range(70)]
        bodies += [event("verified", id="evt_70", status="verified", created=now), bodies[0]]
        bodies += [thin_event(), thin_event()]
        said = [
            httpx2.post(receiver.url, content=body, headers=signed(body)).json() for body in bodies
        ]
        assert [said[0], *said[-4:]] == [
            {"outcome": word}
            for word in ("admitted", "admitted", "duplicate", "queued", "duplicate")
        ]
        wait_until(lambda: len(worker.lines("transition")) == 2)
        wait_until(lambda: len(worker.lines("delivery.dead_lettered")) == 2)

        def run(*words: str, **settings: str) -> bytes:
            ended = processes.run(*words, REDIS_URL=urls[OPERATOR], **{**both, **settings})
            assert ended.wait() == 0, (words, ended.out, ended.err)
            return ended.out

        run("check")
        selftest = orjson.loads(run("selftest", "--to", receiver.url, "--json"))
        assert [row for row in selftest if not row["kept"]] == []

        def ready() -> set[str]:
            looking = processes.run("status", "--json", REDIS_URL=urls[OPERATOR], **both)
            seen = orjson.loads(looking.out)["activity"]["processes"]
            return {one["kind"] for one in seen if one["ready"] is None}

        # What they say when they start may be that they are not ready.
        wait_until(lambda: ready() == {"receiver", "worker"})
        assert b"evt_70" in run("session", "vs_1")
        letters = orjson.loads(run("dead", "list", "failing:open", "--json"))
        run("dead", "show", "failing:open", letters[0]["id"])
        run("dead", "replay", "failing:open", letters[0]["id"])
        wait_until(lambda: len(worker.lines("delivery.dead_lettered")) == 3)
        run("dead", "drop", "failing:open", "--all", "--yes")
        run("replay", "log", "--all", "--yes")
        wait_until(lambda: len(worker.lines("transition")) == 4)
        run("handlers", "list")
        assert (receiver.stop(), worker.stop()) == (0, 0)
        # A worker without heartbeats is forgotten after a while, or when it says goodbye.
        run("handlers", "retire", "failing:open", "--yes", HANDLERS="log")
        # The worker had no key, so the thin event still waits.
        assert b"fetch" in run("handlers", "list")
        run("handlers", "retire", "fetch", "--yes")
        assert b"fetch" not in run("handlers", "list")
    assert _refused(guarded) == []


@takes_long
@pytest.mark.timeout(120)
async def test_replicas_and_sentinels_have_users_too(tmp_path: Path) -> None:
    """Replication and Sentinel work as the users of these names."""
    acl = roles.write_acl(tmp_path / "users.acl")
    with watched_pair(tmp_path / "servers", acl) as pair:
        url = roles.as_user(pair.url, RECEIVER)
        async with connect(Secret(url)) as connections:
            assert await connections.client.ping()
            before = pair.primary()
            assert pair.switch() != before
            await until_claimable(connections)
        refused = [one for each in pair.servers.values() for one in _refused(each)]
    assert refused == []


async def until_claimable(connections: Connections) -> None:
    """Wait until a layout can be claimed, which is a write."""
    await until_answers(connections)
    await claim(connections, Keys("idv", 8))


def _refused(guarded: Server) -> list[Any]:
    with guarded.client() as client:
        return [one for one in client.acl_log() if one["reason"] != "auth"]


REFUSED_TO_ALL = [
             "FLUSHALL", "KEYS *", "SCAN 0", "CONFIG SET maxmemory 1", "CONFIG REWRITE", "SHUTDOWN",
             "ACL LIST", "CLIENT LIST", "MONITOR", "SUBSCRIBE x", "REPLICAOF NO ONE", "GET other",
             "SET idv:other 1", "DEL idv:{1}:transitions", "DEL idv:layout",
             "HSET idv:layout version 2", "SCRIPT FLUSH", "FUNCTION LIST"]  # fmt: skip
REFUSED = {
    RECEIVER: ["XRANGE idv:{1}:replays:log - +", "XREAD STREAMS idv:{1}:transitions 0",
               "XREADGROUP GROUP log me STREAMS idv:{1}:transitions >",
               "XRANGE idv:{1}:dead:log - +", "XLEN idv:{1}:dead:log", "GET idv:{1}:lease:log",
               "DEL idv:{1}:session:vs_1", "XTRIM idv:{1}:transitions MAXLEN 0",
               "XGROUP DESTROY idv:{1}:transitions log",
               "XREADGROUP GROUP fetch me STREAMS idv:{1}:notifications >",
               "DEL idv:{1}:noted:evt_1", "XTRIM idv:{1}:notifications MAXLEN 0",
               "HGETALL other:{1}:session:vs_1", "EVAL return{} 1 other"],
    WORKER: ["HGETALL idv:{1}:session:vs_1", "DEL idv:{1}:session:vs_1",
             "XADD idv:{1}:notifications * notification x", "DEL idv:{1}:notifications",
             "XTRIM idv:{1}:notifications MAXLEN 0", "SET other:{1}:lease:log x",
             "XREAD STREAMS idv:{1}:dead:log 0", "XTRIM idv:{1}:dead:log MAXLEN 0",
             "EVAL return{} 1 other:{1}:session:vs_1", "XGROUP DESTROY idv:{1}:transitions log"],
    OPERATOR: ["HSET idv:{1}:session:vs_1 status verified", "DEL idv:{1}:session:vs_1",
               "XADD idv:{1}:transitions * change x", "XDEL idv:{1}:transitions 1-0",
               "XADD idv:{1}:notifications * notification x", "XDEL idv:{1}:notifications 1-0",
               "XADD idv:{1}:dead:log * change x", "SET idv:{1}:lease:log x",
               "XREADGROUP GROUP log me STREAMS idv:{1}:transitions >",
               "EVAL return{} 1 idv:{1}:session:vs_1"],
}  # fmt: skip


@pytest.mark.parametrize("role", roles.ROLES)
def test_each_user_is_refused_the_rest(guarded: Server, role: str) -> None:
    """A user may not use commands or keys that it does not need, in a script neither."""
    inside = "return redis.call(unpack(ARGV))"
    keyless = {"EVAL", "SUBSCRIBE", "MONITOR", "SHUTDOWN", "SCAN"}
    with _as(guarded, role) as client:
        for words in map(str.split, REFUSED_TO_ALL + REFUSED[role]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*words)
            if words[0] not in keyless:
                with pytest.raises(redis.exceptions.ResponseError, match=_INSIDE):
                    client.eval(inside, 0, *words)


_INSIDE = re.compile(
    "ACL failure|No permissions|NOPERM|can't run|can't access|not allowed from script",
    re.IGNORECASE,
)
