"""Chaos runs: every fault is used, a seed repeats its events, every session has canaries."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from random import Random

import orjson
import pytest

from tests.support.preloads import Clock, Preload, SlowDisk, launcher
from tests.support.waiting import PATIENCE_S, until
from tests.system.chaos.faults import FAULTS
from tests.system.chaos.hostile_clients import attacking
from tests.system.chaos.mixes import LONG, SHORT
from tests.system.chaos.needs import ConflictError, Needs, combined
from tests.system.chaos.workload import CANARY, PUBLISHED, Payload, sessions

NOW = 1_790_000_000


def payloads(seed: int, count: int = 300) -> list[Payload]:
    """Return the events of some sessions."""
    return [
        payload for session in islice(sessions(Random(seed), NOW), count) for payload in session
    ]


def test_every_fault_is_in_a_long_mix() -> None:
    """Every fault is in a mix."""
    assert {name for mix in LONG.values() for name in mix} == set(FAULTS)


@pytest.mark.parametrize("mix", [*SHORT.values(), *LONG.values()])
def test_a_mix_asks_for_one_durability(mix: tuple[str, ...]) -> None:
    """The faults of a mix can share one deployment."""
    combined(FAULTS[name].needs for name in mix)


def test_different_deployments_are_not_combined() -> None:
    """Two settings of one name are a conflict; needs that agree are added up."""
    agreed = combined([Needs(proxy=True), Needs(replicas=1), Needs(settings={"A": "1"})])
    assert agreed == Needs(proxy=True, replicas=1, settings={"A": "1"})
    for one, other in [
        (Needs(durability="none"), Needs(durability="fsync")),
        (Needs(appendfsync="always"), Needs(appendfsync="everysec")),
        (Needs(settings={"A": "1"}), Needs(settings={"A": "2"})),
    ]:
        with pytest.raises(ConflictError):
            combined([one, other])


def loaded(directory: Path, program: str, *preloads: Preload) -> list[str]:
    """Return the words that a Python program prints, started with libraries loaded."""
    python = launcher(directory, Path(sys.executable), [*preloads])
    return subprocess.check_output([python, "-c", program], text=True).split()


@pytest.mark.skipif(SlowDisk.missing() != "", reason="needs gcc")
def test_a_slow_disk_takes_as_long_as_configured(tmp_path: Path) -> None:
    """A file is on disk no sooner than the delay allows, and the delay can be changed."""
    disk = SlowDisk(tmp_path)
    program = (
        "import os, time; file = os.open('synced', os.O_CREAT | os.O_WRONLY);"
        "began = time.monotonic(); os.fdatasync(file); os.fsync(file);"
        "print(time.monotonic() - began)"
    )
    disk.delay(0.1)
    [took] = loaded(tmp_path, f"import os; os.chdir({str(tmp_path)!r}); {program}", disk)
    assert float(took) >= 0.2


@pytest.mark.skipif(Clock.missing() != "", reason="needs libfaketime")
def test_a_clock_is_stepped_and_time_goes_on(tmp_path: Path) -> None:
    """The wall clock is stepped; the monotonic clock is not."""
    clock = Clock(tmp_path)
    clock.step(86_400)
    program = "import time; print(time.time(), time.monotonic())"
    before, began = time.time(), time.monotonic()
    wall, interval = map(float, loaded(tmp_path, program, clock))
    assert wall - before >= 86_400
    assert began <= interval <= time.monotonic()


async def test_hostile_clients_end_with_their_block() -> None:
    """No connection stays open, whatever state it is in."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.add(writer)
        with contextlib.suppress(OSError):
            while await reader.read(1024) and random.random() < 0.7:
                writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                await asyncio.sleep(0.01 * random.random())
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        connected.remove(writer)

    random, statuses, connected = Random(1), set[int](), set[asyncio.StreamWriter]()
    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        for number in range(30):
            async with asyncio.timeout(PATIENCE_S):
                async with attacking(port, lambda _, status: statuses.add(status)):
                    await asyncio.sleep(0.01 * number)
        await until(lambda: not connected)
    assert statuses == {400}


def test_a_seed_repeats_its_lives() -> None:
    """The same seed gives the same events to the byte, another one others."""
    assert payloads(1) == payloads(1)
    assert payloads(1) != payloads(2)


def test_every_secret_field_holds_a_canary() -> None:
    """Every event has a canary in each secret field, and event ids are unique."""
    dead_letters = payloads(3)
    assert len({payload.event.id for payload in dead_letters}) == len(dead_letters)
    for payload in dead_letters:
        session = orjson.loads(payload.body)["data"]["object"]
        secret = [session[name] for name in ("client_secret", "url", "provided_details")]
        secret += [session["verified_outputs"], (session["last_error"] or secret[0])]
        secret.append(session["last_verification_report"] or secret[0])
        assert all(CANARY in orjson.dumps(one).decode() for one in secret)
        assert session["metadata"] == {"user": PUBLISHED}
