"""Where a request comes from, and whether it may: addresses and networks. Pure.

Nothing else in the service decides by an address: whoever has a signing secret is who it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TypeAlias

from ..config import Network

Address: TypeAlias = IPv4Address | IPv6Address

MAX_FORWARDED = 64


class AllowList:
    """The networks that may come in, which may be exchanged while requests do.

    Args:
        networks: Who may come in.
        proxies: Whose word counts about where a request came from.
    """

    def __init__(self, networks: Sequence[Network], *, proxies: Sequence[Network]) -> None:
        self._networks = networks
        self._proxies = proxies

    def exchange(self, networks: Sequence[Network]) -> None:
        """Let in *networks* from the next request on, and none of those before."""
        self._networks = networks

    def admits(self, peer: str, forwarded_for: Iterable[bytes]) -> bool:
        """Say whether a request may come in.

        Args:
            peer: The address of the other end of the connection.
            forwarded_for: The values of X-Forwarded-For, in order.
        """
        address = client_address(peer, forwarded_for, self._proxies)
        return address is not None and _is_in(address, self._networks)


def client_address(
    peer: str, forwarded_for: Iterable[bytes], proxies: Sequence[Network]
) -> Address | None:
    """Return the last address on the way to us that is no proxy of ours; None where none is told.

    Each proxy appends whom it heard: from the right, addresses are believed as far as the one who
    wrote them is.
    """
    address = _address(peer.encode())
    told = b",".join(forwarded_for).split(b",")[-MAX_FORWARDED:]
    while told and address is not None and _is_in(address, proxies):
        last = told.pop().strip()
        if not last and not told:
            break
        address = _address(last)
    return address


def _is_in(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


def _address(text: bytes) -> Address | None:
    """Read an address, with a port or without; one of IPv4 in IPv6's clothes is one of IPv4."""
    try:
        address = ip_address(_without_port(text.decode("ascii")))
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _without_port(text: str) -> str:
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text
