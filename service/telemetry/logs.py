"""The one configuration of logging: structlog's, with everybody else's lines in the same pipe.

Lines are JSON in production and coloured text on a terminal. Field names are those of the types
(`event_id`, `session_id`, `current` …); `event` is what happened, as `noun.verb_past`. What may
stand in a line is decided in `redaction` and where it is logged.
"""

from __future__ import annotations

import atexit
import logging
import sys
import threading
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias

import orjson
import structlog
from structlog.typing import EventDict, Processor

from ..config import LogFormat, LogLevel
from .log_throttle import LogThrottle
from .log_writer import LogSink
from .redaction import is_clean, sanitize

LIBRARY_LEVEL = logging.WARNING
LIBRARIES = ("asyncio", "py.warnings", "redis", "uvicorn", "uvicorn.error")
MAX_FRAMES = 20

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
    floods = LogThrottle()
    sink = LogSink(out, partial(_lines_dropped, processors))
    for replaced in _sinks:
        replaced.close()
    _sinks[:] = [sink]
    atexit.unregister(flush)
    atexit.register(flush)
    structlog.configure(
        processors=[_once_in_a_while(floods), *processors],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=True,
    )
    _configure_libraries(_Handler(sink, processors, floods), max(least, LIBRARY_LEVEL))


async def wait_until_written(within_s: float) -> None:
    """Wait until what was logged in this loop turn is out, where it goes through `configure`.

    Raises:
        ConnectionError: It could not be written (a full disk, a closed pipe), or was not within
            *within_s* seconds because its reader stalls. It may still be written later.
    """
    for sink in _sinks:
        if not await sink.written(within_s):
            raise ConnectionError("the log cannot be written")


def flush() -> None:
    """Wait until what was logged is out, for a bounded time."""
    for sink in _sinks:
        sink.flush()


def log_unhandled_errors() -> None:
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


# The one that is configured, if any.
_sinks: list[LogSink] = []


class _Handler(logging.Handler):
    """Takes the records of libraries through our processors."""

    def __init__(self, sink: LogSink, processors: list[Processor], floods: LogThrottle) -> None:
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
        self._sink.write(_rendered(self._processors, record.levelname.lower(), line))


def _rendered(processors: Sequence[Processor], level: str, fields: Any) -> Any:
    for process in processors:
        fields = process(None, level, fields)
    return fields


def _lines_dropped(processors: Sequence[Processor], number: int) -> bytes:
    line: bytes = _rendered(processors, "error", {"event": "log.lines_dropped", "lines": number})
    return line


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
        "frames": frames[-MAX_FRAMES:],
    }
    if isinstance(error, BaseExceptionGroup):
        told["exceptions"] = [_told(each) for each in error.exceptions]
    return told


_render_exception = structlog.processors.ExceptionRenderer(_raised)


def _once_in_a_while(floods: LogThrottle) -> Processor:
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
    if is_clean(line, tuple(fields)):
        return line
    return orjson.dumps(sanitize(fields), option=orjson.OPT_UTC_Z)


def _as_text(*, colors: bool) -> list[Processor]:
    console = structlog.dev.ConsoleRenderer(
        colors=colors, exception_formatter=structlog.dev.plain_traceback, sort_keys=False
    )
    return [_sanitize, _exception_as_text, console, _encode]


def _sanitize(_: Any, __: str, fields: EventDict) -> EventDict:
    return sanitize(fields)


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
