"""Epochs: a sequence number is never used twice in one, even when Redis loses writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.admissions import (
    CREATED,
    FAILED,
    PROCESSING,
    SESSION_ID,
    VERIFIED,
    InboxAt,
    InspectedInbox,
    make_event,
    outcomes,
)
from tests.support.servers import Server, server
from tests.support.waiting import PATIENCE_S, until

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
REDACTED = make_event("redacted", "verified", at=60, redaction="redacted")


async def numbers(inbox: InspectedInbox) -> list[tuple[int, int]]:
    """Return epoch and sequence of each transition on the streams, as a consumer compares them."""
    return [(one.epoch, one.sequence) for one in await inbox.transitions()]


async def test_a_server_that_lost_its_last_writes_begins_an_epoch(
    tmp_path: Path, inbox_at: InboxAt
) -> None:
    """Started from data that lacks a transition which handlers have seen, it repeats no number."""
    data, copy = tmp_path / "data", tmp_path / "copy"
    with server(data, *DURABLE) as lost:
        async with inbox_at(lost.url) as inbox:
            await inbox.admit(CREATED, PROCESSING)
            shutil.copytree(data, copy)
            await inbox.admit(FAILED)
            seen = await numbers(inbox)
            assert [sequence for _, sequence in seen] == [1, 2, 3]
        lost.process.kill()
        lost.process.wait(PATIENCE_S)
    with server(copy, *DURABLE, port=lost.port):
        async with inbox_at(lost.url) as inbox:
            assert outcomes(await inbox.admit(VERIFIED)) == ["admitted"]
            found = await numbers(inbox)
            assert found[:2] == seen[:2]
            [(epoch, sequence)] = found[2:]
            assert epoch > seen[-1][0]
            assert sequence == 1
            # From there on it is numbered as before.
            await inbox.admit(REDACTED)
            assert (await numbers(inbox))[3:] == [(epoch, 2)]
            assert [one.previous for one in await inbox.transitions()] == [
                *(None, "requires_input", "processing", "verified")
            ]


async def test_a_primary_demoted_and_promoted_again_begins_an_epoch(
    pair: tuple[Server, Server], inbox_at: InboxAt
) -> None:
    """A server that was a replica meanwhile has lost writes too, although it never stopped."""
    primary, replica = pair
    async with inbox_at(primary.url) as inbox:
        with replica.client() as other, primary.client() as own:
            await inbox.admit(CREATED, PROCESSING)
            stream = inbox.keys.transitions(inbox.keys.partition(SESSION_ID))
            await until(lambda: other.xlen(stream) == 2)
            other.replicaof("NO", "ONE")
            await inbox.admit(FAILED)
            seen = await numbers(inbox)
            own.replicaof("127.0.0.1", str(replica.port))
            await until(lambda: own.info("replication")["master_link_status"] == "up")
            own.replicaof("NO", "ONE")
            assert len(await numbers(inbox)) == 2
        assert outcomes(await inbox.admit(VERIFIED)) == ["admitted"]
        assert (await numbers(inbox))[-1] > seen[-1]
        assert (await numbers(inbox))[-1][1] == 1


@pytest.mark.parametrize("ahead_ms", [0, 10**9])
async def test_an_epoch_is_above_the_one_before(inbox: InspectedInbox, ahead_ms: int) -> None:
    """An epoch is higher than the last one, also where that server's clock was ahead."""
    await inbox.admit(CREATED)
    record = await inbox.record()
    epoch = int(record["epoch"]) + ahead_ms
    state = f"7 {epoch} 00000000 {record['hash']} {record['kind']}"
    await inbox.client.hset(inbox.keys.session(SESSION_ID), "state", state)
    await inbox.admit(PROCESSING)
    later = await inbox.record()
    assert int(later["epoch"]) > epoch
    assert not ahead_ms or int(later["epoch"]) == epoch + 1
    assert later["sequence"] == "1"
