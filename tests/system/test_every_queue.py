"""The whole way from HTTP to every queue that is installed.

A receiver and a worker, as real processes, deliver sessions of every lifecycle, shuffled and
duplicated, to five kinds of queues at once. In between the worker is killed. TEST_SESSIONS is the
number of sessions.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter, defaultdict
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, cycle, islice
from random import Random
from typing import Any, NamedTuple

import orjson
import pytest
import redis

from service.operations.sender import Summary, plan, send
from service.operations.synthetic_events import LIFECYCLES, SyntheticEvent, lifecycle_events
from service.storage.keys import Keys
from service.transitions import cloudevents, stream_entry
from tests.support.brokers.broker import Broker, Received
from tests.support.brokers.installed import start_installed
from tests.support.harness import SECRET
from tests.support.processes import Process, Sandbox, open_sandbox
from tests.support.streams import count_unsettled
from tests.support.waiting import until, wait_until

QUEUES = ("redis_stream", "rabbitmq", "nats", "kafka", "sqs")
KEYS = Keys("idv", 8)
SESSIONS = int(os.environ.get("TEST_SESSIONS", "200"))
DUPLICATES = 0.4
STARTED_AT = int(time.time()) - 5 * 86_400
DEADLINE_S = 120 + SESSIONS / 2

pytestmark = [pytest.mark.xdist_group("everything"), pytest.mark.timeout(2 * DEADLINE_S)]

Sessions = dict[str, list[SyntheticEvent]]


class Run(NamedTuple):
    """What was sent and what was received.

    Attributes:
        ordered: Events by session, of sessions whose events were posted in order.
        shuffled: Events by session, of sessions whose events were posted in random order.
        outcomes: The number of responses with each outcome.
        admitted: The messages of each session, as the streams in Redis have them.
        received: The messages on each queue, in the queue's order.
        absent: Why a queue is not tested.
        dead_letters: The number of dead letters.
    """

    ordered: Sessions
    shuffled: Sessions
    outcomes: Mapping[str, int]
    admitted: Mapping[str, list[cloudevents.Message]]
    received: Mapping[str, list[Received]]
    absent: Mapping[str, str]
    dead_letters: int


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run everything once."""
    directory = tmp_path_factory.mktemp("everything")
    with ExitStack() as running:
        queues, absent = start_installed(QUEUES, running, directory)
        opened = running.enter_context(open_sandbox(directory))
        yield _run(opened, queues, absent)


def _run(sandbox: Sandbox, queues: Mapping[str, Broker], absent: Mapping[str, str]) -> Run:
    random = Random(20)
    ordered, shuffled = (_sessions(random, SESSIONS // 2) for _ in range(2))
    settings = {"HANDLERS": ",".join(queues), "LEASE_TTL_S": "1"}
    for queue in queues.values():
        settings |= queue.environ()
    receiver, killed = (sandbox.start(command, **settings) for command in ("serve", "work"))
    receiver.ready()
    killed.ready()
    with redis.Redis.from_url(sandbox.server.url) as store:

        async def posted() -> dict[str, int]:
            posting = _post(receiver.url, ordered, shuffled, random)
            return (await asyncio.gather(posting, _kill(killed, store, SESSIONS)))[0]

        outcomes = asyncio.run(posted())
        worker = sandbox.start("work", **settings).ready()
        wait_until(lambda: _is_settled(store, queues), DEADLINE_S)
        admitted = _admitted_messages(store)
        dead = sum(store.xlen(KEYS.dead_letters(n, name)) for n in range(8) for name in queues)
    received = {name: asyncio.run(queue.received()) for name, queue in queues.items()}
    _stop_cleanly(receiver, worker)
    return Run(ordered, shuffled, outcomes, admitted, received, absent, dead)


def _sessions(random: Random, count: int) -> Sessions:
    created = (
        lifecycle_events(name, random=random, started_at=STARTED_AT)
        for name in islice(cycle(LIFECYCLES), count)
    )
    return {events[0].session_id: events for events in created}


async def _post(url: str, ordered: Sessions, shuffled: Sessions, random: Random) -> dict[str, int]:
    """Post all events from two clients; return the number of responses with each outcome."""

    def posting(sessions: Sessions, *, shuffle: bool) -> Coroutine[Any, Any, Summary]:
        events = [*chain.from_iterable(sessions.values())]
        deliveries = plan(events, duplicates=DUPLICATES, shuffle=shuffle, random=random)
        return send(deliveries, to=url, secret=SECRET, concurrency=16)

    summaries = await asyncio.gather(
        posting(ordered, shuffle=False), posting(shuffled, shuffle=True)
    )
    assert all(summary.ok for summary in summaries), summaries
    return sum((Counter(summary.counts) for summary in summaries), Counter())


async def _kill(worker: Process, store: redis.Redis, admitted: int) -> None:
    """Kill the worker once *admitted* transitions are in the streams."""
    await until(lambda: _count_admitted(store) >= admitted, DEADLINE_S)
    worker.popen.kill()


def _count_admitted(store: redis.Redis) -> int:
    return sum(store.xlen(KEYS.transitions(partition)) for partition in range(8))


def _is_settled(store: redis.Redis, handlers: Iterable[str]) -> bool:
    streams = [KEYS.transitions(partition) for partition in range(8)]
    return not any(count_unsettled(store, stream, name) for stream in streams for name in handlers)


def _admitted_messages(store: redis.Redis) -> dict[str, list[cloudevents.Message]]:
    found: dict[str, list[cloudevents.Message]] = defaultdict(list)
    for partition in range(8):
        entries: Any = store.xrange(KEYS.transitions(partition))
        for _, entry in entries:
            transition = stream_entry.unpack(entry)
            found[transition.session_id].append(cloudevents.message(transition))
    return dict(found)


def _stop_cleanly(*processes: Process) -> None:
    assert [process.stop() for process in processes] == [0] * len(processes)
    for process in processes:
        assert process.err == b""
        assert b"Traceback" not in process.out


def _consumed(received: Iterable[Received]) -> dict[str, list[Received]]:
    """Return what a consumer acts on that ignores a sequence not above the last one."""
    taken: dict[str, list[Received]] = defaultdict(list)
    for one in received:
        session = one.headers["subject"]
        last = int(taken[session][-1].headers["sessionsequence"]) if taken[session] else 0
        if int(one.headers["sessionsequence"]) > last:
            taken[session].append(one)
    return dict(taken)


@pytest.mark.parametrize("queue", QUEUES)
def test_a_consumer_gets_each_transition_once_and_in_order(run: Run, queue: str) -> None:
    """A consumer gets exactly the admitted messages, in order, without a gap or repeat."""
    if queue in run.absent:
        pytest.skip(run.absent[queue])
    received = run.received[queue]
    taken = _consumed(received)
    assert taken.keys() == run.admitted.keys()
    for session, wanted in run.admitted.items():
        assert [one.body for one in taken[session]] == [message.body for message in wanted]
        sent = [orjson.loads(one.body) for one in taken[session]]
        assert [int(one["sessionsequence"]) for one in sent] == [*range(1, len(wanted) + 1)]
        assert len({one["data"]["epoch"] for one in sent}) == 1
    ids = [one.headers["id"] for each in taken.values() for one in each]
    assert len(set(ids)) == len(ids)
    # A repeat is the same message to the byte.
    assert {one.body for one in received} == {
        message.body for each in run.admitted.values() for message in each
    }


@pytest.mark.parametrize("queue", QUEUES)
def test_first_deliveries_are_in_order(run: Run, queue: str) -> None:
    """Even with repeats after the kill, no sequence came before the one below it."""
    if queue in run.absent:
        pytest.skip(run.absent[queue])
    first: dict[str, dict[int, None]] = defaultdict(dict)
    for one in run.received[queue]:
        first[one.headers["subject"]][int(one.headers["sessionsequence"])] = None
    for sequences in first.values():
        assert [*sequences] == [*range(1, len(sequences) + 1)]


def test_a_killed_worker_causes_no_dead_letter(run: Run) -> None:
    """No message became a dead letter."""
    assert run.dead_letters == 0
