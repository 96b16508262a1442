"""The commands about dead letters, replays and handler groups: output, effect, exit code."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import click
import orjson
import pytest
import redis

from service.cli import dead_letters, selection
from service.parsers import FETCH
from service.runtime.embedded_redis import EmbeddedServer
from tests.cli.conftest import KEYS, claim_layout
from tests.support import roles
from tests.support.processes import Sandbox
from tests.support.transitions import stored_entry, stored_notification
from tests.support.waiting import PATIENCE_S, wait_until

CANARY = "canary4711"
LETTER = {"entry_id": "1-0", "reason": "exhausted", "error": "ValueError", "attempts": 3}
# `python -m service`, with Ctrl-C after two calls of `replay`.
INTERRUPTED = """
import os, signal
from service.delivery import dead_letters
from service.cli import main

replay, calls = dead_letters.replay, 0

async def interrupted(*arguments, **words):
    global calls
    done = await replay(*arguments, **words)
    calls += 1
    if calls == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return done

dead_letters.replay = interrupted
main()
"""


class Operator:
    """Runs commands against an empty Redis."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.server: EmbeddedServer = sandbox.server
        self.client: Any = redis.Redis.from_url(self.server.url)
        self.client.flushall()
        claim_layout(self.server.url)
        self.logged: list[Any] = []
        self.err = b""

    def run(self, *words: str, code: int = 0, answer: str = "", **settings: str) -> Any:
        """Run a command, check its exit code, and return its output."""
        typed = self.sandbox.invoke(*words, answer=answer, **settings)
        self.logged, self.err = typed.logged, typed.err
        assert typed.code == code, typed
        assert b"Traceback" not in typed.err
        assert CANARY.encode() not in typed.err
        return orjson.loads(typed.out) if typed.out.startswith((b"{", b"[")) else typed.out

    def add_letters(self, count: int, *, reason: str = "exhausted", first: int = 0) -> list[str]:
        """Add *count* dead letters, each of another session; return their ids."""
        with self.client.pipeline(transaction=False) as pipeline:
            partitions = [KEYS.partition(f"vs_{n}") for n in range(first, first + count)]
            for n, partition in enumerate(partitions, first):
                letter = stored_entry(f"vs_{n}", 1) | LETTER | {"reason": reason}
                pipeline.xadd(KEYS.dead_letters(partition, "log"), letter)
            entry_ids = pipeline.execute()
        return [
            f"{partition}-{entry_id.decode()}"
            for partition, entry_id in zip(partitions, entry_ids, strict=True)
        ]

    def admit(self, count: int, kind: str = "processing") -> None:
        """Append *count* transitions."""
        for n in range(count):
            self.client.xadd(
                KEYS.transitions(KEYS.partition(f"vs_{n}")), stored_entry(f"vs_{n}", 1, kind=kind)
            )

    def pending(self) -> int:
        """Return how many transitions are read and not acknowledged."""
        streams = [KEYS.transitions(partition) for partition in range(KEYS.partitions)]
        return sum(self.client.xpending(stream, "log")["pending"] for stream in streams)

    def length(self, key: Any) -> int:
        """Return the number of entries in the streams of all partitions."""
        return sum(self.client.xlen(key(p, "log")) for p in range(KEYS.partitions))


@pytest.fixture
def operator(sandbox: Sandbox) -> Iterator[Operator]:
    """Yield an empty server; end all processes afterwards."""
    one = Operator(sandbox)
    yield one
    sandbox.close()
    one.client.close()


def test_letters_are_listed_and_shown(operator: Operator) -> None:
    """`list` has where, when and why, but no metadata; `show` has all; `status` says what to do."""
    [first] = operator.add_letters(1)
    operator.add_letters(2, reason="refused", first=1)
    listed = operator.run("dead", "list", "log", "--json")

    assert Counter(row["reason"] for row in listed) == {"exhausted": 1, "refused": 2}
    assert set(listed[0]) == set(dead_letters._columns("log"))
    assert CANARY not in str(listed)
    [one] = operator.run("dead", "list", "log", "--reason", "exhausted", "--json")
    assert (one["id"], one["session_id"], one["event_id"]) == (first, "vs_0", "evt_vs_0_1")
    assert (one["error"], one["attempts"]) == ("ValueError", 3)
    assert CANARY.encode() not in operator.run("dead", "list", "log")

    assert operator.run("dead", "list", "log", "--session", "vs_1", "--since", "1h", "--json")
    shown = operator.run("dead", "show", "log", first, "--json")
    assert shown["metadata"] == {"k": CANARY}
    assert shown["sequence"] == 1
    assert b"exhausted" in operator.run("dead", "show", "log", first)
    assert operator.run("dead", "show", "log", "0-1-1", code=1) == b""

    for partition in range(KEYS.partitions):
        operator.client.xgroup_create(KEYS.transitions(partition), "log", "0", mkstream=True)
    reasons = operator.run("status", "--json", code=1)["reasons"]
    [advice] = [one["help"] for one in reasons if "dead letters" in one["meaning"]]
    for command in re.findall("`(.*?)`", advice):
        assert operator.run(*command.split())
    assert operator.length(KEYS.dead_letters) == 0


HOSTILE = "[/x][red]a\x1b[2Jb"
SHOWN = rb"[/x][red]a\x1b[2Jb"


def test_text_from_requests_is_printed_as_text(operator: Operator) -> None:
    """No command interprets markup in what it prints, or prints control characters."""
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
    letter = stored | LETTER | {"reason": HOSTILE, "error": HOSTILE}
    entry_id = operator.client.xadd(KEYS.dead_letters(0, "log"), letter).decode()
    operator.client.xgroup_create(KEYS.transitions(0), HOSTILE, "0", mkstream=True)
    status = f"{len(HOSTILE)} {HOSTILE}{HOSTILE}"
    operator.client.hset(
        KEYS.session("vs_x"),
        mapping={
            "state": "1 1 1 a r",
            "status": status,
            "latest": "r 1 evt_1",
            "evt_1": "a 1 1 n 1-0",
        },
    )

    for words in (
        ("dead", "list", "log"),
        ("dead", "show", "log", f"0-{entry_id}"),
        ("handlers", "list"),
        ("session", "vs_x"),
        ("check",),
    ):
        shown = operator.run(*words)
        assert SHOWN in shown, words
        assert b"\x1b" not in shown, words


def test_letters_are_dropped(operator: Operator) -> None:
    """One, some or all are dropped, after confirmation; a missing id is an error."""
    named = operator.add_letters(3)
    operator.add_letters(2, reason="refused", first=3)
    operator.run("dead", "drop", "log", "--all", code=1, answer="n\n")
    assert b"Delete 5 dead letters of log for good?" in operator.err
    assert operator.run("dead", "drop", "log", "--all", "--dry-run", "--json") == {"would_drop": 5}
    assert operator.length(KEYS.dead_letters) == 5
    assert not operator.logged

    dropped = ["dead", "drop", "log", "--yes", "--json"]
    assert operator.run(*dropped, named[0]) == {"dropped": 1}
    assert operator.run(*dropped, named[0], named[1], code=1) == {"dropped": 1}
    assert operator.run(*dropped, "--reason", "refused") == {"dropped": 2}
    assert operator.logged == [
        {
            "event": "dead_letters.dropped",
            "log_level": "warning",
            "handler": "log",
            "dropped": 2,
            "reason": "refused",
        }
    ]
    assert operator.run("dead", "drop", "log", "--all", answer="y\n").split() == [b"dropped", b"1"]
    assert operator.length(KEYS.dead_letters) == 0


def test_exit_codes(operator: Operator) -> None:
    """2 for a wrong argument or setting, 3 for a Redis that does not answer."""
    nowhere = {"REDIS_URL": "redis://127.0.0.1:1"}
    operator.run("dead", "replay", "log", code=2)
    operator.run("dead", "drop", "log", code=2)
    operator.run("dead", "replay", "gone", "--all", code=2)
    operator.run("dead", "list", "log", "--since", "yesterday", code=2)
    operator.run("replay", "gone", "--all", code=2)
    operator.run("replay", "log", "--all", "--yes", code=2)
    assert b"log has no group yet" in operator.err
    operator.run("handlers", "retire", "log", code=2)
    operator.run("dead", "list", "log", code=3, **nowhere)
    operator.run("replay", "log", "--all", code=3, **nowhere)


EVERY_COMMAND = (
    ("session", "vs_1"),
    ("dead", "list", "log"),
    ("dead", "show", "log", "0-1-1"),
    ("dead", "replay", "log", "--all"),
    ("dead", "replay", "log", "--all", "--dry-run"),
    ("dead", "drop", "log", "--all"),
    ("dead", "drop", "log", "--all", "--yes"),
    ("replay", "log", "--all"),
    ("replay", "log", "--all", "--yes"),
    ("handlers", "list"),
    ("handlers", "retire", "gone"),
    ("handlers", "retire", "gone", "--yes"),
)


@pytest.mark.parametrize("words", EVERY_COMMAND, ids=" ".join)
def test_another_deployment_is_not_taken_for_an_empty_one(
    operator: Operator, words: tuple[str, ...]
) -> None:
    """A wrong prefix or number of partitions is named in an error, before any question."""
    # The operator's Redis user may not read under another prefix.
    code, said = (3, b"error: Redis at ") if roles.are_wanted() else (2, b"error: REDIS_PREFIX: ")
    assert operator.run(*words, code=code, REDIS_PREFIX="wrong") == b""
    assert operator.err.startswith(said)
    assert operator.run(*words, code=2, PARTITIONS="16") == b""
    assert operator.err == b"error: PARTITIONS is 16, but the layout in Redis was made for 8\n"


@pytest.mark.parametrize(
    "words",
    [
        tuple("typo" if word in {"log", "gone"} else word for word in words)
        for words in EVERY_COMMAND
        if {"log", "gone"} & {*words}
    ],
    ids=" ".join,
)
def test_an_unknown_handler_is_an_error(operator: Operator, words: tuple[str, ...]) -> None:
    """A name that is neither configured nor has a group is an error, before any question."""
    operator.client.xgroup_create(KEYS.transitions(0), "old", "0", mkstream=True)
    assert operator.run(*words, code=2) == b""
    assert operator.err.startswith(b"error: ")
    assert b"typo" in operator.err
    assert b"log" in operator.err
    assert b"[y/N]" not in operator.err


def test_a_handler_that_is_no_longer_configured_is_known_by_its_group(operator: Operator) -> None:
    """Dead letters of a removed handler can be listed and dropped."""
    operator.client.xgroup_create(KEYS.transitions(0), "old", "0", mkstream=True)
    operator.client.xadd(KEYS.dead_letters(0, "old"), stored_entry("vs_1", 1))
    assert len(operator.run("dead", "list", "old", "--json")) == 1
    assert operator.run("dead", "drop", "old", "--all", "--yes", "--json") == {"dropped": 1}


def test_the_letters_of_fetch_hold_notifications(operator: Operator) -> None:
    """They are listed by type, shown whole and replayed; there is no history to replay."""
    partition = KEYS.partition("vs_1")
    stored = stored_notification("vs_1", 1, context="acct_1")
    assert operator.run("dead", "list", FETCH, "--json") == []
    operator.client.xgroup_create(KEYS.notifications(partition), FETCH, "0", mkstream=True)
    operator.client.xadd(KEYS.dead_letters(partition, FETCH), stored | LETTER)

    [listed] = operator.run("dead", "list", FETCH, "--session", "vs_1", "--json")
    assert listed["event_type"] == "identity.verification_session.processing"
    assert "current" not in listed
    shown = operator.run("dead", "show", FETCH, listed["id"], "--json")
    assert (shown["event_id"], shown["context"]) == ("evt_vs_1_1", "acct_1")
    operator.run("replay", FETCH, "--all", code=2)
    assert b"fetch has no history" in operator.err
    replayed = operator.run("dead", "replay", FETCH, "--all", "--json")
    assert replayed["replayed"] == 1
    assert operator.run("dead", "list", FETCH, "--json") == []
    [(_, copied)] = operator.client.xrange(KEYS.replays(partition, FETCH))
    replay = replayed["replay"].encode()
    assert copied == {b"notification": stored["notification"], b"replay": replay}


def test_fetch_is_listed_and_retired(operator: Operator) -> None:
    """What waits is listed, with or without a group; with a key it is not retired."""
    stream = KEYS.notifications(KEYS.partition("vs_1"))
    operator.client.xadd(stream, stored_notification("vs_1", 1))
    [row] = operator.run("handlers", "list", "--json")
    assert (row["handler"], row["lag"]) == (FETCH, 1)

    operator.run("handlers", "retire", FETCH, "--yes", code=2, STRIPE_API_KEY="rk_live_1")
    assert b"STRIPE_API_KEY is set" in operator.err
    operator.run("handlers", "retire", FETCH, answer="y\n")
    assert b"Delete the notifications, replays and dead letters of fetch?" in operator.err
    assert operator.run("handlers", "list", "--json") == []
    assert not operator.client.exists(stream)


def test_a_replay_interrupted_is_continued(operator: Operator) -> None:
    """Of 2,000 dead letters whose replay was interrupted, each is delivered exactly once."""
    operator.add_letters(2_000)
    planned = operator.run("dead", "replay", "log", "--all", "--dry-run", "--json")
    assert planned == {"would_replay": 2_000}
    process = operator.sandbox.run("dead", "replay", "log", "--all", "--json", program=INTERRUPTED)
    assert process.wait() == 1
    done = operator.length(KEYS.replays)
    assert 0 < done < 2_000
    # What was done before the interruption is printed, and logged to standard error.
    assert orjson.loads(process.out)["replayed"] == done
    logged = orjson.loads(process.err.split(b"\n")[0])
    assert (logged["event"], logged["replayed"]) == ("dead_letters.replayed", done)
    assert process.err.endswith(b"error: interrupted: the rest is unchanged\n")
    assert operator.length(KEYS.dead_letters) == 2_000 - done

    rest = operator.run("dead", "replay", "log", "--all", "--json")
    assert rest["replayed"] == 2_000 - done
    assert operator.run("dead", "replay", "log", "--all", "--json")["replayed"] == 0

    worker = operator.sandbox.start("work").ready()
    wait_until(lambda: operator.length(KEYS.replays) == 0)
    assert worker.stop() == 0
    taken = Counter(line["event_id"] for line in worker.lines("transition"))
    assert taken == dict.fromkeys((f"evt_vs_{n}_1" for n in range(2_000)), 1)


def test_the_past_is_replayed_to_a_running_worker(operator: Operator) -> None:
    """`replay` delivers what the options cover, and leaves the streams as they were."""
    operator.admit(20)
    operator.admit(5, "verified")
    worker = operator.sandbox.start("work").ready()
    wait_until(lambda: len(worker.lines("transition")) == 25)
    wait_until(lambda: not operator.pending())
    verified = "identity.verification_session.verified"

    for options, count in (
        (["--type", verified], 5),
        (["--type", "verified"], 5),
        (["--session", "vs_1"], 2),
        (["--since", "1h", "--type", verified, "--session", "vs_1"], 1),
        (["--all"], 25),
    ):
        before = len(worker.lines("transition"))
        result = operator.run("replay", "log", *options, "--json", "--yes")
        assert (result["replayed"], result["left_out"]) == (count, 0)
        assert result["replay"]
        wait_until(lambda: len(worker.lines("transition")) == before + count)  # noqa: B023
    wait_until(lambda: operator.length(KEYS.replays) == 0)

    assert worker.stop() == 0
    operator.admit(3)
    planned = operator.run("replay", "log", "--all", "--json", "--dry-run")
    assert planned == {"would_replay": 25, "left_out": 3}
    operator.run("replay", "log", "--all", code=1, answer="n\n")
    assert b"Deliver 25 transitions to log again?" in operator.err
    assert not operator.logged
    assert operator.length(KEYS.replays) == 0
    result = operator.run("replay", "log", "--since", "1h", "--json", answer="y\n")
    assert (result["replayed"], result["left_out"]) == (25, 3)
    [audit] = operator.logged
    assert {
        "event": "replay.made",
        "handler": "log",
        "replay": result["replay"],
        "replayed": 25,
        "left_out": 3,
    }.items() <= audit.items()
    assert audit["since"].endswith("+00:00")
    assert operator.run("replay", "log", "--session", "vs_none", "--json")["would_replay"] == 0


@pytest.mark.parametrize("word", ["verify", "", "identity.verification_session.", "payment.failed"])
def test_a_type_that_does_not_exist_is_an_error(operator: Operator, word: str) -> None:
    """An unknown event type replays nothing, and the error lists the known ones."""
    operator.run("replay", "log", "--type", word, code=2)
    assert b"created, processing, requires_input, verified, canceled, redacted" in operator.err


def test_groups_are_listed_and_retired(operator: Operator) -> None:
    """A removed handler is listed until it is retired, which is refused while a worker runs."""
    operator.client.xgroup_create(KEYS.transitions(0), "gone", "0", mkstream=True)
    operator.client.xadd(KEYS.dead_letters(0, "gone"), stored_entry("vs_1", 1))
    operator.client.xadd(KEYS.transitions(0), stored_entry("vs_1", 1))
    [row] = operator.run("handlers", "list", "--json")
    assert row.pop("oldest_s") < PATIENCE_S
    assert row == {"handler": "gone", "lag": 1, "replays": 0, "dead_letters": 1}

    operator.client.zadd(KEYS.workers("gone"), {"w": time.time() * 1000 - 1000})
    operator.run("handlers", "retire", "gone", code=1)
    assert operator.err == b"error: a worker still works for it: stop it first\n"
    # A worker that is silent for longer than a lease, and one from before the clock stepped back.
    operator.client.zadd(KEYS.workers("gone"), {"w": 1, "x": time.time() * 1000 + 100_000})
    operator.run("handlers", "retire", "gone", code=1, answer="n\n")
    assert operator.client.exists(KEYS.dead_letters(0, "gone"))
    operator.run("handlers", "retire", "gone", answer="y\n")
    assert [(line["event"], line["handler"]) for line in operator.logged] == [
        ("handler.retired", "gone")
    ]
    assert operator.run("handlers", "list", "--json") == []
    assert not operator.client.exists(KEYS.dead_letters(0, "gone"))


@pytest.mark.parametrize("text", ["90m", "3d", "2026-01-31T12:00", "2026-01-31T12:00+02:00"])
def test_times_are_understood(text: str) -> None:
    """A time is a duration ago, or ISO 8601, in UTC unless it has an offset."""
    found = selection.Since().convert(text, None, None)
    assert found.tzinfo is not None


@pytest.mark.parametrize("text", ["", "0m", "-1h", "999999d", "1w", "now", "2026-13-01"])
def test_other_times_are_refused(text: str) -> None:
    """Anything else is a wrong argument."""
    with pytest.raises(click.BadParameter):
        selection.Since().convert(text, None, None)
