"""The peers of the way in: their own packages, installed once, and how each is started.

Each does what its libraries' documentation shows, and less than the service: verify, parse, SET NX,
XADD, one log line. No order, no atomicity, no typed session, no metrics.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.candidates import BENCH, Candidate, logged, uvicorn_of
from tests.support.servers import Server

PEERS = BENCH / "peers"
INSTALLED = BENCH.parents[1] / ".venv-peers"
MODULES = INSTALLED / "node_modules"


def _python() -> Path:
    """Return the interpreter of the Python peers, with their pins installed."""
    python = INSTALLED / f"{sys.version_info.major}.{sys.version_info.minor}" / "bin" / "python"
    pins = PEERS / "requirements.txt"
    done = python.parent / "installed"
    if not done.exists() or done.read_text(encoding="utf-8") != pins.read_text(encoding="utf-8"):
        _done([sys.executable, "-m", "venv", "--clear", str(python.parents[1])])
        _done([str(python), "-m", "pip", "install", "-qq", "--no-deps", "-r", str(pins)])
        shutil.copy(pins, done)
    return python


def _node() -> Path:
    """Return the interpreter of the Node peers, with their pins installed."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise FileNotFoundError("no Node.js with npm")
    wanted, done = PEERS / "package.json", INSTALLED / "package.json"
    if not done.exists() or done.read_text(encoding="utf-8") != wanted.read_text(encoding="utf-8"):
        shutil.rmtree(MODULES, ignore_errors=True)
        INSTALLED.mkdir(exist_ok=True)
        shutil.copy(wanted, done)
        quietly = ["--no-audit", "--no-fund", "--no-package-lock", "--silent"]
        _done([npm, "install", *quietly, "--prefix", str(INSTALLED)])
    return Path(node)


def _done(command: list[str]) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def _start_python(app: str, port: int, store: Server, directory: Path) -> subprocess.Popen[bytes]:
    return uvicorn_of(_python(), f"peers.{app}:app", port, store, directory)


def _start_node(
    pipelining: str, port: int, store: Server, directory: Path
) -> subprocess.Popen[bytes]:
    further = {
        "PORT": str(port),
        "AUTO_PIPELINING": pipelining,
        "NODE_ENV": "production",
        "NODE_PATH": str(MODULES),
    }
    return logged([str(_node()), str(PEERS / "fastify_stripe.js")], store, directory, **further)


def _counted(client: Any) -> tuple[int, int]:
    return client.xlen("transitions"), client.dbsize() - 1


ALL = {
    "fastapi": Candidate(
        "FastAPI + stripe + redis", partial(_start_python, "fastapi_stripe"), _counted
    ),
    "node": Candidate("Node fastify + stripe + ioredis", partial(_start_node, ""), _counted),
    "node_piped": Candidate("the same, auto-pipelining", partial(_start_node, "1"), _counted),
}


def missing() -> dict[str, str]:
    """Install what the peers need; return why each peer that cannot run cannot."""
    reasons: dict[str, str] = {}
    for needed, names in ((_python, ("fastapi",)), (_node, ("node", "node_piped"))):
        try:
            needed()
        except (OSError, subprocess.CalledProcessError) as error:
            reasons |= dict.fromkeys(names, str(error))
    return reasons
