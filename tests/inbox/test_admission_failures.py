"""Admission while Redis fails: no event is lost or admitted twice; each has its answer in time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from service.config import Durability
from service.errors import Unavailable, UnavailableReason
from service.inbox.admission import Admission, Outcome
from service.stripe.events import Event
from service.telemetry import metrics
from service.transitions import stream_entry
from tests.support.admissions import (
    CREATED,
    DEADLINE_S,
    PROCESSING,
    VERIFIED,
    InboxAt,
    InspectedInbox,
    make_event,
    outcomes,
)
from tests.support.proxy import Fault, proxy_to
from tests.support.servers import Server, server
from tests.support.topologies import lone_cluster
from tests.support.virtual_time import push
from tests.support.waiting import PATIENCE_S, until


def failures(reason: UnavailableReason) -> float:
    """Return how often Redis has failed an attempt for *reason*."""
    return float(metrics.REDIS_ERRORS.labels(reason)._value.get())


async def attempted(reason: UnavailableReason, times: int) -> None:
    """Wait until so many more attempts have failed for *reason*."""
    before = failures(reason)
    await until(lambda: failures(reason) >= before + times)


class TestLostReplies:
    """A connection may break at any point: the answer is true, and the event is admitted once."""

    @pytest.mark.parametrize("fault", [Fault.LOSE_REPLY, Fault.LOSE_REQUEST])
    async def test_a_batch_that_is_sent_again_gets_its_first_answers(
        self, redis_url: str, inbox_at: InboxAt, fault: Fault
    ) -> None:
        """However often request or reply is lost, each event is admitted and answered once."""
        twin = make_event("processing", "processing", id="evt_twin", at=10)
        after_final = make_event("processing", "processing", id="evt_after", at=90)
        async with proxy_to(redis_url) as proxy, inbox_at(proxy.url) as inbox:
            await inbox.admit(PROCESSING)
            proxy.break_next(fault, times=3)
            answers = await inbox.together(
                PROCESSING, CREATED, twin, VERIFIED, after_final, VERIFIED
            )

            assert proxy.happened == [fault] * 3
            assert outcomes(answers) == [
                *("duplicate", "late", "unchanged", "admitted", "late", "duplicate")
            ]
            assert answers[3] == Admission(Outcome.ADMITTED, 2, "processing", after_final=False)
            assert answers[4] == Admission(Outcome.LATE, 2, "verified", after_final=True)
            assert len(await inbox.entries()) == 2

    async def test_unknown_is_never_duplicate(self, redis_url: str, inbox_at: InboxAt) -> None:
        """An event whose fate stays unknown is `Unavailable`, so that it is sent again."""
        async with (
            proxy_to(redis_url) as proxy,
            inbox_at(proxy.url, admit_deadline_s=DEADLINE_S) as inbox,
        ):
            await inbox.admit(CREATED)
            proxy.break_next(Fault.LOSE_REPLY, times=10**6)
            admission = asyncio.create_task(inbox.admit(PROCESSING))
            await attempted(UnavailableReason.REDIS_UNREACHABLE, 5)
            push(DEADLINE_S)
            with pytest.raises(Unavailable) as refused:
                await admission

            assert refused.value.reason is UnavailableReason.REDIS_UNREACHABLE
            assert refused.value.__cause__ is refused.value.__context__ is None

    async def test_an_unreachable_server_is_reported_at_the_deadline(
        self, redis_url: str, inbox_at: InboxAt
    ) -> None:
        """While connections are refused events fail at the deadline; then they are admitted."""
        async with (
            proxy_to(redis_url) as proxy,
            inbox_at(proxy.url, admit_deadline_s=DEADLINE_S) as inbox,
        ):
            await inbox.admit(CREATED)
            proxy.refusing = True
            proxy.cut()
            events = [make_event(session=f"vs_{n}", id=f"evt_{n}") for n in range(50)]
            admissions = asyncio.create_task(inbox.together(*events))
            await attempted(UnavailableReason.REDIS_UNREACHABLE, 5)
            assert not admissions.done()
            # Once for all: they wait together, not one after the other.
            push(DEADLINE_S)
            assert {*outcomes(await admissions)} <= {"redis_unreachable", "redis_slow"}
            proxy.refusing = False
            # At once, for no clock is moved: a past failure does not count against the server.
            assert outcomes(await inbox.together(*events)) == ["admitted"] * 50


class TestServerTrouble:
    """A server that hangs, dies or is full."""

    async def test_trouble_of_one_partition_is_not_hidden_by_another(
        self, tmp_path: Path, inbox_at: InboxAt
    ) -> None:
        """In Cluster an event gets the reason of its own primary, whatever others answer."""
        with lone_cluster(tmp_path) as one:
            url = f"redis+cluster://127.0.0.1:{one.port}"
            async with inbox_at(url, admit_deadline_s=DEADLINE_S) as inbox:
                await inbox.admit(CREATED)
                other = make_event(session="vs_other", id="evt_other")
                partition = inbox.keys.partition("vs_other")
                assert partition != inbox.keys.partition(CREATED.session.id)
                await inbox.client.delete(inbox.keys.layout_in(partition))
                await inbox.client.rpush(inbox.keys.layout_in(partition), "no layout")
                admission = asyncio.create_task(inbox.together(other))
                await attempted(UnavailableReason.REDIS_REFUSED, 1)
                await inbox.admit(PROCESSING)
                push(DEADLINE_S)
                assert outcomes(await admission) == ["redis_refused"]

    async def test_a_hung_server_is_reported_at_the_deadline(
        self, tmp_path: Path, inbox_at: InboxAt
    ) -> None:
        """While the server hangs each event fails at its own deadline; then they are admitted."""
        with server(tmp_path) as hung:
            async with inbox_at(hung.url, admit_deadline_s=DEADLINE_S) as inbox:
                await inbox.admit(CREATED)
                with hung.frozen():
                    first = asyncio.create_task(inbox.admit(PROCESSING))
                    await asyncio.sleep(0)
                    push(DEADLINE_S / 2)
                    # The second has a deadline of its own, later than the first's.
                    second = asyncio.create_task(inbox.admit(VERIFIED))
                    await asyncio.sleep(0)
                    assert not first.done()
                    push(DEADLINE_S / 2)
                    with pytest.raises(Unavailable, match="redis_slow"):
                        await first
                    assert not second.done()
                    push(DEADLINE_S / 2)
                    with pytest.raises(Unavailable, match="redis_slow"):
                        await second

                again = await inbox.admit(PROCESSING, VERIFIED)
                assert {*outcomes(again)} <= {"admitted", "duplicate", "late"}
                assert [one.current for one in await inbox.transitions()][-1] == "verified"
                sequences = [one.sequence for one in await inbox.transitions()]
                assert sequences == [*range(1, len(sequences) + 1)]

    async def test_a_killed_server_loses_nothing_acknowledged(
        self, tmp_path: Path, inbox_at: InboxAt
    ) -> None:
        """A server that is killed under load and restarted has each acknowledged event once."""
        durable = ("--appendonly", "yes", "--appendfsync", "always")
        acknowledged: list[str] = []
        with server(tmp_path, *durable) as killed:
            async with inbox_at(killed.url, admit_deadline_s=DEADLINE_S) as inbox:

                async def send(n: int) -> None:
                    for i in range(60):
                        event = make_event(session=f"vs_{n}_{i}", id=f"evt_{n}_{i}")
                        [answer] = await inbox.admit(event)
                        assert answer.outcome is Outcome.ADMITTED
                        acknowledged.append(event.id)

                senders = [asyncio.create_task(send(n)) for n in range(10)]
                await until(lambda: len(acknowledged) >= 100)
                killed.process.kill()
                killed.process.wait(PATIENCE_S)
                with server(tmp_path, *durable, port=killed.port):
                    await asyncio.wait_for(asyncio.gather(*senders), PATIENCE_S)
                    stored = [
                        stream_entry.unpack(entry).event_id for entry in await inbox.entries()
                    ]

        assert len(acknowledged) == 600
        assert sorted(stored) == sorted(acknowledged)

    async def test_a_full_server_writes_all_of_an_event_or_nothing(
        self, inbox: InspectedInbox
    ) -> None:
        """A full server is reported at once; a session has its record and its entry, or neither."""
        used = int((await inbox.client.info("memory"))["used_memory"])
        bulk = {f"key{n}": "x" * 450 for n in range(40)}
        admitted, before = [], failures(UnavailableReason.REDIS_FULL)
        await inbox.client.config_set("maxmemory", used + 300_000)
        try:
            for n in range(999):
                event = make_event(session=f"vs_{n}", id=f"evt_{n}", metadata=bulk)
                [answer] = await inbox.together(event)
                if not isinstance(answer, Admission):
                    break
                admitted.append(event.session.id)
            assert outcomes([answer]) == ["redis_full"]
            assert failures(UnavailableReason.REDIS_FULL) == before + 1, "a retry is of no use"
            await inbox.client.config_set("maxmemory", 1)
            assert outcomes(await inbox.together(event, event, CREATED)) == ["redis_full"] * 3
        finally:
            await inbox.client.config_set("maxmemory", 0)

        assert admitted
        stored = [stream_entry.unpack(entry).session_id for entry in await inbox.entries()]
        assert sorted(stored) == sorted(admitted)
        recorded = [key.decode() async for key in inbox.client.scan_iter("*:session:*")]
        assert sorted(recorded) == sorted(inbox.keys.session(one) for one in admitted)
        assert outcomes(await inbox.admit(event)) == ["admitted"]


REPLICATED: dict[str, Any] = {"durability": Durability.REPLICA, "admit_deadline_s": DEADLINE_S}


class TestReplica:
    """DURABILITY=replica: an acknowledged event is on a replica."""

    async def check_not_durable(self, inbox: InspectedInbox, event: Event) -> None:
        """Check that *event* is `not_durable` at the deadline, and not before."""
        admission = asyncio.create_task(inbox.together(event))
        # The metric counts the failures of every inbox of this process.
        await until(lambda: inbox.inbox._shards[0].reason is UnavailableReason.NOT_DURABLE)
        assert not admission.done()
        push(DEADLINE_S)
        assert outcomes(await admission) == ["not_durable"]

    async def test_an_event_that_no_replica_has_is_not_acknowledged(
        self, pair: tuple[Server, Server], inbox_at: InboxAt
    ) -> None:
        """Without the replica neither the event nor a copy is acknowledged, until it is back."""
        primary, replica = pair
        async with inbox_at(primary.url, **REPLICATED) as inbox:
            assert outcomes(await inbox.admit(CREATED)) == ["admitted"]
            with replica.frozen():
                await self.check_not_durable(inbox, PROCESSING)
                # Another process, whose connections have written nothing yet.
                async with inbox_at(primary.url, **REPLICATED) as other:
                    await self.check_not_durable(other, PROCESSING)
            assert outcomes(await inbox.admit(PROCESSING)) == ["duplicate"]
            assert len(await inbox.entries()) == 2

    async def test_a_replica_may_pause_within_the_deadline(
        self, pair: tuple[Server, Server], inbox_at: InboxAt
    ) -> None:
        """When the replica is back within the deadline the answer is still `admitted`."""
        primary, replica = pair
        async with inbox_at(primary.url, **REPLICATED) as inbox:
            with replica.frozen():
                admission = asyncio.create_task(inbox.together(CREATED))
                await attempted(UnavailableReason.NOT_DURABLE, 1)
            assert outcomes(await admission) == ["admitted"]
            assert "duplicates" not in await inbox.record()

    async def test_an_error_is_not_mistaken_for_a_missing_replica(
        self, pair: tuple[Server, Server], inbox_at: InboxAt
    ) -> None:
        """Redis's own error for a call is reported, also while no replica confirms."""
        primary, replica = pair
        async with inbox_at(primary.url, **REPLICATED) as inbox:
            with replica.frozen():
                await self.check_not_durable(inbox, CREATED)
                await inbox.client.config_set("maxmemory", 1)
                assert outcomes(await inbox.together(PROCESSING)) == ["redis_full"]
