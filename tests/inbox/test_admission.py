"""Laws of the way in: what one event makes of the ledger and of the streams, whatever happens."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.config import DAY_S, Durability, Settings
from service.errors import Unavailable, UnavailableReason
from service.inbox.admission import Admission, Inbox, Outcome
from service.operations.synthetic_events import LIFECYCLES, lifecycle_events
from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.layout import Keys
from service.storage.scripts import Script
from service.stripe.events import Event, parse
from service.stripe.signatures import VerifiedPayload
from service.telemetry import metrics
from service.transitions import stream_entry
from service.transitions.transition import StatusTransition, make_change
from tests.support import session_record_model
from tests.support.depth import searching
from tests.support.proxy import Fault, proxy_to
from tests.support.servers import PATIENCE_S, Server, server, until
from tests.support.session_record_model import place_of, story_of
from tests.support.virtual_time import push

NOW = int(time.time()) - 3600
PREFIX = "identity.verification_session."
# Longer than anything here takes: it passes when a test pushes the clock.
DEADLINE_S = 600.0
STATE = ("sequence", "epoch", "server", "hash", "kind")
EVENT_ID = "evt_1PgafTB7WZ01zgkWKhTeq3Xy"
SESSION_ID = "vs_1PgafTB7WZ01zgkWKhTeq3Xy"


def make_event(
    step: str = "created",
    status: str = "requires_input",
    *,
    id: str | None = None,
    at: int = 0,
    session: str = SESSION_ID,
    error: str | None = None,
    redaction: str | None = None,
    report: str | dict[str, Any] | None = None,
    **more: Any,
) -> Event:
    """Return an event of a session, *at* seconds after NOW."""
    body = {
        "id": id or f"evt_{step}_{NOW + at}",
        "type": PREFIX + step,
        "created": NOW + at,
        "data": {
            "object": {
                "id": session,
                "status": status,
                "last_error": error and {"code": error},
                "redaction": redaction and {"status": redaction},
                "last_verification_report": report,
                **more,
            }
        },
    }
    return parsed(orjson.dumps(body))


def parsed(body: bytes) -> Event:
    """Return the event in *body* as if its signature had been verified."""
    event = parse(VerifiedPayload(body, "fingerprint"))
    assert isinstance(event, Event)
    return event


CREATED = make_event("created", "requires_input", at=0)
PROCESSING = make_event("processing", "processing", at=10)
FAILED = make_event("requires_input", "requires_input", at=20, error="document_expired")
VERIFIED = make_event("verified", "verified", at=40, report="vr_1")


class Ledger(NamedTuple):
    """An inbox, and eyes on everything it wrote."""

    inbox: Inbox
    client: Any
    keys: Keys

    async def admit(self, *events: Event) -> list[Admission]:
        """Admit *events* one after the other."""
        return [await self.inbox.admit(event, make_change(event)) for event in events]

    async def together(self, *events: Event) -> list[Admission | BaseException]:
        """Admit *events* in one loop turn."""
        return await asyncio.gather(
            *(self.inbox.admit(event, make_change(event)) for event in events),
            return_exceptions=True,
        )

    async def record(self, session: str = SESSION_ID) -> dict[str, str]:
        """Return a session's hash, its state by parts."""
        found = await self.client.hgetall(self.keys.session(session))
        fields = {name.decode(): value.decode() for name, value in found.items()}
        if "state" in fields:
            numbers = fields.pop("state").split(" ")
            fields |= zip(STATE, numbers, strict=True)
            length, words = fields["status"].split(" ", 1)
            fields |= {"status": words[: int(length)], "previous": words[int(length) :]}
        return fields

    async def entries(self) -> list[dict[bytes, bytes]]:
        """Return all stream entries, oldest first within each partition."""
        streams = [
            await self.client.xrange(self.keys.transitions(partition))
            for partition in range(self.keys.partitions)
        ]
        return [fields for stream in streams for _, fields in stream]

    async def transitions(self, session: str = SESSION_ID) -> list[StatusTransition]:
        """Return a session's transitions as handlers will read them."""
        found = [stream_entry.unpack(fields) for fields in await self.entries()]
        return [one for one in found if one.session_id == session]


@pytest.fixture
def open_ledger(
    connections: Connections, keys: Keys, make_settings: Callable[..., Settings]
) -> Callable[..., Ledger]:
    """Return a factory of inboxes on the same server, with settings of their own."""

    def make(**changes: Any) -> Ledger:
        inbox = Inbox(connections, keys, make_settings(**changes))
        return Ledger(inbox, connections.client, keys)

    return make


@pytest.fixture
def ledger(connections: Connections, keys: Keys, settings: Settings) -> Ledger:
    """Return an inbox with default settings on an empty server."""
    return Ledger(Inbox(connections, keys, settings), connections.client, keys)


@asynccontextmanager
async def ledger_at(
    url: str, make_settings: Callable[..., Settings], **changes: Any
) -> AsyncIterator[Ledger]:
    """Yield an inbox with clients of its own."""
    chosen = make_settings(redis_url=Secret(url), **changes)
    keys = Keys(chosen.redis_prefix, chosen.partitions)
    async with connect(chosen.redis_url) as connections:
        yield Ledger(Inbox(connections, keys, chosen), connections.client, keys)


def failures(reason: UnavailableReason) -> float:
    """Return how often Redis has failed an attempt for *reason*."""
    return float(metrics.REDIS_ERRORS.labels(reason)._value.get())


async def attempted(reason: UnavailableReason, times: int) -> None:
    """Wait until so many more attempts have failed for *reason*."""
    before = failures(reason)
    await until(lambda: failures(reason) >= before + times)


def outcomes(answers: Sequence[Admission | BaseException]) -> list[str]:
    """Return the words of *answers*: outcomes and the reasons of shortages."""
    return [
        str(answer.outcome) if isinstance(answer, Admission) else str(answer) for answer in answers
    ]


class TestVerdicts:
    """What the script says to one event, and what it writes."""

    async def test_a_first_sight_is_admitted_and_written_whole(self, ledger: Ledger) -> None:
        """The first event of a session makes the record, one entry, and a time to live."""
        event = make_event(id=EVENT_ID)
        [answer] = await ledger.admit(event)

        assert answer == Admission(Outcome.ADMITTED, 1, None, after_final=False)
        record = await ledger.record()
        words = record.pop(EVENT_ID).split(" ")
        assert words[:3] == ["a", "1", str(NOW)]
        assert len(words[3]) == 8
        epoch = int(record.pop("epoch"))
        assert abs(epoch - time.time() * 1000) < 60_000
        assert len(record.pop("hash")) == 16
        replication = await ledger.client.info("replication")
        assert record.pop("server") == replication["master_replid"][:8]
        assert record == {
            "latest": f"s {NOW}0 {EVENT_ID}",
            "status": "requires_input",
            "previous": "",
            "sequence": "1",
            "kind": "s",
        }
        ttl = await ledger.client.ttl(ledger.keys.session(SESSION_ID))
        assert 400 * DAY_S - 60 < ttl <= 400 * DAY_S
        [entry] = await ledger.entries()
        assert entry == {
            b"change": stream_entry.pack(make_change(event)),
            b"previous": b"",
            b"sequence": b"1",
            b"epoch": str(epoch).encode(),
        }

    async def test_a_copy_is_a_duplicate_and_is_counted(self, ledger: Ledger) -> None:
        """The same id again changes nothing but a counter, and tells the first one's sequence."""
        await ledger.admit(CREATED, PROCESSING)
        before = await ledger.record()
        answers = await ledger.admit(CREATED, CREATED)

        assert answers == [Admission(Outcome.DUPLICATE, 1, None, after_final=False)] * 2
        assert await ledger.record() == before | {"duplicates": "2"}
        assert len(await ledger.entries()) == 2

    async def test_an_older_event_is_late(self, ledger: Ledger) -> None:
        """What is older than what the session is is remembered and not handed over."""
        await ledger.admit(PROCESSING)
        before = await ledger.record()
        [answer] = await ledger.admit(CREATED)

        assert answer == Admission(Outcome.LATE, 1, "processing", after_final=False)
        after = await ledger.record()
        assert after.pop(CREATED.id).startswith(f"l 1 {NOW} ")
        assert after == before
        assert outcomes(await ledger.admit(CREATED)) == ["duplicate"]
        assert len(await ledger.entries()) == 1

    async def test_a_late_event_that_is_newer_contradicts(self, ledger: Ledger) -> None:
        """Something after a final status is late, and said to contradict it."""
        after = make_event("processing", "processing", at=50)
        answers = await ledger.admit(VERIFIED, after)

        assert answers[1] == Admission(Outcome.LATE, 1, "verified", after_final=True)

    async def test_an_event_that_changes_nothing_is_unchanged(self, ledger: Ledger) -> None:
        """A second Event object for one change is remembered, and moves only the order key up."""
        twin = make_event("created", "requires_input", id="evt_twin", at=7)
        await ledger.admit(CREATED)
        before = await ledger.record()
        [answer] = await ledger.admit(twin)

        assert answer == Admission(Outcome.UNCHANGED, 1, "requires_input", after_final=False)
        after = await ledger.record()
        assert after.pop("evt_twin").startswith(f"u 1 {NOW + 7} ")
        assert after == before | {"latest": f"s {NOW + 7}0 evt_twin"}
        between = make_event("processing", "processing", at=5)
        assert outcomes(await ledger.admit(between)) == ["late"]
        assert len(await ledger.entries()) == 1

    @pytest.mark.parametrize("event", ["late", "unchanged"])
    async def test_what_changes_nothing_prolongs_the_record_too(
        self, ledger: Ledger, event: str
    ) -> None:
        """A record outlives each event that it remembers by more than the age limit."""
        await ledger.admit(PROCESSING)
        key = ledger.keys.session(SESSION_ID)
        await ledger.client.expire(key, 1000)
        twin = make_event("processing", "processing", id="evt_twin", at=10)
        [answer] = await ledger.admit(CREATED if event == "late" else twin)

        assert answer.outcome == event
        assert await ledger.client.ttl(key) > 399 * DAY_S

    async def test_an_event_beyond_the_horizon_is_expired(self, ledger: Ledger) -> None:
        """What is older than the memory is answered and leaves no trace."""
        old = make_event(at=-36 * DAY_S)
        [answer] = await ledger.admit(old)

        assert answer == Admission(Outcome.EXPIRED, 0, None, after_final=False)
        assert await ledger.record() == {}
        assert await ledger.entries() == []

    async def test_the_horizon_itself_is_admitted(self, ledger: Ledger) -> None:
        """An event a little younger than the horizon is still taken."""
        younger = int(time.time()) - NOW + 100 - 35 * DAY_S

        assert outcomes(await ledger.admit(make_event(at=younger))) == ["admitted"]

    async def test_known_comes_before_expired(self, open_ledger: Callable[..., Ledger]) -> None:
        """An id that is remembered is a duplicate, however old its event is."""
        old = make_event(at=-2 * DAY_S)
        await open_ledger().admit(old)

        assert outcomes(await open_ledger(max_event_age_days=1).admit(old)) == ["duplicate"]

    async def test_expired_comes_before_late(self, open_ledger: Callable[..., Ledger]) -> None:
        """An unknown event beyond the horizon is expired, also where it would be late."""
        narrow = open_ledger(max_event_age_days=1)
        await narrow.admit(PROCESSING)

        assert outcomes(await narrow.admit(make_event(at=-2 * DAY_S))) == ["expired"]

    async def test_late_comes_before_unchanged(self, ledger: Ledger) -> None:
        """An older event is late even when it says what the session already is."""
        await ledger.admit(make_event(at=9))

        assert outcomes(await ledger.admit(make_event(at=5))) == ["late"]

    async def test_a_full_backlog_is_not_remembered(
        self, open_ledger: Callable[..., Ledger]
    ) -> None:
        """Over the cap an event is refused and forgotten, so that a resend is admitted later."""
        capped = open_ledger(stream_max_entries=1)
        await capped.admit(CREATED)
        before = await capped.record()
        with pytest.raises(Unavailable) as refused:
            await capped.admit(PROCESSING)

        assert refused.value.reason is UnavailableReason.BACKLOG_FULL
        assert await capped.record() == before
        stream = capped.keys.transitions(capped.keys.partition(SESSION_ID))
        await capped.client.xtrim(stream, maxlen=0)
        assert outcomes(await capped.admit(PROCESSING)) == ["admitted"]

    async def test_a_full_backlog_still_answers_what_adds_nothing(
        self, open_ledger: Callable[..., Ledger]
    ) -> None:
        """Duplicates, late and unchanged events need no room."""
        capped = open_ledger(stream_max_entries=1)
        twin = make_event("processing", "processing", id="evt_twin", at=10)
        answers = await capped.admit(PROCESSING, PROCESSING, CREATED, twin)

        assert outcomes(answers) == ["admitted", "duplicate", "late", "unchanged"]


class TestOrder:
    """What becomes of a session's story."""

    async def test_two_events_of_one_second_keep_the_newer(self, ledger: Ledger) -> None:
        """Within one second the step decides: the failure after the start of a check is kept."""
        start = make_event("processing", "processing", at=5)
        failure = make_event("requires_input", "requires_input", at=5, error="abandoned")

        assert outcomes(await ledger.admit(failure, start)) == ["admitted", "late"]
        assert (await ledger.record())["status"] == "requires_input"

    async def test_equal_order_keys_are_ordered_by_event_id(
        self, open_ledger: Callable[..., Ledger]
    ) -> None:
        """Two real changes of one second and one type end in one of them, whichever comes first."""
        ledger = open_ledger()
        ids = ["evt_9", "evt_9a", "evt_B", "evt_a", "evt_aB", "evt_ab"]
        for first, second in itertools.combinations(ids, 2):
            one = make_event("requires_input", id=first, at=5, error="document_expired")
            other = make_event("requires_input", id=second, at=5, error="abandoned")

            await ledger.client.flushall()
            assert outcomes(await ledger.admit(one, other)) == ["admitted", "admitted"]
            await ledger.client.flushall()
            assert outcomes(await ledger.admit(other, one)) == ["admitted", "late"]

    @pytest.mark.parametrize("status", ["verified", "canceled"])
    async def test_no_step_sets_a_final_status_back(self, ledger: Ledger, status: str) -> None:
        """Whatever its time, what only began changes nothing that has ended."""
        final = make_event(status, status, at=10)
        steps = [
            make_event("processing", "processing", id=f"evt_{at}", at=at)
            for at in (1, 10, 11, 15, 16, 99, 9999)
        ]

        assert outcomes(await ledger.admit(final, *steps)) == ["admitted"] + ["late"] * 7
        assert (await ledger.record())["status"] == status

    @pytest.mark.parametrize("status", ["verified", "canceled"])
    async def test_a_final_status_is_reversed_by_a_later_result(
        self, ledger: Ledger, status: str
    ) -> None:
        """What Stripe itself changes later is handed on, and so is what it changes after that."""
        earlier = make_event("requires_input", at=9, error="abandoned")
        rejected = make_event("requires_input", id="evt_rejected", at=99)
        approved = make_event("verified", "verified", id="evt_approved", at=200)
        final = make_event(status, status, at=10)
        answers = await ledger.admit(final, earlier, rejected, approved)

        assert outcomes(answers) == ["admitted", "late", "admitted", "admitted"]
        told = await ledger.transitions()
        assert [one.current for one in told] == [status, "requires_input", "verified"]
        assert [one.reversal for one in told] == [False, True, False]

    async def test_a_result_waits_for_no_step(self, ledger: Ledger) -> None:
        """A result some seconds before the step that is known is no older than it."""
        start = make_event("processing", "processing", at=100)
        for at, outcome in ((94, "late"), (95, "admitted")):
            await ledger.client.flushall()
            result = make_event("verified", "verified", at=at)
            assert outcomes(await ledger.admit(start, result)) == ["admitted", outcome]

    async def test_a_step_just_after_a_result_is_its_own(self, ledger: Ledger) -> None:
        """A step some seconds after a known result belongs to it, a later one does not."""
        failure = make_event("requires_input", at=100, error="abandoned")
        for at, outcome in ((105, "late"), (106, "admitted")):
            await ledger.client.flushall()
            start = make_event("processing", "processing", at=at)
            assert outcomes(await ledger.admit(failure, start)) == ["admitted", outcome]

    async def test_redaction_is_compared_with_no_step(self, ledger: Ledger) -> None:
        """What tells of redaction is admitted although it was created long before the step."""
        start = make_event("processing", "processing", at=100)
        erasing = make_event("canceled", "canceled", at=1, redaction="processing")
        later = make_event("processing", "processing", id="evt_later", at=500)

        assert outcomes(await ledger.admit(start, erasing, later)) == [
            *("admitted", "admitted", "late"),
        ]

    async def test_an_unchanged_step_is_the_one_that_counts(self, ledger: Ledger) -> None:
        """After a second event for one step a result before that second one is late."""
        start = make_event("processing", "processing", at=100)
        twin = make_event("processing", "processing", id="evt_twin", at=110)
        failure = make_event("requires_input", at=103, error="abandoned")

        assert outcomes(await ledger.admit(start, twin, failure)) == [
            *("admitted", "unchanged", "late"),
        ]

    async def test_redacted_absorbs(self, ledger: Ledger) -> None:
        """After redaction everything is late, whatever it is and whenever it was created."""
        redacted = make_event("redacted", "verified", at=10, redaction="redacted")
        answers = await ledger.admit(
            redacted, make_event("verified", "verified", at=99), VERIFIED, CREATED
        )

        assert outcomes(answers) == ["admitted", "late", "late", "late"]
        assert (await ledger.record())["status"] == "redacted"

    async def test_a_retry_loop_is_followed(self, ledger: Ledger) -> None:
        """Each step of a loop is told, in order, with gap-free sequence and constant epoch."""
        again = make_event("processing", "processing", at=30, error=None)
        answers = await ledger.admit(CREATED, PROCESSING, FAILED, again, VERIFIED)

        assert [answer.sequence for answer in answers] == [1, 2, 3, 4, 5]
        told = await ledger.transitions()
        assert [(one.previous, one.current) for one in told] == [
            (None, "requires_input"),
            ("requires_input", "processing"),
            ("processing", "requires_input"),
            ("requires_input", "processing"),
            ("processing", "verified"),
        ]
        assert [one.sequence for one in told] == [1, 2, 3, 4, 5]
        assert len({one.epoch for one in told}) == 1
        assert all(one.expected for one in told)

    async def test_a_missed_step_leaves_no_gap(self, ledger: Ledger) -> None:
        """Late and unchanged events take no sequence number."""
        twin = make_event("verified", "verified", id="evt_twin", at=41, report="vr_1")
        redacted = make_event("redacted", "verified", at=60, redaction="redacted")
        answers = await ledger.admit(PROCESSING, CREATED, VERIFIED, twin, FAILED, redacted)

        assert outcomes(answers) == [
            *("admitted", "late", "admitted", "unchanged", "late", "admitted"),
        ]
        assert [one.sequence for one in await ledger.transitions()] == [1, 2, 3]


class TestRecord:
    """The hash: small, pruned, and closed to whatever an id may look like."""

    async def test_it_stays_small(self, ledger: Ledger) -> None:
        """With realistic ids a session of 4 to 8 events is one listpack, of 500 bytes with 4."""
        key = ledger.keys.session(SESSION_ID)
        for n in range(8):
            step = "processing" if n % 2 else "requires_input"
            await ledger.admit(make_event(step, step, id=f"{EVENT_ID[:-1]}{n}", at=n))
            assert await ledger.client.object("ENCODING", key) == b"listpack"
            if n == 3:
                assert await ledger.client.memory_usage(key) <= 500

    async def test_ids_that_cannot_come_again_are_pruned(
        self, open_ledger: Callable[..., Ledger]
    ) -> None:
        """Now and then the ids are forgotten whose events every receiver would call expired."""
        days = [6] * 20 + [2] * 20 + [0] * 21
        story = [
            make_event(
                "processing" if n % 2 else "requires_input",
                str(n),
                id=f"evt_{n:02}",
                at=n - each * DAY_S,
            )
            for n, each in enumerate(days)
        ]
        await open_ledger().admit(*story[:-1])
        narrow = open_ledger(max_event_age_days=3)
        await narrow.admit(story[-1])

        kept = [name for name in await narrow.record() if name.startswith("evt_")]
        assert sorted(kept) == [event.id for event in story[20:]]
        assert outcomes(await narrow.admit(story[0], story[39])) == ["expired", "duplicate"]
        assert (await narrow.record())["sequence"] == "61"

    async def test_ids_that_a_slow_clock_still_admits_are_kept(self, ledger: Ledger) -> None:
        """What is expired here may be young enough for a receiver whose clock is behind."""
        oldest = int(time.time()) - 35 * DAY_S - NOW
        spared = make_event("created", id="evt_spared", at=oldest - 500)
        story = [make_event("processing", str(n), id=f"evt_{n}", at=n) for n in range(61)]
        await ledger.admit(story[0])
        await ledger.client.hset(
            ledger.keys.session(SESSION_ID), spared.id, f"l 1 {spared.created} nonce678"
        )
        await ledger.admit(*story[1:])
        assert outcomes(await ledger.admit(spared)) == ["duplicate"]

    async def test_a_session_of_many_events_stays_bounded(
        self, open_ledger: Callable[..., Ledger]
    ) -> None:
        """However many have come, hardly more than twice those are kept that may come again."""
        narrow = open_ledger(max_event_age_days=3)
        key = narrow.keys.session(SESSION_ID)
        await narrow.admit(CREATED)
        expired = {f"evt_old{n}": f"l 1 {NOW - 9 * DAY_S} nonce678" for n in range(2_000)}
        await narrow.client.hset(key, mapping=expired)
        for n in range(40):
            await narrow.together(
                *(make_event("created", id=f"evt_{n}_{i}", at=-9) for i in range(100))
            )
        assert await narrow.client.hlen(key) < 4_000 + 700

    async def test_an_id_cannot_pose_as_anything_else(self, ledger: Ledger) -> None:
        """Ids of every allowed form stay what they are, the longest and the oddest included."""
        odd = ["evt_position", "evt_" + "_" * 250, "evt_0", "evt_status_sequence"]
        sessions = ["vs_" + "x" * 250, "vs_idv_layout", "vs_0", "vs__transitions"]
        for session in sessions:
            for at, name in enumerate(odd):
                step = ("requires_input", "processing")[at % 2]
                event = make_event(step, step, id=name, session=session, at=10 * at)
                assert outcomes(await ledger.admit(event, event)) == ["admitted", "duplicate"]
            assert (await ledger.record(session))["sequence"] == "4"
        keys = {key.decode() for key in await ledger.client.keys("*")}
        others = {ledger.keys.layout, *map(ledger.keys.layout_in, range(8))}
        others |= {ledger.keys.transitions(partition) for partition in range(8)}
        assert keys - others == {ledger.keys.session(session) for session in sessions}

    @pytest.mark.parametrize(
        "fields",
        [
            None,
            {"state": "was better"},
            {"state": "1 1 01234567 0123456789abcdef s", "latest": "s 1 evt_1"},
            {"state": "1 ? 01234567 0123456789abcdef s", "status": "8 verified", "latest": "s 1 x"},
            {"state": "1 1 01234567 0123456789abcdef s", "status": "verified", "latest": "s 1 x"},
            {"state": "1 1 01234567 0123456789abcdef s", "status": "8 verified"},
        ],
        ids=["no hash", "no numbers", "no status", "no epoch", "no length", "no latest event"],
    )
    async def test_a_broken_record_hurts_nobody_else(
        self, fields: dict[str, str] | None, open_ledger: Callable[..., Ledger]
    ) -> None:
        """What an operator broke is refused alone; what came along with it is admitted."""
        ledger = open_ledger(admit_deadline_s=DEADLINE_S)
        same_partition = next(
            f"vs_{n}"
            for n in range(999)
            if ledger.keys.partition(f"vs_{n}") == ledger.keys.partition(SESSION_ID)
        )
        key = ledger.keys.session(SESSION_ID)
        if fields is None:
            await ledger.client.set(key, "broken")
        else:
            await ledger.client.hset(key, mapping=fields)
        other = [make_event(session=same_partition, id=f"evt_{n}", status=str(n)) for n in "ab"]

        first, broken, second = (
            asyncio.create_task(ledger.admit(one)) for one in (other[0], CREATED, other[1])
        )
        # All three went together, so by then the broken one has been refused, and asks again.
        assert outcomes([*await first, *await second]) == ["admitted"] * 2
        push(DEADLINE_S)
        with pytest.raises(Unavailable, match="redis_refused"):
            await broken
        assert len(await ledger.entries()) == 2

    async def test_every_answer_to_a_known_id_is_a_write(self, ledger: Ledger) -> None:
        """A duplicate and a repeated answer write, so that WAIT covers the first write too."""
        script = Script("service.inbox", "admit.lua")
        partition = ledger.keys.partition(SESSION_ID)
        keys = [
            ledger.keys.layout_in(partition),
            ledger.keys.transitions(partition),
            ledger.keys.session(SESSION_ID),
        ]
        policy = [int(time.time()), 0, 300, ledger.keys.layout_copy, 5, 9**9, 9]

        async def call(nonce: str) -> tuple[tuple[str, str, str], int]:
            judged = ["evt_1", nonce, NOW, NOW * 10, "s", "hash", "processing", "{}"]
            before = await changes()
            reply = await ledger.client.eval(script.source, 3, *keys, *policy, *judged)
            outcome, sequence, _, previous = reply[0].decode().split(" ", 3)
            return (outcome, sequence, previous), await changes() - before

        async def changes() -> int:
            return int((await ledger.client.info("persistence"))["rdb_changes_since_last_save"])

        first, _ = await call("mine")
        repeated, written = await call("mine")
        assert repeated == first
        assert written > 0
        copy, written = await call("another")
        assert copy[0] == "duplicate"
        assert written > 0
        assert (await ledger.record())["duplicates"] == "1"

    async def test_no_secret_reaches_redis(self, ledger: Ledger) -> None:
        """Of an event with canaries in every secret place none is anywhere in Redis."""
        canaries = (f"CANARY{n}" for n in range(99))

        def person(**more: Any) -> dict[str, Any]:
            address = {name: next(canaries) for name in ("city", "line1", "postal_code")}
            names = {name: next(canaries) for name in ("first_name", "last_name", "id_number")}
            return {"address": address, "dob": {"day": 1, "month": 1, "year": 1}, **names, **more}

        event = make_event(
            "verified",
            "verified",
            client_secret=next(canaries),
            url="https://verify.stripe.com/" + next(canaries),
            verified_outputs=person(email=next(canaries), phone=next(canaries)),
            provided_details={"email": next(canaries), "phone": next(canaries)},
            report={
                "id": "vr_1",
                "document": person(number=next(canaries), files=[next(canaries)]),
                "selfie": {"selfie": next(canaries), "document": next(canaries)},
                "id_number": person(),
                "email": {"email": next(canaries)},
                "phone": {"phone": next(canaries)},
                "unknown": next(canaries),
            },
            unknown=next(canaries),
            metadata={"mine": "published"},
        )
        await ledger.admit(event, event)

        whole = await dumped(ledger.client)
        assert b"published" in whole
        assert b"vr_1" in whole
        assert b"CANARY" not in whole


async def dumped(client: Any) -> bytes:
    """Return everything a server holds, names and values of all types."""
    readers = {
        b"string": client.get,
        b"hash": client.hgetall,
        b"stream": client.xrange,
        b"set": client.smembers,
        b"zset": lambda key: client.zrange(key, 0, -1),
        b"list": lambda key: client.lrange(key, 0, -1),
    }
    found = []
    async for key in client.scan_iter("*"):
        kind = await client.type(key)
        found.append(repr((key, await readers[kind](key))))
        if kind == b"stream":
            found.append(repr(await client.xinfo_groups(key)))
    return "\n".join(found).encode()


class TestGroupCommit:
    """Events that wait together travel together."""

    async def test_many_travel_in_few_calls(self, ledger: Ledger) -> None:
        """A hundred events of one loop turn take one call for each partition."""
        await ledger.admit(CREATED)
        await ledger.client.config_resetstat()
        events = [make_event(session=f"vs_{n}", id=f"evt_{n}") for n in range(100)]
        answers = await ledger.together(*events)

        assert outcomes(answers) == ["admitted"] * 100
        stats = await ledger.client.info("commandstats")
        assert stats["cmdstat_evalsha"]["calls"] <= ledger.keys.partitions

    async def test_each_is_judged_for_itself_and_in_order(self, ledger: Ledger) -> None:
        """In one flight a session's events are judged one after the other, copies included."""
        old = make_event(id="evt_old", at=-36 * DAY_S)
        answers = await ledger.together(CREATED, PROCESSING, CREATED, old, VERIFIED, FAILED)

        assert outcomes(answers) == [
            *("admitted", "admitted", "duplicate", "expired", "admitted", "late"),
        ]
        assert [one.current for one in await ledger.transitions()] == [
            *("requires_input", "processing", "verified"),
        ]

    async def test_a_crowd_of_copies_makes_one_transition(
        self, open_ledger: Callable[..., Ledger]
    ) -> None:
        """Fifty copies at three replicas at once: exactly one is admitted, round after round."""
        replicas = [open_ledger() for _ in range(3)]
        for n in range(20):
            event = make_event(session=f"vs_{n}", id=f"evt_{n}")
            answers = await asyncio.gather(
                *(replicas[i % 3].inbox.admit(event, make_change(event)) for i in range(50))
            )
            assert sorted(outcomes(answers)) == ["admitted"] + ["duplicate"] * 49
        assert len(await replicas[0].entries()) == 20

    async def test_scripts_may_be_flushed_at_any_time(self, ledger: Ledger) -> None:
        """A server that has forgotten the script is sent it again, for every call of a flight."""
        for n in range(5):
            await ledger.client.script_flush()
            events = [make_event(session=f"vs_{n}_{i}", id=f"evt_{n}_{i}") for i in range(40)]
            assert outcomes(await ledger.together(*events)) == ["admitted"] * 40
        assert len(await ledger.entries()) == 200


class TestLostReplies:
    """A connection may break at any point: what was answered is true, and happens once."""

    async def test_a_lost_reply_is_heard_again(
        self, redis_url: str, make_settings: Callable[..., Settings]
    ) -> None:
        """When the reply is lost after execution, the first answer is given, and one entry made."""
        async with (
            proxy_to(redis_url) as proxy,
            ledger_at(proxy.url, make_settings) as ledger,
        ):
            await ledger.admit(CREATED)
            proxy.break_next(Fault.LOSE_REPLY, times=3)
            [answer] = await ledger.admit(PROCESSING)

            assert proxy.happened == [Fault.LOSE_REPLY] * 3
            assert answer == Admission(Outcome.ADMITTED, 2, "requires_input", after_final=False)
            assert len(await ledger.entries()) == 2
            assert "duplicates" not in await ledger.record()

    async def test_a_lost_reply_of_a_flight_is_heard_again(
        self, redis_url: str, make_settings: Callable[..., Settings]
    ) -> None:
        """Every verdict of a flight whose reply was lost is repeated as it was."""
        twin = make_event("processing", "processing", id="evt_twin", at=10)
        contradiction = make_event("processing", "processing", id="evt_after", at=90)
        async with (
            proxy_to(redis_url) as proxy,
            ledger_at(proxy.url, make_settings) as ledger,
        ):
            await ledger.admit(PROCESSING)
            proxy.break_next(Fault.LOSE_REPLY)
            answers = await ledger.together(
                PROCESSING, CREATED, twin, VERIFIED, contradiction, VERIFIED
            )

            assert proxy.happened == [Fault.LOSE_REPLY]
            assert outcomes(answers) == [
                *("duplicate", "late", "unchanged", "admitted", "late", "duplicate"),
            ]
            assert answers[3] == Admission(Outcome.ADMITTED, 2, "processing", after_final=False)
            assert answers[4] == Admission(Outcome.LATE, 2, "verified", after_final=True)
            assert len(await ledger.entries()) == 2

    async def test_a_request_that_never_arrived_is_sent_again(
        self, redis_url: str, make_settings: Callable[..., Settings]
    ) -> None:
        """A connection reset before execution is ridden out inside the request."""
        async with (
            proxy_to(redis_url) as proxy,
            ledger_at(proxy.url, make_settings) as ledger,
        ):
            await ledger.admit(CREATED)
            proxy.break_next(Fault.LOSE_REQUEST, times=2)

            assert outcomes(await ledger.admit(PROCESSING)) == ["admitted"]
            assert proxy.happened == [Fault.LOSE_REQUEST] * 2

    async def test_unknown_is_never_duplicate(
        self, redis_url: str, make_settings: Callable[..., Settings]
    ) -> None:
        """While nobody can say what became of an event the answer is to come again."""
        async with (
            proxy_to(redis_url) as proxy,
            ledger_at(proxy.url, make_settings, admit_deadline_s=DEADLINE_S) as ledger,
        ):
            await ledger.admit(CREATED)
            proxy.break_next(Fault.LOSE_REPLY, times=10**6)
            admission = asyncio.create_task(ledger.admit(PROCESSING))
            await attempted(UnavailableReason.REDIS_UNREACHABLE, 5)
            push(DEADLINE_S)
            with pytest.raises(Unavailable) as refused:
                await admission

            assert refused.value.reason is UnavailableReason.REDIS_UNREACHABLE
            assert refused.value.__cause__ is refused.value.__context__ is None

    async def test_an_unreachable_server_is_said_in_time_and_forgotten_at_once(
        self, redis_url: str, make_settings: Callable[..., Settings]
    ) -> None:
        """While connections are refused the answer comes at the deadline; then all is well."""
        async with (
            proxy_to(redis_url) as proxy,
            ledger_at(proxy.url, make_settings, admit_deadline_s=DEADLINE_S) as ledger,
        ):
            await ledger.admit(CREATED)
            proxy.refusing = True
            proxy.cut()
            events = [make_event(session=f"vs_{n}", id=f"evt_{n}") for n in range(50)]
            admissions = asyncio.create_task(ledger.together(*events))
            await attempted(UnavailableReason.REDIS_UNREACHABLE, 5)
            assert not admissions.done()
            # Once for all: they wait together, and not one after the other.
            push(DEADLINE_S)
            assert {*outcomes(await admissions)} <= {"redis_unreachable", "redis_slow"}
            proxy.refusing = False
            # In time, for no clock is pushed: nobody holds a past failure against the server.
            assert outcomes(await ledger.together(*events)) == ["admitted"] * 50


class TestServerTrouble:
    """A server that hangs, dies or is full."""

    async def test_a_frozen_server_is_said_in_time(
        self, tmp_path: Path, make_settings: Callable[..., Settings]
    ) -> None:
        """A hung server means 503 at the deadline for each request; it heals by itself."""
        with server(tmp_path) as hung:
            async with ledger_at(hung.url, make_settings, admit_deadline_s=DEADLINE_S) as ledger:
                await ledger.admit(CREATED)
                with hung.frozen():
                    first = asyncio.create_task(ledger.admit(PROCESSING))
                    await asyncio.sleep(0)
                    push(DEADLINE_S / 2)
                    # The second has a deadline of its own, later than the first's.
                    second = asyncio.create_task(ledger.admit(VERIFIED))
                    await asyncio.sleep(0)
                    assert not first.done()
                    push(DEADLINE_S / 2)
                    with pytest.raises(Unavailable, match="redis_slow"):
                        await first
                    assert not second.done()
                    push(DEADLINE_S / 2)
                    with pytest.raises(Unavailable, match="redis_slow"):
                        await second

                again = await ledger.admit(PROCESSING, VERIFIED)
                assert {*outcomes(again)} <= {"admitted", "duplicate", "late"}
                assert [one.current for one in await ledger.transitions()][-1] == "verified"
                told = [one.sequence for one in await ledger.transitions()]
                assert told == [*range(1, len(told) + 1)]

    async def test_nothing_acknowledged_is_lost_by_a_kill(
        self, tmp_path: Path, make_settings: Callable[..., Settings]
    ) -> None:
        """A server killed under load and started again holds all it acknowledged, once each."""
        durable = ("--appendonly", "yes", "--appendfsync", "always")
        acknowledged: list[str] = []
        with server(tmp_path, *durable) as killed:
            async with ledger_at(killed.url, make_settings, admit_deadline_s=DEADLINE_S) as ledger:

                async def send(n: int) -> None:
                    for i in range(60):
                        event = make_event(session=f"vs_{n}_{i}", id=f"evt_{n}_{i}")
                        [answer] = await ledger.admit(event)
                        assert answer.outcome is Outcome.ADMITTED
                        acknowledged.append(event.id)

                senders = [asyncio.create_task(send(n)) for n in range(10)]
                await until(lambda: len(acknowledged) >= 100)
                killed.process.kill()
                killed.process.wait(PATIENCE_S)
                with server(tmp_path, *durable, port=killed.port):
                    await asyncio.wait_for(asyncio.gather(*senders), PATIENCE_S)
                    stored = [
                        stream_entry.unpack(entry).event_id for entry in await ledger.entries()
                    ]

        assert len(acknowledged) == 600
        assert sorted(stored) == sorted(acknowledged)

    async def test_a_full_server_writes_nothing_by_halves(self, ledger: Ledger) -> None:
        """A full server is said at once; each session has its record and its entry, or neither."""
        used = int((await ledger.client.info("memory"))["used_memory"])
        bulk = {f"key{n}": "x" * 450 for n in range(40)}
        admitted, before = [], failures(UnavailableReason.REDIS_FULL)
        await ledger.client.config_set("maxmemory", used + 300_000)
        try:
            for n in range(999):
                event = make_event(session=f"vs_{n}", id=f"evt_{n}", metadata=bulk)
                [answer] = await ledger.together(event)
                if not isinstance(answer, Admission):
                    break
                admitted.append(event.session.id)
            assert outcomes([answer]) == ["redis_full"]
            assert failures(UnavailableReason.REDIS_FULL) == before + 1, "asking again is no use"
            await ledger.client.config_set("maxmemory", 1)
            assert outcomes(await ledger.together(event, event, CREATED)) == ["redis_full"] * 3
        finally:
            await ledger.client.config_set("maxmemory", 0)

        assert admitted
        told = [stream_entry.unpack(entry).session_id for entry in await ledger.entries()]
        assert sorted(told) == sorted(admitted)
        recorded = [key.decode() async for key in ledger.client.scan_iter("*:session:*")]
        assert sorted(recorded) == sorted(ledger.keys.session(one) for one in admitted)
        assert outcomes(await ledger.admit(event)) == ["admitted"]


REPLICATED: dict[str, Any] = {"durability": Durability.REPLICA, "admit_deadline_s": DEADLINE_S}


class TestReplica:
    """DURABILITY=replica: acknowledged means that a replica has it."""

    async def is_not_durable(self, ledger: Ledger, event: Event) -> None:
        """Check that *event* is refused at the deadline, after the replica was waited for."""
        admission = asyncio.create_task(ledger.together(event))
        # The metric counts the failures of every inbox of this process.
        await until(lambda: ledger.inbox._reason is UnavailableReason.NOT_DURABLE)
        assert not admission.done()
        push(DEADLINE_S)
        assert outcomes(await admission) == ["not_durable"]

    async def test_what_no_replica_has_is_not_acknowledged(
        self, pair: tuple[Server, Server], make_settings: Callable[..., Settings]
    ) -> None:
        """Without the replica the event is refused, its copies too, until the replica is back."""
        primary, replica = pair
        async with ledger_at(primary.url, make_settings, **REPLICATED) as ledger:
            assert outcomes(await ledger.admit(CREATED)) == ["admitted"]
            with replica.frozen():
                await self.is_not_durable(ledger, PROCESSING)
                # Another process, whose connections have written nothing yet.
                async with ledger_at(primary.url, make_settings, **REPLICATED) as other:
                    await self.is_not_durable(other, PROCESSING)
            assert outcomes(await ledger.admit(PROCESSING)) == ["duplicate"]
            assert len(await ledger.entries()) == 2

    async def test_a_hiccup_of_the_replica_is_ridden_out(
        self, pair: tuple[Server, Server], make_settings: Callable[..., Settings]
    ) -> None:
        """When the replica comes back inside the deadline the first answer stays `admitted`."""
        primary, replica = pair
        async with ledger_at(primary.url, make_settings, **REPLICATED) as ledger:
            with replica.frozen():
                admission = asyncio.create_task(ledger.together(CREATED))
                await attempted(UnavailableReason.NOT_DURABLE, 1)
            assert outcomes(await admission) == ["admitted"]
            assert "duplicates" not in await ledger.record()

    async def test_a_refusal_is_not_mistaken_for_a_missing_replica(
        self, pair: tuple[Server, Server], make_settings: Callable[..., Settings]
    ) -> None:
        """What Redis said about a call is told, also while no replica confirms."""
        primary, replica = pair
        async with ledger_at(primary.url, make_settings, **REPLICATED) as ledger:
            with replica.frozen():
                await self.is_not_durable(ledger, CREATED)
                await ledger.client.config_set("maxmemory", 1)
                assert outcomes(await ledger.together(PROCESSING)) == ["redis_full"]


@st.composite
def arrivals(draw: st.DrawFn) -> list[bytes]:
    """Draw the events of some sessions, shuffled, each at least once and some several times."""
    names = draw(st.lists(st.sampled_from(sorted(LIFECYCLES)), min_size=1, max_size=3))
    random = Random(draw(st.integers(0, 2**32)))
    bodies = [
        event.body
        for name in names
        for event in lifecycle_events(name, random=random, started_at=NOW - 7 * DAY_S)
    ]
    copies = draw(st.lists(st.sampled_from(bodies), max_size=6))
    return draw(st.permutations(bodies + copies))


class TestAnyOrder:
    """Whatever order events arrive in, however often, and wherever."""

    @given(bodies=arrivals())
    @searching(80)
    async def test_one_by_one_each_is_judged_as_the_rules_say(
        self, ledger: Ledger, bodies: list[bytes]
    ) -> None:
        """Any permutation with any duplicates is answered, and left, as the model says."""
        await ledger.client.flushall()
        model = session_record_model.Ledger()
        for n, body in enumerate(bodies):
            [answer] = await ledger.admit(parsed(body))
            now, horizon_s = time.time(), 35 * DAY_S
            expected = model.judge(orjson.loads(body), str(n), now=now, horizon_s=horizon_s)
            assert (answer.outcome, answer.sequence) == expected[:2]
        await self.check_final_states(ledger, bodies)

    @given(bodies=arrivals(), seed=st.integers(0, 2**32))
    @searching(50)
    async def test_all_at_once_at_several_replicas_the_end_is_the_same(
        self, open_ledger: Callable[..., Ledger], bodies: list[bytes], seed: int
    ) -> None:
        """Concurrent admissions leave the same state, and streams without gap or step back."""
        ledgers, random = [open_ledger() for _ in range(3)], Random(seed)
        await ledgers[0].client.flushall()
        answers = await asyncio.gather(
            *(random.choice(ledgers).admit(parsed(body)) for body in bodies)
        )
        decided = [
            orjson.loads(body)["id"]
            for body, [answer] in zip(bodies, answers, strict=True)
            if answer.outcome is not Outcome.DUPLICATE
        ]
        admitted = [
            orjson.loads(body)["id"]
            for body, [answer] in zip(bodies, answers, strict=True)
            if answer.outcome is Outcome.ADMITTED
        ]
        assert sorted(decided) == sorted({orjson.loads(body)["id"] for body in bodies})
        told = [stream_entry.unpack(entry).event_id for entry in await ledgers[0].entries()]
        assert sorted(told) == sorted(admitted)
        await self.check_final_states(ledgers[0], bodies)

    async def check_final_states(self, ledger: Ledger, bodies: list[bytes]) -> None:
        """Compare each session with its newest event, and its stream with the promises."""
        found = {event["id"]: event for event in map(orjson.loads, bodies)}
        for session in {event["data"]["object"]["id"] for event in found.values()}:
            own = [one for one in found.values() if one["data"]["object"]["id"] == session]
            newest = max(own, key=place_of)
            told = await ledger.transitions(session)

            assert [one.sequence for one in told] == [*range(1, len(told) + 1)]
            places = [place_of(found[one.event_id]) for one in told]
            assert places == sorted(places)
            assert [one.previous for one in told] == [None, *(one.current for one in told[:-1])]
            assert len({one.epoch for one in told}) == 1
            assert story_of(found[told[-1].event_id]) == story_of(newest)
            record = await ledger.record(session)
            assert record["status"] == told[-1].current
            assert int(record["sequence"]) == len(told)
            assert record["latest"].split(" ")[1:] == [
                str(place_of(newest).order_key),
                newest["id"],
            ]
            remembered = {name for name in record if name.startswith("evt_")}
            assert remembered == {one["id"] for one in own}
