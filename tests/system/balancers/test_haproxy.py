"""HAProxy, with the shipped file, in front of two real receivers."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.servers import free_port
from tests.support.waiting import DEADLINE_S
from tests.system.balancers import balancer
from tests.system.balancers.balancer import Contract, Site, secured
from tests.system.balancers.haproxy import HAProxy


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Run it in front of two receivers."""
    with balancer.site(HAProxy(), tmp_path_factory.mktemp("haproxy")) as running:
        yield running


class Numbered(HAProxy):
    """HAProxy whose denying rules answer with their number."""

    def adapted(self, directory: Path, addresses: Sequence[str], port: int) -> Path:
        """Number the rules."""
        configuration = super().adapted(directory, addresses, port)
        numbers = itertools.count()
        configuration.write_text(
            re.sub(
                r"http-request deny deny_status (\d+)",
                lambda found: f"http-request return status {found[1]} hdr Rule {next(numbers)}",
                configuration.read_text(),
            )
        )
        return configuration


LARGE = b"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\nContent-Length: 262145\r\n\r\n"
# One request for each rule, in the order of the file.
DENIED = {
    b"404": b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
    b"413": LARGE + b"x" * 262_145,
}


class TestHAProxy(Contract):
    """The contract of balancers, and HAProxy's rules."""

    async def test_each_denying_rule_is_needed(self, site: Site) -> None:
        """For each rule there is a request that only this rule denies."""
        rules = len(re.findall("http-request deny", HAProxy.shipped.read_text()))
        numbered = site._replace(balancer=Numbered())
        async with numbered.in_front_of("numbered", [f"127.0.0.1:{free_port()}"] * 2) as url:
            found = [await denied(url, request) for request in DENIED.values()]
        assert found == [(status, number) for number, status in enumerate(DENIED)]
        assert len(found) == rules


async def denied(url: str, request: bytes) -> tuple[bytes, int]:
    """Return the status that a request is denied with, and the number of the rule."""
    async with secured(url) as (reader, writer):
        writer.write(request)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
    [rule] = re.findall(rb"(?i)\r\nrule: (\d+)", head)
    return head.split(b" ")[1], int(rule)
