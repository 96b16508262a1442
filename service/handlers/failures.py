"""What an exception of a handler tells: its class, its place, and whether its destination is away.

Never its message, nor a variable: they may quote a transition.
"""

from __future__ import annotations

import errno
import inspect
import socket
import ssl
import traceback
from itertools import dropwhile
from pathlib import Path

from ..errors import UNREACHABLE, Unreachable, reason_word

MAX_CLASS_NAME = 100
MAX_PLACE = 600
# Of the frames of a handler: where it begins, and where it ends.
FIRST_FRAMES, LAST_FRAMES = 2, 3

_HANDLERS = Path(__file__).parent
_PACKAGE = _HANDLERS.parent
_MACHINERY = ("importlib", "contextlib.py")

_CLASSES: tuple[tuple[type[OSError], str], ...] = (
    (socket.gaierror, "name_unresolved"),
    (ssl.SSLCertVerificationError, "certificate_untrusted"),
    (ssl.SSLError, "tls_failed"),
    (ConnectionRefusedError, "connection_refused"),
    (ConnectionError, "connection_lost"),
)
# Those for which Python has no class of their own, or one that says too little.
_NUMBERS = {
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


def unreachable(error: BaseException) -> str | None:
    """Return the word for a destination that cannot be reached; None for any other error.

    That are `Unreachable`, Python's own `ConnectionError`, failed name resolution, TLS errors and
    the network's numbers of `OSError`; and a group of nothing else.
    """
    if isinstance(error, BaseExceptionGroup):
        words = [unreachable(each) for each in error.exceptions]
        return None if None in words else words[0]
    if isinstance(error, Unreachable):
        return reason_word(error.reason, UNREACHABLE)
    for kind, word in _CLASSES:
        if isinstance(error, kind):
            return word
    return _NUMBERS.get(error.errno or 0) if isinstance(error, OSError) else None


def class_name(error: BaseException) -> str:
    """Return the name of an error's class, which may be any text."""
    name = type(error).__name__
    return name[:MAX_CLASS_NAME] if name.isidentifier() else "unnamed"


def place(error: BaseException) -> str:
    """Return where an error comes from, as `file:line function` of its frames, outermost first.

    What of our own stands above a handler, or above what it imports, is left out.
    """
    frames = [
        (frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno or 0, "<module>"))
    told = [f"{file}:{line} {name}" for file, line, name in _foreign(frames) or frames]
    if len(told) > FIRST_FRAMES + LAST_FRAMES:
        told[FIRST_FRAMES:-LAST_FRAMES] = ["…"]
    return _printable(", ".join(told))


def definition(found: object) -> str:
    """Return where a function or a class was written, as `file:line name`; nothing if unknown."""
    function = vars(found).get("__init__") if isinstance(found, type) else found
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return _printable(f"{code.co_filename}:{code.co_firstlineno} {code.co_name}") if code else ""


def is_foreign(error: BaseException) -> bool:
    """Say whether an error was raised in code that is not ours."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, SyntaxError) or not (frames and frames[-1].startswith(str(_PACKAGE)))


def _foreign(frames: list[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """Leave out Python's machinery, and from the beginning whatever merely calls handlers."""
    written = [one for one in frames if not any(each in one[0] for each in _MACHINERY)]
    return [*dropwhile(lambda one: _calls_handlers(Path(one[0])), written)]


def _calls_handlers(file: Path) -> bool:
    is_ours = file.is_relative_to(_PACKAGE)
    return is_ours and (file.parent != _HANDLERS or file == _HANDLERS / "__init__.py")


def _printable(text: str) -> str:
    """Bound a text, of which the end says most, and leave in it nothing that cannot be sent."""
    told = text if len(text) <= MAX_PLACE else f"…{text[1 - MAX_PLACE :]}"
    return told.encode("utf-8", "backslashreplace").decode()
