"""The laws of the whole way: HTTP at its beginning, and at its end every queue that is there.

One receiver and one worker, real processes, take sessions of every lifecycle, shuffled and
doubled, to five kinds of queues at once; in the middle the worker is killed. TEST_SESSIONS says
how many sessions live.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter, defaultdict
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import ExitStack
from importlib import import_module
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import orjson
import pytest
import redis

from service.operations.sender import Summary, plan, send
from service.operations.synthetic_events import LIFECYCLES, SyntheticEvent, lifecycle_events
from service.storage.layout import Keys
from service.transitions import cloudevents, stream_entry
from tests.support.brokers.broker import Broker, Received
from tests.support.harness import SECRET, Process, Sandbox, eventually, open_sandbox, soon

QUEUES = ("redis_stream", "rabbitmq", "nats", "kafka", "sqs")
KEYS = Keys("idv", 8)
SESSIONS = int(os.environ.get("TEST_SESSIONS", "200"))
DUPLICATES = 0.4
LIVES_BEGAN_S = int(time.time()) - 5 * 86_400
DEADLINE_S = 120 + SESSIONS / 2

pytestmark = [
    pytest.mark.xdist_group("everything"),
    pytest.mark.timeout(2 * DEADLINE_S),
]

Lives = dict[str, list[SyntheticEvent]]


class Way(NamedTuple):
    """What went in at one end, and what came out at the others.

    Attributes:
        orderly: The events of each session whose events were posted one after the other.
        disorderly: Those of sessions whose events were posted all at once.
        answers: How the posts were answered, added up.
        handed_over: The messages of each session that the ledger's streams stand for.
        received: What came to each queue, in the queue's order.
        absent: Why a queue is not there.
        dead: How many dead letters there are.
    """

    orderly: Lives
    disorderly: Lives
    answers: Mapping[str, int]
    handed_over: Mapping[str, list[cloudevents.Message]]
    received: Mapping[str, list[Received]]
    absent: Mapping[str, str]
    dead: int


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Way]:
    """Go the whole way once."""
    directory = tmp_path_factory.mktemp("everything")
    with ExitStack() as running:
        queues, absent = _queues(running, directory)
        opened = running.enter_context(open_sandbox(directory))
        yield _gone(opened, queues, absent)


def _queues(running: ExitStack, directory: Path) -> tuple[dict[str, Broker], dict[str, str]]:
    """Start and empty every queue that can be had; return them, and why the others are not."""
    queues: dict[str, Broker] = {}
    absent: dict[str, str] = {}
    for name in QUEUES:
        try:
            queues[name] = running.enter_context(
                import_module(f"tests.support.brokers.{name}").run_broker(directory)
            )
        except pytest.skip.Exception as skipped:
            absent[name] = str(skipped)
        else:
            asyncio.run(queues[name].empty())
    return queues, absent


def _gone(sandbox: Sandbox, queues: Mapping[str, Broker], absent: Mapping[str, str]) -> Way:
    random = Random(20)
    orderly, disorderly = (_lives(random, SESSIONS // 2) for _ in range(2))
    settings = {"HANDLERS": ",".join(queues), "LEASE_TTL_S": "1", "ADMIT_DEADLINE_S": "30"}
    for queue in queues.values():
        settings |= queue.environ()
    receiver, killed = (sandbox.start(command, **settings) for command in ("serve", "work"))
    receiver.ready()
    killed.ready()
    with redis.Redis.from_url(sandbox.server.url) as ledger:

        async def posted() -> dict[str, int]:
            posting = _post(receiver.url, orderly, disorderly, random)
            return (await asyncio.gather(posting, _kill(killed, ledger, SESSIONS)))[0]

        answers = asyncio.run(posted())
        worker = sandbox.start("work", **settings).ready()
        soon(lambda: _is_settled(ledger, len(queues)), DEADLINE_S)
        handed_over = _handed_over(ledger)
        dead = sum(ledger.xlen(KEYS.dead_letters(n, name)) for n in range(8) for name in queues)
    received = {name: asyncio.run(queue.received()) for name, queue in queues.items()}
    _in_good_order(receiver, worker)
    return Way(orderly, disorderly, answers, handed_over, received, absent, dead)


def _lives(random: Random, count: int) -> Lives:
    lived = (
        lifecycle_events(name, random=random, started_at=LIVES_BEGAN_S)
        for name in islice(cycle(LIFECYCLES), count)
    )
    return {events[0].session_id: events for events in lived}


async def _post(url: str, orderly: Lives, disorderly: Lives, random: Random) -> dict[str, int]:
    """Post everything, from two sides at once; return how it was answered."""

    def posting(lives: Lives, *, shuffle: bool) -> Coroutine[Any, Any, Summary]:
        events = [event for life in lives.values() for event in life]
        deliveries = plan(events, duplicates=DUPLICATES, shuffle=shuffle, random=random)
        return send(deliveries, to=url, secret=SECRET, concurrency=16)

    summaries = await asyncio.gather(
        posting(orderly, shuffle=False), posting(disorderly, shuffle=True)
    )
    assert all(summary.ok for summary in summaries), summaries
    return sum((Counter(summary.counts) for summary in summaries), Counter())


async def _kill(worker: Process, ledger: redis.Redis, admitted: int) -> None:
    """Kill the worker in the middle of its work: once so many transitions were admitted."""
    await eventually(lambda: _admitted(ledger) >= admitted, DEADLINE_S)
    worker.popen.kill()


def _admitted(ledger: redis.Redis) -> int:
    return sum(ledger.xlen(KEYS.transitions(partition)) for partition in range(8))


def _is_settled(ledger: redis.Redis, handlers: int) -> bool:
    groups = [
        group
        for partition in range(8)
        if ledger.exists(stream := KEYS.transitions(partition))
        for group in ledger.xinfo_groups(stream)
    ]
    left = [group for group in groups if group["pending"] or group["lag"] != 0]
    return len(groups) >= handlers and not left


def _handed_over(ledger: redis.Redis) -> dict[str, list[cloudevents.Message]]:
    found: dict[str, list[cloudevents.Message]] = defaultdict(list)
    for partition in range(8):
        entries: Any = ledger.xrange(KEYS.transitions(partition))
        for _, entry in entries:
            transition = stream_entry.unpack(entry)
            found[transition.session_id].append(cloudevents.message(transition))
    return dict(found)


def _in_good_order(*processes: Process) -> None:
    assert [process.stop() for process in processes] == [0] * len(processes)
    for process in processes:
        assert process.err == b""
        assert b"Traceback" not in process.out


def _consumed(received: Iterable[Received]) -> dict[str, list[Received]]:
    """Do what a consumer is told to do: ignore a sequence that is not above the last one seen."""
    taken: dict[str, list[Received]] = defaultdict(list)
    for one in received:
        session = one.headers["subject"]
        last = int(taken[session][-1].headers["sessionsequence"]) if taken[session] else 0
        if int(one.headers["sessionsequence"]) > last:
            taken[session].append(one)
    return dict(taken)


def test_every_post_has_its_place(way: Way) -> None:
    """Each event is admitted or late, each copy a duplicate, and what is admitted handed over."""
    events = sum(len(life) for lives in (way.orderly, way.disorderly) for life in lives.values())
    assert way.answers["admitted"] + way.answers["late"] == events
    assert way.answers["duplicate"] == sum(way.answers.values()) - events
    assert way.answers["duplicate"] >= DUPLICATES * events - 1
    assert way.answers["admitted"] == sum(map(len, way.handed_over.values()))


def test_what_was_in_order_comes_whole_and_what_was_not_ends_right(way: Way) -> None:
    """Orderly sessions keep every step; the others skip some, and end where they should."""
    for session, life in way.orderly.items():
        assert [one.id for one in way.handed_over[session]] == [event.id for event in life]
    for session, life in way.disorderly.items():
        place = {event.id: n for n, event in enumerate(life)}
        places = [place[one.id] for one in way.handed_over[session]]
        assert places == sorted(places)
        assert places[-1] == len(life) - 1


@pytest.mark.parametrize("queue", QUEUES)
def test_a_consumer_gets_each_transition_once_and_in_order(way: Way, queue: str) -> None:
    """By the documented rule: all there, gap-free, in order, ids unique, and to the byte."""
    if queue in way.absent:
        pytest.skip(way.absent[queue])
    received = way.received[queue]
    taken = _consumed(received)
    assert taken.keys() == way.handed_over.keys()
    for session, wanted in way.handed_over.items():
        assert [one.body for one in taken[session]] == [message.body for message in wanted]
        sent = [orjson.loads(one.body) for one in taken[session]]
        assert [int(one["sessionsequence"]) for one in sent] == [*range(1, len(wanted) + 1)]
        assert len({one["data"]["epoch"] for one in sent}) == 1
    ids = [one.headers["id"] for each in taken.values() for one in each]
    assert len(set(ids)) == len(ids)
    # A repeat is the very same message, and never something else.
    assert {one.body for one in received} == {
        message.body for each in way.handed_over.values() for message in each
    }


@pytest.mark.parametrize("queue", QUEUES)
def test_first_deliveries_are_in_order(way: Way, queue: str) -> None:
    """Whatever was repeated after the kill, no sequence came before the one below it."""
    if queue in way.absent:
        pytest.skip(way.absent[queue])
    first: dict[str, dict[int, None]] = defaultdict(dict)
    for one in way.received[queue]:
        first[one.headers["subject"]][int(one.headers["sessionsequence"])] = None
    for sequences in first.values():
        assert [*sequences] == [*range(1, len(sequences) + 1)]


def test_nothing_died_on_the_way(way: Way) -> None:
    """A killed worker is no reason for a dead letter."""
    assert way.dead == 0
