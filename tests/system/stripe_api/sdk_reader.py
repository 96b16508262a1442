"""Reads a stand-in with the `stripe` package, and prints what it found, as JSON.

Run by `test_official_sdk` in an environment that has the package; it imports nothing of ours.
Its input is JSON on standard input: the address, keys, ids, and pushes with their signatures.
"""

from __future__ import annotations

import importlib
import json
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

stripe: Any = importlib.import_module("stripe")

Found = dict[str, Any]


def problems(found: Any, kind: type, path: str) -> Iterator[str]:
    """Yield where an object differs from what a class of the package declares."""
    declared = _declared(kind)
    values = found.to_dict(recursive=False)
    for name in values.keys() - declared.keys():
        if name not in _UNDECLARED:
            yield f"{path}.{name} is not declared"
    for name, hint in declared.items():
        if name in values:
            yield from _unfit(getattr(found, name), hint, f"{path}.{name}")
        elif not _is_optional(hint):
            yield f"{path}.{name} is missing"


# Declared by other classes of the package: `data` by events about objects of /v2.
_UNDECLARED = {"data"}


def _declared(kind: type) -> Found:
    hints: Found = {}
    for one in reversed(kind.__mro__):
        if issubclass(one, stripe.StripeObject) and one.__module__ != "stripe._stripe_object":
            hints |= {
                name: hint
                for name, hint in vars(one).get("__annotations__", {}).items()
                if not name.startswith("_") and typing.get_origin(hint) is not typing.ClassVar
            }
    return hints


def _is_optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _unfit(value: Any, hint: Any, path: str) -> Iterator[str]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union:
        if not any(not list(_unfit(value, one, path)) for one in inner):
            yield f"{path} is {value!r}"
    elif origin is typing.Literal:
        if value not in inner:
            yield f"{path} is {value!r}"
    elif origin is list:
        for one in value if isinstance(value, list) else [f"{path} is no list"]:
            yield from _unfit(one, inner[0], f"{path}[]")
    elif isinstance(hint, type) and issubclass(hint, stripe.StripeObject) and not origin:
        # The package declares `related_object` with a class that it does not use.
        if isinstance(value, hint) or type(value) is stripe.StripeObject:
            yield from problems(value, hint, path)
        else:
            yield f"{path} is a {type(value).__name__}"
    elif isinstance(hint, type) and not origin and not isinstance(value, hint):
        yield f"{path} is a {type(value).__name__}"


class Reader:
    """Reads everything, and collects the problems of all objects that it has read."""

    def __init__(self, asked: Found) -> None:
        self.asked = asked
        self.problems: list[str] = []
        self.client = self.client_with(asked["key"])

    def client_with(self, key: str) -> Any:
        """Return a client with a key."""
        bases = {"api": self.asked["address"]}
        return stripe.StripeClient(key, base_addresses=bases, max_network_retries=0)

    def checked(self, found: Any, kind: Any = None) -> Any:
        """Return an object after comparing it with its class."""
        if kind is not None:
            assert isinstance(found, kind), (type(found), kind)
        self.problems += problems(found, type(found), type(found).__name__)
        return found

    def snapshots(self) -> Found:
        """Read events under /v1."""
        events = self.client.v1.events
        params = {"limit": 2, "types": self.asked["types"], "created": {"gte": self.asked["since"]}}
        every = [self.checked(one, stripe.Event) for one in events.list(params).auto_paging_iter()]
        sessions = [
            self.checked(one.data.object, stripe.identity.VerificationSession) for one in every
        ]
        oldest = every[-1].id
        return {
            "listed": [one.id for one in every],
            "statuses": [one.status for one in sessions],
            "retrieved": self.checked(events.retrieve(oldest), stripe.Event).id,
            "connected": [one.id for one in events.list(options=self.asked["connected"])],
        }

    def sessions(self) -> Found:
        """Read a session with its report."""
        sessions = self.client.v1.identity.verification_sessions
        one = self.checked(sessions.retrieve(self.asked["session"]))
        report = self.checked(one.last_verification_report, stripe.identity.VerificationReport)
        return {"outputs": sorted(one.verified_outputs.to_dict()), "report": report.id}

    def endpoints(self) -> Found:
        """List endpoints and destinations."""
        core = self.client.v2.core.event_destinations
        destinations = [
            self.checked(one) for one in core.list({"include": ["webhook_endpoint.url"]})
        ]
        endpoints = self.client.v1.webhook_endpoints.list()
        return {
            "endpoints": [self.checked(one).id for one in endpoints],
            "destinations": [[one.id, one.status] for one in destinations],
            "urls": [one.webhook_endpoint and one.webhook_endpoint.url for one in destinations],
        }

    def pushes(self) -> Found:
        """Verify pushes, read thin ones, and fetch what they are about."""
        found: Found = {"snapshot": [], "thin": []}
        for push in self.asked["pushes"]:
            sent = push["body"], push["signature"], push["secret"]
            if json.loads(push["body"])["object"] == "event":
                found["snapshot"].append(self.checked(self.client.construct_event(*sent)).id)
            else:
                notification = self.client.parse_event_notification(*sent)
                fetched = self.checked(notification.fetch_event())
                session = self.checked(
                    fetched.fetch_related_object(), stripe.identity.VerificationSession
                )
                found["thin"].append(
                    [type(notification).__name__, fetched.snapshot_event, session.id]
                )
        return found

    def errors(self) -> Found:
        """Return which error each wrong request raises."""
        client = self.client
        narrow = self.client_with(self.asked["narrow_key"])
        events, thin = client.v1.events, client.v2.core.events
        asked: dict[str, Callable[[], Any]] = {
            "wrong key": self.client_with("sk_test_wrong").v1.events.list,
            "forbidden": narrow.v1.events.list,
            "forbidden v2": narrow.v2.core.event_destinations.list,
            "revoked account": lambda: events.list(options=self.asked["deauthorized"]),
            "missing": lambda: events.retrieve("evt_none"),
            "missing v2": lambda: thin.retrieve("evt_none"),
            "unknown parameter": lambda: events.list({"colour": "red"}),
            "429": lambda: events.list({"limit": 91}),
            "429 v2": lambda: client.v2.core.event_destinations.list({"limit": 91}),
            "500": lambda: events.list({"limit": 92}),
            "cut": lambda: events.list({"limit": 93}),
        }
        return {name: _raised(call) for name, call in asked.items()}


def _raised(call: Callable[[], Any]) -> list[Any]:
    try:
        call()
    except stripe.StripeError as error:
        code = error.error.code if error.error and "code" in error.error else None
        return [type(error).__name__, error.http_status, code]
    return ["nothing"]


def main() -> None:
    """Read, and print."""
    reader = Reader(json.load(sys.stdin))
    parts = ("snapshots", "pushes", "endpoints", "sessions", "errors")
    found = {name: getattr(reader, name)() for name in parts}
    json.dump({**found, "problems": sorted(set(reader.problems))}, sys.stdout)


main()
