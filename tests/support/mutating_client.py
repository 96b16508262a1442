"""A client that sends damaged HTTP: the same requests for the same seed. No tests.

What must hold whatever it sends is in `tests.fuzz.http` and `tests.server.test_raw_http`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from random import Random
from typing import NamedTuple

import orjson

from tests.support.harness import event, request, signed

ANSWER_DEADLINE_S = 20.0
MAX_BODY_BYTES = 262_144

ANSWER = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{0,40})")
UNANSWERED = b"neither answered nor closed"

HOSTILE = [
    *(b"\r\n", b"\n", b"\r", b"\0", b"\xff", b" ", b"\t", b":", b",", b";", b"\r\n\r\n", b"%00"),
    *(b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n"),
    *(b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\nConnection: Upgrade\r\n", b"HTTP/2.0"),
    *(b"Stripe-Signature: t=1,v1=" + b"0" * 64 + b"\r\n", b"t=", b"v1=", b"A" * 4000),
    *(b"ffffffffffffffff\r\n", b"5;x=y\r\nhello\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    *(b"/webhooks/stripe/", b"/webhooks/stripe/../x", b"//", b"http://x/livez", b"*", b"?a=b#c"),
    *(
        b"X-Request-Id: a\r\n",
        b"traceparent: 00-0-0-0\r\n",
        b"Host: \r\n",
        b"Cookie: " + b"a=b;" * 500,
    ),
]
# Bodies of the largest size that cost the most work.
LARGE = [
    event(metadata={f"key{n}": "x" for n in range(15_000)}),
    event(last_verification_report={"id": "vr_1", "document": {"files": ["file_1"] * 25_000}}),
    event(unknown=[{}] * 80_000),
    event(unknown={f"{n}": n for n in range(20_000)}),
    event(client_reference_id="\u0001" * 40_000),
    event(client_reference_id="\U0001f600" * 60_000),
]


class Attempt(NamedTuple):
    """One request, however damaged.

    Attributes:
        pieces: The writes in which it is sent.
        ends: Whether the client half-closes the connection afterwards.
    """

    pieces: list[bytes]
    ends: bool


class Mutations:
    """Derives damaged requests from valid ones, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._number = 0

    def next(self) -> Attempt:
        """Return the next request."""
        found = bytearray(self._valid())
        for _ in range(self._random.choice([0, 1, 1, 2, 3, 8])):
            self._damage(found)
        ends = self._random.random() < 0.2
        return Attempt(self._cut(bytes(found[: 4 * MAX_BODY_BYTES])), ends)

    def _valid(self) -> bytes:
        self._number += 1
        body = event(id=f"evt_{self._number}", session=f"vs_{self._number % 50}")
        chosen = self._random.randrange(10)
        if chosen == 0:
            return b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * self._random.choice([1, 1, 2, 40])
        if chosen == 1:
            body = orjson.dumps({"type": "x" * self._random.choice([1, MAX_BODY_BYTES])})
        if chosen == 2:
            body = self._random.randbytes(self._random.choice([0, 1, 300, MAX_BODY_BYTES + 1]))
        if chosen == 3:
            body = b"[" * self._random.choice([500, MAX_BODY_BYTES])
        if chosen == 6:
            body = self._random.choice(LARGE)
        if chosen == 7:
            damaged = bytearray(body)
            self._damage(damaged)
            body = bytes(damaged)
        headers = signed(body) if self._random.random() < 0.8 else {}
        if chosen == 4:
            return self._chunked(body, headers)
        return request(body, headers, close=self._random.random() < 0.5) * (1 + (chosen == 5))

    def _chunked(self, body: bytes, headers: dict[str, str]) -> bytes:
        size = self._random.choice([1, 7, 1000])
        chunks = [body[i : i + size] for i in range(0, len(body), size)]
        head = request(b"", {**headers, "Transfer-Encoding": "chunked"})
        head = head.replace(b"Content-Length: 0\r\n", b"")
        return head + b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in chunks) + b"0\r\n\r\n"

    def _damage(self, found: bytearray) -> None:
        at = self._random.randrange(len(found) + 1)
        # Half of the damage is done to the request line and the headers.
        at = at if self._random.random() < 0.5 else min(at, self._random.randrange(300))
        length = self._random.choice([1, 1, 2, 8, 64])
        match self._random.randrange(6):
            case 0:
                found[at:at] = self._random.choice(HOSTILE)
            case 1:
                found[at : at + length] = self._random.choice(HOSTILE)
            case 2:
                del found[at : at + length]
            case 3:
                found[at : at + length] = self._random.randbytes(length)
            case 4:
                found[at:at] = found[at : at + length] * self._random.choice([1, 2, 300])
            case _:
                lines = bytes(found).split(b"\r\n")
                self._random.shuffle(lines)
                found[:] = b"\r\n".join(lines)

    def _cut(self, found: bytes) -> list[bytes]:
        """Cut a request into a few pieces of any size."""
        cuts = sorted(
            self._random.randrange(len(found) + 1) for _ in range(self._random.choice([0, 0, 1, 5]))
        )
        return [found[a:b] for a, b in zip([0, *cuts], [*cuts, len(found)], strict=True)]


async def send_attempt(port: int, attempt: Attempt) -> bytes:
    """Send a request; return everything received until the connection is closed."""
    answer = b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(OSError):
            for piece in attempt.pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if attempt.ends:
                writer.write_eof()
        with contextlib.suppress(OSError):
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                while part := await reader.read(65536):
                    answer += part
    except TimeoutError:
        return UNANSWERED
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return answer
