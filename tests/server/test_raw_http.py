"""HTTP byte for byte: what is sent, and the exact bytes of the response.

The real application behind a real listener. An unsigned request that reaches it is answered
`signature_missing`, which shows how many requests were read. HTTP has the same reading in every
state of the process: idle, overloaded or draining.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from http import HTTPStatus

import pytest

from service.config import Settings
from service.server.closing import MAX_LINGERING
from service.server.framing import MAX_HEADER_BYTES, MAX_HEADERS, MAX_SMALL_CHUNKS, MIN_CHUNK_BYTES
from service.server.protocol import MAX_PIPELINED
from service.storage.connections import Connections
from tests.support.apps import serving, webhook_app
from tests.support.harness import WEBHOOK, event, listening, signed, talk
from tests.support.mutating_client import ANSWER, Attempt, Mutations, send_attempt

DATE = re.compile(rb"date: [^\r]+\r\n")
LAST = b"connection: close\r\n"


def response(status: str, body: bytes = b"", *, more: bytes = b"", last: bool = False) -> bytes:
    """Return a response as it is sent, without its date."""
    kind = b"content-type: application/json\r\n" if body else b""
    head = b"HTTP/1.1 %b\r\n%bcontent-length: %d\r\n" % (status.encode(), kind, len(body))
    return head + more + (LAST if last else b"") + b"\r\n" + body


def error(status: str, word: str, *, more: bytes = b"", last: bool = False) -> bytes:
    """Return a response whose body names an error."""
    return response(status, b'{"error":"%b"}' % word.encode(), more=more, last=last)


def post(*headers: bytes, body: bytes = b"", start: bytes = b"") -> bytes:
    """Return a POST with a host and *headers*, one a line."""
    line = start or b"POST %b HTTP/1.1" % WEBHOOK.encode()
    return b"\r\n".join([line, b"Host: x", *headers, b"", b""]) + body


def get(line: bytes, *headers: bytes) -> bytes:
    """Return a request that is not a POST."""
    return post(*headers, start=line)


UNSIGNED = error("400 Bad Request", "signature_missing")
UNSIGNED_LAST = error("400 Bad Request", "signature_missing", last=True)
MALFORMED = error("400 Bad Request", "request_malformed", last=True)
HEADERS = error("431 Request Header Fields Too Large", "headers_too_large", last=True)
# The words after a status code are Python's, and changed with 3.13.
TOO_LARGE = error(f"413 {HTTPStatus(413).phrase}", "body_too_large")
TOO_LARGE_LAST = error(f"413 {HTTPStatus(413).phrase}", "body_too_large", last=True)
CHUNKS = error("400 Bad Request", "too_many_chunks", last=True)
BUSY = error("503 Service Unavailable", "unavailable", more=LAST + b"retry-after: 5\r\n")
SHED = error("503 Service Unavailable", "unavailable", more=b"retry-after: 5\r\n")
BUSY_LAST = error("503 Service Unavailable", "unavailable", more=b"retry-after: 5\r\n", last=True)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
ALIVE = response("200 OK")
NOT_FOUND = response("404 Not Found")
SLASH = error("404 Not Found", "trailing_slash")
UNKNOWN = error("404 Not Found", "endpoint_unknown")
NOT_ALLOWED = b"HTTP/1.1 405 Method Not Allowed\r\nallow: POST\r\ncontent-length: 0\r\n\r\n"
SILENCE = b""

Table = dict[str, tuple[bytes, bytes]]


def malformed(requests: dict[str, bytes]) -> Table:
    """Return a table of requests that are refused as malformed."""
    return {name: (sent, MALFORMED) for name, sent in requests.items()}


LIVEZ = get(b"GET /livez HTTP/1.1")
LENGTH_1 = b"Content-Length: 1"
CHUNKED = b"Transfer-Encoding: chunked"
ENDED = b"0\r\n\r\n"
ONE = b"1\r\nx\r\n" + ENDED

# What a proxy before us might read in another way.
FRAMING = malformed(
    {
        "length before coding": post(b"Content-Length: 5", CHUNKED, body=ENDED + LIVEZ),
        "coding before length": post(CHUNKED, b"Content-Length: 5", body=ENDED + LIVEZ),
        "two lengths": post(LENGTH_1, b"Content-Length: 2", body=b"xy"),
        "two equal lengths": post(LENGTH_1, LENGTH_1, body=b"x"),
        "a list of lengths": post(b"Content-Length: 1, 1", body=b"x"),
        "a negative length": post(b"Content-Length: -1", body=b"x"),
        "a length with a sign": post(b"Content-Length: +1", body=b"x"),
        "a length in hexadecimal": post(b"Content-Length: 0x1", body=b"x"),
        "a length in two words": post(b"Content-Length: 1 1", body=b"x"),
        "an empty length": post(b"Content-Length: ", body=b"x"),
        "a length beyond counting": post(b"Content-Length: " + b"9" * 30),
        "space before the colon": post(b"Content-Length : 1", body=b"x"),
        "gzip, chunked": post(b"Transfer-Encoding: gzip, chunked", body=ONE),
        "chunked, gzip": post(b"Transfer-Encoding: chunked, gzip", body=ONE),
        "chunked, chunked": post(b"Transfer-Encoding: chunked, chunked", body=ONE),
        "chunked in two lines": post(CHUNKED, CHUNKED, body=ONE),
        "chunked after a tab stop": post(b"Transfer-Encoding: \x0bchunked", body=ONE),
        "identity": post(b"Transfer-Encoding: identity", LENGTH_1, body=b"x"),
        "an empty coding": post(b"Transfer-Encoding: ", LENGTH_1, body=b"x"),
        "xchunked": post(b"Transfer-Encoding: xchunked", body=ONE),
        "chunked in HTTP/1.0": post(CHUNKED, body=ONE, start=b"POST /webhooks/stripe HTTP/1.0"),
        "an extension and a bare LF": post(CHUNKED, body=b"1;a=b\nx\r\n" + ENDED),
        "a chunk's size negative": post(CHUNKED, body=b"-1\r\nx\r\n" + ENDED),
        "a chunk's size with 0x": post(CHUNKED, body=b"0x1\r\nx\r\n" + ENDED),
        "a chunk's size and a space": post(CHUNKED, body=b"1 \r\nx\r\n" + ENDED),
        "a chunk's size too large": post(CHUNKED, body=b"f" * 17 + b"\r\nx\r\n"),
        "a chunk's size missing": post(CHUNKED, body=b"\r\nx\r\n" + ENDED),
        "a chunk's size and a bare LF": post(CHUNKED, body=b"1\nx\r\n" + ENDED),
        "a chunk longer than its size": post(CHUNKED, body=b"1\r\nxyz\r\n" + ENDED),
        "a coding with a tab in its name": post(
            b"Transfer-Encoding\x0b: chunked", LENGTH_1, body=b"x"
        ),
        "a coding before the colon": post(b"Transfer-Encoding : chunked", LENGTH_1, body=b"x"),
        "a coding on a folded line": post(
            b"A: b\r\n Transfer-Encoding: chunked", LENGTH_1, body=b"x"
        ),
        "a coding after a bare LF": post(b"A: b\nTransfer-Encoding: chunked", LENGTH_1, body=b"x"),
        "a length after a bare CR": post(b"A: b\rContent-Length: 1", body=b"x"),
    }
) | {
    "plain": (post(LENGTH_1, body=b"x"), UNSIGNED),
    "no length": (post(), UNSIGNED),
    "chunked": (post(CHUNKED, body=ONE), UNSIGNED),
    "chunked in capitals": (post(CHUNKED.upper(), body=ONE), UNSIGNED),
    "a length beyond the cap": (post(b"Content-Length: 999999999"), TOO_LARGE),
    "an extension of a chunk": (post(CHUNKED, body=b'1;a="b"\r\nx\r\n' + ENDED), UNSIGNED),
    "trailers": (post(CHUNKED, body=b"1\r\nx\r\n0\r\nStripe-Signature: t=1\r\n\r\n"), UNSIGNED),
    "as many small chunks as may be": (
        post(CHUNKED, body=b"1\r\nx\r\n" * MAX_SMALL_CHUNKS + ENDED),
        UNSIGNED,
    ),
    "too many small chunks": (
        post(CHUNKED, body=b"1\r\nx\r\n" * 2 * MAX_SMALL_CHUNKS + ENDED),
        CHUNKS,
    ),
    "many chunks, not small": (
        post(
            CHUNKED, body=b"%x\r\n%b\r\n" % (MIN_CHUNK_BYTES, b"x" * MIN_CHUNK_BYTES) * 2000 + ENDED
        ),
        UNSIGNED,
    ),
}
SYNTAX = malformed(
    {
        "bare LF everywhere": post(LENGTH_1, body=b"x").replace(b"\r\n", b"\n"),
        "bare LF after a header": post(b"A: b\nB: c"),
        "bare LF at the end": post()[:-2] + b"\n",
        "bare CR": post(b"A: b\rB: c"),
        "folded header": post(b"A: b\r\n c"),
        "folded with a tab": post(b"A: b\r\n\tc"),
        "first header folded": post().replace(b"Host", b" Host"),
        "NUL in a value": post(b"A: b\0c"),
        "NUL in a name": post(b"A\0: b"),
        "no colon": post(b"Abc"),
        "no name": post(b": b"),
        "space in a name": post(b"A b: c"),
        "no host": post().replace(b"Host: x\r\n", b""),
        "two hosts": post(b"Host: y"),
        "the same host twice": post(b"Host: x"),
        "tabs": get(b"GET\t/livez\tHTTP/1.1"),
        "space in the path": get(b"GET /li vez HTTP/1.1"),
        "high bytes in the path": get(b"GET /livez\xff HTTP/1.1"),
        "empty lines and NUL": b"\r\n" * 100 + b"\0",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 50,
    }
) | {
    "high bytes in a value": (post(b"A: \xff\xfe"), UNSIGNED),
    "a huge header": (post(b"A: " + b"a" * MAX_HEADER_BYTES), HEADERS),
    "a header up to the cap": (post(b"A: " + b"a" * (MAX_HEADER_BYTES - 200)), UNSIGNED),
    "many headers": (post(*[b"A: b"] * (MAX_HEADER_BYTES // 2)), HEADERS),
    "as many headers as may be": (post(*[b"A: b"] * (MAX_HEADERS - 1)), UNSIGNED),
    "one header more": (post(*[b"A: b"] * MAX_HEADERS), HEADERS),
    "many trailers": (
        post(CHUNKED, body=b"1\r\nx\r\n0\r\n" + b"A: b\r\n" * (MAX_HEADERS + 1) + b"\r\n"),
        HEADERS,
    ),
    "a long URL": (get(b"GET /" + b"a" * MAX_HEADER_BYTES + b" HTTP/1.1"), HEADERS),
    "a huge trailer": (
        post(CHUNKED, body=b"1\r\nx\r\n0\r\nA: " + b"a" * 10 * MAX_HEADER_BYTES),
        HEADERS,
    ),
    "a huge extension": (post(CHUNKED, body=b"1;" + b"a" * 10 * MAX_HEADER_BYTES), HEADERS),
    "empty lines only": (b"\r\n" * MAX_HEADER_BYTES, HEADERS),
    "two spaces": (get(b"GET  /livez HTTP/1.1"), ALIVE),
    "empty lines before": (b"\r\n\r\n" + LIVEZ, ALIVE),
}
VERSIONS = malformed(
    {
        "HTTP/0.9 by name": get(b"GET /livez HTTP/0.9"),
        "HTTP/1.2": get(b"GET /livez HTTP/1.2"),
        "HTTP/2.0": get(b"GET /livez HTTP/2.0"),
        "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "http/1.1": get(b"GET /livez http/1.1"),
        "upgrade to websocket": get(
            b"GET /livez HTTP/1.1", b"Connection: Upgrade", b"Upgrade: websocket"
        ),
        "upgrade to h2c, malformed after it": post(
            b"Connection: Upgrade", b"Upgrade: h2c", LENGTH_1, b"Content-Length: 2", body=b"xy"
        ),
        "upgrade to h2c or another": get(
            b"GET /livez HTTP/1.1", b"Connection: Upgrade", b"Upgrade: h2c, websocket"
        ),
        "upgrade in two lines": get(
            b"GET /livez HTTP/1.1", b"Connection: Upgrade", b"Upgrade: h2c", b"Upgrade: h2c"
        ),
    }
) | {
    "HTTP/1.0": (b"POST /webhooks/stripe HTTP/1.0\r\n\r\n", UNSIGNED_LAST),
    "HTTP/1.0 that would stay": (
        b"POST /webhooks/stripe HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        UNSIGNED_LAST,
    ),
    "HTTP/0.9": (b"GET /livez\r\n", SILENCE),
    "upgrade to h2c": (
        post(
            b"Connection: Upgrade, HTTP2-Settings",
            b"Upgrade: h2c",
            b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
            LENGTH_1,
            body=b"x" + LIVEZ,
        ),
        UNSIGNED + ALIVE,
    ),
    "upgrade to h2c, in chunks": (
        post(b"Connection: Upgrade", b"UPGRADE: H2C ", CHUNKED, body=ONE + LIVEZ),
        UNSIGNED + ALIVE,
    ),
    "upgrade to h2c without a body": (
        get(b"GET /livez HTTP/1.1", b"Connection: Upgrade", b"Upgrade: h2c") * 3,
        ALIVE * 3,
    ),
    "upgrade to h2c in HTTP/1.0": (
        b"POST /webhooks/stripe HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        UNSIGNED_LAST,
    ),
    "upgrade to websocket in HTTP/1.0": (
        b"POST /webhooks/stripe HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Content-Length: 1\r\n\r\nx" + LIVEZ,
        UNSIGNED_LAST,
    ),
    "upgrade that is not meant": (post(b"Upgrade: h2c"), UNSIGNED),
    "expectation": (post(b"Expect: 100-continue", LENGTH_1, body=b"x"), CONTINUE + UNSIGNED),
    "expectation with whitespace": (
        post(b"Expect:\t100-continue \t", LENGTH_1, body=b"x"),
        CONTINUE + UNSIGNED,
    ),
    "expectation beyond the cap": (
        post(b"Expect: 100-continue", b"Content-Length: 999999999"),
        TOO_LARGE_LAST,
    ),
    "expectation of a body that is not read": (
        get(b"POST /nowhere HTTP/1.1", b"Expect: 100-continue", b"Content-Length: 37") + LIVEZ,
        response("404 Not Found", last=True),
    ),
    "another expectation": (post(b"Expect: a-miracle", LENGTH_1, body=b"x"), UNSIGNED),
}
METHODS = malformed(
    {
        "CONNECT": get(b"CONNECT evil.example:443 HTTP/1.1"),
        "CONNECT in HTTP/1.0": get(b"CONNECT evil.example:443 HTTP/1.0"),
        "an unknown method": get(b"BREW /webhooks/stripe HTTP/1.1"),
        "a method in small letters": get(b"post /webhooks/stripe HTTP/1.1"),
    }
) | {
    "GET": (get(b"GET /webhooks/stripe HTTP/1.1"), NOT_ALLOWED),
    "HEAD": (get(b"HEAD /webhooks/stripe HTTP/1.1"), NOT_ALLOWED),
    "PUT": (get(b"PUT /webhooks/stripe HTTP/1.1", LENGTH_1) + b"x", NOT_ALLOWED),
    "PATCH": (get(b"PATCH /webhooks/stripe HTTP/1.1"), NOT_ALLOWED),
    "DELETE": (get(b"DELETE /webhooks/stripe HTTP/1.1"), NOT_ALLOWED),
    "TRACE": (get(b"TRACE /webhooks/stripe HTTP/1.1"), NOT_ALLOWED),
    "OPTIONS": (get(b"OPTIONS /webhooks/stripe HTTP/1.1"), NOT_ALLOWED),
    "OPTIONS of everything": (get(b"OPTIONS * HTTP/1.1"), NOT_FOUND),
}
PATHS = malformed(
    {
        "absolute, without a path": post(start=b"POST http://evil HTTP/1.1"),
        "absolute, invalid": post(start=b"POST http://[::1/x HTTP/1.1"),
    }
) | {
    "absolute": (post(start=b"POST http://evil.example/webhooks/stripe HTTP/1.1"), UNSIGNED),
    "percent-encoded": (post(start=b"POST /webhooks/%73tripe HTTP/1.1"), UNSIGNED),
    "ill encoded": (post(start=b"POST /webhooks/%zz HTTP/1.1"), NOT_FOUND),
    "NUL, encoded": (post(start=b"POST /webhooks/stripe%00 HTTP/1.1"), NOT_FOUND),
    "line break, encoded": (post(start=b"POST /webhooks/stripe%0d%0a HTTP/1.1"), NOT_FOUND),
    "two slashes": (post(start=b"POST //webhooks/stripe HTTP/1.1"), NOT_FOUND),
    "slash at the end": (post(start=b"POST /webhooks/stripe/ HTTP/1.1"), SLASH),
    "dots": (post(start=b"POST /webhooks/../webhooks/stripe HTTP/1.1"), NOT_FOUND),
    "capitals": (post(start=b"POST /Webhooks/Stripe HTTP/1.1"), NOT_FOUND),
    "query": (post(start=b"POST /webhooks/stripe?a=b&c HTTP/1.1"), UNSIGNED),
    "an unknown endpoint": (post(start=b"POST /webhooks/stripe/unknown HTTP/1.1"), UNKNOWN),
    "another method on an unknown endpoint": (
        get(b"GET /webhooks/stripe/unknown HTTP/1.1"),
        NOT_ALLOWED,
    ),
}
PATHS |= {
    f"unknown: {path}": (post(start=b"POST %b HTTP/1.1" % path.encode()), NOT_FOUND)
    for path in ("/", "/webhooks", "/webhooks/stripes", "/livez/", "/metrics", "/docs", "/%2e%2e/x")
}
PIPELINES = {
    "an invalid URL after good": (
        post() + post(start=b"POST http://[::1/x HTTP/1.1"),
        UNSIGNED + MALFORMED,
    ),
    "in order": (post() + LIVEZ + post(LENGTH_1, body=b"x"), UNSIGNED + ALIVE + UNSIGNED),
    "after the last": (post(b"Connection: close") + LIVEZ, UNSIGNED_LAST),
    "malformed after good": (
        LIVEZ + post() + post(b"A b: c") + LIVEZ,
        ALIVE + UNSIGNED + MALFORMED,
    ),
    "malformed body after good": (
        LIVEZ + post(CHUNKED, body=b"zz\r\n" + LIVEZ),
        ALIVE + MALFORMED,
    ),
    "too many": (LIVEZ * 1000, ALIVE * (MAX_PIPELINED + 1) + BUSY),
    "half at the end": (LIVEZ + post()[:-4], ALIVE),
}
GOOD_HOSTS = (
    *("", "x", "x:80", "x:", "a.b-c_d.example", "127.0.0.1:8000", "[::1]", "[::1]:80", "a%20b"),
    *("[fe80::1%25eth0]", "[v1.x]", "xn--zo-hja.example", "x \t", "long" * 5000),
)
BAD_HOSTS = (
    *("a b", "u@h", "a/b", "a\tb", "a?b", "a#b", "a\\b", "http://a", "<a>", "a:b", "a:80:80"),
    *("[::1", "::1]", "[::1]x", "[]", "a[::1]", "a%2", "a%zz", "é", "{a}", "a|b", "^", 'a"b'),
    "long" * 5000 + "@",
)
HOSTS = {
    f"{host[-9:]!r} is {'a' if host in GOOD_HOSTS else 'no'} host": (
        b"POST /webhooks/stripe HTTP/1.1\r\nHost: %b\r\n\r\n" % host.encode(),
        UNSIGNED if host in GOOD_HOSTS else MALFORMED,
    )
    for host in (*GOOD_HOSTS, *BAD_HOSTS)
} | {"no host, in HTTP/1.0": (b"POST /webhooks/stripe HTTP/1.0\r\nHost: a b\r\n\r\n", MALFORMED)}
TABLES = {
    "framing": FRAMING,
    "syntax": SYNTAX,
    "versions": VERSIONS,
    "methods": METHODS,
    "paths": PATHS,
    "pipelines": PIPELINES,
    "hosts": HOSTS,
}


def idle(sent: bytes, expected: bytes) -> bytes:
    """Return the response of an idle process."""
    return expected


def overloaded(sent: bytes, expected: bytes) -> bytes:
    """Return the response under overload: each POST is answered 503, as one request."""
    if expected == TOO_LARGE:
        # A request that is shed is read to its end, and this one has none.
        return SILENCE
    shed = expected.replace(UNSIGNED, SHED).replace(UNSIGNED_LAST, BUSY_LAST)
    is_post = sent.startswith(b"POST")
    return SHED if is_post and shed in (NOT_FOUND, SLASH, UNKNOWN) else shed


def draining(sent: bytes, expected: bytes) -> bytes:
    """Return the response while the process stops: the first one closes the connection."""
    interim = CONTINUE if expected.startswith(CONTINUE) else b""
    head, found, rest = expected.removeprefix(interim).partition(b"\r\n\r\n")
    if not found:
        return SILENCE
    length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
    last = b"" if LAST.strip() in head else b"\r\n" + LAST.strip()
    return interim + head + last + found + rest[:length]


STATES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "idle": idle,
    "overloaded": overloaded,
    "draining": draining,
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
async def test_each_request_has_its_exact_response(
    connections: Connections, settings: Settings, table: Table
) -> None:
    """Nothing is echoed, and the connection is closed if the framing is in doubt.

    All states are tried at once, because each takes as long as its timeouts.
    """

    async def answers(state: str) -> dict[str, bytes]:
        async with serving(connections, settings, state) as listener:
            found = await asyncio.gather(*(talk(listener.port, sent) for sent, _ in table.values()))
        return {name: DATE.sub(b"", one) for name, one in zip(table, found, strict=True)}

    for state, got in zip(STATES, await asyncio.gather(*map(answers, STATES)), strict=True):
        assert got == {
            name: STATES[state](sent, expected) for name, (sent, expected) in table.items()
        }, state


@pytest.mark.parametrize("state", ["overloaded", "draining"])
async def test_no_state_reads_more_requests_than_another(
    connections: Connections, settings: Settings, state: str
) -> None:
    """Damaged bytes contain no more requests in any state than in an idle process."""
    mutations = Mutations(seed=7)
    # After a half-close the connection may end before the response.
    attempts = [mutations.next()._replace(ends=False) for _ in range(200)]

    async def answered(port: int) -> list[int]:
        async def one(attempt: Attempt) -> int:
            async with slots:
                return len(ANSWER.findall(await send_attempt(port, attempt)))

        # Above this number connections do not linger: some would miss their response.
        slots = asyncio.Semaphore(MAX_LINGERING)
        return await asyncio.gather(*map(one, attempts))

    # Many of the bodies are large: a loop turn takes long.
    async with (
        serving(connections, settings, "idle", receive_timeout_s=4) as usual,
        serving(connections, settings, state, receive_timeout_s=4) as other,
    ):
        expected, found = await asyncio.gather(answered(usual.port), answered(other.port))
    assert [
        (len(attempt.pieces), more, fewer, b"".join(attempt.pieces)[:300])
        for attempt, more, fewer in zip(attempts, found, expected, strict=True)
        if more > fewer
    ] == []
    assert sum(found) > 100


def chunks(body: bytes, *, extension: bytes, trailer: bytes) -> bytes:
    """Return *body* in chunks of seven bytes."""
    pieces = [body[start : start + 7] for start in range(0, len(body), 7)]
    sized = [b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces]
    return b"".join(sized) + b"0\r\n" + trailer + b"\r\n"


TRAILER = b"Stripe-Signature: t=1\r\n"
GENUINE: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda body: b"Content-Length: %d\r\n\r\n%b" % (len(body), body),
    "chunked": lambda body: CHUNKED + b"\r\n\r\n" + chunks(body, extension=b"", trailer=b""),
    "with extensions and trailers": lambda body: (
        CHUNKED + b"\r\n\r\n" + chunks(body, extension=b";a=b", trailer=TRAILER)
    ),
}


@pytest.mark.parametrize("framed", GENUINE.values(), ids=GENUINE)
async def test_the_verified_bytes_are_the_body(
    connections: Connections, settings: Settings, framed: Callable[[bytes], bytes]
) -> None:
    """However a body is framed, its own bytes are verified, and trailers are ignored."""
    app, _ = webhook_app(connections, settings)
    body = event(metadata={"name": "Zoë Ωmega 🛂"})
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nStripe-Signature: %b\r\n" % (
        WEBHOOK.encode(),
        signed(body)["Stripe-Signature"].encode(),
    )
    async with listening(app) as listener:
        answer = await talk(listener.port, head + framed(body))
    assert DATE.sub(b"", answer) == response("200 OK", b'{"outcome":"admitted"}', last=True)
