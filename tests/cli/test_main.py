"""The commands as a user types them: `dev`, `send`, `check` and the rest, and their exit codes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from unittest import mock

import httpx2
import orjson
import pytest
import redis
from click.testing import CliRunner

from service import __version__
from service.cli.main import commands
from service.operations.synthetic_events import LIFECYCLES, lifecycle_events
from service.storage.keys import Keys
from tests.support.depth import takes_long
from tests.support.harness import SECRET
from tests.support.http_sink import http_sink
from tests.support.processes import Process, Processes, Sandbox, environment
from tests.support.waiting import PATIENCE_S, wait_until

CANARY = "canary4711"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
COMMANDS = ["dev", "serve", "work", "check", "send", "session", "selftest", "version"]


class Dev:
    """A new user's directory, in which the commands of the README and of `dev` are typed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: list[Process] = []

    def start(self, **settings: str) -> Process:
        """Run `python -m service dev`, and wait until it is ready."""
        process = Process(
            "dev", directory=self.directory, **{"PORT": "0", "ADMIN_PORT": "0", **settings}
        )
        self.processes.append(process)
        process.ready()
        ready = f"http://127.0.0.1:{process.port}/readyz"
        wait_until(lambda: httpx2.get(ready).status_code == 200)
        return process

    def type(self, line: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a line of shell, and wait for its end."""
        return subprocess.run(
            ["/bin/sh", "-c", line],
            cwd=self.directory,
            env=environment(**{"PATH": PATH, **settings}),
            check=False,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_S,
        )


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[Dev]:
    """Yield an empty directory to work in."""
    opened = Dev(tmp_path)
    yield opened
    for process in opened.processes:
        process.end()


def _said(process: Process, label: str) -> str:
    return next(
        line.strip().removeprefix(label).strip()
        for line in process.err.decode().splitlines()
        if line.strip().startswith(label)
    )


def test_two_commands_are_enough(dev: Dev) -> None:
    """`dev`, then exactly the command that `dev` prints, then the one that this prints.

    Empty variables count as unset, as in a copied .env.example.
    """
    running = dev.start(STRIPE_WEBHOOK_SECRETS="", REDIS_URL="")
    assert _said(running, "endpoint") == running.url
    assert re.fullmatch(r"whsec_[0-9a-f]{32}", _said(running, "signing secret"))
    assert httpx2.get(_said(running, "metrics")).status_code == 200
    assert "<h1 " in httpx2.get(_said(running, "page")).text
    assert "--to" not in _said(running, "type next")
    sent = dev.type(_said(running, "type next"))
    assert sent.returncode == 0, sent.stderr
    assert re.search(r"admitted\s+3\b", sent.stdout)
    moves = wait_until(lambda: running.lines("transition")[2:] and running.lines("transition"))
    assert [move["current"] for move in moves] == ["requires_input", "processing", "verified"]
    hint = sent.stderr.split("look at it with: ")[1].strip()
    shown = dev.type(hint)
    assert shown.returncode == 0, shown.stderr
    assert "verified" in shown.stdout
    assert re.search(
        r" #3 processing → verified\n +" + moves[2]["event_id"] + "  verified, webhook",
        shown.stdout,
    )
    as_json = orjson.loads(dev.type(hint + " --json").stdout)
    assert (as_json["status"], as_json["sequence"], len(as_json["steps"])) == ("verified", 3, 3)
    assert {
        "event_type": "identity.verification_session.verified",
        "previous": "processing",
        "current": "verified",
    }.items() <= as_json["steps"][-1]["transition"].items()
    assert running.stop() == 0
    assert not (dev.directory / ".data/endpoint").exists()
    assert b"Traceback" not in running.out + running.err


@takes_long
def test_dev_remembers(dev: Dev) -> None:
    """After Ctrl-C and a restart, the same events are duplicates, and the secret is the same."""
    first = dev.start()
    secret = _said(first, "signing secret")
    command = "python -m service send canceled --seed 7 --json --to "
    assert orjson.loads(dev.type(command + first.url).stdout) == [
        {"outcome": "admitted", "answers": 2}
    ]
    first.popen.send_signal(signal.SIGINT)
    assert first.wait() == 0
    assert not (dev.directory / ".data/redis_url").exists()
    second = dev.start()
    command += second.url
    assert orjson.loads(dev.type(command).stdout) == [{"outcome": "duplicate", "answers": 2}]
    assert _said(second, "signing secret") == secret
    kept = dev.directory / ".data/signing_secret"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    checked = dev.type("python -m service check --json")
    assert {row["name"] for row in orjson.loads(checked.stdout)} >= {"persistence", "handler log"}
    again = Process("dev", directory=dev.directory, PORT="0", ADMIN_PORT="0")
    assert again.wait() == 2
    assert again.err == b"error: the data directory is in use by another running server\n"
    assert dev.type("python -m service check").returncode == 0
    closed = dev.type(f"({command} --count 20; echo $? >code) | true")
    assert "Traceback" not in closed.stderr
    assert second.stop() == 0


def test_dev_takes_what_is_set(dev: Dev, sandbox: Sandbox) -> None:
    """`dev` uses a secret and a Redis that the environment names, and makes none of its own."""
    (dev.directory / "secret").write_bytes(SECRET.reveal() + b"\n")
    running = dev.start(
        STRIPE_WEBHOOK_SECRETS_FILE=str(dev.directory / "secret"), REDIS_URL=sandbox.server.url
    )
    assert SECRET.reveal() not in running.err + running.out
    assert not (dev.directory / ".data").exists()
    line = f"{_said(running, 'type next')} --secret-file secret --json"
    assert orjson.loads(dev.type(line).stdout) == [{"outcome": "admitted", "answers": 3}]
    assert running.stop() == 0


def test_dev_without_a_place_to_write(dev: Dev) -> None:
    """If .data cannot be made, `dev` fails with one line."""
    (dev.directory / ".data").write_text("in the way")
    process = Process("dev", directory=dev.directory)
    assert process.wait() == 2
    assert process.err.count(b"\n") == 1


def test_all_wrong_settings_are_reported_at_once(sandbox: Sandbox) -> None:
    """Exit 2, one line for each setting, by name and without its value."""
    bad = {"PORT": CANARY, "REDIS_URL": CANARY, "LIVEMODE": CANARY, "RETRY_MAX_ATTEMPTS": "-1"}
    typed = sandbox.invoke("serve", **bad, STRIPE_WEBHOOK_SECRETS=f"{CANARY} x")
    assert typed.code == 2
    said = typed.err.decode()
    assert {line.split(":")[1].strip() for line in said.splitlines()} == {
        *bad,
        "STRIPE_WEBHOOK_SECRETS",
    }
    assert CANARY not in said
    assert typed.out == b""
    missing = sandbox.invoke("serve", STRIPE_WEBHOOK_SECRETS="")
    assert (missing.code, missing.err.count(b"\n")) == (2, 1)


UNSET = """
from contextlib import asynccontextmanager
from service.errors import ConfigError

@asynccontextmanager
async def open(environ):
    raise ConfigError(["QUEUE_URL: expected a URL"])
    yield
"""


def test_exit_codes_of_check(sandbox: Sandbox) -> None:
    """0 when every promise can be kept, 1 when not, 2 for wrong settings, 3 without Redis."""
    (sandbox.directory / "unset.py").write_text(UNSET)
    closed = sandbox.invoke("check", "--json", HANDLERS="log,unset:open")
    fine = sandbox.invoke("check", "--json")
    table = sandbox.invoke("check")
    fatal = sandbox.invoke("check", "--json", DURABILITY="fsync")
    wrong = sandbox.invoke("check", HANDLERS="absent")
    gone = sandbox.invoke("check", REDIS_URL=f"redis://{CANARY}:{CANARY}@127.0.0.1:1/0")
    invoked = (fine, table, closed, fatal, wrong, gone)
    assert [one.code for one in invoked] == [0, 0, 1, 1, 2, 3]
    rows = {row["name"]: row for row in orjson.loads(fine.out)}
    opens = "opens (service.handlers.log:open)"
    assert rows["handler log"] == {
        "name": "handler log",
        "severity": "fine",
        "promises": ["each handler alone"],
        "meaning": opens,
    }
    assert {"clock", "eviction", "persistence", "durability"} <= rows.keys()
    for word in (b"persistence", b"forward only", b"because of"):
        assert word in table.out
    assert {"name": "durability", "severity": "fatal"}.items() <= next(
        row.items() for row in orjson.loads(fatal.out) if row["name"] == "durability"
    )
    meanings = {row["name"]: row["meaning"] for row in orjson.loads(closed.out)}
    assert meanings["handler log"] == opens
    assert meanings["handler unset:open"] == "QUEUE_URL: expected a URL (unset:open)"
    assert wrong.err.startswith(b"error: HANDLERS: absent")
    assert gone.err == (
        b"error: Redis at 127.0.0.1:1 does not answer (redis_unreachable); REDIS_URL says where\n"
    )
    assert CANARY.encode() not in gone.err


def test_exit_codes_of_send(sandbox: Sandbox) -> None:
    """2 without a secret, an address or anything to send; 1 when nothing answers."""
    secret = sandbox.invoke("send", "verified", STRIPE_WEBHOOK_SECRETS="")
    address = sandbox.invoke("send", "verified", "--to", f"ftp://{CANARY}")
    nothing = sandbox.invoke("send")
    unknown = sandbox.invoke("send", "verify")
    # Bound but not listening, so that no other process takes the port.
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = str(silent.getsockname()[1])
        refused = sandbox.invoke("send", "verified", "--json", PORT=port)
    both = sandbox.invoke("send", "--thin", "--file", __file__)
    attempts = (secret, address, nothing, unknown, both, refused)
    assert [one.code for one in attempts] == [2, 2, 2, 2, 2, 1]
    for one, said in ((secret, b"no signing secret"), (address, b"URL")):
        assert said in one.err
        assert one.err.count(b"\n") == 1
        unheard = sandbox.invoke("send", "verified", PORT=port)
    assert orjson.loads(refused.out) == [{"outcome": "unreachable", "answers": 3}]
    # No hint to look at the session: no receiver has it.
    assert unheard.err == b""
    assert CANARY.encode() not in address.err


def test_send_sends_files_and_thin_events(sandbox: Sandbox) -> None:
    """`send --file` signs and posts each file as it is, `--thin` the thin form of each event."""
    serve = sandbox.start("serve", STRIPE_API_KEY="sk_test_tests").ready()
    body = lifecycle_events("verified", random=Random(5), started_at=1)[0].body
    (sandbox.directory / "old.json").write_bytes(body)
    (sandbox.directory / "none.json").write_bytes(b"[]")
    process = sandbox.run(
        "send", "--file", "old.json", "--file", "none.json", "--json", PORT=str(serve.port)
    )
    assert process.wait() == 1
    assert orjson.loads(process.out) == [
        {"outcome": "body_not_an_event", "answers": 1},
        {"outcome": "expired", "answers": 1},
    ]
    thin = sandbox.invoke("send", "canceled", "verified", "--thin", PORT=str(serve.port))
    assert (thin.code, thin.err) == (0, b"")
    assert thin.out.split() == [b"outcome", b"answers", b"queued", b"5"]
    unknown = sandbox.invoke("session", "vs_absent")
    assert unknown.code == 1
    assert unknown.err.startswith(b"error: no session record has this id: no event of it was ")
    with redis.Redis.from_url(sandbox.server.url) as client:
        client.hset(Keys("idv", 8).session("vs_spoiled"), "state", "?")
    spoiled = sandbox.invoke("session", "vs_spoiled")
    assert spoiled.code == 1
    assert spoiled.err == b"error: the stored session record cannot be read\n"
    assert serve.stop() == 0


@pytest.mark.parametrize("rate", ["5", "0.1"])
def test_an_interrupted_send_prints_its_summary(sandbox: Sandbox, rate: str) -> None:
    """After Ctrl-C `send` prints the answers so far, without waiting for the next turn."""
    with http_sink(b'{"outcome":"admitted"}') as endpoint:
        sending = sandbox.start(
            *("send", "verified", "--count", "1000", "--rate", rate, "--json"),
            *("--to", endpoint.url),
        )
        wait_until(lambda: endpoint.received)
        sending.popen.send_signal(signal.SIGINT)
        assert sending.wait() == 1
    [row] = orjson.loads(sending.out)
    assert row["outcome"] == "admitted"
    assert 1 <= row["answers"] < 3000
    assert sending.err == f"interrupted after {row['answers']} of 3000 events\n".encode()


def test_the_version_is_printed() -> None:
    """`version` and `--version` print the package's version and nothing else."""
    for words in ("version", "--version"):
        assert CliRunner().invoke(commands, [words]).output == f"{__version__}\n"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("STRIPE_WEBHOOK_SECRET", "STRIPE_WEBHOOK_SECRETS"),
        ("STRIPE_WEBHOOK_SECRET_ACME", "STRIPE_WEBHOOK_SECRETS_ACME"),
        ("HANDLER", "HANDLERS"),
        ("LEASE_TTL", "LEASE_TTL_S"),
    ],
)
def test_a_misspelled_setting_is_named(sandbox: Sandbox, name: str, meant: str) -> None:
    """Every command warns of a misspelled setting, without its value."""
    for words in (("check", "--json"), ("handlers", "list"), ("serve",)):
        typed = sandbox.invoke(*words, STRIPE_WEBHOOK_SECRETS="", **{name: CANARY})
        line = f"warning: {name} is no setting, but {meant} is\n".encode()
        assert typed.err.startswith(line), typed
        assert CANARY.encode() not in typed.err + typed.out


def test_dev_ignores_a_host_that_is_no_address(dev: Dev) -> None:
    """HOST as conda sets it names a compiler: `dev` prints a note and listens on loopback."""
    running = dev.start(HOST="x86_64-conda-linux-gnu")
    assert b"HOST is not an IP address: dev listens on 127.0.0.1\n" in running.err
    assert running.stop() == 0


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_explains_itself(command: str) -> None:
    """-h and --help print a command's help, and exit 0."""
    for option in ("-h", "--help"):
        result = CliRunner().invoke(commands, [*shlex.split(command), option])
        assert result.exit_code == 0
        assert "Usage:" in result.output
    listed = COMMANDS if not command else [*LIFECYCLES] if command == "send" else []
    assert all(word in result.output for word in listed)


def test_the_console_script_finds_handlers_of_the_folder(dev: Dev, sandbox: Sandbox) -> None:
    """Both the console script and `python -m` find a handler in a file of the current folder."""
    (dev.directory / "bin").mkdir()
    (dev.directory / "bin" / "script").write_text("from service.cli import main\nmain()\n")
    (dev.directory / "own.py").write_text("async def handle(transition):\n    pass\n")
    settings = {"HANDLERS": "own:handle", "REDIS_URL": sandbox.server.url}
    for start in ("bin/script", "-m service"):
        checked = dev.type(f"python {start} check --json", **settings)
        rows = {row["name"]: row["meaning"] for row in orjson.loads(checked.stdout)}
        assert rows["handler own:handle"] == "opens (own:handle)"
    refused = dev.type("python -P bin/script check", **settings)
    assert "module own is not installed" in refused.stderr


def test_the_module_is_a_program(sandbox: Sandbox) -> None:
    """`python -m service` is named in its help, and the console script is installed."""
    assert b"Usage: python -m service" in sandbox.run("--help", program="").out
    script = shutil.which("identity-webhooks", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("the package is not installed")
    said = subprocess.run([script, "version"], check=True, capture_output=True, text=True)
    assert said.stdout == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "key", "works"),
    [
        ((), "", ("log", "kafka")),
        ((), "rk_test_x", ("log", "kafka", "fetch")),
        (("--handlers", "fetch"), "rk_test_x", ("fetch",)),
        (("--handlers", "kafka"), "rk_test_x", ("kafka",)),
    ],
)
def test_a_worker_with_an_api_key_fetches(
    arguments: tuple[str, ...], key: str, works: tuple[str, ...], tmp_path: Path
) -> None:
    """It runs `fetch` beside its handlers, unless `--handlers` says otherwise."""
    processes = Processes("redis://127.0.0.1:1", tmp_path)
    with (
        mock.patch("service.runtime.process.run") as run,
        mock.patch("service.cli.run._configure_logging"),
    ):
        invoked = processes.invoke("work", *arguments, HANDLERS="log,kafka", STRIPE_API_KEY=key)
    assert invoked.code == 0, invoked.err
    assert run.call_args.kwargs["work"] == works
