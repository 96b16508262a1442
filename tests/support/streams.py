"""What a stream still holds for a handler, asked of Redis by a plain client."""

from __future__ import annotations

import contextlib
from typing import Any

import redis


def count_unsettled(client: redis.Redis, stream: str, handler: str) -> int:
    """Return how many entries a handler has not acknowledged, unread ones included.

    Before a worker has created the handler's consumer group, all entries are unread. Redis's `lag`
    is not asked: after deletions Redis may not know it.
    """
    groups: list[Any] = []
    with contextlib.suppress(redis.ResponseError):  # there is no such stream, and nothing in it
        groups = client.xinfo_groups(stream)
    for group in groups:
        if group["name"] == handler.encode():
            unread: Any = client.xrange(stream, "(" + group["last-delivered-id"].decode())
            return len(unread) + int(group["pending"])
    entries: Any = client.exists(stream) and client.xlen(stream)
    return int(entries)
