"""What a run leaves behind where it can be seen, and how to search it for secret values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import redis


def everything_in(redis_url: str) -> bytes:
    """Return each key of a server with all it holds."""
    readers: dict[str, Callable[[redis.Redis, str], Any]] = {
        "string": lambda client, key: client.get(key),
        "hash": lambda client, key: client.hgetall(key),
        "stream": lambda client, key: [client.xrange(key), client.xinfo_stream(key, full=True)],
        "zset": lambda client, key: client.zrange(key, 0, -1, withscores=True),
        "set": lambda client, key: client.smembers(key),
        "list": lambda client, key: client.lrange(key, 0, -1),
        # It has expired since it was listed.
        "none": lambda *_: None,
    }
    with redis.Redis.from_url(redis_url) as client:
        found = [
            (key, readers[client.type(key).decode()](client, key)) for key in client.scan_iter()
        ]
    return repr(found).encode()


def everything_written(directory: Path) -> bytes:
    """Return the append-only files of a server that has stopped or runs."""
    return b"".join(path.read_bytes() for path in directory.rglob("*.aof"))


def hits(traces: bytes, words: Iterable[str], numbers: Iterable[int]) -> list[bytes]:
    """Return the surroundings of each of *words*, and of each of *numbers* that stands alone."""
    wanted = "|".join([*words, *(rf"\b{number}\b" for number in numbers)])
    return [
        traces[max(0, hit.start() - 80) : hit.end() + 40]
        for hit in re.finditer(wanted.encode(), traces, re.IGNORECASE)
    ]
