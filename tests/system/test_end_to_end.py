"""The whole way: a real receiver and a real worker on a real server."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from random import Random

import httpx2
import orjson

from service.operations.synthetic_events import LIFECYCLES, Step, lifecycle_events
from tests.support.harness import event, signed
from tests.support.processes import open_sandbox
from tests.support.waiting import until, wait_until

NAMES = tuple(LIFECYCLES)


def _status(step: Step) -> str:
    return "redacted" if step.redaction == "redacted" else step.status


def test_every_lifecycle_arrives_as_it_was_lived(tmp_path: Path) -> None:
    """Each event of each lifecycle is one transition: in order, gap-free, expected.

    `send --seed` makes the same sessions as below; only times may differ.
    """
    random = Random(1)
    sessions = [(name, lifecycle_events(name, random=random, started_at=0)) for name in NAMES * 3]
    total = sum(len(events) for _, events in sessions)
    written = defaultdict(list)
    with open_sandbox(tmp_path) as sandbox:
        receiver, worker = processes = [sandbox.start(one) for one in ("serve", "work")]
        for process in processes:
            process.ready()
        arguments = (*NAMES, "--count", "3", "--seed", "1", "--json")
        sent = sandbox.run("send", *arguments, PORT=str(receiver.port))
        rows = orjson.loads(sent.out)
        assert {row["outcome"]: row["answers"] for row in rows} == {"admitted": total}
        wait_until(lambda: len(worker.lines("transition")) == total)
        for line in worker.lines("transition"):
            written[line["session_id"]].append(line)
        assert [process.stop() for process in processes] == [0, 0]
        assert all(b"Traceback" not in one.out and one.err == b"" for one in processes)
    for name, events in sessions:
        path = [_status(step) for step in LIFECYCLES[name]]
        lines = written[events[0].session_id]
        assert [line["event_id"] for line in lines] == [one.id for one in events]
        assert [line["current"] for line in lines] == path
        assert [line["previous"] for line in lines] == [None, *path[:-1]]
        assert [line["sequence"] for line in lines] == [*range(1, len(path) + 1)]
        # An approval on review looks like a check that was missed.
        expected = [name != "approved-on-review" or one is not lines[-1] for one in lines]
        assert [line["expected"] for line in lines] == expected
        reversals = [name == "rejected-on-review" and one is lines[-1] for one in lines]
        assert [line["reversal"] for line in lines] == reversals


MINE = """
from contextlib import asynccontextmanager
from pathlib import Path

@asynccontextmanager
async def open(environ):
    async def handle(transition):
        with Path(environ["TAKEN"]).open("a") as file:
            print(transition.event_id, file=file)
    yield handle
"""


async def test_what_came_before_the_first_worker_is_handed_over(tmp_path: Path) -> None:
    """A receiver that knows of no handler, or of another, takes nothing from the worker's."""
    (tmp_path / "mine.py").write_text(MINE)
    taken = tmp_path / "taken"
    with open_sandbox(tmp_path) as ground:
        receiver = ground.start("serve", HANDLERS="log").ready()
        bodies = [event(id=f"evt_{n}", session=f"vs_{n}") for n in range(100)]
        async with httpx2.AsyncClient() as client:
            answers = await asyncio.gather(
                *(client.post(receiver.url, content=body, headers=signed(body)) for body in bodies)
            )
        assert {answer.content for answer in answers} == {b'{"outcome":"admitted"}'}
        worker = ground.start("work", HANDLERS="mine:open", TAKEN=str(taken)).ready()
        await until(lambda: taken.exists() and len(taken.read_text().splitlines()) == 100)
        assert {*taken.read_text().splitlines()} == {f"evt_{n}" for n in range(100)}
        assert (receiver.stop(), worker.stop()) == (0, 0)
