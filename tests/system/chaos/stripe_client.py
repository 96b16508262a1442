"""A client that behaves like Stripe behind a load balancer, and records every response.

Each delivery is sent again, after growing pauses, until it is acknowledged. Events of a session
overtake each other, copies follow, and now and then the balancer sends a request to two receivers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from random import Random

import orjson

from tests.support.harness import SECRET, answer, request, signed
from tests.system.chaos.evidence import Answer, Event
from tests.system.chaos.workload import Payload

TIMEOUT_S = 6.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.3, 3.0
# Shares of all events: sent twice, much later than their turn, to two receivers at once.
COPIES, STRAGGLERS, DOUBLED = 0.2, 0.1, 0.05
STEP_S, OVERTAKING_S, STRAGGLING_S = 0.25, 0.6, 3.0

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Stripe:
    """Sends the events of sessions at an even rate.

    Attributes:
        rate: Events begun per second; may be changed at any time.
        receivers: The ports of the receivers, by name.
        events: All events, unsent ones included.
        answers: Every answer, and every request that had none.
        bodies: Every different body of an answer.
        unsent_share: The share of events whose webhook is never sent.
        thin_share: The share of events that are sent as thin notifications.
        unsent: The ids of events that were never sent.
        thin: The ids of the notifications that were sent instead of events, by the events' ids.
    """

    def __init__(self, random: Random, *, rate: float) -> None:
        self.receivers: dict[str, int] = {}
        self.events: dict[str, Event] = {}
        self.answers: list[Answer] = []
        self.bodies: set[bytes] = set()
        self._random = random
        self.rate = rate
        self.unsent_share = self.thin_share = 0.0
        self.unsent: set[str] = set()
        self.thin: dict[str, str] = {}
        self._idle: dict[int, list[Connection]] = {}
        self._gives_up_at = float("inf")
        # When each event that is not acknowledged was first sent, in Unix seconds.
        self._waiting: dict[str, float] = {}

    async def send(self, sessions: Iterator[list[Payload]], stopping: asyncio.Event) -> None:
        """Send sessions until *stopping*, and each event until it is acknowledged."""
        due = time.monotonic()
        async with asyncio.TaskGroup() as deliveries:
            while not stopping.is_set():
                session = next(sessions)
                for delay_s, payload in self._planned(session):
                    deliveries.create_task(self._deliver(payload, delay_s))
                due += len(session) / self.rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))

    def is_acknowledged_until(self, at: float) -> bool:
        """Say whether all that was first sent before *at*, in Unix seconds, is acknowledged."""
        return all(sent_at > at for sent_at in self._waiting.values())

    def give_up_in(self, seconds: float) -> None:
        """Stop repeating so many seconds from now."""
        self._gives_up_at = time.monotonic() + seconds

    def close(self) -> None:
        """Close every connection."""
        for connections in self._idle.values():
            for _, writer in connections:
                writer.transport.abort()
        self._idle.clear()

    def _planned(self, session: list[Payload]) -> Iterator[tuple[float, Payload]]:
        """Yield when each event is sent for the first time, copies included."""
        random = self._random
        self.events |= {payload.event.id: payload.event for payload in session}
        for step, payload in enumerate(self._sent(session)):
            delay_s = step * STEP_S + random.uniform(0, OVERTAKING_S)
            if random.random() < STRAGGLERS:
                delay_s += random.uniform(0, STRAGGLING_S)
            yield delay_s, payload
            if random.random() < COPIES:
                yield delay_s + random.uniform(0, STRAGGLING_S), payload

    def _sent(self, session: list[Payload]) -> Iterator[Payload]:
        """Yield what is sent of a session: not every event, and some in the thin form."""
        for payload in session:
            drawn = self._random.random() if payload.thin_id else 1.0
            if drawn < self.unsent_share:
                self.unsent.add(payload.event.id)
            elif drawn < self.unsent_share + self.thin_share:
                self.thin[payload.event.id] = payload.thin_id
                yield payload._replace(body=payload.thin_body)
            else:
                yield payload

    async def _deliver(self, payload: Payload, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self._waiting.setdefault(payload.event.id, time.time())
        pause_s = FIRST_PAUSE_S
        while not await self._is_acknowledged(payload):
            if time.monotonic() > self._gives_up_at:
                return
            await asyncio.sleep(self._random.uniform(pause_s / 2, pause_s))
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        self._waiting.pop(payload.event.id, None)

    async def _is_acknowledged(self, payload: Payload) -> bool:
        names = self._random.sample([*self.receivers], k=len(self.receivers))
        chosen = names[: 2 if self._random.random() < DOUBLED else 1]
        answers = await asyncio.gather(
            *(self._post(payload, name, self.receivers[name]) for name in chosen)
        )
        return any(answer.is_acknowledgement for answer in answers)

    async def _post(self, payload: Payload, receiver: str, port: int) -> Answer:
        asked_at, status, word = time.time(), None, None
        try:
            async with asyncio.timeout(TIMEOUT_S), self._connection(port) as (reader, writer):
                headers = signed(payload.body, SECRET)
                writer.write(request(payload.body, headers, close=False))
                status, body = await answer(reader)
                self.bodies.add(body)
                word = _word(body)
        except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError):
            pass
        answered = Answer(payload.event.id, receiver, asked_at, time.time(), status, word)
        self.answers.append(answered)
        return answered

    @contextlib.asynccontextmanager
    async def _connection(self, port: int) -> AsyncIterator[Connection]:
        """Yield a kept-alive connection; one that failed is not used again."""
        idle = self._idle.setdefault(port, [])
        # uvloop refuses to write to a connection that was lost while it was idle.
        while idle and idle[-1][1].is_closing():
            idle.pop()
        reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        try:
            yield reader, writer
        except BaseException:
            writer.transport.abort()
            raise
        idle.append((reader, writer))


def _word(body: bytes) -> str | None:
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return said.get("outcome") or said.get("error") if isinstance(said, dict) else None
