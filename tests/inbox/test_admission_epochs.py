"""Laws of epochs: a sequence number is never used twice in one, whatever Redis forgets."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from service.config import Settings
from tests.inbox.test_admission import (
    CREATED,
    FAILED,
    PROCESSING,
    SESSION_ID,
    VERIFIED,
    Ledger,
    ledger_at,
    make_event,
    outcomes,
)
from tests.support.servers import PATIENCE_S, Server, server, until

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
REDACTED = make_event("redacted", "verified", at=60, redaction="redacted")


async def places(ledger: Ledger) -> list[tuple[int, int]]:
    """Return epoch and sequence of each transition on the streams, as a consumer compares them."""
    return [(one.epoch, one.sequence) for one in await ledger.transitions()]


async def test_a_server_that_lost_its_last_writes_begins_an_epoch(
    tmp_path: Path, make_settings: Callable[..., Settings]
) -> None:
    """Started from data that lacks a transition which handlers have seen, it repeats no number."""
    data, copy = tmp_path / "data", tmp_path / "copy"
    with server(data, *DURABLE) as lost:
        async with ledger_at(lost.url, make_settings) as ledger:
            await ledger.admit(CREATED, PROCESSING)
            shutil.copytree(data, copy)
            await ledger.admit(FAILED)
            seen = await places(ledger)
            assert [sequence for _, sequence in seen] == [1, 2, 3]
        lost.process.kill()
        lost.process.wait(PATIENCE_S)
    with server(copy, *DURABLE, port=lost.port):
        async with ledger_at(lost.url, make_settings) as ledger:
            assert outcomes(await ledger.admit(VERIFIED)) == ["admitted"]
            told = await places(ledger)
            assert told[:2] == seen[:2]
            [(epoch, sequence)] = told[2:]
            assert epoch > seen[-1][0]
            assert sequence == 1
            # From there on it counts as before.
            await ledger.admit(REDACTED)
            assert (await places(ledger))[3:] == [(epoch, 2)]
            assert [one.previous for one in await ledger.transitions()] == [
                *(None, "requires_input", "processing", "verified"),
            ]


async def test_a_primary_demoted_and_promoted_again_begins_an_epoch(
    pair: tuple[Server, Server], make_settings: Callable[..., Settings]
) -> None:
    """A process that was a replica meanwhile has lost writes too, although it never ended."""
    primary, replica = pair
    async with ledger_at(primary.url, make_settings) as ledger:
        with replica.client() as other, primary.client() as own:
            await ledger.admit(CREATED, PROCESSING)
            stream = ledger.keys.transitions(ledger.keys.partition(SESSION_ID))
            await until(lambda: other.xlen(stream) == 2)
            other.replicaof("NO", "ONE")
            await ledger.admit(FAILED)
            seen = await places(ledger)
            own.replicaof("127.0.0.1", str(replica.port))
            await until(lambda: own.info("replication")["master_link_status"] == "up")
            own.replicaof("NO", "ONE")
            assert len(await places(ledger)) == 2
        assert outcomes(await ledger.admit(VERIFIED)) == ["admitted"]
        assert (await places(ledger))[-1] > seen[-1]
        assert (await places(ledger))[-1][1] == 1


async def test_what_adds_nothing_begins_no_epoch(
    tmp_path: Path, make_settings: Callable[..., Settings]
) -> None:
    """After a restart late and unchanged events leave number and epoch; the next begins anew."""
    twin = make_event("processing", "processing", id="evt_twin", at=10)
    with server(tmp_path, *DURABLE) as first:
        async with ledger_at(first.url, make_settings) as ledger:
            await ledger.admit(PROCESSING)
            before = await ledger.record()
    with server(tmp_path, *DURABLE) as second:
        async with ledger_at(second.url, make_settings) as ledger:
            assert outcomes(await ledger.admit(CREATED, twin)) == ["late", "unchanged"]
            after = await ledger.record()
            for field in ("sequence", "epoch", "server"):
                assert after[field] == before[field]
            await ledger.admit(FAILED)
            again = await ledger.record()
            assert again["sequence"] == "1"
            assert int(again["epoch"]) > int(before["epoch"])
            assert again["server"] != before["server"]


@pytest.mark.parametrize("ahead_ms", [0, 10**9])
async def test_an_epoch_is_above_the_one_before(
    ahead_ms: int, redis_url: str, make_settings: Callable[..., Settings]
) -> None:
    """Also where the clock of the server before was ahead of this one's."""
    async with ledger_at(redis_url, make_settings) as ledger:
        await ledger.admit(CREATED)
        record = await ledger.record()
        epoch = int(record["epoch"]) + ahead_ms
        state = f"7 {epoch} 00000000 {record['hash']} {record['kind']}"
        key = ledger.keys.session(CREATED.session.id)
        await ledger.client.hset(key, "state", state)
        await ledger.admit(PROCESSING)
        later = await ledger.record()
        assert int(later["epoch"]) > epoch
        assert not ahead_ms or int(later["epoch"]) == epoch + 1
        assert later["sequence"] == "1"
