"""Laws of the whole: real receivers, a real worker, a real server, and events in any order."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import httpx2
import orjson
import pytest
import redis

from service.operations.synthetic_events import LIFECYCLES, Step, SyntheticEvent, lifecycle_events
from service.storage.layout import Keys
from tests.support.depth import examples
from tests.support.harness import NOW, event, post_all, signed
from tests.support.processes import Process, Sandbox, open_sandbox
from tests.support.waiting import until, wait_until

KEYS = Keys("idv", 8)
ROUNDS = examples(40)
COPIES = 50


class Deployment(NamedTuple):
    """Three receivers and a worker on one server."""

    sandbox: Sandbox
    receivers: list[Process]
    worker: Process

    def settled(self, session_ids: set[str], count: int) -> dict[str, list[dict[str, Any]]]:
        """Wait until *count* transitions of some sessions were written, and return them."""
        wait_until(lambda: sum(map(len, self.moves(session_ids).values())) >= count)
        return self.moves(session_ids)

    def moves(self, session_ids: set[str]) -> dict[str, list[dict[str, Any]]]:
        """Return what the log handler wrote of some sessions, in the order it was written."""
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in self.worker.lines("transition"):
            if line["session_id"] in session_ids:
                found[line["session_id"]].append(line)
        return found


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Start everything once; at the end all must stop with exit code 0 and without a traceback."""
    with open_sandbox(tmp_path_factory.mktemp("deployment")) as opened:
        processes = [opened.start(command) for command in ("serve", "serve", "serve", "work")]
        for process in processes:
            process.ready()
        yield Deployment(opened, processes[:3], processes[3])
        codes = [process.stop() for process in processes]
        assert codes == [0, 0, 0, 0]
        assert all(b"Traceback" not in p.out + p.err for p in processes)
        assert [p.err for p in processes] == [b""] * 4


def _status(step: Step) -> str:
    return "redacted" if step.redaction == "redacted" else step.status


def _sent(seed: int, count: int, names: tuple[str, ...]) -> dict[str, list[list[SyntheticEvent]]]:
    """Return the sessions that `send --seed` makes, by lifecycle; only times may differ."""
    random = Random(seed)
    made: dict[str, list[list[SyntheticEvent]]] = defaultdict(list)
    for _ in range(count):
        for name in names:
            made[name].append(lifecycle_events(name, random=random, started_at=0))
    return made


def _send(deployment: Deployment, *arguments: str, seed: int) -> dict[str, int]:
    port = str(deployment.receivers[seed % 3].port)
    sent = deployment.sandbox.run("send", *arguments, "--seed", str(seed), "--json", PORT=port)
    assert sent.wait() == 0, sent.err
    return {row["outcome"]: row["answers"] for row in orjson.loads(sent.out)}


def test_every_lifecycle_arrives_as_it_was_lived(deployment: Deployment) -> None:
    """Each event of each lifecycle is one transition: in order, gap-free, expected."""
    names = tuple(LIFECYCLES)
    sessions = _sent(1, 3, names)
    total = sum(len(events) for lives in sessions.values() for events in lives)
    assert _send(deployment, *names, "--count", "3", seed=1) == {"admitted": total}
    ids = {events[0].session_id for lives in sessions.values() for events in lives}
    moves = deployment.settled(ids, total)
    for name, lives in sessions.items():
        path = [_status(step) for step in LIFECYCLES[name]]
        for events in lives:
            written = moves[events[0].session_id]
            assert [line["event_id"] for line in written] == [one.id for one in events]
            assert [line["current"] for line in written] == path
            assert [line["previous"] for line in written] == [None, *path[:-1]]
            assert [line["sequence"] for line in written] == [*range(1, len(path) + 1)]
            # An approval on review looks like a check that was missed.
            expected = [name != "approved-on-review" or one is not written[-1] for one in written]
            assert [line["expected"] for line in written] == expected
            reversals = [name == "rejected-on-review" and one is written[-1] for one in written]
            assert [line["reversal"] for line in written] == reversals


def test_disorder_ends_in_the_same_states(deployment: Deployment) -> None:
    """Shuffled and doubled, every session ends where it should, never backwards, gap-free."""
    names = tuple(LIFECYCLES)
    sessions = _sent(2, 6, names)
    lives = [(name, events) for name in names for events in sessions[name]]
    total = sum(len(events) for _, events in lives)
    arguments = ("--count", "6", "--shuffle", "--duplicates", "0.5")
    counts = _send(deployment, *names, *arguments, seed=2)
    assert counts["duplicate"] == round(total / 2)
    assert counts["admitted"] + counts.get("late", 0) == total
    ids = {events[0].session_id for _, events in lives}
    moves = deployment.settled(ids, counts["admitted"])
    for name, events in lives:
        written = moves[events[0].session_id]
        assert written[-1]["current"] == _status(LIFECYCLES[name][-1])
        assert [line["sequence"] for line in written] == [*range(1, len(written) + 1)]
        order = {one.id: place for place, one in enumerate(events)}
        places = [order[line["event_id"]] for line in written]
        assert places == sorted(places)
    assert sum(map(len, moves.values())) == counts["admitted"]
    with redis.Redis.from_url(deployment.sandbox.server.url, decode_responses=True) as client:
        for name, events in lives:
            record = client.hgetall(KEYS.session(events[0].session_id))
            length, words = record["status"].split(" ", 1)
            assert words[: int(length)] == _status(LIFECYCLES[name][-1])
            assert {one.id for one in events} <= record.keys()


async def test_of_many_copies_one_is_admitted(deployment: Deployment) -> None:
    """Fifty copies of one event at three receivers at once: one admitted, the rest duplicates."""
    urls = [receiver.url for receiver in deployment.receivers]
    limits = httpx2.Limits(max_connections=COPIES)
    async with httpx2.AsyncClient(limits=limits, timeout=20) as client:
        for number in range(ROUNDS):
            session = f"vs_race{number % 5}"
            body = event(id=f"evt_race{number}", session=session, created=NOW + number)
            answers = await asyncio.gather(
                *(
                    client.post(urls[copy % 3], content=body, headers=signed(body))
                    for copy in range(COPIES)
                )
            )
            outcomes = Counter(answer.json()["outcome"] for answer in answers)
            first = "admitted" if number < 5 else "unchanged"
            assert outcomes == {first: 1, "duplicate": COPIES - 1}
    ids = {f"vs_race{number}" for number in range(5)}
    moves = await asyncio.to_thread(deployment.settled, ids, 5)
    assert [len(lines) for lines in moves.values()] == [1] * 5


async def test_what_was_acknowledged_survives_kill_9(deployment: Deployment) -> None:
    """A receiver killed under load has acknowledged nothing that Redis does not hold."""
    victim = deployment.sandbox.start("serve").ready()
    acknowledged: list[tuple[str, str]] = []
    limits = httpx2.Limits(max_connections=16)

    async def post(client: httpx2.AsyncClient, sender: int) -> None:
        for number in range(10_000):
            session, event_id = f"vs_kill{sender}_{number}", f"evt_kill{sender}_{number}"
            body = event(id=event_id, session=session)
            response = await client.post(victim.url, content=body, headers=signed(body))
            if response.status_code == 200:
                acknowledged.append((session, event_id))

    async with httpx2.AsyncClient(limits=limits) as client:
        senders = [asyncio.create_task(post(client, sender)) for sender in range(16)]
        await until(lambda: len(acknowledged) >= 200)
        victim.popen.kill()
        ended = await asyncio.gather(*senders, return_exceptions=True)
    assert all(isinstance(one, httpx2.RequestError) for one in ended)
    with redis.Redis.from_url(deployment.sandbox.server.url) as asked:
        missing = [
            event_id
            for session, event_id in acknowledged
            if not asked.hexists(KEYS.session(session), event_id)
        ]
    assert missing == []


async def test_a_batch_of_strangers_disturbs_nobody(deployment: Deployment) -> None:
    """Events travel together, but each hears its own answer."""
    bodies = [event(id=f"evt_mix{n}", session=f"vs_mix{n}") for n in range(30)]
    async with httpx2.AsyncClient() as client:
        url = deployment.receivers[0].url
        malformed = [client.post(url, content=b"{}") for _ in range(30)]
        genuine, refused = await asyncio.gather(
            post_all(client, url, bodies), asyncio.gather(*malformed)
        )
    assert {answer.content for answer in genuine} == {b'{"outcome":"admitted"}'}
    assert {answer.content for answer in refused} == {b'{"error":"signature_missing"}'}


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
        async with httpx2.AsyncClient(timeout=20) as client:
            answers = await post_all(client, receiver.url, bodies)
        assert {answer.content for answer in answers} == {b'{"outcome":"admitted"}'}
        worker = ground.start("work", HANDLERS="mine:open", TAKEN=str(taken)).ready()
        await until(lambda: taken.exists() and len(taken.read_text().splitlines()) == 100)
        assert {*taken.read_text().splitlines()} == {f"evt_{n}" for n in range(100)}
        assert (receiver.stop(), worker.stop()) == (0, 0)
