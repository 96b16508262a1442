"""What is said about an exception of a handler: its class, its place, and "unreachable"."""

from __future__ import annotations

import errno
import socket
import ssl
from typing import Any

import pytest

from service.errors import Undeliverable, Unreachable
from service.handlers.failures import MAX_PLACE, class_name, definition, place, unreachable_reason

CANARY = "canary-3c1f"


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (Unreachable("no_such_queue"), "no_such_queue"),
        (Unreachable(), "unreachable"),
        (ConnectionError(CANARY), "connection_lost"),
        (ConnectionResetError(), "connection_lost"),
        (BrokenPipeError(), "connection_lost"),
        (ConnectionRefusedError(), "connection_refused"),
        (socket.gaierror(socket.EAI_NONAME, CANARY), "name_unresolved"),
        (ssl.SSLError(), "tls_failed"),
        (ssl.SSLCertVerificationError(), "certificate_untrusted"),
        (OSError(errno.EHOSTUNREACH, CANARY), "host_unreachable"),
        (OSError(errno.ENETUNREACH, ""), "network_unreachable"),
        (OSError(errno.ETIMEDOUT, ""), "connection_timed_out"),
        (ExceptionGroup("", [ConnectionResetError(), Unreachable("away")]), "connection_lost"),
        # A failed attempt.
        (TimeoutError(), None),
        (ValueError(CANARY), None),
        (Undeliverable("away"), None),
        (OSError(errno.ENOSPC, ""), None),
        (OSError(errno.ENOENT, ""), None),
        (OSError("connection refused"), None),
        (KeyboardInterrupt(), None),
        (ExceptionGroup("", [ConnectionResetError(), ValueError()]), None),
    ],
    ids=repr,
)
def test_what_counts_as_unreachable(error: BaseException, word: str | None) -> None:
    """Unreachable, connection errors, name resolution, TLS, network errno, and groups of these."""
    assert unreachable_reason(error) == word


def test_an_aiohttp_error_has_its_errno() -> None:
    """When aiohttp cannot connect, it raises an OSError with the network's errno."""
    aiohttp = pytest.importorskip("aiohttp")
    key: Any = None
    error = aiohttp.ClientConnectorError(key, OSError(errno.ECONNREFUSED, "refused"))
    assert unreachable_reason(error) == "connection_refused"


def fail(depth: int) -> None:
    """Raise an error *depth* calls below, with a canary in its message and a variable."""
    secret = CANARY
    if not depth:
        raise ValueError(secret)
    fail(depth - 1)


def raised(depth: int = 0) -> Exception:
    """Return such an error."""
    try:
        fail(depth)
    except ValueError as error:
        return error
    raise AssertionError


def test_a_place_names_files_lines_and_functions() -> None:
    """Each frame is file, line and function, without messages and variables."""
    text = place(raised())
    first, then = raised.__code__.co_firstlineno + 3, fail.__code__.co_firstlineno + 4
    assert text == f"{__file__}:{first} raised, {__file__}:{then} fail"
    assert CANARY not in text


def place_in(file: str) -> str:
    """Return the place of an error that a function in a file of any name has raised."""
    namespace: dict[str, Any] = {}
    exec(compile("def f():\n    raise ValueError", file, "exec"), namespace)  # noqa: S102 - see above
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - only its place matters
        namespace["f"]()
    return place(raised.value)


def test_a_place_is_bounded() -> None:
    """Of many frames the first and the last are kept, and of a long text the end."""
    assert place(raised(400)).count(", ") == 5
    text = place_in("x" * 5000 + ".py")
    assert len(text) <= MAX_PLACE
    assert text.endswith(".py:2 f")


def test_odd_names_are_replaced_or_escaped() -> None:
    """Names of files and classes may be any text; class name and place can be encoded."""
    odd = type("no name", (Exception,), {})
    assert class_name(odd()) == "unnamed"
    assert class_name(ValueError()) == "ValueError"
    assert len(class_name(type("x" * 500, (Exception,), {})())) == 100
    place_in("\udc80.py").encode()


def test_a_definition_is_where_the_code_is() -> None:
    """A function has a definition; anything without Python code has none."""
    assert definition(raised) == f"{__file__}:{raised.__code__.co_firstlineno} raised"
    assert definition(print) == ""
    assert definition(None) == ""
