"""A client that behaves like Stripe behind a balancer, and writes down every answer.

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

from tests.support.harness import SECRET, request, signed
from tests.system.chaos.evidence import Answer, Event
from tests.system.chaos.lives import Letter

TIMEOUT_S = 6.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.3, 3.0
# Shares of all events: sent twice, much later than their turn, to two receivers at once.
COPIES, STRAGGLERS, DOUBLED = 0.2, 0.1, 0.05
STEP_S, OVERTAKING_S, STRAGGLING_S = 0.25, 0.6, 3.0


class Stripe:
    """Sends lives at an even rate.

    Attributes:
        rate: Events begun per second; may be changed at any time.
        receivers: The ports that the balancer knows, by the receivers' names.
        events: All events sent.
        answers: Every answer, and every request that had none.
        bodies: Every different body of an answer.
    """

    def __init__(self, random: Random, *, rate: float) -> None:
        self.receivers: dict[str, int] = {}
        self.events: dict[str, Event] = {}
        self.answers: list[Answer] = []
        self.bodies: set[bytes] = set()
        self._random = random
        self.rate = rate
        self._idle: dict[int, list[_Line]] = {}
        self._gives_up_at = float("inf")
        # When each event that is not acknowledged was first sent, in Unix seconds.
        self._waiting: dict[str, float] = {}

    async def send(self, lives: Iterator[list[Letter]], stopping: asyncio.Event) -> None:
        """Begin one life after the other until *stopping*, and see each event acknowledged."""
        due = time.monotonic()
        async with asyncio.TaskGroup() as deliveries:
            while not stopping.is_set():
                life = next(lives)
                for delay_s, letter in self._planned(life):
                    deliveries.create_task(self._deliver(letter, delay_s))
                due += len(life) / self.rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))

    def is_acknowledged_until(self, at: float) -> bool:
        """Say whether all that was first sent before *at*, in Unix seconds, is acknowledged."""
        return all(sent_at > at for sent_at in self._waiting.values())

    def give_up_in(self, seconds: float) -> None:
        """Stop sending again so many seconds from now."""
        self._gives_up_at = time.monotonic() + seconds

    def close(self) -> None:
        """Close every connection."""
        for lines in self._idle.values():
            for line in lines:
                line.close()
        self._idle.clear()

    def _planned(self, life: list[Letter]) -> Iterator[tuple[float, Letter]]:
        """Yield when each event is sent for the first time, copies included."""
        random = self._random
        for step, letter in enumerate(life):
            self.events[letter.event.id] = letter.event
            delay_s = step * STEP_S + random.uniform(0, OVERTAKING_S)
            if random.random() < STRAGGLERS:
                delay_s += random.uniform(0, STRAGGLING_S)
            yield delay_s, letter
            if random.random() < COPIES:
                yield delay_s + random.uniform(0, STRAGGLING_S), letter

    async def _deliver(self, letter: Letter, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self._waiting.setdefault(letter.event.id, time.time())
        pause_s = FIRST_PAUSE_S
        while not await self._is_acknowledged(letter):
            if time.monotonic() > self._gives_up_at:
                return
            await asyncio.sleep(self._random.uniform(pause_s / 2, pause_s))
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        self._waiting.pop(letter.event.id, None)

    async def _is_acknowledged(self, letter: Letter) -> bool:
        names = self._random.sample([*self.receivers], k=len(self.receivers))
        chosen = names[: 2 if self._random.random() < DOUBLED else 1]
        answers = await asyncio.gather(
            *(self._post(letter, name, self.receivers[name]) for name in chosen)
        )
        return any(answer.is_acknowledgement for answer in answers)

    async def _post(self, letter: Letter, receiver: str, port: int) -> Answer:
        asked_at, status, word = time.time(), None, None
        try:
            async with asyncio.timeout(TIMEOUT_S), self._line(port) as line:
                status, body = await line.post(letter.body)
                self.bodies.add(body)
                word = _word(body)
        except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError):
            pass
        answer = Answer(letter.event.id, receiver, asked_at, time.time(), status, word)
        self.answers.append(answer)
        return answer

    @contextlib.asynccontextmanager
    async def _line(self, port: int) -> AsyncIterator[_Line]:
        """Lend a connection; one that failed is not lent again."""
        idle = self._idle.setdefault(port, [])
        line = idle.pop() if idle else await _Line.open(port)
        try:
            yield line
        except BaseException:
            line.close()
            raise
        idle.append(line)


class _Line:
    """One connection that is kept alive."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> _Line:
        """Connect."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """Send a signed body; return the answer's status and body."""
        self._writer.write(request(body, signed(body, SECRET), close=False))
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        answer = await self._reader.readexactly(int(fields.get(b"content-length", 0)))
        return int(head.split(b" ")[1]), answer

    def close(self) -> None:
        """Disconnect."""
        self._writer.transport.abort()


def _word(body: bytes) -> str | None:
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return said.get("outcome") or said.get("error") if isinstance(said, dict) else None
