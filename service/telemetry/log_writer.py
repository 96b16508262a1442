"""Writes log lines without ever blocking the event loop.

The rule:

* The lines of one turn of the event loop are written together at its end (one write for each line
  costs 25 % more CPU per event).
* They are written directly as long as the output takes `PIPE_BUF` bytes without blocking (writing
  everything in the thread costs 25 % more, too).
* Otherwise they go to a thread, through a queue of bounded size. Until the queue is empty, all
  lines go through it, so that they stay in order.
* When the queue is full, lines are dropped and counted until it is empty: one gap instead of many.
  Then one line says how many are missing. Lines that cannot be written (disk full, pipe closed)
  are counted in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from select import PIPE_BUF, POLLOUT, poll, select
from threading import Event, Lock, Thread, local
from typing import Any, BinaryIO, NamedTuple

from . import metrics

# Room for about 6,000 lines of requests.
MAX_QUEUED_BYTES = 4 * 1024 * 1024
# When the process ends: the log may have no reader any more.
FLUSH_DEADLINE_S = 2.0


class _Turn(local):
    """What a thread has logged in the current turn of its event loop.

    Attributes:
        lines: The lines.
        written: Its result will be whether all lines were written; None if no task waits for it.
    """

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.written: asyncio.Future[bool] | None = None


class LogSink:
    """Collects encoded lines, without line ends. To structlog this is the logger.

    Args:
        out: The output.
        lines_dropped: Returns the line that says how many lines were dropped.
    """

    def __init__(self, out: BinaryIO, lines_dropped: Callable[[int], bytes]) -> None:
        self._writer = _Writer(out, lines_dropped)
        self._turn = _Turn()

    def write(self, line: bytes) -> None:
        """Take a line without blocking. In a thread without a loop it is written at once."""
        lines = self._turn.lines
        lines.append(line)
        if len(lines) == 1:
            try:
                asyncio.get_running_loop().call_soon(self._end_turn)
            except RuntimeError:
                self._end_turn()

    debug = info = warning = error = critical = write

    async def wait_until_written(self, within_s: float) -> bool:
        """Wait until the lines of this turn are written; say whether they were, in time."""
        turn = self._turn
        if not turn.lines:
            return True
        if turn.written is None:
            turn.written = _future(within_s)
        # Other tasks may wait for the same future.
        return await asyncio.shield(turn.written)

    def flush(self) -> None:
        """Wait up to `FLUSH_DEADLINE_S` until all lines are written or dropped."""
        self._end_turn()
        self._writer.flush(FLUSH_DEADLINE_S)

    def close(self) -> None:
        """Take no more lines."""
        self._writer.close()

    def _end_turn(self) -> None:
        turn = self._turn
        lines, turn.lines = turn.lines, []
        written, turn.written = turn.written, None
        done = None if written is None else partial(_resolve_from_thread, written)
        self._writer.put(lines, done)


def _future(within_s: float) -> asyncio.Future[bool]:
    """Return a future that resolves to False if it has no other result within *within_s* s."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[bool] = loop.create_future()
    timer = loop.call_later(within_s, _resolve, future, False)  # noqa: FBT003 - the result
    future.add_done_callback(lambda _: timer.cancel())
    return future


def _resolve_from_thread(future: asyncio.Future[bool], result: bool) -> None:  # noqa: FBT001
    with contextlib.suppress(RuntimeError):  # its loop has ended
        future.get_loop().call_soon_threadsafe(_resolve, future, result)


def _resolve(future: asyncio.Future[bool], result: bool) -> None:  # noqa: FBT001
    if not future.done():
        future.set_result(result)


class _Chunk(NamedTuple):
    """Lines that are queued together.

    Attributes:
        lines: The lines.
        size: Their number of bytes.
        done: Called with whether all lines were written.
    """

    lines: Sequence[bytes]
    size: int
    done: Callable[[bool], None] | None


def _readiness_check(out: Any) -> Callable[[], bool]:
    """Return a function that says whether *out* takes `PIPE_BUF` bytes without blocking.

    A terminal can be stopped in the middle of a write, so it never counts as ready.
    """
    try:
        descriptor = -1 if out.isatty() else out.fileno()
    except (AttributeError, OSError, ValueError):
        descriptor = -1
    if descriptor < 0:
        return lambda: False
    polled = poll()
    polled.register(descriptor, POLLOUT)
    ready = [(descriptor, POLLOUT)]
    return lambda: polled.poll(0) == ready


class _Writer:
    """Writes lines directly or through the queue, and owns the thread that empties it."""

    def __init__(self, out: BinaryIO, lines_dropped: Callable[[int], bytes]) -> None:
        # The raw file: a stalled write would hold the lock of a buffered one when Python exits.
        self._out: Any = getattr(out, "raw", out)
        self._is_ready = _readiness_check(self._out)
        self._lines_dropped = lines_dropped
        self._queue: SimpleQueue[_Chunk | None] = SimpleQueue()
        self._lock = Lock()
        self._queued_bytes = 0
        self._is_full = False
        self._dropped = 0
        Thread(target=self._run, name="log-writer", daemon=True).start()

    def put(self, lines: Sequence[bytes], done: Callable[[bool], None] | None) -> None:
        """Write, queue or drop *lines*; *done* is called with the outcome, in any thread."""
        with self._lock:
            if not self._queued_bytes:
                lines = self._write_directly(lines)
            size = sum(map(len, lines))
            # Checked before adding, so that a chunk larger than the bound still fits.
            self._is_full = self._is_full or self._queued_bytes > MAX_QUEUED_BYTES
            is_dropped = self._is_full and bool(lines)
            if not is_dropped:
                self._queued_bytes += size
        if is_dropped:
            self._drop(len(lines))
        elif lines:
            self._queue.put(_Chunk(lines, size, done))
            return
        if done:
            done(not is_dropped)

    def _write_directly(self, lines: Sequence[bytes]) -> Sequence[bytes]:
        """Write as many of *lines* as the output takes without blocking; return the rest."""
        begin = 0
        while begin < len(lines):
            end, size = begin, 0
            while end < len(lines) and (size := size + len(lines[end]) + 1) <= PIPE_BUF:
                end += 1
            if end == begin or not self._is_ready() or not self._write(lines[begin:end]):
                break
            begin = end
        return lines[begin:]

    def flush(self, within_s: float) -> None:
        reached = Event()
        self._queue.put(_Chunk((), 0, lambda _: reached.set()))
        reached.wait(within_s)

    def close(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        while (chunk := self._queue.get()) is not None:
            chunks = [chunk, *self._take_queued()]
            lines = [line for chunk in chunks for line in chunk.lines]
            is_written = self._write(lines)
            if not is_written:
                self._drop(len(lines))
            self._free(sum(chunk.size for chunk in chunks))
            for done in filter(None, (chunk.done for chunk in chunks)):
                done(is_written)

    def _take_queued(self) -> list[_Chunk]:
        """Take all chunks out of the queue, without waiting for more."""
        chunks = []
        while not self._queue.empty():
            if (chunk := self._queue.get()) is None:
                self.close()
                break
            chunks.append(chunk)
        return chunks

    def _free(self, size: int) -> None:
        """Subtract what was written from the size of the queue; report dropped lines if empty."""
        with self._lock:
            self._queued_bytes -= size
            if self._queued_bytes:
                return
            self._is_full = False
            dropped = self._dropped
        if dropped and self._write([self._lines_dropped(dropped)]):
            with self._lock:
                self._dropped -= dropped

    def _drop(self, number: int) -> None:
        metrics.LOG_LINES_DROPPED.inc(number)
        with self._lock:
            self._dropped += number

    def _write(self, lines: Sequence[bytes]) -> bool:
        """Write *lines* and say whether that succeeded. Blocks as long as the reader stalls."""
        rest = memoryview(b"\n".join([*lines, b""]))
        try:
            while rest:
                count = self._out.write(rest)
                if count is None:
                    # The output is non-blocking, and its buffer is full.
                    select((), (self._out,), ())
                else:
                    rest = rest[count:]
        except (OSError, ValueError):
            return False
        return True
