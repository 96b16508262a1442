"""The load on the way in: requests made beforehand, and the compiled generator that posts them.

What is measured with it, and against whom, is `way_in`'s and `candidates`' business.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from array import array
from collections.abc import Iterator
from functools import cached_property
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import orjson

from service.operations.synthetic_events import lifecycle_events
from service.stripe.signatures import sign
from tests.support.harness import SECRET, WEBHOOK

SOURCE = Path(__file__).with_name("generator.c")
LIFECYCLE = "redacted-after-verified"
STEPS = 4
# Far enough apart that no step of a session overtakes another with 256 requests in hand.
SESSIONS_SIDE_BY_SIDE = 2000
LAYOUTS = 16
RUN_DEADLINE_S = 60
# A signature is accepted for 300 s, of which a run needs some.
FRESH_S = 150
OLD_ENOUGH_S = 6 * 86_400

# What Stripe's sessions have, and the simulated ones leave out.
_FURTHER: dict[str, Any] = {
    "related_person": {"account": "acct_1NuN4zLkdIwHu7ix", "person": "person_1NuN4zLkdIwHu7ix"},
    "verification_flow": "vf_1NuN4zLkdIwHu7ixleE6XvTz",
    "metadata": {
        "user_id": "user-7f3c2a",
        "attempt_group": "kyc-2026-08",
        "tenant": "northwind-traders",
        "plan": "business",
        "onboarding_step": "identity-document",
        "return_to": "https://app.example.com/onboarding/identity/done",
        "risk_band": "low",
        "campaign": "spring-onboarding-2026",
        "sales_contact": "team-emea-north@example.com",
        "contract": "3c1d6a0e-0b44-4f4e-8f0e-6a1f7f0f2b90",
        "source": "https://app.example.com/signup?plan=business&step=3",
        "correlation_id": "0f5c2f6e-5a51-4b7e-9d55-9b7f1c7f9a11",
    },
}
_FURTHER_OPTIONS: dict[str, Any] = {
    "email": {"require_verification": True},
    "id_number": {},
    "matching": {"dob": "similar", "name": "similar"},
    "phone": {"require_verification": True},
}


class Layout(NamedTuple):
    """The bodies of one session's events, with ids to be replaced."""

    session_id: bytes
    events: tuple[tuple[bytes, bytes], ...]

    def body(self, step: int, session: int) -> bytes:
        """Return the body of *step* of session number *session*."""
        event_id, body = self.events[step]
        named = body.replace(self.session_id, b"vs_1NuN4zLkdIwHu7ix%08d" % session)
        return named.replace(event_id, b"evt_1NuN4zLkdIwHu7ix%08d" % (session * STEPS + step))


def layouts() -> list[Layout]:
    """Return sessions as full as Stripe's, about 2.3 KB an event."""
    random, started_at = Random(1), int(time.time()) - OLD_ENOUGH_S
    return [_layout(random, started_at) for _ in range(LAYOUTS)]


def _layout(random: Random, started_at: int) -> Layout:
    simulated = lifecycle_events(LIFECYCLE, random=random, started_at=started_at)
    events = [(each.id.encode(), _full(orjson.loads(each.body))) for each in simulated]
    return Layout(simulated[0].session_id.encode(), tuple(events))


def _full(event: dict[str, Any]) -> bytes:
    session = event["data"]["object"]
    session |= {**_FURTHER, "options": {**session["options"], **_FURTHER_OPTIONS}}
    return orjson.dumps(event, option=orjson.OPT_INDENT_2)


def bodies(first_session: int = 0) -> Iterator[bytes]:
    """Yield bodies of ever new events, the steps of each session in order and far apart."""
    known = layouts()
    for first in count(first_session, SESSIONS_SIDE_BY_SIDE):
        for step in range(STEPS):
            for session in range(first, first + SESSIONS_SIDE_BY_SIDE):
                yield known[session % LAYOUTS].body(step, session)


class Answers(NamedTuple):
    """What the generator saw.

    Attributes:
        found: What it printed.
    """

    found: dict[str, Any]

    @property
    def good(self) -> int:
        """How many answers were 200."""
        return int(self.found["good"]["count"])

    @property
    def per_s(self) -> float:
        """Answers of 200 per second."""
        return self.good / float(self.found["seconds"])

    @property
    def generator_us(self) -> float:
        """The generator's own CPU time per answer."""
        return float(self.found["cpu_s"]) / max(1, self.good + self.refused) * 1e6

    @property
    def refused(self) -> int:
        """How many answers were none of 200."""
        return int(self.found["refused"]["count"])

    @property
    def lost(self) -> int:
        """How many requests had no answer: dropped, never answered, or not connected."""
        return sum(int(self.found[name]) for name in ("dropped", "unanswered", "failed_to_connect"))

    @property
    def next(self) -> int:
        """The first request that was not used."""
        return int(self.found["next"])

    def ms(self, share: str, which: str = "good") -> float:
        """Return a percentile (`p50`, `p99`, `p99.9`, `p100`) of the latency."""
        return float(self.found[which].get(f"{share}_us", 0)) / 1000


class Load:
    """Requests in a file, signed anew when they get old, and the generator that posts them.

    Args:
        directory: Where both are made.
        requests: How many there are.
        duplicates: The share of them that repeats one of the thousand before.
    """

    def __init__(self, directory: Path, requests: int, duplicates: float = 0) -> None:
        self._directory = directory
        self._requests = requests
        self._duplicates = duplicates
        self._file = directory / "requests"
        self._signed_at = 0.0
        self._generator = _compiled(directory)

    @cached_property
    def _bodies(self) -> list[bytes]:
        """The bodies, repeats among them."""
        random, fresh = Random(2), bodies()
        made: list[bytes] = []
        while len(made) < self._requests:
            repeats = made and random.random() < self._duplicates
            made.append(random.choice(made[-1000:]) if repeats else next(fresh))
        return made

    def post(
        self,
        port: int,
        *,
        first: int = 0,
        connections: int,
        seconds: float,
        rate: float = 0,
        again: bool = False,
    ) -> Answers:
        """Post for *seconds*, or until the requests are used up, and return what was answered."""
        self._freshen()
        words = [port, self._file, first, connections, seconds, rate, int(again)]
        ended = subprocess.run(
            [str(self._generator), *map(str, words)],
            check=True,
            stdout=subprocess.PIPE,
            timeout=seconds + RUN_DEADLINE_S,
        )
        return Answers(orjson.loads(ended.stdout))

    def _freshen(self) -> None:
        """Sign all requests again, unless that was a short time ago."""
        if time.time() - self._signed_at < FRESH_S:
            return
        self._signed_at = time.time()
        timestamp = int(self._signed_at)
        requests = (_request(body, timestamp) for body in self._bodies)
        with self._file.open("wb") as out:
            offsets = array("Q", [8 * (self._requests + 2)])
            out.seek(offsets[0])
            for request in requests:
                out.write(request)
                offsets.append(offsets[-1] + len(request))
            out.seek(0)
            out.write(array("Q", [self._requests]).tobytes())
            out.write(offsets.tobytes())


def _request(body: bytes, timestamp: int) -> bytes:
    """Return the POST as Stripe sends it."""
    return (
        f"POST {WEBHOOK} HTTP/1.1\r\n"
        "Host: 127.0.0.1\r\n"
        "User-Agent: Stripe/1.0 (+https://stripe.com/docs/webhooks)\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Accept: */*; q=0.5, application/xml\r\n"
        "Cache-Control: no-cache\r\n"
        "Content-Type: application/json; charset=utf-8\r\n"
        f"Stripe-Signature: {sign(body, SECRET, timestamp)}\r\n\r\n"
    ).encode() + body


def _compiled(directory: Path) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise SystemExit("no C compiler: the load generator needs gcc or cc")
    made = directory / "generator"
    subprocess.run([compiler, "-O2", "-o", str(made), str(SOURCE)], check=True)
    return made
