"""All lines have one format and hold nothing secret, and logging never blocks."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import pty
import re
import sys
import threading
import tty
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from select import PIPE_BUF
from typing import Any

import pytest
import structlog

from service.config import LogFormat, LogLevel
from service.handlers import log as log_handler
from service.secret import MASK
from service.telemetry import log_writer, logs, metrics
from service.telemetry.log_throttle import MAX_PER_WINDOW, WINDOW_S, LogThrottle
from tests.support.processes import Process
from tests.support.transitions import TRANSITION

CANARY = "canary-66600666"
FORMATS = pytest.mark.parametrize("log_format", [LogFormat.JSON, LogFormat.CONSOLE])


class Out(io.BytesIO):
    """Collects the output; can pretend to be a terminal."""

    def __init__(self, *, is_terminal: bool = False) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        """Say whether this is a terminal."""
        return self._is_terminal

    @property
    def text(self) -> str:
        """The text of all lines logged so far."""
        logs.flush()
        return self.getvalue().decode()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All lines logged so far, decoded."""
        return [json.loads(line) for line in self.text.split("\n")[:-1]]


Configure = Callable[..., Out]


@pytest.fixture(name="configure")
def _configure() -> Iterator[Configure]:
    """Yield a function that configures logging; restore everything afterwards."""
    root = logging.getLogger()
    loggers = [logging.getLogger(name) for name in logs.LIBRARIES]
    state = [(each, each.level, each.propagate, list(each.handlers)) for each in [root, *loggers]]
    hooks = sys.unraisablehook, threading.excepthook
    root.handlers.clear()  # configuring would close pytest's handlers
    before = structlog.get_config() if structlog.is_configured() else None

    def configure(
        log_format: LogFormat = LogFormat.JSON,
        level: LogLevel = LogLevel.INFO,
        out: Out | None = None,
        **options: bool,
    ) -> Out:
        out = out or Out()
        logs.configure(level, log_format, out, **options)
        return out

    yield configure
    for output in logs._outputs:
        output.sink.close()
    logs._outputs.clear()
    logging.captureWarnings(capture=False)
    sys.unraisablehook, threading.excepthook = hooks
    if before is None:
        structlog.reset_defaults()
    else:
        structlog.configure(**before)
    for logger, level, propagate, handlers in state:
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers[:] = handlers


def logger() -> Any:
    """Return a new logger: one that was used keeps its configuration."""
    return structlog.get_logger()


def fail() -> None:
    """Raise an exception with secrets in locals, messages, notes and causes."""
    body = secret = CANARY
    try:
        try:
            int(body)
        except ValueError as error:
            error.add_note(secret)
            raise KeyError(CANARY) from error
    except KeyError:
        raise ExceptionGroup(CANARY, [OSError(CANARY), RuntimeError(CANARY)])  # noqa: B904


def test_a_line_is_a_json_object(configure: Configure) -> None:
    """A line is one JSON object with event, level, timestamp and the named fields."""
    out = configure()

    logger().info("event.admitted", event_id="evt_1", sequence=3, livemode=None)

    [line] = out.lines
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "event.admitted",
        "level": "info",
        "event_id": "evt_1",
        "sequence": 3,
        "livemode": None,
    }
    assert out.text.endswith("}\n")


@pytest.mark.parametrize("log_format", [LogFormat.JSON, LogFormat.CONSOLE])
@pytest.mark.parametrize("level", LogLevel)
def test_a_line_past_structlog_is_the_same(
    configure: Configure, log_format: LogFormat, level: LogLevel
) -> None:
    """The line of a request is rendered, masked and filtered like any other."""
    out = configure(log_format, level)
    fields: dict[str, Any] = {"email": CANARY, "field": f"x whsec_{CANARY}", "no JSON": {1: {2}}}

    logger().warning("event.admitted", **fields)
    logs.write_line("warning", {"event": "event.admitted", **fields})

    lines = [re.sub(r"\d+:\d+:[\d.]+", "", line) for line in out.text.splitlines()]
    assert lines[::2] == lines[1::2]
    assert bool(lines) == (level is not LogLevel.ERROR)
    assert CANARY not in out.text


@pytest.mark.parametrize(
    ("log_format", "is_terminal", "colors", "is_json", "is_colored"),
    [
        (LogFormat.AUTO, False, True, True, False),
        (LogFormat.AUTO, True, True, False, True),
        (LogFormat.AUTO, True, False, False, False),
        (LogFormat.JSON, True, True, True, False),
        (LogFormat.CONSOLE, True, True, False, True),
        (LogFormat.CONSOLE, False, True, False, False),
    ],
)
def test_formats(
    configure: Configure,
    *,
    log_format: LogFormat,
    is_terminal: bool,
    colors: bool,
    is_json: bool,
    is_colored: bool,
) -> None:
    """By default a terminal gets text, colored if the user wants that; other outputs get JSON."""
    out = configure(log_format, out=Out(is_terminal=is_terminal), colors=colors)

    logger().info("process.started")

    assert "process.started" in out.text
    assert out.text.startswith("{") is is_json
    assert ("\x1b[" in out.text) is is_colored


@FORMATS
def test_of_an_exception_only_class_and_place_are_logged(
    configure: Configure, log_format: LogFormat
) -> None:
    """Of an exception and its causes no message, note, local or source line is logged."""
    out = configure(log_format)

    for write in (logger().exception, logging.getLogger("uvicorn.error").exception):
        try:
            fail()
        except ExceptionGroup:
            write("turn.failed")

    assert CANARY not in out.text
    assert "add_note" not in out.text
    for name in ("ExceptionGroup", "KeyError", "ValueError", "OSError", "RuntimeError"):
        assert out.text.count(f"builtins.{name}") == 2
    assert out.text.count(f"{__file__}:") >= 4
    assert " fail" in out.text


@FORMATS
def test_a_developer_sees_tracebacks(
    configure: Configure, log_format: LogFormat, capfd: pytest.CaptureFixture[str]
) -> None:
    """Right below the line on a terminal, beside JSON on standard error; without secrets."""

    def lose() -> None:
        raise LookupError(f"no user 7\x1b[2J\nfor whsec_{CANARY}")

    def write(*, tracebacks: bool) -> tuple[str, str]:
        out = configure(log_format, tracebacks=tracebacks)
        try:
            lose()
        except LookupError as error:
            logger().warning("delivery.retried")
            logs.show_traceback(error)
            logger().info("event.admitted")
        return out.text, capfd.readouterr().err

    text, err = write(tracebacks=False)
    assert text.count("\n") == 2
    text, err = write(tracebacks=True)
    if log_format is LogFormat.CONSOLE:
        failed, *shown, last = text.splitlines()
        assert ("delivery.retried" in failed, "evt_1" in last) == (True, False)
    else:
        shown = err.splitlines()
    assert shown[0].strip() == "Traceback (most recent call last):"
    assert [line.strip() for line in shown[-2:]] == [
        "LookupError: no user 7\\x1b[2J",
        f"for {MASK}",
    ]
    assert all(line.startswith("    ") for line in shown) == (log_format is LogFormat.CONSOLE)


def test_exceptions_are_structured(configure: Configure) -> None:
    """In JSON an exception is a list: itself, then its causes, each with its frames."""
    out = configure()
    error = ValueError(CANARY)
    error.__cause__ = error

    logger().error("turn.failed", exc_info=error)

    assert out.lines[0]["exception"] == [{"class": "builtins.ValueError", "frames": []}]


def test_a_deep_traceback_is_cut(configure: Configure) -> None:
    """Of a deep traceback the innermost frames are logged."""
    out = configure()

    def dive(depth: int) -> None:
        if depth == 0:
            raise ValueError
        dive(depth - 1)

    try:
        dive(100)
    except ValueError:
        logger().exception("turn.failed")

    [raised] = out.lines[0]["exception"]
    assert len(raised["frames"]) == logs.MAX_FRAMES
    assert raised["frames"][-1].endswith(" dive")


@FORMATS
@pytest.mark.parametrize("name", ["uvicorn", "uvicorn.error", "redis", "redis.x", "asyncio", "new"])
def test_libraries_log_the_same_way(configure: Configure, log_format: LogFormat, name: str) -> None:
    """Lines of the standard library's loggers have the same format, with the logger's name."""
    library = logging.getLogger(name)
    library.addHandler(logging.NullHandler())
    out = configure(log_format)

    library.warning("lost %s", "redis://u:canary66600666@h", extra={"body": CANARY})
    library.info("chatter")

    assert out.text.count("\n") == 1
    assert "66600666" not in out.text
    assert name in out.text
    if log_format is LogFormat.JSON:
        [line] = out.lines
        del line["timestamp"]
        said = f"lost redis://{MASK}@h"
        assert line == {"event": said, "logger": name, "level": "warning"}


def test_asyncio_does_not_quote_exceptions(configure: Configure) -> None:
    """Asyncio's line about an exception that was never retrieved has its class only."""
    out = configure()

    async def lose() -> None:
        async def fail_alone() -> None:
            raise ValueError(CANARY)

        asyncio.get_running_loop().set_exception_handler(None)
        task = asyncio.create_task(fail_alone())
        await asyncio.wait({task})
        del task

    asyncio.run(lose())

    [line] = out.lines
    assert line["event"] == "Task exception was never retrieved"
    assert line["exception"][0]["class"] == "builtins.ValueError"
    assert CANARY not in out.text


@FORMATS
@pytest.mark.parametrize(
    "character",
    [
        *("\r", "\n", "\x0b", "\x0c", "\x1c", "\x1b[2J", "\x1b]0;t\x07", "\x9b", "\x85", "\x7f"),
        *("\b\b\b", "\u2028", "\u2029", "\u202e", "\u2066", "\u200f"),
    ],
    ids=ascii,
)
def test_no_line_can_be_forged(configure: Configure, log_format: LogFormat, character: str) -> None:
    """No value, message or name can end a line, start another, or control a terminal."""
    out = configure(log_format)
    forged = f'x{character}{{"event":"forged"}}'

    logger().info(forged, value=forged, nested={forged: [forged]}, **{forged: 1})
    logging.getLogger("redis").warning("%s", forged)
    # The fields that renderers treat specially.
    special = dict.fromkeys(("logger", "level", "timestamp"), forged)
    logger().warning("event.rejected", **special)

    assert len(out.text.splitlines()) == 3
    assert character not in out.text.replace("\n", "")


def test_repeated_faults_are_throttled(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repeated fault is written a few times; lines about decided events are always written.

    The next line of a kind, also of a library's, says how many were suppressed before it.
    """
    now = 0.0
    monkeypatch.setattr(logs, "LogThrottle", lambda: LogThrottle(lambda: now))
    out = configure()
    log, library = logger(), logging.getLogger("uvicorn.error")

    def write() -> None:
        log.warning("event.rejected", reason="signature_mismatch")
        log.warning("event.late", after_final=True)
        library.warning("Invalid HTTP request received.")

    for _ in range(3 * MAX_PER_WINDOW):
        write()

    said = [line["event"] for line in out.lines]
    assert said.count("event.rejected") == MAX_PER_WINDOW
    assert said.count("Invalid HTTP request received.") == MAX_PER_WINDOW
    assert said.count("event.late") == 3 * MAX_PER_WINDOW

    now = WINDOW_S
    for suppressed in (2 * MAX_PER_WINDOW, None):
        write()
        last = [line.get("suppressed") for line in out.lines[-3:]]
        assert last == [suppressed, None, suppressed]


def test_warnings_are_logged(configure: Configure) -> None:
    """A warning of Python or a library is one line, without the source line."""
    out = configure()

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn(f"old whsec_{CANARY}", DeprecationWarning, stacklevel=1)

    [line] = out.lines
    assert line["logger"] == "py.warnings"
    assert line["event"].endswith(f": DeprecationWarning: old {MASK}")


def test_unhandled_errors_are_logged(
    configure: Configure, capfd: pytest.CaptureFixture[str]
) -> None:
    """An error that ends a thread, or occurs in a finalizer, is logged without its message."""
    out = configure()
    logs.log_unhandled_errors()

    class Fragile:
        def __del__(self) -> None:
            raise ValueError(CANARY)

    def fail_in_thread() -> None:
        raise LookupError(CANARY)

    Fragile()
    thread = threading.Thread(target=fail_in_thread)
    thread.start()
    thread.join()

    assert [(line["event"], line["exception"][0]["class"]) for line in out.lines] == [
        ("process.fault_ignored", "builtins.ValueError"),
        ("thread.failed", "builtins.LookupError"),
    ]
    assert CANARY not in out.text + capfd.readouterr().err


@pytest.mark.parametrize("level", LogLevel)
def test_levels(configure: Configure, level: LogLevel) -> None:
    """Lines below the level are not written; those of libraries need at least a warning."""
    out = configure(level=level)

    for each in LogLevel:
        getattr(logger(), each)("ours")
        getattr(logging.getLogger("redis"), each)("theirs")

    severities = list(LogLevel)
    ours = [line["level"] for line in out.lines if line["event"] == "ours"]
    theirs = [line["level"] for line in out.lines if line["event"] == "theirs"]
    assert ours == severities[severities.index(level) :]
    assert theirs == [each for each in ours if each in {"warning", "error"}]


def test_a_message_that_does_not_fit_is_not_quoted(
    configure: Configure, capfd: pytest.CaptureFixture[str]
) -> None:
    """A library's message that does not fit its arguments is one line without both."""
    out = configure()

    logging.getLogger("redis").error(f"%d {CANARY}", CANARY)  # noqa: G004 - that is the fault

    assert out.lines[0]["event"] == "log.unreadable"
    assert CANARY not in out.text + capfd.readouterr().err


@pytest.mark.parametrize("error", [BrokenPipeError, OSError, ValueError])
def test_a_broken_stream_breaks_nothing_else(
    configure: Configure, error: type[Exception], capfd: pytest.CaptureFixture[str]
) -> None:
    """A full disk or a closed pipe raises nothing in the code that logs."""

    class Broken(Out):
        def write(self, line: object, /) -> int:
            raise error

        def flush(self) -> None:
            raise error

    configure(out=Broken())

    logger().info("event.admitted")
    logging.getLogger("redis").error("lost")

    assert capfd.readouterr().err == ""


async def test_a_write_error_is_reported_to_the_log_handler(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log handler fails while the disk is full, and succeeds once it is not."""
    is_full = True

    class Disk(Out):
        def write(self, line: Any, /) -> int:
            if is_full:
                raise OSError
            return super().write(line)

    out = configure(out=Disk())
    monkeypatch.setattr(log_handler, "log", logger())
    async with log_handler.open({}) as handle:
        with pytest.raises(ConnectionError):
            await handle(TRANSITION)
        is_full = False
        await handle(TRANSITION)
    assert [line["event"] for line in out.lines] == ["transition", "log.lines_dropped"]
    assert out.lines[1]["lines"] == 1


class Pipe:
    """A pipe whose reader stalls until the test calls `drain`."""

    def __init__(self, open_both: Callable[[], tuple[int, int]] = os.pipe) -> None:
        self._reading, writing = open_both()
        self.out = os.fdopen(writing, "wb")
        self._found: list[bytes] = []
        self._reader = threading.Thread(target=self._read)

    def drain(self) -> None:
        """Start reading."""
        self._reader.start()

    def lines(self) -> list[dict[str, Any]]:
        """Close the pipe and return all lines."""
        if not self._reader.is_alive():
            self.drain()
        logs.flush()
        self.out.close()
        self._reader.join()
        os.close(self._reading)
        return [json.loads(line) for line in b"".join(self._found).splitlines()]

    def _read(self) -> None:
        # A terminal ends with an error.
        with contextlib.suppress(OSError):
            while some := os.read(self._reading, 65536):
                self._found.append(some)


def open_terminal() -> tuple[int, int]:
    """Return both ends of a terminal that passes bytes on unchanged."""
    screen, terminal = pty.openpty()
    tty.setraw(terminal)
    return screen, terminal


@pytest.mark.parametrize("open_both", [os.pipe, open_terminal], ids=["pipe", "terminal"])
async def test_lines_are_dropped_while_the_reader_stalls(
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    open_both: Callable[[], tuple[int, int]],
) -> None:
    """Lines beyond the bound are dropped and counted; one line reports that afterwards."""
    monkeypatch.setattr(log_writer, "MAX_QUEUED_BYTES", 100_000)
    pipe = Pipe(open_both)
    configure(out=pipe.out)
    log = logger()
    before = _dropped()
    for number in range(1000):
        log.info("event.admitted", number_of_this=number, text="x" * 500)
        await asyncio.sleep(0)
    dropped = _dropped() - before
    *written, last = await asyncio.to_thread(pipe.lines)

    assert 100 < len(written) < 600
    assert [line["number_of_this"] for line in written] == [*range(len(written))]
    assert len(written) + dropped == 1000
    assert (last["event"], last["level"], last["lines"]) == ("log.lines_dropped", "error", dropped)


def _dropped() -> float:
    return float(metrics.LOG_LINES_DROPPED._value.get())


async def test_the_log_handler_waits_for_a_stalled_reader(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log handler fails while its line is not written; a later attempt succeeds."""
    monkeypatch.setattr(log_writer, "MAX_QUEUED_BYTES", 1000)
    pipe = Pipe()
    configure(out=pipe.out)
    log = logger()
    monkeypatch.setattr(log_handler, "log", log)
    async with log_handler.open({"HANDLER_TIMEOUT_S": "0.1"}) as handle:
        for _ in range(200):
            log.info("event.admitted", text="x" * 500)
        await asyncio.sleep(0)
        # The pipe and the queue are full, so both attempts fail.
        for attempt in (handle(TRANSITION), handle(TRANSITION)):
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(attempt, 30)
        pipe.drain()
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(ConnectionError):
                    await handle(TRANSITION)
                    break
        lines = await asyncio.to_thread(pipe.lines)
    assert "transition" in [line["event"] for line in lines]


# The fields of a line that is left to the thread of the log.
TOO_LONG = {f"field_{number}": "x" * 1000 for number in range(PIPE_BUF // 1000 + 1)}


class Held(Out):
    """A ready output that does not let the thread of the log write until `release` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        monkeypatch.setattr(log_writer, "_readiness_check", lambda _: lambda: True)
        self.release = threading.Event()

    def write(self, lines: Any) -> int:
        """Take lines."""
        if threading.current_thread().name == "log-writer":
            self.release.wait()
        return super().write(lines)


async def test_waiting_tasks_are_independent(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that stops waiting does not disturb another one that waits for the same turn."""
    out = Held(monkeypatch)
    configure(out=out)

    async def wait() -> None:
        logger().info("transition", **TOO_LONG)
        await logs.wait_until_written(30)

    waiting = [asyncio.create_task(wait()) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    out.release.set()
    await waiting[1]
    assert waiting[0].cancelled()
    assert len(out.lines) == 2


async def test_lines_do_not_overtake_those_that_are_queued(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the thread writes queued lines, new ones stay behind, though the output is ready."""
    out = Held(monkeypatch)
    configure(out=out)
    logger().info("event.admitted", **TOO_LONG)
    await asyncio.sleep(0)
    logger().info("transition")
    await asyncio.sleep(0)
    out.release.set()
    assert [line["event"] for line in out.lines] == ["event.admitted", "transition"]


async def test_a_non_blocking_output_gets_every_line(configure: Configure) -> None:
    """If the output is non-blocking, no line is torn or lost."""
    pipe = Pipe()
    os.set_blocking(pipe.out.fileno(), False)
    configure(out=pipe.out)
    log = logger()
    for number in range(1000):
        log.info("event.admitted", number_of_this=number, text="x" * 500)
    await asyncio.sleep(0.05)
    lines = await asyncio.to_thread(pipe.lines)
    assert [line["number_of_this"] for line in lines] == [*range(1000)]


def test_threads_may_log_concurrently(configure: Configure) -> None:
    """The lines of threads, with or without an event loop, are whole and in order."""
    out = configure()
    log = logger()

    async def in_a_loop(name: str) -> None:
        for number in range(200):
            log.info("event.admitted", thread=name, number_of_this=number)
            if number % 7 == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(0)

    def without(name: str) -> None:
        for number in range(200):
            log.info("event.admitted", thread=name, number_of_this=number)

    threads = [threading.Thread(target=asyncio.run, args=[in_a_loop(f"a{n}")]) for n in range(4)]
    threads += [threading.Thread(target=without, args=[f"b{n}"]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = out.lines
    for name in {line["thread"] for line in lines}:
        found = [line["number_of_this"] for line in lines if line["thread"] == name]
        assert found == [*range(200)]
    assert len(lines) == 1600


def test_a_process_ends_although_the_reader_stalls(tmp_path: Path) -> None:
    """When the process ends, queued lines have a deadline and are then lost."""
    program = """
import os, structlog
from service.telemetry import log_writer
from service.telemetry import logs
from service.config import LogFormat, LogLevel
log_writer.FLUSH_DEADLINE_S = 0.2
reading, writing = os.pipe()
out = os.fdopen(writing, "wb")
logs.configure(LogLevel.INFO, LogFormat.JSON, out)
for _ in range(1000):
    structlog.get_logger().info("event.admitted", text="x" * 500)
print("done", flush=True)
"""
    process = Process("own", directory=tmp_path, program=program)
    try:
        assert process.wait() == 0
        assert (process.out, process.err) == (b"done\n", b"")
    finally:
        process.end()
