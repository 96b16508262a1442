"""The IP allow list: X-Forwarded-For counts only as far as trusted proxies wrote it."""

from __future__ import annotations

import pytest

from service.parsers import parse_network
from service.web.allow_list import AllowList, client_address

PROXIES = [parse_network("10.0.0.0/8"), parse_network("fd00::/8"), parse_network("127.0.0.1")]
STRIPE = [
    parse_network("3.18.12.63"),
    parse_network("54.187.174.0/24"),
    parse_network("2001:db8::/32"),
    parse_network("::ffff:54.187.176.0/120"),
]

FORWARDED: dict[str, tuple[str, list[bytes], str | None]] = {
    "no proxy": ("3.18.12.63", [], "3.18.12.63"),
    "an untrusted proxy": ("6.6.6.6", [b"3.18.12.63"], "6.6.6.6"),
    "a trusted proxy": ("10.0.0.1", [b"3.18.12.63"], "3.18.12.63"),
    "the rightmost untrusted": ("10.0.0.1", [b"3.18.12.63, 6.6.6.6, 10.1.1.1"], "6.6.6.6"),
    "in several lines": ("10.0.0.1", [b"3.18.12.63", b"6.6.6.6,10.1.1.1"], "6.6.6.6"),
    "proxies only": ("10.0.0.1", [b"10.2.2.2, 10.1.1.1"], "10.2.2.2"),
    "a proxy without the header": ("10.0.0.1", [], "10.0.0.1"),
    "a proxy with an empty header": ("10.0.0.1", [b""], "10.0.0.1"),
    "not an address": ("10.0.0.1", [b"3.18.12.63, unknown"], None),
    "an empty item at the end": ("10.0.0.1", [b"3.18.12.63,"], None),
    "not ASCII": ("10.0.0.1", [b"\xff\xfe"], None),
    "with ports": ("10.0.0.1", [b"6.6.6.6, 3.18.12.63:4711, [fd00::1]:80"], "3.18.12.63"),
    "IPv6": ("fd00::1", [b"2001:db8::7"], "2001:db8::7"),
    "IPv4-mapped IPv6": ("::ffff:10.0.0.1", [b"::ffff:3.18.12.63"], "3.18.12.63"),
    "no peer": ("", [b"3.18.12.63"], None),
    "a socket's path": ("/run/web.sock", [b"3.18.12.63"], None),
    "too many proxies": ("10.0.0.1", [b"3.18.12.63" + b",10.1.1.1" * 999], "10.1.1.1"),
}  # fmt: skip


@pytest.mark.parametrize(("peer", "forwarded", "expected"), FORWARDED.values(), ids=FORWARDED)
def test_the_client_is_the_first_untrusted_address(
    peer: str, forwarded: list[bytes], expected: str | None
) -> None:
    """X-Forwarded-For is read from the right, as long as trusted proxies wrote it."""
    address = client_address(peer, forwarded, PROXIES)
    assert (address and str(address)) == expected


def test_without_proxies_the_peer_is_the_client() -> None:
    """X-Forwarded-For of an unknown proxy is ignored."""
    assert str(client_address("127.0.0.1", [b"3.18.12.63"], [])) == "127.0.0.1"


ADMITTED = {
    "3.18.12.63": True,
    "3.18.12.64": False,
    "54.187.174.255": True,
    "54.187.175.0": False,
    "54.187.176.255": True,
    "54.187.177.0": False,
    "2001:db8:ffff::1": True,
    "2001:db9::1": False,
    "::ffff:3.18.12.63": True,
    "10.0.0.1": False,
    "": False,
    "3.18.12.63 ": False,
}


@pytest.mark.parametrize("peer", ADMITTED)
def test_allowed_networks_are_admitted(peer: str) -> None:
    """An address is admitted if it is in one of the networks; no address is not."""
    assert AllowList(STRIPE, proxies=PROXIES).admits(peer, []) is ADMITTED[peer]


def test_networks_are_replaced_as_a_whole() -> None:
    """After a replacement only the new networks count."""
    allow_list = AllowList(STRIPE, proxies=[])
    allow_list.replace([parse_network("192.0.2.0/24")])
    assert allow_list.admits("192.0.2.7", [])
    assert not allow_list.admits("3.18.12.63", [])


@pytest.mark.parametrize(
    "text", ["", "3.18.12", "3.18.12.63/33", "54.187.174.1/24", "a", "::1%lo/8"]
)
def test_an_invalid_network_is_rejected(text: str) -> None:
    """Anything but an address, or a network without host bits, is an error."""
    with pytest.raises(ValueError, match=r"."):
        parse_network(text)
