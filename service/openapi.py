"""What the HTTP side looks like, for machines: OpenAPI 3.1, from the types and the closed lists.

Pure, and no part of the service's work: `python -m tests.generate` writes the result to `deploy`.
https://spec.openapis.org/oas/v3.1.1.html
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

import msgspec

from . import __version__
from .config import WEBHOOK_PATH
from .errors import RETRY_AFTER_S, RejectionReason
from .inbox.admission import Outcome
from .secret import Secret
from .storage.health import REASONS
from .stripe.events import EVENT_TYPE_PREFIX, Event
from .telemetry import metrics

_COMPONENT = "#/components/schemas/{name}"
_WRAPPED = "_Wrapped"
_HIDDEN = {"writeOnly": True}
_INT64 = {"format": "int64", "minimum": -(2**63), "maximum": 2**63 - 1}
# Refusals that are answered with a status of their own; every other one is a 400.
_OWN_STATUS = {
    RejectionReason.SOURCE_NOT_ALLOWED: "403",
    RejectionReason.ENDPOINT_UNKNOWN: "404",
    RejectionReason.TRAILING_SLASH: "404",
    RejectionReason.BODY_TOO_LARGE: "413",
    RejectionReason.HEADERS_TOO_LARGE: "431",
}
_OURS = f"^{re.escape(EVENT_TYPE_PREFIX)}"

_OUTCOMES = {
    Outcome.ADMITTED: "New, and moves the session on.",
    Outcome.DUPLICATE: "The same event id was seen before.",
    Outcome.LATE: "Older than what the session already is, or a beginning after its end.",
    Outcome.EXPIRED: "Created more than MAX_EVENT_AGE_DAYS ago.",
    Outcome.UNCHANGED: "Newer, but nothing changed.",
    Outcome.IGNORED: "Genuine, but not for us: another type, the other LIVEMODE.",
}


def openapi() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of both ports, as builtin types in a settled order."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "identity-webhooks",
            "version": __version__,
            "summary": "Takes Stripe Identity's webhooks once, in order and without secrets.",
            "description": "The body of an answer is one word from a closed list. 2xx means that"
            " the event is kept, or that there is nothing to keep; 503, that nothing is decided"
            " and the same may come again. Numbers are also taken as strings of digits, and 0"
            " and 1 as booleans; fields nobody knows are ignored.\n\n"
            "Generated from the types by `python -m tests.generate`. This text is JSON, which is"
            " YAML 1.2.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "http://127.0.0.1:8000", "description": "HOST and PORT."}],
        "paths": {
            WEBHOOK_PATH: {"post": _receive("receive")},
            f"{WEBHOOK_PATH}/{{endpoint}}": {
                "parameters": [_endpoint()],
                "post": _receive("receiveAtEndpoint"),
            },
            "/livez": {"get": _probe("livez", "The process runs.")},
            "/readyz": {"get": _probe("readyz", "Send traffic here.", {"503": _not_ready()})},
            "/metrics": {
                "servers": [{"url": "http://127.0.0.1:8001", "description": "ADMIN_PORT."}],
                "get": _metrics(),
            },
        },
        "components": {
            "responses": _responses(),
            "schemas": {"Notification": _notification(), **_structs()},
        },
    }


def _receive(name: str) -> dict[str, Any]:
    statuses = {
        "200": "Outcome",
        "400": "Refused",
        "403": "NotAllowed",
        "404": "NoSuchEndpoint",
        "413": "TooLarge",
        "431": "HeadersTooLarge",
    }
    return {
        "operationId": name,
        "summary": "Receive one event of Stripe's.",
        "parameters": [
            {
                "name": "Stripe-Signature",
                "in": "header",
                "required": True,
                "description": "`t=` Unix seconds, `v1=` HMAC-SHA256 in hexadecimal, by commas.",
                "schema": {"type": "string", "minLength": 1, "maxLength": 4096},
                "example": f"t=1785931200,v1={'0' * 64}",
            }
        ],
        "requestBody": {
            "required": True,
            "description": "At most MAX_BODY_BYTES, exactly as it was signed.",
            "content": {"application/json": {"schema": _ref("Notification")}},
        },
        "responses": {
            **{status: _ref(response, "responses") for status, response in statuses.items()},
            "503": _ref("Unavailable", "responses"),
        },
    }


def _endpoint() -> dict[str, Any]:
    return {
        "name": "endpoint",
        "in": "path",
        "required": True,
        "description": "One that STRIPE_WEBHOOK_SECRETS_{ENDPOINT} names; case does not matter.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9_]{1,64}$"},
    }


def _probe(name: str, text: str, more: dict[str, Any] | None = None) -> dict[str, Any]:
    responses = {"200": _silent(text), **(more or {})}
    return {"operationId": name, "summary": text, "responses": responses}


def _not_ready() -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {
            "ready": {"const": False},
            "reason": {"enum": [str(one) for one in REASONS]},
        },
        "required": ["ready", "reason"],
        "additionalProperties": False,
    }
    return {"description": "Not now.", "content": {"application/json": {"schema": schema}}}


def _metrics() -> dict[str, Any]:
    kind = metrics.CONTENT_TYPE.partition(";")[0]
    content = {kind: {"schema": {"type": "string"}}}
    return {
        "operationId": "metrics",
        "summary": "What Prometheus scrapes.",
        "responses": {"200": {"description": "All series.", "content": content}},
    }


def _silent(description: str) -> dict[str, Any]:
    return {"description": f"{description} The body is empty."}


def _responses() -> dict[str, Any]:
    """Return every answer there is to an event, each with the words it may hold."""
    refused = [reason for reason in RejectionReason if reason not in _OWN_STATUS]
    unavailable = _answer("Nothing is decided: the same may come again.", "error", ["unavailable"])
    retry_after = {"schema": {"type": "integer", "minimum": 0}, "example": RETRY_AFTER_S}
    unavailable["headers"] = {"Retry-After": {"description": "Seconds to wait.", **retry_after}}
    outcomes = "\n".join(f"* `{outcome}`: {text}" for outcome, text in _OUTCOMES.items())
    return {
        "Outcome": _answer(f"Genuine:\n\n{outcomes}", "outcome", list(_OUTCOMES)),
        "Refused": _answer(
            "Refused as it stands; `field` is a path into the event, never a value.",
            "error",
            refused,
            field={"type": "string"},
        ),
        "NotAllowed": _answer(
            "It comes from elsewhere.", "error", [RejectionReason.SOURCE_NOT_ALLOWED]
        ),
        "NoSuchEndpoint": _answer(
            "No endpoint with signing secrets has this path.",
            "error",
            [RejectionReason.ENDPOINT_UNKNOWN, RejectionReason.TRAILING_SLASH],
        ),
        "TooLarge": _answer("The body is too large.", "error", [RejectionReason.BODY_TOO_LARGE]),
        "HeadersTooLarge": _answer(
            "The headers are.", "error", [RejectionReason.HEADERS_TOO_LARGE]
        ),
        "Unavailable": unavailable,
    }


def _answer(description: str, name: str, words: list[Any], **more: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {name: {"enum": [str(word) for word in words]}, **more},
        "required": [name],
        "additionalProperties": False,
    }
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _notification() -> dict[str, Any]:
    """Return the schema of whatever Stripe may post: an event of ours, or one to be ignored."""
    other = {"type": "string", "not": {"pattern": _OURS}}
    return {
        "title": "Notification",
        "description": "An event about a verification session, or any other, which is ignored.",
        "anyOf": [
            _ref(Event.__name__),
            {"type": "object", "properties": {"type": other}, "required": ["type"]},
        ],
    }


def _structs() -> dict[str, dict[str, Any]]:
    """Return the schemas of an event and of all its parts by name."""
    kinds = {kind.__name__: kind for kind in _parts(Event)}
    _, found = msgspec.json.schema_components(
        [Event], ref_template=_COMPONENT, schema_hook=lambda _: dict(_HIDDEN)
    )
    for name, schema in found.items():
        schema["description"] = inspect.cleandoc(schema.get("description", "")).split("\n\n")[0]
        for field, hint in typing.get_type_hints(kinds[name]).items():
            if field in schema["properties"]:
                _complete(schema["properties"][field], hint)
    event, session = found[Event.__name__]["properties"], found["VerificationSession"]["properties"]
    # What could not be read is ours to say.
    del event["skipped_fields"]
    event["id"]["pattern"] = "^evt_[A-Za-z0-9_]{1,250}$"
    event["type"]["pattern"] = _OURS
    session["id"]["pattern"] = "^vs_[A-Za-z0-9_]{1,250}$"
    session["status"]["minLength"] = 1
    # The envelope's wrapper is no type of its own to anybody else.
    event["data"] = found.pop(_WRAPPED) | {"title": "EventData", "description": "Its wrapper."}
    return found


def _parts(kind: Any) -> Iterator[Any]:
    """Yield a struct and all structs that its fields hold."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
        for hint in typing.get_type_hints(kind).values():
            yield from _parts(hint)
    else:
        for part in typing.get_args(kind):
            yield from _parts(part)


def _complete(schema: dict[str, Any], hint: Any) -> None:
    """Say what a secret holds, which msgspec does not see, and how large a number may be."""
    for option in schema.get("anyOf", [schema]):
        if option == _HIDDEN:
            [inner] = [part for part in typing.get_args(hint) if typing.get_origin(part) is Secret]
            option.update(msgspec.json.schema(typing.get_args(inner)[0]))
        if option.get("type") == "integer" and "minimum" not in option:
            option.update(_INT64)


def _ref(name: str, kind: str = "schemas") -> dict[str, Any]:
    return {"$ref": f"#/components/{kind}/{name}"}
