"""Collects the evidence of a finished run: calls, dead letters, session records, logs, usage."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import redis

from service.storage.keys import Keys
from tests.support.streams import count_unsettled
from tests.system.chaos.evidence import (
    Call,
    DeadLetter,
    Decision,
    Mark,
    Place,
    Record,
    Remembered,
    Transition,
)

Fields = Mapping[bytes, bytes]

OUTCOMES = {"a": "admitted", "l": "late", "u": "unchanged"}
_DECIDED = (b'"event.fetched"', b'"event.reconciled"', b'"event.recovered"')


def transition_of(entry: Fields) -> Transition:
    """Return the transition in a stream's entry, or in a dead letter."""
    change = orjson.loads(entry[b"change"])
    place = Place(change["session_id"], int(entry[b"epoch"]), int(entry[b"sequence"]))
    return Transition(place, change["event_id"], change["current"])


def transitions(client: redis.Redis, keys: Keys) -> list[Transition]:
    """Return the transitions in the streams."""
    streams = map(keys.transitions, range(keys.partitions))
    return [transition_of(entry) for stream in streams for entry in _entries(client, stream)]


def taken(calls: Mapping[str, Sequence[Call]]) -> set[Transition]:
    """Return the transitions that any handler accepted."""
    every = (call for each in calls.values() for call in each)
    return {call.transition for call in every if call.mark is Mark.TOOK}


def dead_letters(client: redis.Redis, keys: Keys, handler: str) -> list[DeadLetter]:
    """Return a handler's dead letters."""
    streams = [keys.dead_letters(partition, handler) for partition in range(keys.partitions)]
    return [
        DeadLetter(
            transition_of(entry), entry[b"reason"].decode(), int(entry[b"attempts"].decode())
        )
        for stream in streams
        for entry in _entries(client, stream)
    ]


def unsettled(client: redis.Redis, keys: Keys, handler: str) -> int:
    """Return how many transitions a handler has not acknowledged, unread ones included."""
    streams = map(keys.transitions, range(keys.partitions))
    return sum(count_unsettled(client, stream, handler) for stream in streams)


def unfetched(client: redis.Redis, keys: Keys) -> int:
    """Return how many thin notifications are noted and not fetched, dead letters included."""
    streams = [
        stream
        for partition in range(keys.partitions)
        for stream in (keys.notifications(partition), keys.dead_letters(partition, "fetch"))
    ]
    return sum(int(client.xlen(stream)) for stream in streams)


def decisions(logs: Path) -> list[Decision]:
    """Return what the logs say about events that were read from Stripe's API."""
    lines = (line for path in logs.iterdir() for line in path.read_bytes().splitlines())
    found = (orjson.loads(line) for line in lines if any(name in line for name in _DECIDED))
    return [
        Decision(
            line["event_id"],
            datetime.fromisoformat(line["timestamp"]).timestamp(),
            is_recovered=line["event"] == "event.recovered",
        )
        for line in found
    ]


def records(client: redis.Redis) -> dict[str, Record]:
    """Return every session record, by session id."""
    found = {}
    keys = client.scan_iter("idv:*:session:*", count=1000)
    while batch := list(itertools.islice(keys, 500)):
        pipeline = client.pipeline(transaction=False)
        for key in batch:
            pipeline.hgetall(key)
        for key, fields in zip(batch, pipeline.execute(), strict=True):
            found[key.decode().rpartition(":")[2]] = _record(fields)
    return found


def _record(fields: Fields) -> Record:
    events = {}
    for name, value in fields.items():
        if name.startswith(b"evt_"):
            word, number, _ = value.decode().split(" ", 2)
            events[name.decode()] = Remembered(OUTCOMES[word], int(number))
    sequence, epoch, _, _, _ = fields.get(b"state", b"0 0 - - -").split()
    _, latest, latest_id = fields.get(b"latest", b"- 0 -").split()
    length, words = fields.get(b"status", b"0 ").split(b" ", 1)
    return Record(
        status=words[: int(length)].decode(),
        order_key=int(latest),
        latest_id=latest_id.decode(),
        sequence=int(sequence),
        epoch=int(epoch),
        events=events,
    )


def calls(path: Path) -> list[Call]:
    """Return the calls in a sink's call log."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        fields = orjson.loads(line)
        place = Place(fields["session_id"], fields["epoch"], fields["sequence"])
        transition = Transition(place, fields["event_id"], fields["current"])
        found.append(Call(Mark(fields["mark"]), transition, fields["at"]))
    return found


def texts(directory: Path, answers: Sequence[bytes]) -> dict[str, bytes]:
    """Return all text that the run has written, by where."""
    found = {"answers": b"\n".join(answers)}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            where = path.relative_to(directory).parts[0]
            kind = "log" if where == "logs" else "redis" if where[:6] == "redis-" else "calls"
            found[f"{kind} {path.relative_to(directory)}"] = path.read_bytes()
    return found


def _entries(client: redis.Redis, stream: str) -> list[Fields]:
    found: Any = client.xrange(stream)
    return [entry for _, entry in found]
