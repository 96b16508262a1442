"""The service's processes in a chaos run, and the pipes that their output goes to."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tests.support.processes import Process

# Small, so that a stalled reader blocks soon.
PIPE_BYTES = 16_384
READ_BYTES = 65536


class LogReader:
    """Reads the standard output of processes as a container runtime does, and can stall."""

    def __init__(self) -> None:
        self._reading = threading.Event()
        self._reading.set()

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Read nothing for the length of the block."""
        self._reading.clear()
        try:
            yield
        finally:
            self._reading.set()

    def read(self, source: int, out: BinaryIO) -> None:
        """Write to *out* what comes from the pipe *source*, until all its writers have ended."""
        with out, os.fdopen(source, "rb", buffering=0) as pipe:
            while chunk := pipe.read(READ_BYTES):
                out.write(chunk)
                out.flush()
                self._reading.wait()


class PipedProcess(Process):
    """A process whose standard output is a pipe."""

    def __init__(
        self, command: str, *, directory: Path, program: str, reader: LogReader, **settings: str
    ) -> None:
        self._reader = reader
        self._writing_end = -1
        super().__init__(command, directory=directory, program=program, **settings)
        os.close(self._writing_end)

    def _stdout(self, out: BinaryIO) -> int:
        source, self._writing_end = os.pipe()
        fcntl.fcntl(source, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        ours = os.fdopen(os.dup(out.fileno()), "wb")
        threading.Thread(target=self._reader.read, args=(source, ours), daemon=True).start()
        return self._writing_end


class Instance:
    """One named instance of the service, and its current process."""

    def __init__(self, name: str, command: str, *, port: int = 0, program: str = "") -> None:
        self.name = name
        self.command = command
        self.port = port
        self.program = program
        self.generation = 0
        self.is_stopping = False
        self.reader = LogReader()
        self.process: Process

    def start(self, directory: Path, **settings: str) -> None:
        """Start the next process of this instance."""
        self.generation += 1
        self.is_stopping = False
        self.process = PipedProcess(
            self.command,
            directory=directory,
            program=self.program,
            reader=self.reader,
            **settings,
            PORT=str(self.port),
        )

    def kill(self) -> None:
        """Kill it."""
        self.process.popen.kill()

    @property
    def is_up(self) -> bool:
        """Whether it listens, or has already ended and will be restarted."""
        return b"process.started" in self.process.out or self.process.popen.poll() is not None

    @property
    def admin_port(self) -> int:
        """The port of its metrics and probes."""
        [started] = self.process.lines("process.started")
        return int(started["admin_port"])
