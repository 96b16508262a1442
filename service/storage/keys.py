"""The names of all keys in Redis.

Keys of one session share a partition tag, so that one script may use them all, in Cluster too. What
a key holds is known to the package that writes it.
"""

from __future__ import annotations

from typing import NamedTuple
from zlib import crc32

LAYOUT_VERSION = 4


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

    def finished_attempts(self, partition: int, handler: str) -> str:
        """Return the key of a handler's stream of finished attempts."""
        return f"{self.prefix}:{{{partition}}}:attempts:{handler}"

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
