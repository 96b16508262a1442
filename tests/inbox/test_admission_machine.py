"""Admission against a model, searched: records, streams and answers are the model's.

Hypothesis makes up events, notifications, copies, twins of one second, batches, lost replies,
flushed scripts and operators' deletions; after every step everything in Redis is compared. `depth`
says how to search further, and how to repeat a failure.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any
from unittest import mock

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from service.config import Settings
from service.errors import Unavailable
from service.inbox import admission, session_record
from service.inbox.admission import Admission, Inbox
from service.storage.keys import Keys
from service.storage.layout import claim
from service.storage.scripts import ScriptCall
from service.transitions import stream_entry, thin_notification
from service.transitions.thin_notification import Notification
from service.transitions.transition import make_change
from tests.support import session_record_model
from tests.support.admissions import NOW, event_body, make_notification, parsed
from tests.support.depth import SEARCH_TIMEOUT_S, searching
from tests.support.session_record_model import DAY_S, PRUNE_EVERY, Answer, Entry, Epoch, Record
from tests.support.tapped import Tapped, tapped

SESSIONS = ("vs_a", "vs_b", "vs_d")
KEYS = Keys("idv", 2)
# The age limit in days and the most entries of a stream: a plain inbox, one with a low age limit,
# and one whose streams are soon full.
LIMITS = {"plain": (35, 1_000_000), "forgetful": (1, 1_000_000), "full": (35, 2)}

ARGUMENTS_BEFORE_EVENTS, ARGUMENTS_PER_EVENT, NONCE = 8, 8, 1

SHAPES = st.fixed_dictionaries(
    {
        "session": st.sampled_from(SESSIONS),
        "step": st.sampled_from(
            ["created", "processing", "requires_input", "verified", "canceled", "redacted", "new"]
        ),
        "status": st.sampled_from(
            ["requires_input", "processing", "verified", "canceled", "new words, ä 7 "]
        ),
        "at": st.sampled_from(
            [*range(0, 12, 2), 5, 11, 60, 200, 205, 206, 400, 800, -2 * DAY_S, -40 * DAY_S]
        ),
        "error": st.sampled_from([None, None, "document_expired", "abandoned"]),
        "redaction": st.sampled_from(
            [None, None, None, None, "processing", "validated", "redacted"]
        ),
        "report": st.sampled_from([None, None, "vr_1", "vr_2"]),
    }
)
# A longer value would cost a hash its compact encoding.
LISTPACK_VALUE = 64
# Epochs that begin within one millisecond count on from it.
MAX_EPOCHS = 100
INBOXES = st.sampled_from(["plain", "plain", "plain", "forgetful", "full"])
NOTIFICATIONS = st.sampled_from(
    [
        make_notification(id=f"evt_thin_{n}", session=session, at=at)
        for n, (session, at) in enumerate(
            itertools.product(SESSIONS, (0, 5, -2 * DAY_S, -40 * DAY_S))
        )
    ]
)
FAULTS = st.lists(st.sampled_from(["request", "reply"]), max_size=2)


def made(number: int, shape: dict[str, Any]) -> Any:
    """Return an event with an id of its own."""
    return event_body(id=f"evt_{number}", **shape)


def kind_of(status: str, *, is_step: bool) -> str:
    """Return the letter that a record has for an event: a capital one for a final status."""
    kind = "s" if is_step else "r"
    return kind.upper() if status in session_record_model.FINAL else kind


class Bench:
    """What all the examples of a search share."""

    def __init__(
        self, runner: asyncio.Runner, tap: Tapped, make_settings: Callable[..., Settings]
    ) -> None:
        self.run = runner.run
        self.tap = tap
        self.client = tap.client
        self._make_settings = make_settings

    def inbox(self, name: str = "plain") -> Inbox:
        """Return an inbox of the kind of that name."""
        days, entries = LIMITS[name]
        limited = self._make_settings(max_event_age_days=days, stream_max_entries=entries)
        return Inbox(self.tap, KEYS, limited)


class AdmissionMachine(RuleBasedStateMachine):
    """Admits events, and compares answers and everything stored with the model."""

    events: Bundle[Any] = Bundle("events")

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench = bench
        self.client = bench.client
        bench.run(self.client.flushall())
        bench.run(claim(bench.tap, KEYS))
        bench.tap.calls.clear()
        self.inboxes = {name: bench.inbox(name) for name in LIMITS}
        self.model = session_record_model.Model(KEYS.partition)
        self.numbers = itertools.count()
        self.nonces: set[str] = set()
        self.asked: list[tuple[ScriptCall, list[Any], str]] = []
        self.hashes: dict[tuple[Any, ...], bytes] = {}
        self.servers: dict[int, bytes] = {}
        self.began_ms = time.time_ns() // 10**6

    def send(self, events: list[Any], name: str, faults: Iterable[str] = ()) -> None:
        """Send events and notifications in one loop turn; compare each answer with the model's."""
        self.bench.tap.faults.extend(faults)
        inbox = self.inboxes[name]

        def decide(one: Any) -> Awaitable[Admission]:
            if isinstance(one, Notification):
                return inbox.note(one)
            event = parsed(one)
            return inbox.admit(event, make_change(event))

        async def together() -> list[Admission | BaseException]:
            return await asyncio.gather(*map(decide, events), return_exceptions=True)

        answers = self.bench.run(together())
        call = self.admissions()[-1]
        nonces = self.nonces_of(call)
        assert not self.nonces & {*nonces}
        assert len({*nonces}) == len(events)
        self.nonces.update(nonces)
        self.asked.append((call, events, name))
        for fault in (*faults, "none"):
            if fault != "request":
                expected = self.expected_answers(call, events, name)
        assert [self.words(answer) for answer in answers] == expected

    def admissions(self) -> list[ScriptCall]:
        """Return the calls that admit events, without those that trim."""
        return [call for call in self.bench.tap.calls if call.script is admission._ADMIT]

    def expected_answers(self, call: ScriptCall, events: list[Any], name: str) -> list[Answer]:
        """Return the model's answers to a call as it was made, nonces included."""
        days, entries = LIMITS[name]
        limits: Any = {"now": time.time(), "age_limit_s": days * DAY_S, "max_entries": entries}
        answers = []
        for event, nonce in zip(events, self.nonces_of(call), strict=True):
            decide = self.model.note if isinstance(event, Notification) else self.model.admit
            answers.append(decide(event, nonce, **limits))
        return answers

    @staticmethod
    def nonces_of(call: ScriptCall) -> list[str]:
        """Return the nonce that goes with each event of a call."""
        nonces = call.arguments[ARGUMENTS_BEFORE_EVENTS + NONCE :: ARGUMENTS_PER_EVENT]
        return [str(nonce) for nonce in nonces]

    @staticmethod
    def words(answer: Admission | BaseException) -> Answer:
        """Return an answer as the model would give it."""
        if isinstance(answer, Unavailable):
            return Answer({"backlog_full": "full"}.get(str(answer), str(answer)))
        assert isinstance(answer, Admission), answer
        return Answer(str(answer.outcome), answer.sequence, answer.previous, answer.after_final)

    @rule(target=events, shape=SHAPES, name=INBOXES, faults=FAULTS)
    def arrive(self, shape: dict[str, Any], name: str, faults: list[str]) -> Any:
        """A new event arrives, its replies perhaps lost."""
        event = made(next(self.numbers), shape)
        self.send([event], name, faults)
        return event

    @rule(event=events, name=INBOXES)
    def arrive_again(self, event: Any, name: str) -> None:
        """A copy of an event arrives."""
        self.send([event], name)

    @rule(target=events, event=events, shape=SHAPES)
    def arrive_twin(self, event: Any, shape: dict[str, Any]) -> Any:
        """Another event of the same session and the same second arrives."""
        of_event = {"session": event["data"]["object"]["id"], "at": event["created"] - NOW}
        twin = made(next(self.numbers), shape | of_event)
        self.send([twin], "plain")
        return twin

    @rule(
        target=events,
        copies=st.lists(events, max_size=4),
        others=st.lists(SHAPES | NOTIFICATIONS, max_size=6),
        turn=st.integers(0, 8),
        name=INBOXES,
        faults=FAULTS,
    )
    def arrive_together(
        self,
        copies: list[Any],
        others: list[dict[str, Any] | Notification],
        turn: int,
        name: str,
        faults: list[str],
    ) -> MultipleResults[Any]:
        """Old and new events and notifications share a batch, some of them twice."""
        fresh = [
            one if isinstance(one, Notification) else made(next(self.numbers), one)
            for one in others
        ]
        batch = [*fresh, *copies]
        if batch:
            self.send(batch[turn:] + batch[:turn], name, faults)
        return multiple(*(one for one in fresh if not isinstance(one, Notification)))

    @rule(notification=NOTIFICATIONS, name=INBOXES, faults=FAULTS)
    def notify(self, notification: Notification, name: str, faults: list[str]) -> None:
        """A notification arrives, perhaps once more, its replies perhaps lost."""
        self.send([notification], name, faults)

    @rule(partition=st.integers(0, KEYS.partitions - 1))
    def fetch(self, partition: int) -> None:
        """A worker has fetched the events of all notifications, and deletes their entries."""
        self.bench.run(self.client.xtrim(KEYS.notifications(partition), maxlen=0))
        self.model.notifications[partition] = []

    @rule(shape=SHAPES, old=st.booleans())
    def arrive_in_numbers(self, shape: dict[str, Any], *, old: bool) -> None:
        """A record grows to where it is pruned, but not to where it is pruned at random."""
        record = self.model.records.get(shape["session"])
        if record and record.fields > 2 * PRUNE_EVERY - 30:
            return
        at = -2 * DAY_S if old else 100
        steps = itertools.cycle(["requires_input", "processing"])
        shapes = [
            shape | {"at": at + 10 * n, "step": step, "status": step}
            for n, step in zip(range(15), steps)  # noqa: B905 - endless
        ]
        self.send([made(next(self.numbers), one) for one in shapes], "plain")

    @rule(event=events)
    def arrive_at_two_replicas(self, event: Any) -> None:
        """Two copies arrive at two replicas at the same moment."""
        two = [self.bench.inbox() for _ in range(2)]
        before = len(self.admissions())

        async def at_once() -> list[Admission]:
            return await asyncio.gather(*(one.admit(found, make_change(found)) for one in two))

        found = parsed(event)
        answers = [self.words(answer) for answer in self.bench.run(at_once())]
        order = sorted((0, 1), key=lambda n: answers[n].outcome == "duplicate")
        for n in order:
            call = self.admissions()[before + n]
            assert [answers[n]] == self.expected_answers(call, [event], "plain")

    @rule(which=st.integers(0, 10**6))
    def ask_again(self, which: int) -> None:
        """A caller whose reply was lost long ago asks again under its old nonces."""
        if not self.asked:
            return
        call, events, name = self.asked[which % len(self.asked)]
        [replies] = self.bench.run(self.bench.tap.run([call]))
        expected = self.expected_answers(call, events, name)
        found = [reply.decode().split(" ", 3) for reply in replies]
        assert [(one[0], int(one[1]), one[3]) for one in found] == [
            (one.outcome, one.sequence, one.previous or "") for one in expected
        ]

    @rule()
    def flush_scripts(self) -> None:
        """The server forgets the scripts."""
        self.bench.run(self.client.script_flush())

    @rule()
    def change_server(self) -> None:
        """Redis is demoted and promoted: it may have lost its last writes."""
        self.bench.run(self.client.replicaof("127.0.0.1", "1"))
        self.bench.run(self.client.replicaof("NO", "ONE"))
        self.model.change_server()

    @rule(session=st.sampled_from(SESSIONS))
    def delete_record(self, session: str) -> None:
        """An operator deletes a session's record: the session begins anew."""
        self.bench.run(self.client.delete(KEYS.session(session)))
        self.model.records.pop(session, None)

    @rule(partition=st.integers(0, KEYS.partitions - 1))
    def trim(self, partition: int) -> None:
        """The stream is trimmed."""
        self.bench.run(self.client.xtrim(KEYS.transitions(partition), maxlen=0))
        self.model.streams[partition] = []

    @invariant()
    def all_is_the_models(self) -> None:
        """Records and streams are the model's, whole."""
        found = self.bench.run(self.everything())
        records, streams = found[: len(SESSIONS)], found[len(SESSIONS) :][: KEYS.partitions]
        for session, fields in zip(SESSIONS, records, strict=True):
            record = self.model.records.get(session)
            if record is None:
                assert not fields
            else:
                self.learn(record, fields)
                entries = streams[KEYS.partition(session)]
                assert self.without_arrivals(fields, entries) == self.hash_of(record)
        for partition, entries in enumerate(streams):
            self.check_stream(entries, self.model.streams.get(partition, []))
        for partition, entries in enumerate(found[-KEYS.partitions :]):
            waiting = [thin_notification.unpack(fields) for _, fields in entries]
            assert waiting == self.model.notifications.get(partition, [])

    async def everything(self) -> list[Any]:
        """Return every session's hash and every stream."""
        pipeline = self.client.pipeline(transaction=False)
        for session in SESSIONS:
            pipeline.hgetall(KEYS.session(session))
        for partition in range(KEYS.partitions):
            pipeline.xrange(KEYS.transitions(partition))
        for partition in range(KEYS.partitions):
            pipeline.xrange(KEYS.notifications(partition))
        found: list[Any] = await pipeline.execute()
        return found

    @staticmethod
    def check_stream(entries: list[Any], expected: list[Entry]) -> None:
        """Check that a stream holds what was admitted, in order, as handlers will read it."""
        found = [stream_entry.unpack(fields) for _, fields in entries]
        assert [
            (one.event_id, one.current, one.previous, one.sequence, one.epoch) for one in found
        ] == [
            (
                one.event["id"],
                session_record_model.status_of(one.event),
                one.previous,
                one.sequence,
                one.epoch.began_ms,
            )
            for one in expected
        ]

    def learn(self, record: Record, found: dict[bytes, bytes]) -> None:
        """Take from a hash what the model cannot know: when its epoch began, and its state hash."""
        _, began_ms, server, digest, _ = found[b"state"].split(b" ")
        epoch = record.epoch
        assert epoch is not None
        if epoch.began_ms is None:
            epoch.began_ms = int(began_ms)
            assert self.began_ms <= epoch.began_ms <= time.time_ns() // 10**6 + MAX_EPOCHS
            self.check_order(epoch)
        assert server == self.servers.setdefault(epoch.server, server)
        assert len({*self.servers.values()}) == len(self.servers)
        assert digest == self.hashes.setdefault(record.state, digest)
        assert len({*self.hashes.values()}) == len(self.hashes)

    def without_arrivals(
        self, fields: dict[bytes, bytes], entries: list[Any]
    ) -> dict[bytes, bytes]:
        """Check when each event arrived, and return a hash without that.

        That of a transition is the id of its entry, unless it was trimmed.
        """
        in_stream = {
            stream_entry.unpack(each).event_id.encode(): entry_id.decode()
            for entry_id, each in entries
        }
        found = {}
        for name, value in fields.items():
            found[name] = value
            if name.startswith(b"evt_"):
                assert len(value) < LISTPACK_VALUE
                event = session_record.known_event(name, value)
                assert (event.entry_id is not None) == (event.outcome == "admitted")
                # An event may be late now whose transition a record that was deleted had.
                assert event.entry_id in {None, in_stream.get(name, event.entry_id)}
                latest_ms = time.time_ns() // 10**6 + MAX_EPOCHS
                assert self.began_ms <= event.arrived_ms <= latest_ms
                found[name] = value.rpartition(b" ")[0]
        return found

    @staticmethod
    def check_order(epoch: Epoch) -> None:
        """Check that an epoch is above all earlier ones of the session."""
        above, began_ms = epoch.above, epoch.began_ms
        while above is not None:
            if above.began_ms is not None:
                assert began_ms is not None
                assert began_ms > above.began_ms
            above = above.above

    def hash_of(self, record: Record) -> dict[bytes, bytes]:
        """Return a record as its hash must be."""
        digest, status = self.hashes[record.state].decode(), str(record.status)
        epoch = record.epoch
        assert epoch is not None
        server = self.servers[epoch.server].decode()
        kind = kind_of(status, is_step=record.is_from_step)
        length = len(status.encode())
        fields = {
            "state": f"{record.sequence} {epoch.began_ms} {server} {digest} {kind}",
            "latest": self.packed(record.latest),
            **({"result": self.packed(record.result)} if record.has_earlier_result else {}),
            "status": f"{length} {status}{record.previous or ''}",
            **({"duplicates": record.duplicates} if record.duplicates else {}),
            **{
                name: " ".join(map(str, (seen.outcome[0], *seen[1:])))
                for name, seen in record.seen.items()
            },
        }
        return {name.encode(): str(value).encode() for name, value in fields.items()}

    @staticmethod
    def packed(event: Any) -> str:
        """Return an event as a hash holds the latest event or the latest result."""
        is_step = session_record_model.is_step(event)
        kind = kind_of(session_record_model.status_of(event), is_step=is_step)
        order = session_record_model.order_of(event)
        return f"{kind} {order.order_key} {order.event_id}"

    def teardown(self) -> None:
        """Check that every record that is left has a time to live."""
        for session in self.model.records:
            assert self.bench.run(self.client.ttl(KEYS.session(session))) > 399 * DAY_S


@pytest.mark.timeout(SEARCH_TIMEOUT_S)
def test_redis_holds_what_the_model_says(make_settings: Callable[..., Settings]) -> None:
    """Answers, sequences, epochs, order keys and streams are the model's, after every step."""
    assert {KEYS.partition(session) for session in SESSIONS} == {0, 1}
    at_once = mock.patch.object(admission, "RETRY_INITIAL_DELAY_S", 0.0)
    with at_once, tapped(make_settings().redis_url) as (runner, tap):
        # Any factory does at run time, whatever the annotation says.
        machine: Any = partial(AdmissionMachine, Bench(runner, tap, make_settings))
        run_state_machine_as_test(machine, settings=searching(60, steps=30))
