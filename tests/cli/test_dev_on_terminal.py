"""What `dev` shows on a terminal: its own handler's calls, and where one failed."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2

from tests.support.harness import SECRET, WEBHOOK, event, signed
from tests.support.terminals import OnTerminal
from tests.support.waiting import wait_until


def test_a_terminal_shows_each_hand_over(tmp_path: Path) -> None:
    """Each call of a handler is a short line, and a traceback is right below its line."""
    (tmp_path / "moody.py").write_text(
        "async def handle(transition, calls=[]):\n"
        "    calls.append(transition)\n"
        "    if len(calls) == 1:\n"
        "        raise LookupError('first')\n"
    )
    settings = {"HANDLERS": "log,moody:handle", "RETRY_INITIAL_DELAY_S": "0.01", "NO_COLOR": "1"}
    settings |= {"PORT": "0", "ADMIN_PORT": "0", "STRIPE_WEBHOOK_SECRETS": SECRET.reveal().decode()}
    dev = OnTerminal("dev", directory=tmp_path, **settings)
    try:
        [port] = wait_until(lambda: re.findall(rb"process.started .*?\bport=(\d+)", dev.out))
        url = f"http://127.0.0.1:{int(port)}{WEBHOOK}"
        body = event(session="vs_moody")
        wait_until(lambda: httpx2.post(url, content=body, headers=signed(body)).is_success)
        wait_until(lambda: b"ms moody:handle" in dev.out and b" log\r\n" in dev.out)
        assert dev.stop() == 0
    finally:
        dev.end()

    text = dev.out.decode()
    assert "\x1b" not in text
    said = [line.partition(" ")[2] for line in text.splitlines()]
    [request] = [line for line in said if line.startswith("in vs_moody new → ")]
    change = request.rpartition(" ")[0].removeprefix("in ")
    assert f"ok {change} log" in said
    assert re.search(rf"ok {change} <?\d+ms moody:handle", text)
    [retried] = [at for at, line in enumerate(said) if "delivery.retried LookupError #1" in line]
    assert text.splitlines()[retried + 1] == "    Traceback (most recent call last):"
    assert text.splitlines()[retried + 4] == "    LookupError: first"
    assert dev.err.count(b"Traceback") == 0
