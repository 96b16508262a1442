"""The one configuration of logging: structlog's, with everybody else's lines in the same pipe.

Lines are JSON in production and coloured text on a terminal. Field names are those of the types
(`event_id`, `session_id`, `current` …); `event` is what happened, as `noun.verb_past`. What may
stand in a line is decided in `redaction` and where it is logged.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, BinaryIO

import orjson
import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor

from .config import LogFormat, LogLevel
from .redaction import drop_forbidden, scrub

LIBRARY_LEVEL = logging.WARNING
LIBRARIES = ("asyncio", "redis", "uvicorn", "uvicorn.error")


def configure(level: LogLevel, log_format: LogFormat, stream: BinaryIO | None = None) -> None:
    """Send every log line of this process to *stream* (standard output), in one format."""
    out = sys.stdout.buffer if stream is None else stream
    as_json = log_format is LogFormat.JSON or (log_format is LogFormat.AUTO and not out.isatty())
    least = logging.getLevelNamesMapping()[level.upper()]
    renderers = _json() if as_json else _console()
    structlog.configure(
        processors=[*_shared(), *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.BytesLoggerFactory(out),
        cache_logger_on_first_use=True,
    )
    _configure_libraries(out, max(least, LIBRARY_LEVEL), renderers)


def _shared() -> list[Processor]:
    return [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _drop_forbidden,
    ]


def _json() -> list[Processor]:
    # With the transformer's defaults a traceback would show local variables, secrets included.
    traceback = ExceptionDictTransformer(show_locals=False, max_frames=20)
    return [
        structlog.processors.ExceptionRenderer(traceback),
        _without_messages,
        structlog.processors.JSONRenderer(serializer=_dumps),
        _scrub,
    ]


def _console() -> list[Processor]:
    renderer = structlog.dev.ConsoleRenderer(
        colors=True, exception_formatter=_types_and_frames, sort_keys=False
    )
    return [renderer, _encode, _scrub]


def _configure_libraries(out: BinaryIO, level: int, renderers: list[Processor]) -> None:
    """Route the standard library's loggers through the same processors."""
    handler = _BytesHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_shared(),
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *renderers,
                _decode,
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in LIBRARIES:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
        logging.getLogger(name).setLevel(level)


class _BytesHandler(logging.Handler):
    """Writes each record's line as bytes, like our own lines."""

    def __init__(self, out: BinaryIO) -> None:
        super().__init__()
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._out.write(self.format(record).encode() + b"\n")
            self._out.flush()
        except Exception:  # noqa: BLE001 - logging never breaks what it reports on
            self.handleError(record)


def _drop_forbidden(_: Any, __: str, fields: EventDict) -> EventDict:
    drop_forbidden(fields)
    return fields


def _without_messages(_: Any, __: str, fields: EventDict) -> EventDict:
    """Drop what exceptions say of themselves: a message may quote what it failed on."""
    for raised in fields.get("exception") or ():
        if isinstance(raised, dict):
            raised["exc_value"] = ""
            raised.pop("exc_notes", None)
    return fields


def _dumps(fields: EventDict, **_: object) -> bytes:
    return orjson.dumps(fields, default=repr)


def _types_and_frames(out: Any, exc_info: Any) -> None:
    """Write where an exception came from and what class it has, never what it says."""
    transformer = ExceptionDictTransformer(show_locals=False, max_frames=20)
    for raised in transformer(exc_info):
        out.write(f"\n{raised['exc_type']}")
        for frame in raised["frames"]:
            out.write(f"\n  {frame['filename']}:{frame['lineno']} {frame['name']}")


def _encode(_: Any, __: str, line: Any) -> bytes:
    return str(line).encode()


def _decode(_: Any, __: str, line: Any) -> str:
    return bytes(line).decode()


def _scrub(_: Any, __: str, line: Any) -> bytes:
    return scrub(line)
