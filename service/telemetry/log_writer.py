"""Writes log lines in a thread of its own: a reader that stalls must not stop the event loop.

The lines of one loop turn are handed to the thread together, at the turn's end, through a queue of
bounded size. While the queue is full, lines are dropped and counted, and that lasts until it is
empty: one gap, rather than many small ones. Then one line says how many are missing. Lines that
could not be written (disk full, pipe closed) are counted the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from select import select
from threading import Event, Lock, Thread, local
from typing import Any, BinaryIO, NamedTuple

from . import metrics

# About 6,000 lines of requests.
MAX_QUEUED_BYTES = 4 * 1024 * 1024
# Each write makes the event loop wait for the interpreter's lock: few large ones cost the least.
COLLECT_S = 0.002
# At the end of the process, when the log may not be read any more.
FLUSH_DEADLINE_S = 2.0


class _Turn(local):
    """What a thread has logged in the present turn of its event loop.

    Attributes:
        lines: The lines.
        written: Becomes whether all of them have been written, where somebody waits for that.
    """

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.written: asyncio.Future[bool] | None = None


class LogSink:
    """Takes lines, encoded and without their ends. To structlog this is the logger.

    Args:
        out: Where they are written.
        lines_dropped: Returns the line that says how many are missing.
    """

    def __init__(self, out: BinaryIO, lines_dropped: Callable[[int], bytes]) -> None:
        self._writer = _Writer(out, lines_dropped)
        self._turn = _Turn()

    def write(self, line: bytes) -> None:
        """Take a line; never blocks. Where no loop runs it is handed on at once."""
        lines = self._turn.lines
        lines.append(line)
        if len(lines) == 1:
            try:
                asyncio.get_running_loop().call_soon(self._end_turn)
            except RuntimeError:
                self._end_turn()

    debug = info = warning = error = critical = write

    async def written(self, within_s: float) -> bool:
        """Wait until the lines of this turn are written; say whether they were, in time."""
        turn = self._turn
        if not turn.lines:
            return True
        if turn.written is None:
            turn.written = _future(within_s)
        # Others wait for it too.
        return await asyncio.shield(turn.written)

    def flush(self) -> None:
        """Wait until everything is written, or given up, or `FLUSH_DEADLINE_S` is over."""
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
    """Return a future that becomes False when it is nothing else within *within_s* seconds."""
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
    """Lines that are written, or lost, together.

    Attributes:
        lines: The lines.
        size: Their bytes.
        done: Called with whether all of them have been written, where somebody waits for that.
    """

    lines: Sequence[bytes]
    size: int
    done: Callable[[bool], None] | None


class _Writer:
    """The queue, and the thread that empties it."""

    def __init__(self, out: BinaryIO, lines_dropped: Callable[[int], bytes]) -> None:
        # Below its buffer, whose lock a stalled write would hold until the interpreter's end.
        self._out: Any = getattr(out, "raw", out)
        self._lines_dropped = lines_dropped
        self._queue: SimpleQueue[_Chunk | None] = SimpleQueue()
        self._lock = Lock()
        self._queued_bytes = 0
        self._is_full = False
        self._dropped = 0
        Thread(target=self._run, name="log-writer", daemon=True).start()

    def put(self, lines: Sequence[bytes], done: Callable[[bool], None] | None) -> None:
        """Queue *lines*, or drop them all; *done* hears, in some thread, what came of them."""
        size = sum(map(len, lines))
        with self._lock:
            # By one chunk too many rather than a chunk that never fits.
            self._is_full = self._is_full or self._queued_bytes > MAX_QUEUED_BYTES
            is_accepted = not self._is_full
            if is_accepted:
                self._queued_bytes += size
        if is_accepted:
            self._queue.put(_Chunk(lines, size, done))
        else:
            self._drop(len(lines))
            if done:
                done(False)  # noqa: FBT003 - what came of it

    def flush(self, within_s: float) -> None:
        reached = Event()
        self._queue.put(_Chunk((), 0, lambda _: reached.set()))
        reached.wait(within_s)

    def close(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        while (chunk := self._queue.get()) is not None:
            if chunk.done is None:
                time.sleep(COLLECT_S)
            chunks = [chunk, *self._waiting()]
            lines = [line for chunk in chunks for line in chunk.lines]
            is_written = self._write(lines)
            if not is_written:
                self._drop(len(lines))
            self._leave_queue(sum(chunk.size for chunk in chunks))
            for done in filter(None, (chunk.done for chunk in chunks)):
                done(is_written)

    def _waiting(self) -> list[_Chunk]:
        """Take what waits out of the queue."""
        chunks = []
        while not self._queue.empty():
            if (chunk := self._queue.get()) is None:
                self.close()
                break
            chunks.append(chunk)
        return chunks

    def _leave_queue(self, size: int) -> None:
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
        """Write *lines*; say whether they are out. Blocks for as long as the reader does."""
        rest = memoryview(b"\n".join([*lines, b""]))
        try:
            while rest:
                count = self._out.write(rest)
                if count is None:
                    # We were started with an output that does not block.
                    select((), (self._out,), ())
                else:
                    rest = rest[count:]
        except (OSError, ValueError):
            return False
        return True
