"""What a browser sends with a form: a body within bounds, and a token that works once.

The page makes the token of a form, and keeps it in Redis with what the form is for. Whichever
process gets the form takes the token away, and acts only if that was there and meant this.
"""

from __future__ import annotations

import re
import secrets
from urllib.parse import parse_qsl

from starlette.datastructures import ImmutableMultiDict
from starlette.requests import Request

from ..storage.connections import Connections
from ..storage.keys import Keys
from .page import PageError

Form = ImmutableMultiDict[str, str]

MAX_BYTES = 64 * 1024
MAX_FIELDS = 2000
TOKEN_S = 3600
# The name of the field that carries a token.
TOKEN_FIELD = "form_token"  # noqa: S105 - a field's name

_TYPE = "application/x-www-form-urlencoded"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")


async def read_form(request: Request) -> Form:
    """Return the fields of a form; a name may have several values.

    Raises:
        PageError: The body is too large, or is no form of UTF-8 text.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _TYPE:
        raise PageError(415, "This is not a form")
    body = await _read_body(request)
    try:
        fields = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=bool(body),
            errors="strict",
            max_num_fields=MAX_FIELDS,
        )
    except ValueError:
        raise PageError(400, "This form cannot be read") from None
    return ImmutableMultiDict(fields)


async def issue_token(connections: Connections, keys: Keys, purpose: str) -> str:
    """Return a new token for one form, whose *purpose* says who may do what with it.

    Raises:
        RedisError: Redis refused or did not answer.
    """
    token = secrets.token_urlsafe(32)
    await connections.client.set(keys.form(token), purpose, ex=TOKEN_S)
    return token


async def spend_token(connections: Connections, keys: Keys, form: Form, purpose: str) -> None:
    """Take a form's token away.

    Raises:
        PageError: It was not there any more, or was for something else.
        RedisError: Redis refused or did not answer. The token may be gone.
    """
    token = form.get(TOKEN_FIELD, "")
    found = None
    if _TOKEN.fullmatch(token):
        found = await connections.client.getdel(keys.form(token))
    if found != purpose.encode():
        text = "It works once, for an hour, for who opened it. Open it again."
        raise PageError(409, "This form cannot be used any more", text)


async def _read_body(request: Request) -> bytes:
    too_large = PageError(413, "This form is too large")
    if int(request.headers.get("content-length", 0)) > MAX_BYTES:
        raise too_large
    body, is_complete = bytearray(), False
    while not is_complete:
        message = await request.receive()
        if message["type"] != "http.request":
            # Not starlette's own exception for this, which would be logged with its traceback.
            raise PageError(400, "This form was not sent to its end")
        body += message.get("body", b"")
        is_complete = not message.get("more_body", False)
        if len(body) > MAX_BYTES:
            raise too_large
    return bytes(body)
