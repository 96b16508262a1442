"""A deployment that an operator looks at: a receiver and a worker on one Redis, fed by webhooks.

Its second handler does as it is bidden: see `Mode`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import redis

from service.config import DAY_S, Settings
from service.storage.keys import Keys
from tests.support.harness import NOW, event, signed
from tests.support.processes import Process, Sandbox, open_sandbox
from tests.support.streams import count_unsettled
from tests.support.waiting import wait_until

NAME, TOKEN = "night-shift", "a-token-of-the-tests"
SHOP = "shop:open"
_DEFAULTS = Settings()
KEYS = Keys(_DEFAULTS.redis_prefix, _DEFAULTS.partitions)
# What a handler is that fails as its users ask: by the word in a file.
_SHOP = """
from contextlib import asynccontextmanager
from pathlib import Path

class PaymentRefused(Exception):
    pass

@asynccontextmanager
async def open(environ):
    async def handle(transition):
        mode = Path(environ["SHOP_MODE"]).read_text()
        if mode == "down":
            raise ConnectionRefusedError
        if mode == "broken":
            raise PaymentRefused(transition.metadata)
    yield handle
"""

_COPY = """
local _, fields = unpack(redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1])
for _ = 1, ARGV[1] do redis.call('XADD', KEYS[1], '*', unpack(fields)) end
"""


class Mode(StrEnum):
    """What the handler does with each transition."""

    WORKS = "works"
    DOWN = "down"
    BROKEN = "broken"


class Deployment(NamedTuple):
    """Running processes.

    Attributes:
        sandbox: Their Redis and their folder.
        receiver: Takes the webhooks.
        worker: Delivers to the log and to the handler `SHOP`.
    """

    sandbox: Sandbox
    receiver: Process
    worker: Process

    def turn(self, mode: Mode) -> None:
        """Let the handler behave like this from now on."""
        _turn(self.sandbox.directory, mode)

    def send(self, *bodies: bytes, outcomes: Sequence[str] = ("admitted",)) -> None:
        """Post signed events one after the other; each must have one of the *outcomes*."""
        with httpx2.Client() as client:
            for body in bodies:
                answer = client.post(self.receiver.url, content=body, headers=signed(body))
                assert answer.json() in [{"outcome": outcome} for outcome in outcomes], answer.text

    def client(self) -> redis.Redis:
        """Return a plain client of its Redis."""
        return redis.Redis.from_url(self.sandbox.url)

    def count_dead_letters(self) -> int:
        """Return how many dead letters the handler has."""
        with self.client() as client:
            return sum(
                client.xlen(KEYS.dead_letters(partition, SHOP))
                for partition in range(KEYS.partitions)
            )

    def copy_dead_letter(self, session: str, copies: int) -> None:
        """Let the handler have the dead letter of a session so many times more."""
        stream = KEYS.dead_letters(KEYS.partition(session), SHOP)
        with self.client() as client:
            client.eval(_COPY, 1, stream, copies)

    def bury(self, *bodies: bytes) -> None:
        """Send events that end as dead letters of the handler, which works again afterwards."""
        self.wait_until_delivered()
        expected = self.count_dead_letters() + len(bodies)
        self.turn(Mode.BROKEN)
        self.send(*bodies)
        wait_until(lambda: self.count_dead_letters() == expected)
        self.turn(Mode.WORKS)

    def wait_until_delivered(self) -> None:
        """Wait until the handler has taken all that was sent."""
        with self.client() as client:
            streams = [KEYS.transitions(partition) for partition in range(KEYS.partitions)]
            wait_until(lambda: not any(count_unsettled(client, one, SHOP) for one in streams))

    def wait_until_published(self) -> None:
        """Wait until both processes have said in Redis that they live."""
        with self.client() as client:
            wait_until(lambda: client.hlen(KEYS.processes) == 2)

    def wait_until_counted(self) -> None:
        """Wait until what the receiver has got is counted in Redis."""
        today = KEYS.day(int(time.time() // DAY_S))
        with self.client() as client:
            wait_until(lambda: client.hexists(today, "last_event_ms"))

    def fill_last_hour(self) -> None:
        """Write what the processes of a busier deployment would have counted."""
        minute = int(time.time() // 60)
        with self.client() as client:
            for ago in range(1, 60):
                events = 40 + ago * ago % 37
                counts = {
                    "received:admitted": events,
                    "received:duplicate": events // 8,
                    "received:unchanged": ago % 3,
                    "received:signature_mismatch": ago % 17 == 0,
                    "delivered:delivered:log": events,
                    f"delivered:delivered:{SHOP}": events - ago % 2,
                    f"delivered:failed:{SHOP}": ago % 2,
                    f"delivered:retried:{SHOP}": ago % 2,
                }
                numbers = {name: int(number) for name, number in counts.items()}
                client.hset(KEYS.minute(minute - ago), mapping=numbers)


@contextmanager
def open_deployment(directory: Path) -> Iterator[Deployment]:
    """Run a deployment until the block is left; no process may have printed a traceback."""
    (directory / "shop.py").write_text(_SHOP)
    _turn(directory, Mode.WORKS)
    given = {
        "HANDLERS": f"log,{SHOP}",
        "ADMIN_TOKENS": f"{NAME}:{TOKEN}",
        "RETRY_MAX_ATTEMPTS": "2",
        "RETRY_INITIAL_DELAY_S": "0.01",
        "RETRY_MAX_DELAY_S": "0.02",
        "SHOP_MODE": str(directory / "mode"),
    }
    with open_sandbox(directory) as sandbox:
        processes = [sandbox.start(command, **given) for command in ("serve", "work")]
        yield Deployment(sandbox, *(process.ready() for process in processes))
        for process in processes:
            assert b"Traceback" not in process.out + process.err


def lifecycle(session: str, *words: str, began: int = NOW - 600) -> list[bytes]:
    """Return events of a session, a minute apart.

    Args:
        session: Its id.
        words: The last word of each event's type, which is the status too, but for `created`.
        began: When the first one is created, Unix time.
    """
    return [
        event(
            word,
            id=f"evt_{session.removeprefix('vs_')}_{number}",
            session=session,
            status="requires_input" if word == "created" else word,
            created=began + 60 * number,
        )
        for number, word in enumerate(words)
    ]


def _turn(directory: Path, mode: Mode) -> Any:
    # In one step: the handler must never read an empty file.
    new = directory / "mode.new"
    new.write_text(mode)
    return new.replace(directory / "mode")
