"""Measures what slow strangers cost honest requests: `python -m tests.bench.slow_clients`.

Honest events at a steady rate, in turns without and with 500 connections that send nothing, half a
header or half a body, each opened again as soon as it is closed. Loopback only; takes 80 seconds.
Asserts no time.
"""
# ruff: noqa: E402, T201 (the tests' own modules are found after the path is set; it says numbers)

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import httpx2
import uvloop
from harness import event, signed, yard

SLOW = 500
EVENTS_PER_S = 100
TURN_S = 20
TURNS = ("without", "with", "without", "with")
HALVES = (
    b"",
    b"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\nContent-Le",
    b"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\nContent-Length: 4096\r\n\r\n{",
)


def main() -> None:
    """Measure in turns, and say each, then the ratio."""
    with tempfile.TemporaryDirectory(prefix="slow-") as made, yard(Path(made)) as opened:
        receiver = opened.start("serve").ready()
        uvloop.run(_measure(receiver.url, receiver.port))
        print(f"{'receiver':>16}  exit code {receiver.stop()}")


async def _measure(url: str, port: int) -> None:
    found: dict[str, list[float]] = {turn: [] for turn in TURNS}
    async with httpx2.AsyncClient(timeout=15) as client:
        await _honest(client, url, "warm", 2)
        for number, turn in enumerate(TURNS):
            lives: list[float] = []
            strangers = [
                asyncio.create_task(_stranger(port, index, lives))
                for index in range(SLOW if turn == "with" else 0)
            ]
            took = await _honest(client, url, f"{number}", TURN_S)
            for stranger in strangers:
                stranger.cancel()
            await asyncio.gather(*strangers, return_exceptions=True)
            found[turn] += took
            _say(f"{turn} strangers", took)
            if lives:
                print(f"{'strangers':>16}  {len(lives)} cut off after {max(lives):.1f} s at most")
    ratio = _p99(found["with"]) / _p99(found["without"])
    print(f"{'ratio of p99':>16}  {ratio:.2f}")


async def _stranger(port: int, index: int, lives: list[float]) -> None:
    """Open, send a part, wait to be cut off, and again."""
    await asyncio.sleep(index / SLOW)
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.monotonic()
        writer.write(HALVES[index % len(HALVES)])
        try:
            await reader.read()
        except ConnectionError:
            pass
        finally:
            writer.close()
        lives.append(time.monotonic() - began)


async def _honest(client: httpx2.AsyncClient, url: str, turn: str, seconds: float) -> list[float]:
    """Post events at their rate; return how long each answer took."""
    statuses: Counter[int] = Counter()
    took: list[float] = []

    async def post(number: int) -> None:
        body = event(id=f"evt_{turn}_{number}", session=f"vs_{turn}_{number}")
        began = time.perf_counter()
        answer = await client.post(url, content=body, headers=signed(body))
        took.append(time.perf_counter() - began)
        statuses[answer.status_code] += 1

    async with asyncio.TaskGroup() as group:
        for number in range(int(seconds * EVENTS_PER_S)):
            group.create_task(post(number))
            await asyncio.sleep(1 / EVENTS_PER_S)
    assert set(statuses) == {200}, statuses
    return took


def _p99(took: list[float]) -> float:
    return statistics.quantiles(took, n=100)[98]


def _say(what: str, took: list[float]) -> None:
    middle = statistics.median(took)
    print(f"{what:>16}  p50 {middle * 1000:.1f} ms  p99 {_p99(took) * 1000:.1f} ms  n {len(took)}")


if __name__ == "__main__":
    main()
