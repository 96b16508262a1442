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
    ],
    ids=repr,
)
def test_what_counts_as_unreachable(error: BaseException, word: str) -> None:
    """Unreachable, connection errors, name resolution, TLS, network errno, and groups of these."""
    assert unreachable_reason(error) == word
    assert CANARY not in word


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        ValueError(CANARY),
        Undeliverable("away"),
        OSError(errno.ENOSPC, ""),
        OSError(errno.ENOENT, ""),
        OSError("connection refused"),
        KeyboardInterrupt(),
        ExceptionGroup("", [ConnectionResetError(), ValueError()]),
    ],
    ids=repr,
)
def test_what_counts_as_a_failed_attempt(error: BaseException) -> None:
    """Any other error, and a group that contains one, has no reason."""
    assert unreachable_reason(error) is None


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


def test_a_place_is_bounded() -> None:
    """Of many frames the first and the last are kept, and of a long text the end."""
    assert place(raised(400)).count(", ") == 5
    namespace: dict[str, Any] = {}
    code = compile("def f():\n    raise ValueError", "x" * 5000 + ".py", "exec")
    exec(code, namespace)  # noqa: S102 - so long a name of a file
    try:
        namespace["f"]()
    except ValueError as error:
        text = place(error)
    assert len(text) <= MAX_PLACE
    assert text.endswith(".py:2 f")


def test_odd_names_are_replaced_or_escaped() -> None:
    """Names of files and classes may be any text; class name and place can be encoded."""
    odd = type("no name", (Exception,), {})
    assert class_name(odd()) == "unnamed"
    assert class_name(ValueError()) == "ValueError"
    assert len(class_name(type("x" * 500, (Exception,), {})())) == 100
    namespace: dict[str, Any] = {}
    exec(compile("def f():\n    raise ValueError", "\udc80.py", "exec"), namespace)  # noqa: S102 - as above
    try:
        namespace["f"]()
    except ValueError as error:
        place(error).encode()


def test_a_definition_is_where_the_code_is() -> None:
    """A function has a definition; anything without Python code has none."""
    assert definition(raised) == f"{__file__}:{raised.__code__.co_firstlineno} raised"
    assert definition(print) == ""
    assert definition(None) == ""
