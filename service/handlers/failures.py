"""What may be said of a handler's exception: class, place, and whether it means "unreachable".

Never its message or a variable: they may quote a transition.
"""

from __future__ import annotations

import errno
import inspect
import socket
import ssl
import traceback
from itertools import dropwhile
from pathlib import Path

from ..errors import UNREACHABLE, ApiError, Undeliverable, Unreachable, reason_word

MAX_CLASS_NAME = 100
MAX_PLACE = 600
# Of many frames, the outermost and the innermost are kept.
FIRST_FRAMES, LAST_FRAMES = 2, 3

_HANDLERS = Path(__file__).parent
_PACKAGE = _HANDLERS.parent
_CALLERS = {_HANDLERS / "__init__.py", _HANDLERS / "loading.py"}
_IMPORT_MACHINERY = ("importlib", "contextlib.py")

_REASONS_BY_CLASS: tuple[tuple[type[OSError], str], ...] = (
    (socket.gaierror, "name_unresolved"),
    (ssl.SSLCertVerificationError, "certificate_untrusted"),
    (ssl.SSLError, "tls_failed"),
    (ConnectionRefusedError, "connection_refused"),
    (ConnectionError, "connection_lost"),
)
# For a plain OSError: many of these numbers have no class of their own in Python.
_REASONS_BY_ERRNO = {
    errno.ECONNREFUSED: "connection_refused",
    errno.ECONNRESET: "connection_lost",
    errno.ECONNABORTED: "connection_lost",
    errno.EPIPE: "connection_lost",
    errno.ENETRESET: "connection_lost",
    errno.ENOTCONN: "connection_lost",
    errno.ESHUTDOWN: "connection_lost",
    errno.ETIMEDOUT: "connection_timed_out",
    errno.EHOSTUNREACH: "host_unreachable",
    errno.EHOSTDOWN: "host_unreachable",
    errno.ENETUNREACH: "network_unreachable",
    errno.ENETDOWN: "network_unreachable",
}


def unreachable_reason(error: BaseException) -> str | None:
    """Return the reason if *error* means that the destination cannot be reached, else None.

    `Unreachable`, Python's `ConnectionError`, failed name resolution, TLS errors and the network
    numbers of `OSError` mean that, and so does an exception group of nothing else.
    """
    if isinstance(error, BaseExceptionGroup):
        reasons = [unreachable_reason(each) for each in error.exceptions]
        return None if None in reasons else reasons[0]
    if isinstance(error, Undeliverable):
        return error.unreachable
    if isinstance(error, Unreachable):
        return reason_word(error.reason, UNREACHABLE)
    for kind, reason in _REASONS_BY_CLASS:
        if isinstance(error, kind):
            return reason
    return _REASONS_BY_ERRNO.get(error.errno or 0) if isinstance(error, OSError) else None


def class_name(error: BaseException) -> str:
    """Return the name of the error's class, bounded; a class may be named by any text."""
    name = type(error).__name__
    return name[:MAX_CLASS_NAME] if name.isidentifier() else "unnamed"


def error_word(error: BaseException) -> str:
    """Return what an error is called: of Stripe's API its reason, of all others the class."""
    if isinstance(error, Undeliverable) and error.unreachable is not None:
        return error.unreachable
    return error.reason.value if isinstance(error, ApiError) else class_name(error)


def place(error: BaseException) -> str:
    """Return `file:line function` of the error's frames, outermost first.

    Frames of this service that merely call or import the handler are left out.
    """
    frames = _frames(error)
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno or 0, "<module>"))
    of_handler = [*dropwhile(lambda one: _calls_handlers(Path(one[0])), frames)]
    texts = [f"{file}:{line} {name}" for file, line, name in of_handler or frames]
    if len(texts) > FIRST_FRAMES + LAST_FRAMES:
        texts[FIRST_FRAMES:-LAST_FRAMES] = ["…"]
    return _printable(", ".join(texts))


def definition(found: object) -> str:
    """Return where a function or class is defined, as `file:line name`; empty if unknown."""
    function = vars(found).get("__init__") if isinstance(found, type) else found
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return _printable(f"{code.co_filename}:{code.co_firstlineno} {code.co_name}") if code else ""


def is_raised_by_handler(error: BaseException) -> bool:
    """Return whether the innermost frame is outside this service."""
    frames = _frames(error)
    return isinstance(error, SyntaxError) or not (
        frames and frames[-1][0].startswith(str(_PACKAGE))
    )


def _frames(error: BaseException) -> list[tuple[str, int, str]]:
    """Return file, line and function of each frame but those of Python's import machinery."""
    # Python makes a RuntimeError of a StopIteration, without the frames that raised it.
    cause = error.__cause__
    raised = cause if isinstance(cause, StopIteration | StopAsyncIteration) else error
    return [
        (frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in traceback.walk_tb(raised.__traceback__)
        if not any(each in frame.f_code.co_filename for each in _IMPORT_MACHINERY)
    ]


def _calls_handlers(file: Path) -> bool:
    return file.is_relative_to(_PACKAGE) and (file.parent != _HANDLERS or file in _CALLERS)


def _printable(text: str) -> str:
    """Bound a text, keeping its end, and escape what cannot be encoded."""
    bounded = text if len(text) <= MAX_PLACE else f"…{text[1 - MAX_PLACE :]}"
    return bounded.encode("utf-8", "backslashreplace").decode()
