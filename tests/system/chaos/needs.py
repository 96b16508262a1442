"""What a fault needs of the deployment, and how the needs of several faults combine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce

from tests.support.preloads import Clock, SlowDisk

DEFAULT_DURABILITY, DEFAULT_FSYNC = "fsync", "always"


class ConflictError(Exception):
    """Two faults need different deployments."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a deployment must be.

    Attributes:
        proxy: Whether processes reach Redis through a proxy.
        replicas: How many replicas there are.
        durability: The setting DURABILITY, if it matters.
        appendfsync: Redis's setting of that name, if it matters.
        slow_disk: Whether Redis's disk can be made slow.
        clock: Whether Redis's clock can be stepped.
        stripe_api: Whether Stripe's API can be asked.
        settings: Further settings of the service.
    """

    proxy: bool = False
    replicas: int = 0
    durability: str = ""
    appendfsync: str = ""
    slow_disk: bool = False
    clock: bool = False
    stripe_api: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> str:
        """Why this machine cannot provide it; empty if it can."""
        slow_disk = SlowDisk.missing() if self.slow_disk else ""
        clock = Clock.missing() if self.clock else ""
        return slow_disk or clock


def combined(needs: Iterable[Needs]) -> Needs:
    """Return the needs that satisfy all *needs*.

    Raises:
        ConflictError: There are none.
    """
    return reduce(_both, needs, Needs())


def _both(one: Needs, other: Needs) -> Needs:
    return Needs(
        proxy=one.proxy or other.proxy,
        replicas=max(one.replicas, other.replicas),
        durability=_agreed("DURABILITY", one.durability, other.durability),
        appendfsync=_agreed("appendfsync", one.appendfsync, other.appendfsync),
        slow_disk=one.slow_disk or other.slow_disk,
        clock=one.clock or other.clock,
        stripe_api=one.stripe_api or other.stripe_api,
        settings={
            name: _agreed(name, one.settings.get(name, ""), other.settings.get(name, ""))
            for name in {**one.settings, **other.settings}
        },
    )


def _agreed(name: str, one: str, other: str) -> str:
    if one and other and one != other:
        raise ConflictError(f"{name}={one} and {name}={other}")
    return one or other
