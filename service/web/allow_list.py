"""The IP allow list: which client a request comes from, and whether its network is allowed. Pure.

Nothing else in the service decides by an address: authenticity comes from the signature alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TypeAlias

from ..parsers import Network

Address: TypeAlias = IPv4Address | IPv6Address

MAX_FORWARDED = 64


class AllowList:
    """The networks that requests may come from; they can be replaced while requests are served.

    Args:
        networks: The allowed networks.
        proxies: The proxies whose X-Forwarded-For is trusted.
    """

    def __init__(self, networks: Sequence[Network], *, proxies: Sequence[Network]) -> None:
        self._networks = networks
        self._proxies = proxies

    def replace(self, networks: Sequence[Network]) -> None:
        """Allow *networks* from the next request on, instead of those before."""
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
    """Return the client's address; None if a trusted proxy forwards something else.

    Each proxy appends the address it was called from. So walk X-Forwarded-For from the right and
    skip trusted proxies: the first other address is the client.
    """
    address = _address(peer.encode())
    forwarded = b",".join(forwarded_for).split(b",")[-MAX_FORWARDED:]
    while forwarded and address is not None and _is_in(address, proxies):
        last = forwarded.pop().strip()
        if not last and not forwarded:
            break
        address = _address(last)
    return address


def _is_in(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


def _address(text: bytes) -> Address | None:
    """Parse an address, with or without a port; an IPv4-mapped IPv6 address is its IPv4 one."""
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
