"""Load balancers: their shipped files in front of two receivers, with real requests.

The files are run as they are, except for addresses and the certificate.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx2
import orjson
import pytest

from tests.support.harness import WEBHOOK, event, rest, signed
from tests.support.processes import Process, Sandbox, open_sandbox
from tests.support.programs import ROOT, program, run
from tests.support.servers import free_port
from tests.support.waiting import DEADLINE_S, until, wait_until

CERTIFICATE = "/run/secrets/certificate.pem"
ADDRESSES = ("receiver-1:8000", "receiver-2:8000")
PORT = "8443"


class Balancer(NamedTuple):
    """A load balancer as Debian packages it.

    Attributes:
        name: The program, and its package.
        shipped: The file in deploy/.
        check: The arguments before a file's path that check it; warnings count as errors.
        run: The arguments before a file's path that run it in the foreground.
    """

    name: str
    shipped: str
    check: Sequence[str]
    run: Sequence[str]

    def adapted(self, directory: Path, addresses: Sequence[str], port: int) -> Path:
        """Return a copy of the shipped file with our ports and certificate."""
        text = (ROOT / "deploy" / self.shipped).read_text()
        certificate = _certificate(directory)
        for theirs, ours in zip(ADDRESSES, addresses, strict=True):
            assert theirs in text
            text = re.sub(rf"{theirs}\b", ours, text)
        assert CERTIFICATE in text
        text = text.replace(CERTIFICATE, str(certificate))
        text = re.sub(rf"(?<=:|\s){PORT}\b", f"127.0.0.1:{port}", text).replace("::127", ":127")
        text = text.replace(" :127", " 127").replace("/tmp/nginx", f"{directory}/nginx")  # noqa: S108
        configuration = directory / self.shipped
        configuration.write_text(text)
        return configuration

    @contextmanager
    def running(self, directory: Path, addresses: Sequence[str]) -> Iterator[str]:
        """Run it in front of *addresses*; yield its URL."""
        path = program(self.name, self.name)
        port = free_port()
        configuration = self.adapted(directory, addresses, port)
        with (directory / f"{self.name}.log").open("wb") as out:
            process = subprocess.Popen(
                [path, *self.run, configuration],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(lambda: _listens(process, port, directory / f"{self.name}.log"))
            yield f"https://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(DEADLINE_S)


HAPROXY = Balancer("haproxy", "haproxy.cfg", check=("-c", "-dW", "-f"), run=("-db", "-f"))
NGINX = Balancer("nginx", "nginx.conf", check=("-t", "-c"), run=("-g", "daemon off;", "-c"))


def _certificate(directory: Path) -> Path:
    path = directory / "certificate.pem"
    if not path.exists():
        made = run(
            *(program("openssl", "openssl"), "req", "-x509", "-newkey", "ec", "-noenc"),
            *("-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", "-", "-out", path.with_suffix(".crt")),
        )
        key = made[made.index("-----BEGIN PRIVATE") : made.index("-----END PRIVATE")]
        whole = f"{path.with_suffix('.crt').read_text()}{key}-----END PRIVATE KEY-----\n"
        path.write_text(whole)
    return path


def _listens(process: subprocess.Popen[bytes], port: int, out: Path) -> bool:
    assert process.poll() is None, out.read_text()
    try:
        httpx2.get(f"https://127.0.0.1:{port}/", verify=trusting())
    except httpx2.TransportError:
        return False
    return True


def trusting() -> ssl.SSLContext:
    """Return a TLS context that accepts any certificate."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def receivers(opened: Sandbox, **settings: str) -> list[Process]:
    """Start two receivers on ports of their own, at once, and wait until both are ready."""
    # 127.0.0.1 is both the client and a trusted proxy.
    ours = {"ALLOWED_NETWORKS": "127.0.0.1", "FORWARDED_ALLOW_IPS": "127.0.0.1", **settings}
    started = [opened.start("serve", PORT=str(free_port()), **ours) for _ in range(2)]
    for process in started:
        wait_until(partial(_is_ready, process.ready().port))
    return started


def _is_ready(port: int) -> bool:
    return httpx2.get(f"http://127.0.0.1:{port}/readyz").is_success


@asynccontextmanager
async def refusing(posts: list[bytes] | None = None) -> AsyncIterator[str]:
    """Run a receiver that is ready, answers each POST with 503, and keeps the heads in *posts*."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            head = await reader.readuntil(b"\r\n\r\n")
            if posts is not None and head.startswith(b"POST "):
                posts.append(head)
            status = b"200 OK" if head.startswith(b"GET /readyz ") else b"503 Service Unavailable"
            if found := re.search(rb"(?i)content-length: (\d+)", head):
                await reader.readexactly(int(found[1]))
            head = b"HTTP/1.1 %b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status
            writer.write(head)
            await writer.drain()

    async with await asyncio.start_server(answer, "127.0.0.1") as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@asynccontextmanager
async def secured(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Yield a raw connection over TLS."""
    port = int(url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting())
    try:
        yield reader, writer
    finally:
        writer.close()


BODIES = {
    "plain": event(session="vs_plain", id="evt_plain"),
    "UTF-8": event(session="vs_text", id="evt_text", metadata={"name": "Zoë Ωmega 🛂 \u2028"}),
    "spaced": b" \r\n" + event(session="vs_spaced", id="evt_spaced") + b"\r\n\r\n",
    "large": event(session="vs_large", id="evt_large", metadata={"a": "ö" * 100_000}),
}
SMUGGLED = b"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
AMBIGUOUS = {
    "both lengths": b"Content-Length: %d\r\nTransfer-Encoding: chunked" % (len(SMUGGLED) + 5),
    "both, turned": b"Transfer-Encoding: chunked\r\nContent-Length: %d" % (len(SMUGGLED) + 5),
    "two lengths": b"Content-Length: 5\r\nContent-Length: %d" % (len(SMUGGLED) + 5),
    "gzip, chunked": b"Transfer-Encoding: gzip, chunked",
    "chunked twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "hidden by a tab": b"Transfer-Encoding: \x0bchunked\r\nContent-Length: 5",
    "hidden by a space": b"Transfer-Encoding : chunked\r\nContent-Length: 5",
}


class Site(NamedTuple):
    """A running balancer with two receivers behind it."""

    balancer: Balancer
    ground: Sandbox
    pair: list[Process]
    url: str

    @asynccontextmanager
    async def in_front_of(self, name: str, addresses: Sequence[str]) -> AsyncIterator[str]:
        """Run the balancer once more, in front of other addresses; yield its URL."""
        directory = self.ground.directory / name
        directory.mkdir()
        running = self.balancer.running(directory, addresses)
        url = await asyncio.to_thread(running.__enter__)
        try:
            yield url
        finally:
            await asyncio.to_thread(running.__exit__, None, None, None)


@contextmanager
def site(balancer: Balancer, directory: Path) -> Iterator[Site]:
    """Run a balancer and two receivers."""
    program(balancer.name, balancer.name)
    with open_sandbox(directory) as ground:
        pair = receivers(ground)
        addresses = [f"127.0.0.1:{process.port}" for process in pair]
        with balancer.running(directory, addresses) as url:
            yield Site(balancer, ground, pair, url)


class Contract:
    """What holds behind each balancer; its fixture `site` runs it in front of two receivers."""

    def test_the_shipped_file_is_valid(self, site: Site) -> None:
        """The balancer accepts its file, without a warning."""
        directory = site.ground.directory / "checked"
        directory.mkdir()
        configuration = site.balancer.adapted(directory, ["127.0.0.1:1"] * 2, free_port())
        path = program(site.balancer.name, site.balancer.name)
        said = run(path, *site.balancer.check, configuration)
        assert "warn" not in said.lower()

    @pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
    def test_bodies_arrive_as_they_were_signed(self, site: Site, body: bytes) -> None:
        """Plain or chunked, small or large, a body is what was signed."""
        chunks = (body[start : start + 1000] for start in range(0, len(body), 1000))
        with httpx2.Client(verify=trusting()) as client:
            plain = client.post(site.url + WEBHOOK, content=body, headers=signed(body))
            again = client.post(site.url + WEBHOOK, content=chunks, headers=signed(body))
        assert plain.json() == {"outcome": "admitted"}
        assert again.json() == {"outcome": "duplicate"}

    def test_clients_cannot_choose_their_address_or_request_id(self, site: Site) -> None:
        """The balancer replaces X-Forwarded-For and X-Request-Id."""
        body = event(session="vs_who", id="evt_who")
        claimed = {"X-Forwarded-For": "6.6.6.6", "X-Request-Id": "deadbeefdeadbeef"}
        with httpx2.Client(verify=trusting()) as client:
            answer = client.post(site.url + WEBHOOK, content=body, headers=signed(body) | claimed)
        assert answer.json() == {"outcome": "admitted"}
        [logged] = wait_until(
            lambda: [
                line
                for process in site.pair
                for line in process.lines("event.admitted")
                if line["event_id"] == "evt_who"
            ]
        )
        assert len(logged["request_id"].replace("-", "")) == 32

    def test_only_webhooks_get_through(self, site: Site) -> None:
        """Probes, metrics and the page are not public, and large bodies are refused."""
        page = ("/", "/login", "/sessions", "/dead-letters", "/handlers", "/endpoints")
        with httpx2.Client(verify=trusting()) as client:
            for path in (*page, "/readyz", "/livez", "/metrics", "/webhooks/other"):
                assert client.get(site.url + path).status_code == 404
            assert client.get(site.url + WEBHOOK).status_code == 405
            large = b"x" * 262_145
            assert client.post(site.url + WEBHOOK, content=large).status_code == 413

    async def test_a_client_without_a_host_header_is_answered(self, site: Site) -> None:
        """HTTP/1.0 needs no Host; the receiver gets one from the balancer."""
        body = event(session="vs_hostless", id="evt_hostless")
        lines = {**signed(body), "Content-Length": str(len(body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        async with secured(site.url) as (reader, writer):
            writer.write(f"POST {WEBHOOK} HTTP/1.0\r\n{head}\r\n".encode() + body)
            said = await rest(reader)
        assert said.endswith(b'{"outcome":"admitted"}')

    def test_the_selftest_finds_nothing_broken(self, site: Site) -> None:
        """Through the balancer, every promise is kept."""
        trusted = str(site.ground.directory / "certificate.crt")
        worker = site.ground.start("work").ready()
        command = site.ground.run(
            *("selftest", "--to", site.url + WEBHOOK, "--json"), SSL_CERT_FILE=trusted
        )
        rows = orjson.loads(command.out)
        assert not [row for row in rows if row["kept"] is False], rows
        assert (command.wait(), worker.stop()) == (0, 0)
        assert len(rows) > 20

    @pytest.mark.parametrize("framing", AMBIGUOUS.values(), ids=AMBIGUOUS)
    async def test_nothing_is_smuggled(self, site: Site, framing: bytes) -> None:
        """Ambiguous framing is read as one request at most, and refused."""
        head = b"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\n" + framing
        seen = [len(process.lines("event.rejected")) for process in site.pair]
        async with secured(site.url) as (reader, writer):
            writer.write(head + b"\r\n\r\n0\r\n\r\n" + SMUGGLED)
            said = await rest(reader)
        answers = re.findall(rb"HTTP/1\.1 (\d+)", said)
        # A balancer may choose one reading, normalize the request, and close.
        assert len(answers) <= 1
        assert {*answers} <= {b"400", b"422", b"501"}
        now = [len(process.lines("event.rejected")) for process in site.pair]
        assert sum(now) - sum(seen) <= 1

    async def test_a_503_is_retried_once(self, site: Site) -> None:
        """If all receivers answer 503 an event is counted twice: the alert takes that in."""
        posts: list[bytes] = []
        async with (
            refusing(posts) as one,
            refusing(posts) as other,
            site.in_front_of("refusing", [one, other]) as url,
            httpx2.AsyncClient(verify=trusting()) as client,
        ):
            body = event(session="vs_refused", id="evt_refused")
            answer = await client.post(url + WEBHOOK, content=body, headers=signed(body))
        assert answer.status_code in {502, 503}
        assert len(posts) == 2

    async def test_a_503_is_retried_on_the_other_receiver(self, site: Site) -> None:
        """While one receiver answers 503, every event is answered with 200."""
        async with (
            refusing() as other,
            site.in_front_of("retrying", [other, f"127.0.0.1:{site.pair[0].port}"]) as url,
            httpx2.AsyncClient(verify=trusting()) as client,
        ):
            for number in range(20):
                body = event(session=f"vs_again_{number}", id=f"evt_again_{number}")
                answer = await client.post(url + WEBHOOK, content=body, headers=signed(body))
                assert answer.json() == {"outcome": "admitted"}

    async def test_a_killed_receiver_costs_no_response(self, site: Site) -> None:
        """While one of two receivers is killed, every event is answered with 200."""
        answered: list[int] = []

        async def post(client: httpx2.AsyncClient, name: str) -> None:
            for number in range(60):
                body = event(session=f"vs_{name}_{number}", id=f"evt_{name}_{number}")
                answer = await client.post(site.url + WEBHOOK, content=body, headers=signed(body))
                answered.append(answer.status_code)
                await asyncio.sleep(0.01)

        async with httpx2.AsyncClient(verify=trusting()) as client:
            posting = [asyncio.create_task(post(client, f"killed_{name}")) for name in range(8)]
            await until(lambda: len(answered) > 100)
            site.pair[1].popen.kill()
            await asyncio.gather(*posting)
        assert set(answered) == {200}
        assert len(answered) == 480
