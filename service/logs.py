"""The one configuration of logging: structlog's, with everybody else's lines in the same pipe.

Lines are JSON in production and coloured text on a terminal. Field names are those of the types
(`event_id`, `session_id`, `current` …); `event` is what happened, as `noun.verb_past`. What may
stand in a line is decided in `redaction` and where it is logged.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import sys
import threading
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from select import PIPE_BUF
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias

import orjson
import structlog
from structlog.typing import EventDict, Processor

from .config import LogFormat, LogLevel
from .floods import Floods
from .redaction import harmless, is_harmless

LIBRARY_LEVEL = logging.WARNING
LIBRARIES = ("asyncio", "py.warnings", "redis", "uvicorn", "uvicorn.error")
MOST_FRAMES = 20

ExcInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType | None]


def configure(level: LogLevel, log_format: LogFormat, stream: BinaryIO | None = None) -> None:
    """Send every log line of this process to *stream* (standard output), in one format."""
    out = sys.stdout.buffer if stream is None else stream
    is_terminal = out.isatty()
    as_json = log_format is LogFormat.JSON or (log_format is LogFormat.AUTO and not is_terminal)
    least = logging.getLevelNamesMapping()[level.upper()]
    processors: list[Processor] = [
        _led,
        *([_json] if as_json else _as_text(colors=is_terminal)),
    ]
    sink = _Sink(out)
    _sinks[:] = [sink]
    floods = Floods()
    atexit.register(sink.flush_now)
    structlog.configure(
        processors=[_once_in_a_while(floods), *processors],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=True,
    )
    _configure_libraries(_Handler(sink, processors, floods), max(least, LIBRARY_LEVEL))


async def written() -> None:
    """Wait until what was logged in this loop turn is out, where it goes through `configure`.

    Raises:
        ConnectionError: It could not be written: a full disk, a closed pipe.
    """
    await asyncio.sleep(0)
    if any(sink.is_stuck for sink in _sinks):
        raise ConnectionError("the log cannot be written")


def report_faults() -> None:
    """Write a line about what ends a thread, or fails where nothing could be raised.

    Python would print both to standard error, message and all. Whoever calls this has configured
    logging; until the process ends nobody else is asked.
    """
    log = structlog.get_logger()

    def unraisable(found: sys.UnraisableHookArgs) -> None:
        if found.exc_value is not None:
            log.error("process.fault_ignored", exc_info=found.exc_value)

    def of_thread(found: threading.ExceptHookArgs) -> None:
        if found.exc_value is not None:
            log.error("thread.failed", exc_info=found.exc_value)

    sys.unraisablehook = unraisable
    threading.excepthook = of_thread


def _configure_libraries(handler: logging.Handler, level: int) -> None:
    """Route the standard library's loggers, and its warnings, through the same processors."""
    logging.captureWarnings(capture=True)
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(level)


class _Sink:
    """Where lines go; a full disk or a closed pipe must not stop what was being reported on.

    The lines of one loop turn are written together, at its end. Where no loop runs, or not in
    this thread, each is written at once. To structlog this is the logger: any severity writes.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._lines: list[bytes] = []
        self.is_stuck = False

    def write(self, line: bytes) -> None:
        self._lines.append(line)
        if len(self._lines) == 1:
            try:
                asyncio.get_running_loop().call_soon(self.flush_now)
            except RuntimeError:
                self.flush_now()

    debug = info = warning = error = critical = write

    def flush_now(self) -> None:
        lines, self._lines = self._lines, []
        self.is_stuck = True
        with contextlib.suppress(OSError, ValueError):
            for text in _pieces(lines):
                self._out.write(text)
                self._out.flush()
            self.is_stuck = False


# The one that is configured, if any.
_sinks: list[_Sink] = []


def _pieces(lines: list[bytes]) -> Iterator[bytes]:
    """Join lines to pieces that a pipe takes whole, even where several processes write to it."""
    together: list[bytes] = []
    size = 0
    for line in lines:
        size += len(line) + 1
        if together and size > PIPE_BUF:
            yield b"\n".join([*together, b""])
            together.clear()
            size = len(line) + 1
        together.append(line)
    yield b"\n".join([*together, b""])


class _Handler(logging.Handler):
    """Takes the records of libraries through our processors."""

    def __init__(self, sink: _Sink, processors: list[Processor], floods: Floods) -> None:
        super().__init__()
        self._sink = sink
        self._processors = processors
        self._floods = floods

    def emit(self, record: logging.LogRecord) -> None:
        """Write the first line of a message: asyncio quotes exceptions in those after it."""
        raised = record.exc_info[0] if record.exc_info else None
        held_back = self._floods.held_back((record.pathname, record.lineno, raised))
        if held_back is None:
            return
        try:
            message = record.getMessage().partition("\n")[0]
        except Exception:  # noqa: BLE001 - a message that does not fit its arguments
            message = "log.unreadable"
        line: Any = {"event": message, "logger": record.name, "exc_info": record.exc_info}
        if held_back:
            line["suppressed"] = held_back
        for process in self._processors:
            line = process(None, record.levelname.lower(), line)
        self._sink.write(line)


def _raised(exc_info: ExcInfo) -> list[dict[str, Any]]:
    """Tell of an exception, and of what caused it, the class and the places.

    Never the message or local variables: they may quote a request.
    """
    chain: list[BaseException] = []
    error: BaseException | None = exc_info[1]
    while error is not None and all(error is not known for known in chain):
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return [_told(each) for each in chain]


def _told(error: BaseException) -> dict[str, Any]:
    frames = [
        f"{frame.f_code.co_filename}:{line} {frame.f_code.co_name}"
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    told: dict[str, Any] = {
        "class": f"{type(error).__module__}.{type(error).__qualname__}",
        "frames": frames[-MOST_FRAMES:],
    }
    if isinstance(error, BaseExceptionGroup):
        told["exceptions"] = [_told(each) for each in error.exceptions]
    return told


_render_exception = structlog.processors.ExceptionRenderer(_raised)


def _once_in_a_while(floods: Floods) -> Processor:
    def process(_: Any, __: str, fields: EventDict) -> EventDict:
        held_back = floods.held_back_before(fields)
        if held_back is None:
            raise structlog.DropEvent
        if held_back:
            fields["suppressed"] = held_back
        return fields

    return process


def _led(_: Any, level: str, fields: EventDict) -> EventDict:
    """Put first what a reader looks for first, and tell of an exception, if there is one.

    Each of twenty keywords would be copied, and compared with parameters' names, several times on
    its way here; whoever writes most lines hands them over as one, `_fields`.
    """
    if "exc_info" in fields:
        fields = _render_exception(None, level, fields)
    event = fields.pop("event")
    prepared = fields.pop("_fields", {})
    return {"timestamp": datetime.now(UTC), "level": level, "event": event, **prepared, **fields}


def _json(_: Any, __: str, fields: EventDict) -> bytes:
    """Encode a line; where one look at all of it finds nothing to mend, it is fit as it is."""
    try:
        line = orjson.dumps(fields, option=orjson.OPT_UTC_Z)
    except TypeError:
        line = b""
    if is_harmless(line, tuple(fields)):
        return line
    return orjson.dumps(harmless(fields), option=orjson.OPT_UTC_Z)


def _as_text(*, colors: bool) -> list[Processor]:
    console = structlog.dev.ConsoleRenderer(
        colors=colors, exception_formatter=structlog.dev.plain_traceback, sort_keys=False
    )
    return [_harmless, _exception_as_text, console, _encode]


def _harmless(_: Any, __: str, fields: EventDict) -> EventDict:
    return harmless(fields)


def _exception_as_text(_: Any, __: str, fields: EventDict) -> EventDict:
    if isinstance(fields.get("exception"), list):
        fields["exception"] = "\n".join(_lines(fields["exception"], ""))
    return fields


def _lines(raised: list[dict[str, Any]], indent: str) -> list[str]:
    lines = []
    for each in raised:
        lines.append(f"{indent}{each['class']}")
        lines += [f"{indent}  {frame}" for frame in each["frames"]]
        lines += _lines(each.get("exceptions", []), indent + "    ")
    return lines


def _encode(_: Any, __: str, line: Any) -> bytes:
    return str(line).encode()
