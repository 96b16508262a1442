"""Laws of the commands about mail: what they print, do, and exit with."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import click
import orjson
import pytest
import redis
from harness import Yard, soon, yard
from servers import PATIENCE_S

from service import mail_commands
from service.embedded import EmbeddedServer
from service.layout import LAYOUT_VERSION, Keys

KEYS = Keys("idv", 8)
CANARY = "canary4711"
# As `python -m service`, with somebody who types Ctrl-C after two hand-overs.
INTERRUPTED = """
import os, signal
from service import replays
from service.cli import main

replay, calls = replays.replay, 0

async def interrupted(*arguments, **words):
    global calls
    done = await replay(*arguments, **words)
    calls += 1
    if calls == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return done

replays.replay = interrupted
main()
"""


class Ground:
    """A server with its yard, emptied for each test."""

    def __init__(self, yard: Yard) -> None:
        self.yard = yard
        self.server: EmbeddedServer = yard.server
        self.client: Any = redis.Redis.from_url(self.server.url)
        self.client.flushall()

    def run(self, *words: str, code: int = 0, **settings: str) -> Any:
        """Type a command, check its exit code, and return what it printed."""
        typed = self.yard.typed(*words, **settings)
        assert typed.code == code, typed
        assert b"Traceback" not in typed.err
        assert CANARY.encode() not in typed.err
        return orjson.loads(typed.out) if typed.out.startswith((b"{", b"[")) else typed.out

    def bury(self, count: int, *, reason: str = "exhausted", first: int = 0) -> list[str]:
        """Make so many dead letters, of a session each; return their ids."""
        with self.client.pipeline(transaction=False) as pipeline:
            partitions = [KEYS.partition(f"vs_{n}") for n in range(first, first + count)]
            for n, partition in enumerate(partitions, first):
                letter = {"entry_id": "1-0", "reason": reason, "error": "ValueError", "attempts": 3}
                pipeline.xadd(KEYS.dead(partition, "log"), fields(n) | letter)
            entry_ids = pipeline.execute()
        return [
            f"{partition}-{entry_id.decode()}"
            for partition, entry_id in zip(partitions, entry_ids, strict=True)
        ]

    def admit(self, count: int, kind: str = "processing") -> None:
        """Append so many transitions."""
        for n in range(count):
            self.client.xadd(KEYS.transitions(KEYS.partition(f"vs_{n}")), fields(n, kind))

    def pending(self) -> int:
        """Return how many transitions are read and not settled."""
        streams = [KEYS.transitions(partition) for partition in range(KEYS.partitions)]
        return sum(self.client.xpending(stream, "log")["pending"] for stream in streams)

    def length(self, key: Any) -> int:
        """Return how many entries the streams of all partitions hold."""
        return sum(self.client.xlen(key(p, "log")) for p in range(KEYS.partitions))


def fields(n: int, kind: str = "processing") -> dict[str, Any]:
    """Return a stream entry as admission writes it."""
    change = (
        f'{{"event_id":"evt_{n}","event_type":"identity.verification_session.{kind}",'
        f'"occurred_at":"2026-01-01T00:00:00Z","session_id":"vs_{n}","current":"processing",'
        f'"client_reference_id":"{CANARY}","metadata":{{"k":"{CANARY}"}}}}'
    )
    return {"change": change, "previous": "", "sequence": 1, "epoch": 1}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    """Yield a yard for the tests of this module."""
    with yard(tmp_path_factory.mktemp("mail")) as one:
        yield one


@pytest.fixture
def ground(opened: Yard) -> Iterator[Ground]:
    """Yield an empty server; whatever still runs is ended."""
    one = Ground(opened)
    yield one
    opened.close()
    one.client.close()


def test_letters_are_listed_and_shown(ground: Ground) -> None:
    """`list` tells where, when and why, never yours; `show` tells the whole of one letter."""
    [first] = ground.bury(1)
    ground.bury(2, reason="refused", first=1)
    listed = ground.run("dead", "list", "log", "--json")

    assert Counter(row["reason"] for row in listed) == {"exhausted": 1, "refused": 2}
    assert set(listed[0]) == set(mail_commands._COLUMNS)
    assert CANARY not in str(listed)
    [one] = ground.run("dead", "list", "log", "--reason", "exhausted", "--json")
    assert (one["id"], one["session_id"], one["event_id"]) == (first, "vs_0", "evt_0")
    assert (one["error"], one["attempts"]) == ("ValueError", 3)
    assert CANARY.encode() not in ground.run("dead", "list", "log")

    assert ground.run("dead", "list", "log", "--session", "vs_1", "--since", "1h", "--json")
    shown = ground.run("dead", "show", "log", first, "--json")
    assert shown["metadata"] == {"k": CANARY}
    assert shown["sequence"] == 1
    assert b"exhausted" in ground.run("dead", "show", "log", first)
    assert ground.run("dead", "show", "log", "0-1-1", code=1) == b""


HOSTILE = "[/x][red]a\x1b[2Jb"
SHOWN = rb"[/x][red]a\x1b[2Jb"


def test_text_of_strangers_is_shown_as_text(ground: Ground) -> None:
    """Whatever a command shows, markup in it is not obeyed, nor what a terminal would obey."""
    change = {
        "event_id": "evt_1",
        "event_type": HOSTILE,
        "occurred_at": "2026-01-01T00:00:00Z",
        "session_id": "vs_x",
        "current": HOSTILE,
        "client_reference_id": HOSTILE,
        "metadata": {HOSTILE: HOSTILE},
    }
    stored = {"change": orjson.dumps(change), "previous": HOSTILE, "sequence": 1, "epoch": 1}
    letter = {"entry_id": "1-0", "reason": HOSTILE, "error": HOSTILE, "attempts": 3}
    entry_id = ground.client.xadd(KEYS.dead(0, "log"), stored | letter).decode()
    ground.client.xgroup_create(KEYS.transitions(0), HOSTILE, "0", mkstream=True)
    status = f"{len(HOSTILE)} {HOSTILE}{HOSTILE}"
    ground.client.hset(
        KEYS.session("vs_x"),
        mapping={"state": "1 1 1 a r", "status": status, "latest": "r 1 evt_1", "evt_1": "a 1 1 n"},
    )

    for words in (
        ("dead", "list", "log"),
        ("dead", "show", "log", f"0-{entry_id}"),
        ("handlers", "list"),
        ("session", "vs_x"),
        ("check",),
    ):
        shown = ground.run(*words)
        assert SHOWN in shown, words
        assert b"\x1b" not in shown, words


def test_letters_are_dropped(ground: Ground) -> None:
    """One, some or all are dropped, after a yes; what is named and not there is said."""
    named = ground.bury(3)
    ground.bury(2, reason="refused", first=3)
    ground.run("dead", "drop", "log", "--all", code=1)
    assert ground.length(KEYS.dead) == 5

    dropped = ["dead", "drop", "log", "--yes", "--json"]
    assert ground.run(*dropped, named[0]) == {"dropped": 1}
    assert ground.run(*dropped, named[0], named[1], code=1) == {"dropped": 1}
    assert ground.run(*dropped, "--reason", "refused") == {"dropped": 2}
    assert ground.run(*dropped, "--all") == {"dropped": 1}
    assert ground.length(KEYS.dead) == 0


def test_wrong_words_are_told_from_wrong_states(ground: Ground) -> None:
    """Exit codes: 2 for what was typed or set wrong, 3 for a Redis that does not answer."""
    nowhere = {"REDIS_URL": "redis://127.0.0.1:1"}
    ground.run("dead", "replay", "log", code=2)
    ground.run("dead", "replay", "gone", "--all", code=2)
    ground.run("dead", "list", "log", "--since", "yesterday", code=2)
    ground.run("replay", "gone", "--all", code=2)
    ground.run("handlers", "retire", "log", "--yes", code=2)
    ground.run("handlers", "retire", "gone", "--yes", code=1)
    ground.run("dead", "list", "log", code=3, **nowhere)
    ground.run("replay", "log", "--all", code=3, **nowhere)
    ground.client.hset(KEYS.layout, mapping={"version": LAYOUT_VERSION, "partitions": 16})
    ground.run("dead", "list", "log", code=2)


def test_a_replay_interrupted_is_continued(ground: Ground) -> None:
    """Of two thousand letters whose replay was cut off half-way each is delivered exactly once."""
    ground.bury(2_000)
    process = ground.yard.run("dead", "replay", "log", "--all", program=INTERRUPTED)
    assert process.wait() == 1
    done = ground.length(KEYS.replays)
    assert 0 < done < 2_000
    assert ground.length(KEYS.dead) == 2_000 - done

    rest = ground.run("dead", "replay", "log", "--all", "--json")
    assert rest["replayed"] == 2_000 - done
    assert ground.run("dead", "replay", "log", "--all", "--json")["replayed"] == 0

    # Nobody worked so far; now somebody does.
    worker = ground.yard.start("work").ready()
    soon(lambda: ground.length(KEYS.replays) == 0)
    assert worker.stop() == 0
    taken = Counter(line["event_id"] for line in worker.lines("transition"))
    assert taken == dict.fromkeys((f"evt_{n}" for n in range(2_000)), 1)


def test_the_past_is_handed_to_a_running_worker(ground: Ground) -> None:
    """`replay` hands over what the options cover, and leaves the streams as they were."""
    ground.admit(20)
    ground.admit(5, "verified")
    worker = ground.yard.start("work").ready()
    soon(lambda: len(worker.lines("transition")) == 25)
    soon(lambda: not ground.pending())
    verified = "identity.verification_session.verified"

    for options, count in (
        (["--type", verified], 5),
        (["--session", "vs_1"], 2),
        (["--since", "1h", "--type", verified, "--session", "vs_1"], 1),
        (["--all"], 25),
    ):
        before = len(worker.lines("transition"))
        told = ground.run("replay", "log", *options, "--json")
        assert (told["replayed"], told["left_out"]) == (count, 0)
        assert told["replay"]
        soon(lambda: len(worker.lines("transition")) == before + count)  # noqa: B023
    soon(lambda: ground.length(KEYS.replays) == 0)

    assert worker.stop() == 0
    ground.admit(3)
    told = ground.run("replay", "log", "--all", "--json")
    assert (told["replayed"], told["left_out"]) == (25, 3)


def test_a_full_redis_refuses_and_loses_nothing(ground: Ground) -> None:
    """On a full Redis a replay exits with 3; every letter is where it was."""
    ground.bury(300)
    ground.client.config_set("maxmemory", 1)
    try:
        ground.run("dead", "replay", "log", "--all", code=3)
        assert ground.length(KEYS.dead) == 300
        assert ground.length(KEYS.replays) == 0
        assert ground.run("dead", "drop", "log", "--yes", "--all", "--json") == {"dropped": 300}
    finally:
        ground.client.config_set("maxmemory", 0)


def test_groups_are_listed_and_retired(ground: Ground) -> None:
    """A handler that is gone is listed until it is retired, which no running worker survives."""
    ground.client.xgroup_create(KEYS.transitions(0), "gone", "0", mkstream=True)
    ground.client.xadd(KEYS.dead(0, "gone"), fields(1))
    ground.client.xadd(KEYS.transitions(0), fields(1))
    [row] = ground.run("handlers", "list", "--json")
    assert row.pop("oldest_s") < PATIENCE_S
    assert row == {"handler": "gone", "unsettled": 1, "replays": 0, "dead": 1}

    ground.client.zadd(KEYS.workers("gone"), {"w": time.time() * 1000 - 1000})
    ground.run("handlers", "retire", "gone", "--yes", code=1)
    # Silent for longer than a lease, and heard of before Redis's clock stepped back.
    ground.client.zadd(KEYS.workers("gone"), {"w": 1, "x": time.time() * 1000 + 100_000})
    ground.run("handlers", "retire", "gone", "--yes")
    assert ground.run("handlers", "list", "--json") == []
    assert not ground.client.exists(KEYS.dead(0, "gone"))


@pytest.mark.parametrize("text", ["90m", "3d", "2026-01-31T12:00", "2026-01-31T12:00+02:00"])
def test_times_are_understood(text: str) -> None:
    """A time is so long ago, or ISO 8601, in UTC where it does not say."""
    found = mail_commands.Since().convert(text, None, None)
    assert found.tzinfo is not None


@pytest.mark.parametrize("text", ["", "0m", "-1h", "999999d", "1w", "now", "2026-13-01"])
def test_other_times_are_refused(text: str) -> None:
    """What is no time is a wrong argument, not an accident."""
    with pytest.raises(click.BadParameter):
        mail_commands.Since().convert(text, None, None)
