"""Forms: bodies within bounds, and tokens that work once, for one purpose, in any process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.datastructures import ImmutableMultiDict
from starlette.requests import Request

from service.admin import forms
from service.admin.forms import MAX_BYTES, MAX_FIELDS, TOKEN_S, issue_token, read_form, spend_token
from service.admin.page import PageError
from service.storage.connections import Connections
from service.storage.keys import Keys
from tests.support.harness import listening, talk
from tests.support.logins import TOKENS, OpenPage, admin_app

FORM = "application/x-www-form-urlencoded"
CANARY = "canary4711"
HEAD = (
    b"POST /login HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n"
    b"Content-Type: application/x-www-form-urlencoded\r\n"
)
HOSTILE = {
    "too large": (FORM, b"token=" + b"x" * MAX_BYTES, 413),
    "too many fields": (FORM, b"&".join([b"a=1"] * (MAX_FIELDS + 1)), 400),
    "only separators": (FORM, b"&" * 3000, 400),
    "no pair": (FORM, CANARY.encode(), 400),
    "not ASCII": (FORM, f"token={CANARY}é".encode(), 400),
    "bad UTF-8": (FORM, b"token=canary4711%ff%fe", 400),
    "half a surrogate": (FORM, b"token=canary4711%ed%a0%80", 400),
    "JSON": ("application/json", b'{"token": "canary4711"}', 415),
    "files": ("multipart/form-data; boundary=canary4711", b"--canary4711--\r\n", 415),
    "plain text": ("text/plain", b"token=canary4711", 415),
    "no type": ("", b"token=canary4711", 415),
    "another type's end": (f"x{FORM}", b"token=canary4711", 415),
}


async def parse(body: bytes, content_type: str = FORM) -> Any:
    """Return the fields of a form that came in two pieces."""
    half = len(body) // 2
    messages = [
        {"type": "http.request", "body": body[:half], "more_body": True},
        {"type": "http.request", "body": body[half:]},
    ]

    async def receive() -> Any:
        return messages.pop(0)

    headers = [(b"content-type", content_type.encode())]
    return await read_form(Request({"type": "http", "headers": headers}, receive))


async def test_a_form_is_read() -> None:
    """Fields may be empty, repeated and of any language; an empty form has none."""
    found = await parse(b"a=1&b=&a=x+y%26%C3%A9")

    assert (found.getlist("a"), found["b"]) == (["1", "x y&é"], "")
    assert len(await parse(b"")) == 0
    assert (await parse(b"a=1", f"{FORM.upper()}; charset=utf-8"))["a"] == "1"
    assert len((await parse(b"&".join([b"a=1"] * MAX_FIELDS))).multi_items()) == MAX_FIELDS
    assert len(await parse(b"a=" + b"x" * (MAX_BYTES - 2))) == 1


@pytest.mark.parametrize(("content_type", "body", "status"), HOSTILE.values(), ids=HOSTILE)
async def test_other_bodies_are_refused(
    open_page: OpenPage,
    capfd: pytest.CaptureFixture[str],
    content_type: str,
    body: bytes,
    status: int,
) -> None:
    """Each gets a page that says what is wrong, repeats nothing of it, and leaves no log line."""
    async with open_page(**TOKENS) as client:
        refused = await client.post("/login", content=body, headers={"Content-Type": content_type})

    assert refused.status_code == status
    assert "<h1>This " in refused.text
    assert CANARY not in refused.text
    assert CANARY not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "framing",
    [b"Content-Length: 999999999\r\n\r\ntoken=", b"Transfer-Encoding: chunked\r\n\r\n"],
    ids=["by its length", "as it comes"],
)
async def test_a_body_that_is_too_long_is_not_read_to_its_end(
    make_page: Any, framing: bytes
) -> None:
    """It is answered once it is known to be too long, over the admin port's own listener."""
    app = admin_app(make_page(**TOKENS))
    head = HEAD + framing
    chunk = b"%x\r\n%b\r\n" % (MAX_BYTES + 1, b"a" * (MAX_BYTES + 1))
    # The connection is closed at its deadline, and the answer is there before.
    async with listening(app, receive_timeout_s=2.0) as listener:
        answered = await talk(listener.port, head, b"" if b"Length" in framing else chunk)

    assert answered.startswith(b"HTTP/1.1 413 ")
    assert b"This form is too large" in answered


async def test_a_body_that_does_not_end_is_given_up(
    make_page: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its connection is closed at the listener's deadline, or when the client leaves."""
    app = admin_app(make_page(**TOKENS))
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    async with listening(app, receive_timeout_s=0.3) as listener:
        answered = await talk(listener.port, head, b"5\r\ntoken\r\n")
        _, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(head)
        await writer.drain()
        writer.transport.abort()
        later = await talk(
            listener.port, b"GET /login HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )

    assert answered == b""
    assert later.startswith(b"HTTP/1.1 200 ")
    assert "Traceback" not in "".join(capfd.readouterr())


def form(token: str) -> Any:
    """Return a form with a token."""
    return ImmutableMultiDict([(forms.TOKEN_FIELD, token)])


async def test_a_token_works_once(connections: Connections, keys: Keys) -> None:
    """Any process takes it away, once, even if many try at the same time; it ends by itself."""
    token = await issue_token(connections, keys, "drop log alice")
    ends_s = await connections.client.ttl(keys.form(token))
    spent = await asyncio.gather(
        *(spend_token(connections, keys, form(token), "drop log alice") for _ in range(20)),
        return_exceptions=True,
    )

    assert 0 < ends_s <= TOKEN_S
    assert spent.count(None) == 1
    assert {one.status for one in spent if isinstance(one, PageError)} == {409}


@pytest.mark.parametrize("purpose", ["replay log alice", "drop nats alice", "drop log bob", ""])
async def test_a_token_has_one_purpose(connections: Connections, keys: Keys, purpose: str) -> None:
    """Another action, handler or viewer cannot use it, and by trying takes it away."""
    token = await issue_token(connections, keys, "drop log alice")
    for wanted in (purpose, "drop log alice"):
        with pytest.raises(PageError, match="cannot be used"):
            await spend_token(connections, keys, form(token), wanted)


@pytest.mark.parametrize("token", ["", "x", "x" * 43, "x" * 42 + "*", "{0}", "é" * 43, "x" * 9999])
async def test_what_is_no_token_is_refused(
    connections: Connections, keys: Keys, token: str
) -> None:
    """A form without a token, or with any other text in its place, does nothing."""
    with pytest.raises(PageError, match="cannot be used"):
        await spend_token(connections, keys, form(token), "")
