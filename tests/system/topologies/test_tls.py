"""TLS to Redis: both sides verify each other, or no command is sent."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest

from tests.support.harness import event, signed
from tests.support.processes import Process, Processes
from tests.support.servers import binary, free_port, server

pytestmark = pytest.mark.timeout(120)


@dataclass(frozen=True, kw_only=True)
class Certificates:
    """A directory of certificates, each `<name>.crt` with its `<name>.key`.

    Those of `ca` and `unknown` are authorities of their own; `server` and `client` are of the
    former, and so are `elsewhere`, which is for another host, and `lax`, which is for ours but does
    not name the key of its authority.
    """

    directory: Path

    def __getitem__(self, name: str) -> str:
        return str(self.directory / name)


def _openssl(*words: str) -> None:
    subprocess.run(
        [shutil.which("openssl") or "", *words], check=True, capture_output=True, timeout=60
    )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Make the certificates."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on this machine")
    made = Certificates(directory=tmp_path_factory.mktemp("certificates"))
    key = ("-newkey", "rsa:2048", "-nodes", "-sha256")
    for name in ("ca", "unknown"):
        # Python 3.13 requires a key usage in the certificate of an authority.
        _openssl("req", "-x509", *key, "-days", "2", "-subj", f"/CN={name}",
                 "-addext", "keyUsage=critical,keyCertSign,cRLSign",
                 "-keyout", made[f"{name}.key"], "-out", made[f"{name}.crt"])  # fmt: skip
    names = {"server": "IP:127.0.0.1", "elsewhere": "DNS:elsewhere.example", "client": "DNS:us",
             "lax": "IP:127.0.0.1"}  # fmt: skip
    for name, host in names.items():
        extensions = made.directory / f"{name}.ext"
        named = "none" if name == "lax" else "keyid"
        extensions.write_text(f"subjectAltName={host}\nauthorityKeyIdentifier={named}\n")
        _openssl("req", *key, "-subj", f"/CN={name}",
                 "-keyout", made[f"{name}.key"], "-out", made[f"{name}.csr"])  # fmt: skip
        _openssl("x509", "-req", "-in", made[f"{name}.csr"], "-CA", made["ca.crt"],
                 "-CAkey", made["ca.key"], "-CAcreateserial", "-days", "2", "-sha256",
                 "-extfile", str(extensions), "-out", made[f"{name}.crt"])  # fmt: skip
    return made


@pytest.fixture(scope="module")
def program() -> Path:
    """Return a server that speaks TLS: the one under test, or the system's."""
    found = shutil.which("redis-server")
    for candidate in (binary(), Path(found or "/nowhere")):
        asked = [str(candidate), "--port", "0", "--tls-port", str(free_port())]
        with contextlib.suppress(OSError):
            said = subprocess.run(asked, capture_output=True, timeout=60, check=False, cwd="/")
            if b"tls-cert-file" in said.stdout + said.stderr:
                return candidate
    pytest.skip("no server here speaks TLS: neither the one under test nor a redis-server on PATH")


class TlsServer(NamedTuple):
    """A server that speaks TLS, and where commands are run."""

    port: int
    certificates: Certificates
    processes: Processes

    def url(self, ca: str, own: str = "", *, form: str = "rediss://{}/0") -> str:
        """Return the address for a client that trusts *ca* and shows its *own* certificate."""
        url = f"{form.format(f'127.0.0.1:{self.port}')}?ssl_ca_certs={self.certificates[ca]}"
        if own:
            crt, key = self.certificates[f"{own}.crt"], self.certificates[f"{own}.key"]
            url += f"&ssl_certfile={crt}&ssl_keyfile={key}"
        return url

    def check(self, url: str) -> Process:
        """Run `check`."""
        return self.processes.run("check", REDIS_URL=url, DURABILITY="none")


Start = Callable[..., contextlib.AbstractContextManager[TlsServer]]


@contextlib.contextmanager
def _running(
    program: Path, certificates: Certificates, directory: Path, name: str, *, ask: str = "no"
) -> Iterator[TlsServer]:
    """Run a server with the certificate of this name, which may ask clients for one."""
    port = free_port()
    options = ("--tls-port", str(port), "--tls-cert-file", certificates[f"{name}.crt"],
               "--tls-key-file", certificates[f"{name}.key"],
               "--tls-ca-cert-file", certificates["ca.crt"],
               "--tls-auth-clients", ask)  # fmt: skip
    with (
        server(directory / "redis", *options, program=program),
        contextlib.closing(Processes("", directory)) as processes,
    ):
        yield TlsServer(port, certificates, processes)


@pytest.fixture
def tls_server(program: Path, certificates: Certificates, tmp_path: Path) -> Start:
    """Return what runs a server: the arguments are those of `_running`."""
    return partial(_running, program, certificates, tmp_path)


def assert_untrusted(process: Process, *, by_server: bool = False) -> None:
    """Assert one line with the reason, and exit code 3.

    A client that is rejected *by the server* may lose the server's alert with the connection.
    """
    assert process.wait() == 3
    [line] = process.err.decode().splitlines()
    words = ["redis_untrusted", "redis_unreachable"] if by_server else ["redis_untrusted"]
    assert any(f"({word})" in line for word in words)
    assert line.startswith("error: Redis at 127.0.0.1:")


def test_a_trusted_server_is_used(tls_server: Start) -> None:
    """A receiver that trusts the authority of Redis's certificate admits events over TLS."""
    with tls_server("server") as redis_server:
        receiver = redis_server.processes.start(
            "serve", REDIS_URL=redis_server.url("ca.crt")
        ).ready()
        body = event()
        answer = httpx2.post(receiver.url, content=body, headers=signed(body))
        assert answer.json() == {"outcome": "admitted"}
        assert redis_server.check(redis_server.url("ca.crt")).wait() == 0
        for form in ("rediss://{}/0", "rediss+sentinel://{}/main/0", "rediss+cluster://{}"):
            assert_untrusted(redis_server.check(redis_server.url("unknown.crt", form=form)))


def test_another_host_s_certificate_is_refused(tls_server: Start) -> None:
    """A genuine certificate of another host is not accepted."""
    with tls_server("elsewhere") as redis_server:
        assert_untrusted(redis_server.check(redis_server.url("ca.crt")))


def test_redis_may_ask_for_a_certificate(tls_server: Start) -> None:
    """Where Redis asks for certificates, only one of its own authority is accepted."""
    with tls_server("server", ask="yes") as redis_server:
        assert redis_server.check(redis_server.url("ca.crt", "client")).wait() == 0
        assert_untrusted(redis_server.check(redis_server.url("ca.crt")), by_server=True)
        assert_untrusted(redis_server.check(redis_server.url("ca.crt", "unknown")), by_server=True)


def test_a_certificate_must_name_the_key_of_its_authority(tls_server: Start) -> None:
    """Since Python 3.13 an authority without key usage is not accepted, as the README says."""
    with tls_server("lax") as redis_server:
        checked = redis_server.check(redis_server.url("ca.crt"))
        if sys.version_info >= (3, 13):
            assert_untrusted(checked)
        else:
            assert checked.wait() == 0


def test_verification_can_be_turned_off(tls_server: Start) -> None:
    """With `ssl_cert_reqs=none` Redis is not verified; the connection is encrypted."""
    with tls_server("elsewhere") as redis_server:
        url = f"rediss://127.0.0.1:{redis_server.port}/0?ssl_cert_reqs=none"
        assert redis_server.check(url).wait() == 0


def test_a_file_that_is_not_there_is_a_wrong_setting(tmp_path: Path) -> None:
    """A URL that names a missing file is exit code 2, and the error names the option."""
    with contextlib.closing(Processes("", tmp_path)) as processes:
        url = f"rediss://127.0.0.1:1/0?ssl_ca_certs={tmp_path}/none.crt"
        process = processes.run("check", REDIS_URL=url)
    assert process.wait() == 2
    assert process.err.decode().splitlines() == ["error: REDIS_URL: ssl_ca_certs names no file"]
