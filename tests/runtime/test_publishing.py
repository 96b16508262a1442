"""Each kind of process publishes that it lives, from its start to its end."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import httpx2
import orjson
import pytest
import redis

from service import __version__
from service.storage.keys import Keys
from tests.support.harness import event, signed
from tests.support.processes import Sandbox
from tests.support.waiting import wait_until

KEYS = Keys("idv", 8)
# `python -m service`, which publishes twenty times a second.
QUICK = """
from service.monitoring import publisher
from service.cli import main
publisher.PUBLISH_EVERY_S = 0.05
main()
"""


def lives(client: redis.Redis) -> list[dict[str, object]]:
    """Return what the living processes say of themselves."""
    values: list[Any] = client.hvals(KEYS.processes)
    return [orjson.loads(value.split(b" ", 2)[2]) for value in values]


@pytest.mark.parametrize(
    ("command", "kind", "works"),
    [("serve", "receiver", []), ("work", "worker", ["log"]), ("dev", "dev", ["log"])],
)
def test_a_process_is_seen_until_it_ends(
    sandbox: Sandbox, command: str, kind: str, works: list[str]
) -> None:
    """It is seen soon after its start, as draining while it drains, and no more when it is gone."""
    drain_s = "300" if command == "serve" else "0"
    process = sandbox.start(command, program=QUICK, DRAIN_S=drain_s).ready()
    with closing(redis.Redis.from_url(sandbox.server.url)) as client:
        [life] = wait_until(lambda: lives(client))
        assert (life["kind"], life["works"]) == (kind, works)
        assert life["version"] == __version__
        wait_until(lambda: [each["reason"] for each in lives(client)] == [None])
        process.popen.terminate()
        if command == "serve":
            wait_until(lambda: [each["reason"] for each in lives(client)] == ["draining"])
            process.end()
            client.delete(KEYS.processes)
        else:
            assert process.wait() == 0
            assert lives(client) == []


def test_what_was_counted_last_is_published_at_the_end(sandbox: Sandbox) -> None:
    """A process that ends between two calls loses no count."""
    with closing(redis.Redis.from_url(sandbox.server.url)) as client:
        serve = sandbox.start("serve").ready()
        wait_until(lambda: lives(client))
        body = event(id="evt_last", session="vs_last")
        assert httpx2.post(serve.url, content=body, headers=signed(body)).status_code == 200
        assert serve.stop() == 0
        minutes: list[Any] = [client.hgetall(key) for key in client.keys("idv:{0}:minute:*")]
    assert sum(int(each.get(b"received:admitted", 0)) for each in minutes) == 1
