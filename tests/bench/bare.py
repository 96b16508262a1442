"""A bare ASGI application: reads a whole body and answers 200. What any server must cost."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

BODY = b'{"outcome":"admitted"}'
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))],
}
END = {"type": "http.response.body", "body": BODY}


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request."""
    parts = []
    while True:
        message = await receive()
        parts.append(message["body"])
        if not message["more_body"]:
            break
    assert b"".join(parts)
    await send(START)
    await send(END)
