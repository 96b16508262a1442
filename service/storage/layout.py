"""The names of all keys in Redis, and the check that every process uses the same ones.

Keys of one session share a partition tag, so that one script may use them all, in Cluster too. What
the keys hold is known to `inbox` and `delivery`.

Two processes with different numbers of partitions would look for one session in two places, and
admit its events twice. So the first process claims the layout, in one key. Each process that finds
its own layout there copies it into every partition, where the admission script compares it with its
caller's: when Redis has lost everything and a process has claimed another layout, no event is
admitted under the old one.
"""

from __future__ import annotations

from typing import NamedTuple
from zlib import crc32

from ..errors import ConfigError
from .connections import Connections
from .scripts import Script, ScriptCall, raise_first

LAYOUT_VERSION = 4

_COPY = Script(__package__, "copy_layout.lua")


class Keys(NamedTuple):
    """The names of all keys under one prefix."""

    prefix: str
    partitions: int

    def partition(self, session_id: str) -> int:
        """Return the partition that a session always belongs to."""
        return crc32(session_id.encode()) % self.partitions

    def session(self, session_id: str) -> str:
        """Return the key of a session's record: a hash."""
        return self.session_in(self.partition(session_id), session_id)

    def session_in(self, partition: int, session_id: str) -> str:
        """Return the same, where the session's partition is known."""
        return f"{self.prefix}:{{{partition}}}:session:{session_id}"

    def transitions(self, partition: int) -> str:
        """Return the key of a partition's stream of transitions."""
        return f"{self.prefix}:{{{partition}}}:transitions"

    def notifications(self, partition: int) -> str:
        """Return the key of a partition's stream of thin notifications."""
        return f"{self.prefix}:{{{partition}}}:notifications"

    def noted(self, partition: int, notification_id: str) -> str:
        """Return the key of a notification that is known: a string, the nonce of its caller."""
        return f"{self.prefix}:{{{partition}}}:noted:{notification_id}"

    def dead_letters(self, partition: int, handler: str) -> str:
        """Return the key of a handler's stream of dead letters."""
        return f"{self.prefix}:{{{partition}}}:dead:{handler}"

    def replays(self, partition: int, handler: str) -> str:
        """Return the key of a handler's stream of replayed transitions."""
        return f"{self.prefix}:{{{partition}}}:replays:{handler}"

    def deliveries(self, partition: int, handler: str) -> str:
        """Return the key of a handler's stream of finished attempts."""
        return f"{self.prefix}:{{{partition}}}:deliveries:{handler}"

    def lease(self, partition: int, handler: str) -> str:
        """Return the key of a handler's lease on a partition: a string, the token of its worker."""
        return f"{self.prefix}:{{{partition}}}:lease:{handler}"

    @property
    def reconcile(self) -> str:
        """The key of the reconciler's cursors: a hash."""
        return f"{self.prefix}:{{0}}:reconcile"

    @property
    def processes(self) -> str:
        """The key of the living processes: a hash, by name."""
        return f"{self.prefix}:{{0}}:processes"

    def minute(self, minute: int) -> str:
        """Return the key of what was counted in a minute since 1970: a hash."""
        return f"{self.prefix}:{{0}}:minute:{minute}"

    def day(self, day: int) -> str:
        """Return the key of what was counted in a day since 1970: a hash."""
        return f"{self.prefix}:{{0}}:day:{day}"

    @property
    def reversals(self) -> str:
        """The key of the latest reversals: a stream."""
        return f"{self.prefix}:{{0}}:reversals"

    @property
    def endpoints(self) -> str:
        """The key of what the reconciling worker has seen last: a string."""
        return f"{self.prefix}:{{0}}:endpoints"

    def circuit(self, handler: str) -> str:
        """Return the key that exists while a handler's circuit breaker is open."""
        return f"{self.prefix}:circuit:{handler}"

    def workers(self, handler: str) -> str:
        """Return the key of a handler's live workers: a sorted set."""
        return f"{self.prefix}:workers:{handler}"

    def api_rate(self, *, is_live: bool) -> str:
        """Return the key of a mode's budget of requests to Stripe's API: a string."""
        return f"{self.prefix}:api_rate:{'live' if is_live else 'test'}"

    def form(self, token: str) -> str:
        """Return the key of a form's token: a string, what it may be used for."""
        return f"{self.prefix}:form:{token}"

    def action(self, action_id: str) -> str:
        """Return the key of the progress of an action that was started on the page: a string."""
        return f"{self.prefix}:{{0}}:action:{action_id}"

    @property
    def layout(self) -> str:
        """The key of the layout's version and number of partitions: a hash."""
        return f"{self.prefix}:layout"

    def layout_in(self, partition: int) -> str:
        """Return the key of a partition's copy of the layout: a string."""
        return f"{self.prefix}:{{{partition}}}:layout"

    @property
    def layout_copy(self) -> str:
        """The value of our layout's copies."""
        return f"{LAYOUT_VERSION} {self.partitions}"


async def is_claimed(connections: Connections, keys: Keys) -> bool:
    """Return whether a layout has been claimed, and check that it is ours.

    Raises:
        ConfigError: The version or the number of partitions is not ours.
        RedisError: Redis did not answer.
    """
    ours = _fields(keys)
    found = await connections.client.hmget(keys.layout, list(ours))
    if None in found:
        return False
    names = ("layout version", "PARTITIONS")
    problems = [
        f"{name} is {value}, but the layout in Redis was made for {stored.decode()}"
        for name, value, stored in zip(names, ours.values(), found, strict=True)
        if stored != str(value).encode()
    ]
    if problems:
        raise ConfigError(problems)
    return True


async def claim(connections: Connections, keys: Keys) -> None:
    """Claim the layout on an empty server, or check that the one there is ours.

    Raises:
        ConfigError: The version or the number of partitions differs.
        RedisError: Redis did not answer.
    """
    while True:
        # Read first: workers must be able to start on a full server, which takes no writes.
        while not await is_claimed(connections, keys):
            for field, value in _fields(keys).items():
                await connections.client.hsetnx(keys.layout, field, value)
        await _copy(connections, keys)
        # Meanwhile Redis may have lost the layout, and another process claimed another one.
        if await is_claimed(connections, keys):
            return


async def _copy(connections: Connections, keys: Keys) -> None:
    """Copy the layout into each partition, over the copy of any other layout."""
    partitions = range(keys.partitions)
    calls = [ScriptCall(_COPY, [keys.layout_in(each)], [keys.layout_copy]) for each in partitions]
    raise_first(await connections.run(calls))


def _fields(keys: Keys) -> dict[str, int]:
    return {"version": LAYOUT_VERSION, "partitions": keys.partitions}
