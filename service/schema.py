"""What the messages look like, for those who read them: JSON Schema and AsyncAPI, from the types.

Pure, and no part of the service's work: `python -m tests.generate` writes the results to `deploy`.
https://www.asyncapi.com/docs/reference/specification/v3.0.0
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import orjson

from .transitions import cloudevents
from .transitions.lifecycle import STEP_RANKS, Status
from .transitions.transition import Origin, StatusTransition

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_COMPONENT = "#/components/schemas/{name}"
# An entry of a docstring's "Attributes:", with the lines it goes on for.
_ATTRIBUTE = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)
# Examples, not a list of what is allowed: tomorrow's words are as valid.
_WORDS: Mapping[str, Iterable[str]] = {
    "current": Status,
    "previous": Status,
    "stripe_status": [status for status in Status if status is not Status.REDACTED],
    "origin": Origin,
    "event_type": STEP_RANKS,
}
_EXAMPLE = StatusTransition(
    event_id="evt_1TbCdEfGhIjKlMnO",
    event_type="identity.verification_session.verified",
    occurred_at=datetime(2026, 8, 5, 12, tzinfo=UTC),
    livemode=True,
    session_id="vs_1TbCdEfGhIjKlMnO",
    session_type="document",
    current=Status.VERIFIED,
    stripe_status=Status.VERIFIED,
    report_id="vr_1TbCdEfGhIjKlMnO",
    client_reference_id="user-6735",
    metadata={"order": "6735"},
    previous=Status.PROCESSING,
    sequence=3,
    epoch=1_785_931_000_000,
    expected=True,
)


@dataclass(frozen=True, kw_only=True)
class Queue:
    """One queue, as its channel, server and operation tell of it.

    Attributes:
        protocol: AsyncAPI's word for it.
        host: Where the server is unless somebody says otherwise.
        url: The setting that says otherwise.
        setting: The setting that holds the address.
        address: Its default; None where there is none.
        text: What a consumer should know.
        channel: Bindings of the channel.
        operation: Bindings of the operation.
    """

    protocol: str
    host: str
    url: str
    setting: str
    address: str | None = "verifications"
    text: str
    channel: Mapping[str, Any] = field(default_factory=dict)
    operation: Mapping[str, Any] = field(default_factory=dict)


QUEUES: Mapping[str, Queue] = {
    "kafka": Queue(
        protocol="kafka",
        host="127.0.0.1:9092",
        url="KAFKA_URL",
        setting="KAFKA_TOPIC",
        text="A topic; the record's key is the session id, so a session stays in one partition.",
    ),
    "nats": Queue(
        protocol="nats",
        host="127.0.0.1:4222",
        url="NATS_URL",
        setting="NATS_SUBJECT",
        text="A subject that a JetStream stream listens to. The header `Nats-Msg-Id` comes on top"
        " of the others: the event id, and for a replay `.` and its name.",
    ),
    "rabbitmq": Queue(
        protocol="amqp",
        host="127.0.0.1:5672",
        url="RABBITMQ_URL",
        setting="RABBITMQ_ROUTING_KEY",
        text="A routing key of the exchange RABBITMQ_EXCHANGE, or a queue's name on the default"
        " one. The properties `message_id`, `type` and `content_type` repeat the headers.",
        channel={
            "amqp": {
                "is": "routingKey",
                "exchange": {"name": "", "type": "default"},
                "bindingVersion": "0.3.0",
            }
        },
        operation={"amqp": {"deliveryMode": 2, "mandatory": True, "bindingVersion": "0.3.0"}},
    ),
    "redis_stream": Queue(
        protocol="redis",
        host="127.0.0.1:6379",
        url="REDIS_STREAM_URL",
        setting="REDIS_STREAM_NAME",
        text="The key of a stream. An entry holds each header as a field, and the message in the"
        " field `body`.",
    ),
    "sqs": Queue(
        protocol="sqs",
        host="sqs.eu-central-1.amazonaws.com",
        url="SQS_QUEUE_URL",
        setting="SQS_QUEUE_URL",
        address=None,
        text="A queue's URL. Headers are message attributes. With a FIFO queue, which keeps order,"
        " the group is the session id; the deduplication id is the event id, and for a replay `.`"
        " and its name.",
        channel={
            "sqs": {
                "queue": {"name": "verifications.fifo", "fifoQueue": True},
                "bindingVersion": "0.2.0",
            }
        },
    ),
}


def transition_schema() -> dict[str, Any]:
    """Return the JSON Schema of a message's `data`, which `dataschema` names.

    Words are open and fields may be added: a reader ignores what it does not know.
    """
    parts = _structs("#/$defs/{name}")
    whole = parts.pop(StatusTransition.__name__)
    return {"$schema": DIALECT, "$id": cloudevents.SCHEMA, **whole, "$defs": parts}


def message_schema(transition: str = cloudevents.SCHEMA) -> dict[str, Any]:
    """Return the JSON Schema of a whole message, where *transition* is the reference to `data`'s.

    https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md
    """
    session_id = {**_text("The session id."), "minLength": 1}
    properties = {
        "specversion": {"const": "1.0"},
        "id": {**_text("The event id; a repeat and a replay carry the same."), "minLength": 1},
        "source": {
            **_text("Stripe's world, and the account if it is known.", form="uri-reference"),
            "pattern": "^/stripe/identity/(live|test)(/[^/]+)?$",
        },
        "type": {
            **_text(f"`{cloudevents.TYPE_PREFIX}` and Stripe's event type."),
            "pattern": f"^{re.escape(cloudevents.TYPE_PREFIX)}",
        },
        "subject": session_id,
        "time": _text("When Stripe created the event, in UTC.", form="date-time"),
        "datacontenttype": {"const": "application/json"},
        "dataschema": {"const": cloudevents.SCHEMA},
        "partitionkey": session_id,
        "sessionepoch": {**_text("The epoch of `data`."), "pattern": "^[0-9]+$"},
        "sessionsequence": {
            **_text("1, 2, 3 … without a gap within the epoch."),
            "pattern": "^[0-9]+$",
        },
        "replay": _text("Which replay this is part of; absent unless it is one."),
        "traceparent": _text("Where in a trace the event was received; absent without one."),
        "data": {"$ref": transition},
    }
    return {
        "title": "Message",
        "description": "A transition as CloudEvents 1.0 structured JSON.",
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in {"replay", "traceparent"}],
    }


def headers_schema() -> dict[str, Any]:
    """Return the JSON Schema of what goes along with a message outside its body."""
    names = list(cloudevents.message(_EXAMPLE).headers)
    return {
        "description": "What routers and consumers may want without parsing the body.",
        "type": "object",
        "properties": {name: {"type": "string"} for name in [*names, "traceparent"]},
        "required": names,
    }


def asyncapi() -> dict[str, Any]:
    """Return the AsyncAPI 3 document of every queue, as builtin types in a settled order."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "identity-webhooks",
            "version": cloudevents.SCHEMA.rpartition(":")[2],
            "description": "What happens to Stripe Identity's verification sessions, once each and"
            " in order, as the same message on each queue that is switched on by HANDLERS.\n\n"
            "Generated from the types by `python -m tests.generate`. This text is JSON, which is"
            " YAML 1.2.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": cloudevents.CONTENT_TYPE,
        "servers": {name: _server(queue) for name, queue in QUEUES.items()},
        "channels": {name: _channel(name, queue) for name, queue in QUEUES.items()},
        "operations": {f"send_{name}": _operation(name, queue) for name, queue in QUEUES.items()},
        "components": {
            "messages": {"transition": _message()},
            "schemas": {
                "Message": message_schema(_COMPONENT.format(name=StatusTransition.__name__)),
                **_structs(_COMPONENT),
            },
        },
    }


def _structs(template: str) -> dict[str, dict[str, Any]]:
    """Return the schemas of a transition and of its parts by name, with their descriptions."""
    _, found = msgspec.json.schema_components([StatusTransition], ref_template=template)
    for schema in found.values():
        schema["description"] = inspect.cleandoc(schema["description"]).partition("\n\n")[0]
    properties = found[StatusTransition.__name__]["properties"]
    for name, text in _documented(StatusTransition).items():
        properties[name]["description"] = text
    for name, words in _WORDS.items():
        properties[name]["examples"] = [str(word) for word in words]
    # To msgspec a time may be without a zone; ours never is.
    properties["occurred_at"]["format"] = "date-time"
    return found


def _documented(kind: type) -> dict[str, str]:
    """Return what the docstrings of a class and of those it comes from say of each attribute."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        _, _, section = inspect.cleandoc(one.__doc__ or "").partition("\nAttributes:\n")
        entries = ((match[1], match[2]) for match in _ATTRIBUTE.finditer(section))
        found.update((name, " ".join(text.split())) for name, text in entries)
    return found


def _text(description: str, *, form: str | None = None) -> dict[str, Any]:
    return {"type": "string", "description": description} | ({"format": form} if form else {})


def _server(queue: Queue) -> dict[str, Any]:
    host = {"default": queue.host, "description": f"Host and port of {queue.url}."}
    return {"host": "{host}", "protocol": queue.protocol, "variables": {"host": host}}


def _channel(name: str, queue: Queue) -> dict[str, Any]:
    parameter = {"description": f"The setting {queue.setting}."}
    if queue.address is not None:
        parameter["default"] = queue.address
    return {
        "address": f"{{{queue.setting}}}",
        "description": queue.text,
        "servers": [{"$ref": f"#/servers/{name}"}],
        "parameters": {queue.setting: parameter},
        "messages": {"transition": {"$ref": "#/components/messages/transition"}},
        **({"bindings": dict(queue.channel)} if queue.channel else {}),
    }


def _operation(name: str, queue: Queue) -> dict[str, Any]:
    return {
        "action": "send",
        "summary": "Hand over a transition, and wait until the queue has confirmed it.",
        "channel": {"$ref": f"#/channels/{name}"},
        "messages": [{"$ref": f"#/channels/{name}/messages/transition"}],
        **({"bindings": dict(queue.operation)} if queue.operation else {}),
    }


def _message() -> dict[str, Any]:
    example = cloudevents.message(_EXAMPLE)
    return {
        "name": "transition",
        "title": "A session has changed",
        "summary": "One real change of one session. May come again, with the same `id`.",
        "contentType": cloudevents.CONTENT_TYPE,
        "headers": headers_schema(),
        "payload": {"$ref": _COMPONENT.format(name="Message")},
        "correlationId": {
            "description": "The session id: what order is kept by.",
            "location": "$message.header#/subject",
        },
        "bindings": {
            "kafka": {"key": _text("The session id."), "bindingVersion": "0.5.0"},
        },
        "examples": [
            {
                "name": "verified",
                "headers": dict(example.headers),
                "payload": orjson.loads(example.body),
            }
        ],
    }
