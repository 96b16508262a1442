"""The command `backfill`: its options, what it prints, and how it ends."""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from random import Random

import orjson
import pytest
import redis

from tests.support.asking import Asking, asking
from tests.support.processes import Process, Sandbox, open_sandbox
from tests.support.stripe_api import Fault, StripeStandIn, live, lose_all
from tests.support.waiting import until


@pytest.fixture
def stand_in() -> StripeStandIn:
    """Return a stand-in whose pushes are all lost, with nine events of the last hour."""
    stand_in = StripeStandIn()
    stand_in.pushes.loses = lose_all
    stand_in.clock.advance(-3600)
    for number in range(3):
        live(stand_in, "submit, verify", Random(number))
    stand_in.clock.advance(time.time() - stand_in.clock.time())
    return stand_in


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Sandbox]:
    """Yield a sandbox whose Redis no process has used yet."""
    with open_sandbox(tmp_path) as opened:
        yield opened


@pytest.fixture
async def made(stand_in: StripeStandIn, empty: Sandbox) -> AsyncIterator[Asking]:
    """Yield what starts processes that ask the stand-in."""
    async with asking(stand_in, empty) as opened:
        yield opened


def rows(process: Process) -> dict[str, int]:
    """Return the printed outcomes."""
    return {row["outcome"]: row["events"] for row in orjson.loads(process.out)}


async def test_what_is_missing_is_admitted(made: Asking, empty: Sandbox) -> None:
    """A dry run says how much is unknown, and claims nothing; a run admits it; then it is known.

    It may be the first process that ever uses a Redis.
    """
    dry = await made.run("backfill", "--since", "30d", "--dry-run", "--json")
    assert (dry.wait(), rows(dry), dry.err) == (0, {"unknown": 9}, b"")
    with redis.Redis.from_url(empty.server.url) as client:
        assert client.keys("*:layout") == []
    filled = await made.run("backfill", "--since", "2h", "--json")
    assert (filled.wait(), rows(filled)) == (0, {"admitted": 9})
    [line] = [orjson.loads(line) for line in filled.err.splitlines()]
    assert (line["event"], line["admitted"]) == ("backfill.ended", 9)
    again = await made.run("backfill", "--since", "30d")
    assert again.wait() == 0
    assert [line.split() for line in again.out.splitlines()] == [
        [b"outcome", b"events"], [b"known", b"9"],
    ]  # fmt: skip


async def test_only_until_then_and_only_one_account(stand_in: StripeStandIn, made: Asking) -> None:
    """--until ends it earlier; --account reads a connected account alone."""
    account = stand_in.directory.connect().id
    stand_in.clock.advance(-100)
    stand_in.sessions.create(scope=stand_in.scope(account))
    stand_in.clock.advance(100)
    early = await made.run("backfill", "--since", "30d", "--until", "2h", "--json", "--dry-run")
    assert rows(early) == {}
    one = await made.run("backfill", "--since", "1d", "--account", account, "--json", "--dry-run")
    assert rows(one) == {"unknown": 1}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--since", "soon"), b"expected a time like"),
        (("--since", "1d", "--until", "2d"), b"--since is later than --until"),
        (("--since", "1d", "--account", "vs_1"), b"expected acct_..."),
        ((), b"Missing option '--since'"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: tuple[str, ...], problem: bytes, sandbox: Sandbox) -> None:
    """What cannot be meant is refused."""
    ended = sandbox.invoke("backfill", *arguments, STRIPE_API_KEY="rk_test_1")
    assert ended.code == 2
    assert problem in ended.err


@pytest.mark.parametrize(
    "settings",
    [{}, {"STRIPE_API_KEY": "rk_test_1", "LIVEMODE": "live"}],
    ids=["no key", "no key of the mode"],
)
def test_without_a_key(settings: dict[str, str], sandbox: Sandbox) -> None:
    """A key of a mode that is received is needed."""
    ended = sandbox.invoke("backfill", "--since", "1d", **settings)
    assert ended.code == 2
    assert ended.err.startswith(b"error: STRIPE_API_KEY: ")


async def test_stripe_refuses(stand_in: StripeStandIn, made: Asking) -> None:
    """An error of the API is one word; what to type to go on is printed, and exits with 1."""
    stand_in.faults.add(Fault(kind="answer", status=403, path="/v1/events"))
    ended = await made.run("backfill", "--since", "2026-11-01T00:00:00Z", "--dry-run")
    assert ended.wait() == 1
    note, error = ended.err.decode().splitlines()[-2:]
    assert " backfill --since 2026-11-01T00:00:00Z --until " in note
    assert note.endswith(" --dry-run")
    assert error == "error: test: api_forbidden"


async def test_interrupted(stand_in: StripeStandIn, made: Asking) -> None:
    """SIGINT ends it, and the command that is printed goes on."""
    hang = stand_in.faults.add(Fault(kind="hang", path="/v1/events", query=".*created.*", times=1))
    began = made.launch("backfill", "--since", "2h")
    await until(lambda: hang.times == 0)
    began.popen.send_signal(signal.SIGINT)
    assert await until(lambda: began.popen.poll() == 1)
    *_, note, error = began.err.decode().splitlines()
    assert error == "error: interrupted"
    options = note.partition(" backfill ")[2].split()
    filled = await made.run("backfill", *options, "--json")
    assert rows(filled) == {"admitted": 9}
