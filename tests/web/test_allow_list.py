"""Laws of where a request comes from: an address is believed as far as the one who wrote it is."""

from __future__ import annotations

import pytest

from service.config import parse_network
from service.web.allow_list import AllowList, client_address

PROXIES = [parse_network("10.0.0.0/8"), parse_network("fd00::/8"), parse_network("127.0.0.1")]
STRIPE = [
    parse_network("3.18.12.63"),
    parse_network("54.187.174.0/24"),
    parse_network("2001:db8::/32"),
]

TOLD: dict[str, tuple[str, list[bytes], str | None]] = {
    "nobody between": ("3.18.12.63", [], "3.18.12.63"),
    "a stranger's word": ("6.6.6.6", [b"3.18.12.63"], "6.6.6.6"),
    "a proxy's word": ("10.0.0.1", [b"3.18.12.63"], "3.18.12.63"),
    "the rightmost that is no proxy": ("10.0.0.1", [b"3.18.12.63, 6.6.6.6, 10.1.1.1"], "6.6.6.6"),
    "in several lines": ("10.0.0.1", [b"3.18.12.63", b"6.6.6.6,10.1.1.1"], "6.6.6.6"),
    "proxies only": ("10.0.0.1", [b"10.2.2.2, 10.1.1.1"], "10.2.2.2"),
    "a proxy that says nothing": ("10.0.0.1", [], "10.0.0.1"),
    "a proxy that says an empty word": ("10.0.0.1", [b""], "10.0.0.1"),
    "a word that is no address": ("10.0.0.1", [b"3.18.12.63, unknown"], None),
    "an empty word at the end": ("10.0.0.1", [b"3.18.12.63,"], None),
    "bytes that are no text": ("10.0.0.1", [b"\xff\xfe"], None),
    "with ports": ("10.0.0.1", [b"6.6.6.6, 3.18.12.63:4711, [fd00::1]:80"], "3.18.12.63"),
    "IPv6": ("fd00::1", [b"2001:db8::7"], "2001:db8::7"),
    "IPv4 in IPv6's clothes": ("::ffff:10.0.0.1", [b"::ffff:3.18.12.63"], "3.18.12.63"),
    "no peer": ("", [b"3.18.12.63"], None),
    "a socket's path": ("/run/web.sock", [b"3.18.12.63"], None),
    "more than anybody passes": ("10.0.0.1", [b"3.18.12.63" + b",10.1.1.1" * 999], "10.1.1.1"),
}  # fmt: skip


@pytest.mark.parametrize(("peer", "forwarded", "expected"), TOLD.values(), ids=TOLD)
def test_whose_word_counts(peer: str, forwarded: list[bytes], expected: str | None) -> None:
    """X-Forwarded-For is read from the right, as long as proxies of ours wrote it."""
    address = client_address(peer, forwarded, PROXIES)
    assert (address and str(address)) == expected


def test_nobody_is_believed_unless_named() -> None:
    """Without proxies the other end of the connection is where a request comes from."""
    assert str(client_address("127.0.0.1", [b"3.18.12.63"], [])) == "127.0.0.1"


ADMITTED = {
    "3.18.12.63": True,
    "3.18.12.64": False,
    "54.187.174.255": True,
    "54.187.175.0": False,
    "2001:db8:ffff::1": True,
    "2001:db9::1": False,
    "::ffff:3.18.12.63": True,
    "10.0.0.1": False,
    "": False,
    "3.18.12.63 ": False,
}


@pytest.mark.parametrize("peer", ADMITTED)
def test_who_may_come_in(peer: str) -> None:
    """In may come who is in one of the networks, and nobody whose address is not known."""
    assert AllowList(STRIPE, proxies=PROXIES).admits(peer, []) is ADMITTED[peer]


def test_networks_are_exchanged_whole() -> None:
    """After an exchange only the new networks count."""
    door = AllowList(STRIPE, proxies=[])
    door.replace([parse_network("192.0.2.0/24")])
    assert door.admits("192.0.2.7", [])
    assert not door.admits("3.18.12.63", [])


@pytest.mark.parametrize(
    "text", ["", "3.18.12", "3.18.12.63/33", "54.187.174.1/24", "a", "::1%lo/8"]
)
def test_what_is_no_network_is_refused(text: str) -> None:
    """Anything but an address or a network without further bits is an error, not a guess."""
    with pytest.raises(ValueError, match=r"."):
        parse_network(text)
