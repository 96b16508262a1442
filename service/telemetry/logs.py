"""Configures logging: structlog's, with the standard library's loggers sent the same way.

A line passes the throttle, `_order_fields`, a sanitizing renderer (JSON, or on a terminal the text
of `terminal_log`) and the `LogSink`. Field names are those of the types (`event_id`, `session_id`,
`current` …); `event` is what happened, as `noun.verb_past`. What may appear in a line is decided in
`redaction` and by the log calls.
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
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import orjson
import structlog
from structlog.typing import EventDict, Processor

from ..config import LogFormat, LogLevel
from . import terminal_log
from .log_throttle import LogThrottle
from .log_writer import LogSink
from .redaction import is_clean, sanitize, sanitize_text

LIBRARY_LEVEL = logging.WARNING
LIBRARIES = (
    *("asyncio", "py.warnings", "redis", "uvicorn", "uvicorn.error"),
    # These log each URL, at a lower level.
    *("httpx2", "httpcore2"),
)
MAX_FRAMES = 20

_LEVELS = {name.lower(): number for name, number in logging.getLevelNamesMapping().items()}

ExcInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType | None]


class _Output(NamedTuple):
    """Where lines of a level go, what they pass on the way, and what is written."""

    sink: LogSink
    min_level: int
    processors: Sequence[Processor]
    is_text: bool
    has_tracebacks: bool


# The configured output, if there is one.
_outputs: list[_Output] = []


def configure(
    level: LogLevel,
    log_format: LogFormat,
    stream: BinaryIO | None = None,
    *,
    colors: bool = True,
    tracebacks: bool = False,
) -> None:
    """Send every log line of this process to one output, in one format.

    Args:
        level: The lowest severity to write.
        log_format: The format.
        stream: The output; standard output unless given.
        colors: Whether text on a terminal may be colored.
        tracebacks: Whether `show_traceback` shows anything.
    """
    out = sys.stdout.buffer if stream is None else stream
    is_terminal = out.isatty()
    is_json = log_format is LogFormat.JSON or (log_format is LogFormat.AUTO and not is_terminal)
    min_level = _LEVELS[level]
    processors: list[Processor] = [
        _order_fields,
        _render_json if is_json else _text_renderer(colors=colors and is_terminal),
    ]
    throttle = LogThrottle()
    sink = LogSink(out, partial(_lines_dropped, processors))
    for replaced in _outputs:
        replaced.sink.close()
    _outputs[:] = [_Output(sink, min_level, processors, not is_json, tracebacks)]
    atexit.unregister(flush)
    atexit.register(flush)
    structlog.configure(
        processors=[_throttling(throttle), *processors],
        wrapper_class=structlog.make_filtering_bound_logger(min_level),
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=True,
    )
    handler = _LibraryHandler(sink, processors, throttle)
    _configure_libraries(handler, max(min_level, LIBRARY_LEVEL))


def shows_hand_overs() -> bool:
    """Say whether each call of a handler that returned is to be logged.

    Only people want that line: in JSON it would double the size of a worker's log, to say what the
    metrics count. So there it costs no more than this call.
    """
    return any(output.is_text for output in _outputs)


def show_traceback(error: BaseException) -> None:
    """Show a developer where a handler raised *error*, right below the line logged last.

    Only `dev` is configured to: a traceback may quote what the handler was called with. The frame
    that called the handler is left out. Beside a log in JSON it goes to standard error.
    """
    showing = [output for output in _outputs if output.has_tracebacks]
    if not showing or error.__traceback__ is None:
        return
    shown = "".join(traceback.format_exception(type(error), error, error.__traceback__.tb_next))
    lines = [sanitize_text(line) for line in shown.splitlines()]
    for output in showing:
        if output.is_text:
            output.sink.write("\n".join(f"    {line}" for line in lines).encode())
        else:
            sys.stderr.write("\n".join([*lines, ""]))


def write_line(level: str, fields: EventDict) -> None:
    """Write a line that is never throttled, as structlog would.

    It is for the one line of each event: structlog's way takes 1.3 % of an event's instructions.

    Args:
        level: Its severity, as structlog names it.
        fields: Its fields, and as `event` what happened.
    """
    for output in _outputs:
        if _LEVELS[level] >= output.min_level:
            output.sink.write(_process(output.processors, level, fields))


async def wait_until_written(within_s: float) -> None:
    """Wait until the lines logged in this turn of the event loop are written.

    Raises:
        ConnectionError: They could not be written (a full disk, a closed pipe), or not within
            *within_s* seconds because the reader stalls. They may still be written later.
    """
    for output in _outputs:
        if not await output.sink.wait_until_written(within_s):
            raise ConnectionError("the log cannot be written")


def flush() -> None:
    """Wait for a bounded time until everything logged so far is written."""
    for output in _outputs:
        output.sink.flush()


def log_unhandled_errors() -> None:
    """Log errors that end a thread, or occur where Python cannot raise them (finalizers).

    By default Python prints both to standard error, including the message, which may quote a
    request. Logging must have been configured.
    """
    log = structlog.get_logger()

    def log_unraisable(error: sys.UnraisableHookArgs) -> None:
        if error.exc_value is not None:
            log.error("process.fault_ignored", exc_info=error.exc_value)

    def log_thread_error(error: threading.ExceptHookArgs) -> None:
        if error.exc_value is not None:
            log.error("thread.failed", exc_info=error.exc_value)

    sys.unraisablehook = log_unraisable
    threading.excepthook = log_thread_error


def _configure_libraries(handler: logging.Handler, level: int) -> None:
    """Send the standard library's loggers and warnings through the same processors."""
    logging.captureWarnings(capture=True)
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(level)


class _LibraryHandler(logging.Handler):
    """Renders the records of libraries with our processors."""

    def __init__(self, sink: LogSink, processors: list[Processor], throttle: LogThrottle) -> None:
        super().__init__()
        self._sink = sink
        self._processors = processors
        self._throttle = throttle

    def emit(self, record: logging.LogRecord) -> None:
        """Write the first line of a message: in the following ones asyncio quotes exceptions."""
        error_class = record.exc_info[0] if record.exc_info else None
        suppressed = self._throttle.check((record.pathname, record.lineno, error_class))
        if suppressed is None:
            return
        try:
            message = record.getMessage().partition("\n")[0]
        except Exception:  # noqa: BLE001 - a message that does not fit its arguments
            message = "log.unreadable"
        fields: Any = {"event": message, "logger": record.name, "exc_info": record.exc_info}
        if suppressed:
            fields["suppressed"] = suppressed
        self._sink.write(_process(self._processors, record.levelname.lower(), fields))


def _process(processors: Sequence[Processor], level: str, fields: Any) -> Any:
    for process in processors:
        fields = process(None, level, fields)
    return fields


def _lines_dropped(processors: Sequence[Processor], number: int) -> bytes:
    line: bytes = _process(processors, "error", {"event": "log.lines_dropped", "lines": number})
    return line


def _throttling(throttle: LogThrottle) -> Processor:
    def process(_: Any, __: str, fields: EventDict) -> EventDict:
        suppressed = throttle.check_line(fields)
        if suppressed is None:
            raise structlog.DropEvent
        if suppressed:
            fields["suppressed"] = suppressed
        return fields

    return process


def _order_fields(_: Any, level: str, fields: EventDict) -> EventDict:
    """Put time, level and event first, and replace an exception by its description."""
    if "exc_info" in fields:
        fields = _render_exception(None, level, fields)
    event = fields.pop("event")
    return {"timestamp": datetime.now(UTC), "level": level, "event": event, **fields}


def _describe_chain(exc_info: ExcInfo) -> list[dict[str, Any]]:
    """Describe an exception and its causes.

    structlog's own renderers include the message and local variables, which may quote a request.
    """
    chain: list[BaseException] = []
    error: BaseException | None = exc_info[1]
    while error is not None and all(error is not known for known in chain):
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return [_describe(each) for each in chain]


def _describe(error: BaseException) -> dict[str, Any]:
    """Return the class of an exception and the places it passed, nothing else."""
    frames = [
        f"{frame.f_code.co_filename}:{line} {frame.f_code.co_name}"
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    described: dict[str, Any] = {
        "class": f"{type(error).__module__}.{type(error).__qualname__}",
        "frames": frames[-MAX_FRAMES:],
    }
    if isinstance(error, BaseExceptionGroup):
        described["exceptions"] = [_describe(each) for each in error.exceptions]
    return described


_render_exception = structlog.processors.ExceptionRenderer(_describe_chain)


def _render_json(_: Any, __: str, fields: EventDict) -> bytes:
    """Encode a line; sanitize its fields only if the encoded line is not clean already."""
    try:
        line = orjson.dumps(fields, option=orjson.OPT_UTC_Z)
    except TypeError:
        line = b""
    if is_clean(line, tuple(fields)):
        return line
    return orjson.dumps(sanitize(fields), option=orjson.OPT_UTC_Z)


def _text_renderer(*, colors: bool) -> Processor:
    def render(_: Any, __: str, fields: EventDict) -> bytes:
        return terminal_log.render(sanitize(fields), colors=colors).encode()

    return render
