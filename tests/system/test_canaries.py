"""The law of secrecy: what is secret or personal leaves no trace outside of process memory."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx2
import orjson
import pytest
import redis

from service.secret import Secret
from tests.support.depth import takes_long
from tests.support.harness import PREFIX, signed
from tests.support.processes import Process, Sandbox, open_sandbox
from tests.support.programs import FIXTURES
from tests.support.servers import free_port
from tests.support.traces import everything_in, everything_written, hits
from tests.support.waiting import PATIENCE_S, wait_until

SECRET = Secret(b"whsec_canary0secret0")
TOKEN, REDIS_PASSWORD = "canary0token-of-alice", "canary0redis0password"
# Words that are secret anywhere, and those that may be published but never logged.
CANARY, PUBLISHED = "canary0", "published0"
# Numbers that stand for days, months and years of a person's life.
NUMBERS = range(48_151_600, 48_151_700)

HANDLERS = """
from contextlib import asynccontextmanager
from service.errors import Undeliverable

@asynccontextmanager
async def raising(environ):
    async def handle(transition):
        local = [transition, environ]
        raise RuntimeError(f"{transition} {transition.metadata}", local)
    yield handle

@asynccontextmanager
async def refusing(environ):
    async def handle(transition):
        try:
            raise ValueError(str(transition.metadata))
        except ValueError:
            raise Undeliverable("message_too_large")
    yield handle
"""


def _poisoned(found: Any, count: list[int]) -> Any:
    """Return *found* with a canary in every leaf."""
    if isinstance(found, dict):
        return {key: _poisoned(value, count) for key, value in found.items()}
    if isinstance(found, list):
        return [_poisoned(value, count) for value in found]
    if isinstance(found, bool) or found is None:
        return found
    count[0] += 1
    return NUMBERS[count[0] % 100] if isinstance(found, int) else f"{CANARY}leaf{count[0]}"


def _fixture(name: str, *, id: str, session: str) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads((FIXTURES / f"{name}.json").read_bytes())
    found |= {"id": id, "created": int(time.time())}
    found["data"]["object"] |= {
        "id": session,
        "metadata": {"user": PUBLISHED, PUBLISHED: "x"},
        "client_reference_id": PUBLISHED,
        "related_person": {"account": f"acct_{PUBLISHED}", "person": f"person_{PUBLISHED}"},
    }
    return found


def expanded() -> dict[str, Any]:
    """Return an event with everything Stripe can expand, and a canary in each personal leaf."""
    found = _fixture(f"expanded_report.{PREFIX}verified", id="evt_expanded", session="vs_expanded")
    count = [0]
    session = found["data"]["object"]
    for name in ("verified_outputs", "provided_details"):
        session[name] = _poisoned(session[name], count)
    report = session["last_verification_report"]
    kept = {name: report[name] for name in ("id", "object", "created", "livemode", "options")}
    session["last_verification_report"] = _poisoned(report, count) | kept
    session["a_field_of_next_year"] = {"passport": f"{CANARY}next"}
    found["request"] = {"id": f"req_{CANARY}", "idempotency_key": f"{CANARY}key"}
    assert count[0] > 60
    return found


def waiting() -> dict[str, Any]:
    """Return an event of an open session: its client secret, its link, and why it failed."""
    found = _fixture(f"{PREFIX}requires_input", id="evt_waiting", session="vs_waiting")
    found["data"]["object"] |= {
        "client_secret": f"vs_waiting_secret_{CANARY}",
        "url": f"https://verify.stripe.com/start/{CANARY}",
    }
    found["data"]["object"]["last_error"]["reason"] = f"{CANARY} is not the holder"
    return found


def _broken() -> Iterator[bytes]:
    """Yield genuine bodies that are refused, each for a leaf that holds a canary."""
    yield orjson.dumps(waiting())[:-30]
    yield f'["{CANARY}"]'.encode()
    yield f"{CANARY}".encode()
    for path, value in (
        (("id",), CANARY + "!"),
        (("created",), CANARY),
        (("livemode",), CANARY),
        (("data", "object", "id"), CANARY + "!"),
        (("data", "object", "status"), {CANARY: CANARY}),
        (("data", "object", "metadata"), {CANARY: [CANARY]}),
        (("data", "object", "client_secret"), [CANARY]),
        (("data", "object", "verified_outputs"), {"dob": {"day": CANARY}}),
        (("data", "object", "last_verification_report"), {"document": {"files": CANARY}}),
    ):
        found = waiting()
        inner = found
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        yield orjson.dumps(found)


class Run(NamedTuple):
    """All that could be seen from outside during one run."""

    answers: bytes
    output: bytes
    metrics: bytes
    redis: bytes


def _answers(port: str) -> Iterator[bytes]:
    """Send everything there is to send; yield all answers, headers included."""
    url = f"http://127.0.0.1:{port}/webhooks/stripe"
    hostile = {
        "X-Request-Id": f"{CANARY}\t<script>",
        "traceparent": f"00-{CANARY}",
        "User-Agent": CANARY,
        "Cookie": CANARY,
        "Authorization": f"Bearer {CANARY}",
    }
    genuine = [orjson.dumps(expanded()), orjson.dumps(waiting())]
    genuine += genuine
    with httpx2.Client() as client:
        for body in (*genuine, *_broken()):
            said = client.post(url, content=body, headers={**hostile, **signed(body, SECRET)})
            assert said.status_code in (200, 400)
            yield b"%r %r" % (dict(said.headers), said.content)
        for path in ("", f"?{CANARY}={CANARY}", f"/{CANARY}", f"/../{CANARY}", f"/{CANARY}/"):
            forged = signed(genuine[0], Secret(b"whsec_forged"))["Stripe-Signature"]
            for header in (f"t=1,v1={CANARY}", CANARY, SECRET.reveal().decode(), forged):
                headers = {**hostile, "Stripe-Signature": header}
                said = client.post(url + path, content=genuine[0], headers=headers)
                assert said.status_code in (400, 404)
                yield b"%r %r" % (dict(said.headers), said.content)
    for raw in (
        f"{CANARY}\r\n\r\n",
        f"GET /{CANARY} HTTP/1.1\r\n{CANARY}\r\n\r\n",
        f"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{CANARY}",
        f"GET / HTTP/1.1\r\nHost: x\r\nX: {CANARY * 9000}\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", int(port))) as client:
            client.sendall(raw.encode())
            client.shutdown(socket.SHUT_WR)
            client.settimeout(PATIENCE_S)
            try:
                yield client.recv(65_536)
            except ConnectionError:
                yield b""


def _pages(port: str, handler: str) -> Iterator[bytes]:
    """Open all that the page has, act on a handler's letters, and send what is refused."""
    hostile = {"User-Agent": CANARY, "Cookie": f"idv_admin_idv={CANARY}; {CANARY}", "Origin": ""}
    address = f"http://127.0.0.1:{port}"
    failing = f"/dead-letters/failing%3A{handler}"
    with httpx2.Client(base_url=address, headers={"Origin": address}) as client:

        def said(answer: httpx2.Response) -> bytes:
            assert answer.status_code < 500, answer
            return f"{answer.url.path} {dict(answer.headers)} {answer.text}".encode()

        for path in ("/", f"/{CANARY}", f"/sessions/{CANARY}", f"/actions/{CANARY}"):
            refused = said(client.post(path, data={CANARY: CANARY}, headers=hostile))
            yield refused.replace(f"{path} ".encode(), b"")
        yield said(client.post("/login", data={"token": CANARY, "next": f"//{CANARY}"}))
        assert client.post("/login", data={"token": TOKEN}).status_code == 303
        found = said(client.post("/sessions", data={"text": f"{CANARY} {PUBLISHED}"}))
        # Only its own form shows again what was looked for.
        yield found.replace(f'value="{CANARY} {PUBLISHED}"'.encode(), b"", 1)
        for path in ("/", "/sessions", "/dead-letters", failing, "/handlers", "/endpoints"):
            yield said(client.get(path))
        for path in ("/sessions/vs_expanded", "/sessions/vs_waiting", "/handlers/log"):
            yield said(client.get(path))
        letters = re.findall(rf'href="({failing}/[0-9-]+)"', client.get(failing).text)
        for path in letters:
            yield said(client.get(path))
        for verb, letter in zip(("replay", "drop"), letters, strict=True):
            asked = client.get(f"{failing}/{verb}", params={"id": letter.rpartition("/")[2]})
            yield said(asked)
            form = dict(re.findall(r'type="hidden" name="(.*?)" value="(.*?)"', asked.text))
            sent = client.post(f"{failing}/{verb}", data=form)
            yield said(sent)
            path = sent.headers["location"]
            wait_until(lambda path=path: "so far" not in client.get(path).text)  # type: ignore[misc]
            yield said(client.get(path))


def _delivered(port: str) -> bool:
    shown = httpx2.get(f"http://127.0.0.1:{port}/metrics").text
    return all(
        f'idv_deliveries_total{{handler="{handler}",outcome="{outcome}"}} 2.0' in shown
        for handler, outcome in (
            ("log", "delivered"),
            ("failing:raising", "dead_lettered"),
            ("failing:refusing", "dead_lettered"),
        )
    )


def _started(opened: Sandbox, command: str, log_format: str, port: str, admin: str) -> Process:
    return opened.start(
        command,
        PORT=port,
        ADMIN_PORT=admin,
        LOG_FORMAT=log_format,
        LOG_LEVEL="debug",
        STRIPE_WEBHOOK_SECRETS=SECRET.reveal().decode(),
        HANDLERS="log,failing:raising,failing:refusing",
        RETRY_MAX_ATTEMPTS="2",
        RETRY_INITIAL_DELAY_S="0.01",
        RETRY_MAX_DELAY_S="0.02",
        ADMIN_TOKENS=f"alice:{TOKEN}",
        ADMIN_REDIS_URL=opened.server.url.replace("://", f"://page:{REDIS_PASSWORD}@", 1),
    )


@pytest.fixture(scope="module", params=["json", pytest.param("console", marks=takes_long)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a receiver and a worker with failing handlers on a diet of canaries; keep all traces."""
    directory = tmp_path_factory.mktemp("canaries")
    (directory / "failing.py").write_text(HANDLERS)
    port, *admins = (str(free_port()) for _ in range(3))
    with open_sandbox(directory) as opened:
        with redis.Redis.from_url(opened.server.url) as administrator:
            administrator.acl_setuser(
                "page",
                enabled=True,
                passwords=[f"+{REDIS_PASSWORD}"],
                keys=["*"],
                commands=["+@all"],
            )
        processes = [
            _started(opened, command, request.param, port, admin)
            for command, admin in zip(("serve", "work"), admins, strict=True)
        ]
        for process in processes:
            wait_until(lambda process=process: b"process.started" in process.out)  # type: ignore[misc]
        answers = b"\n".join(_answers(port))
        wait_until(lambda: _delivered(admins[1]))
        for admin, handler in zip(admins, ("raising", "refusing"), strict=True):
            answers += b"\n".join(_pages(admin, handler))
        shown = b"".join(
            httpx2.get(f"http://127.0.0.1:{admin}/metrics").content for admin in admins
        )
        looked = [opened.run("session", "vs_expanded", *json) for json in ([], ["--json"])]
        assert [process.wait() for process in looked] == [0, 0]
        dump = everything_in(opened.server.url)
        assert [process.stop() for process in processes] == [0, 0]
        written = everything_written(directory / "redis")
        output = b"".join(process.out + process.err for process in (*processes, *looked))
    assert len(written) > 2000
    return Run(answers, output, shown, dump + written)


def _hits(traces: bytes, *words: str) -> list[bytes]:
    return hits(traces, words, NUMBERS)


def test_secrets_leave_no_trace(run: Run) -> None:
    """No canary in an answer, a log line, a metric, a key, a dead letter or Redis's own file."""
    for traces in run:
        assert _hits(traces, CANARY, "whsec_") == []


def test_metadata_is_published_and_never_logged(run: Run) -> None:
    """Metadata travels in Redis to the handlers, and appears in no log, metric or answer."""
    assert _hits(run.redis, PUBLISHED)
    for traces in (run.answers, run.output, run.metrics):
        assert _hits(traces, PUBLISHED) == []


def test_the_run_was_worth_looking_at(run: Run) -> None:
    """What may be published is: outcomes, dead letters, sessions; and no process failed."""
    for word in (b"admitted", b"duplicate", b"signature_mismatch", b"field_mistyped"):
        assert word in run.answers
    plain = re.sub(rb"\x1b\[[0-9;]*m", b"", run.output)
    for word in (b"delivery.retried", b"delivery.dead_lettered", b"rejected", b"vs_expanded"):
        assert word in plain
    for word in (b"vs_expanded", b"RuntimeError", b"alice", b"was replayed", b"was dropped"):
        assert word in run.answers
    assert b"message_too_large" in run.redis
    assert b"RuntimeError" in run.redis
    assert b"Traceback" not in plain
    assert b"HTTP/1.1 5" not in run.answers
