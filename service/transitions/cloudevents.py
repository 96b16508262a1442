"""The message for queues: a transition as CloudEvents 1.0 structured JSON, the same on every queue.

The form in our own streams is in `stream_entry`; how a message is sent, in the handler of each
queue; what consumers can rely on, in `deploy/contracts`.
https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
import orjson

from .transition import StatusTransition

CONTENT_TYPE = "application/cloudevents+json"
TYPE_PREFIX = "com.stripe."
SCHEMA = "urn:identity-webhooks:status-transition:2"
# The attributes that are also sent as headers.
HEADER_ATTRIBUTES = ("id", "type", "subject", "sessionepoch", "sessionsequence", "traceparent")


class Message(NamedTuple):
    """One transition, ready for a queue.

    Attributes:
        id: The event id, also of a repeated delivery and of a replay.
        deduplication_id: The key by which a queue may drop repeats. Each replay has its own.
        key: The session id, by which a queue keeps order.
        type: `com.stripe.` and the event type.
        body: The CloudEvent.
        headers: Attributes for routers and consumers that do not parse the body.
    """

    id: str
    deduplication_id: str
    key: str
    type: str
    body: bytes
    headers: Mapping[str, str]

    @property
    def content_type(self) -> str:
        """The media type of the body."""
        return CONTENT_TYPE


def message(transition: StatusTransition) -> Message:
    """Return the message for *transition*."""
    attributes: dict[str, Any] = {
        "specversion": "1.0",
        "id": transition.event_id,
        "source": _source(transition),
        "type": TYPE_PREFIX + transition.event_type,
        "subject": transition.session_id,
        "time": transition.occurred_at,
        "datacontenttype": "application/json",
        "dataschema": SCHEMA,
        "partitionkey": transition.session_id,
        # Not the CloudEvents extension `sequence`: it orders all events of a source, as text.
        "sessionepoch": str(transition.epoch),
        "sessionsequence": str(transition.sequence),
        "replay": transition.replay,
        # The distributed tracing extension asks for the start of the trace, not for the last hop.
        "traceparent": transition.traceparent,
    }
    # CloudEvents does not allow empty attributes.
    attributes = {name: value for name, value in attributes.items() if value}
    headers = {name: attributes[name] for name in HEADER_ATTRIBUTES if name in attributes}
    replay = f".{transition.replay}" if transition.replay else ""
    data = msgspec.to_builtins(transition)
    return Message(
        id=transition.event_id,
        deduplication_id=transition.event_id + replay,
        key=transition.session_id,
        type=attributes["type"],
        body=orjson.dumps({**attributes, "data": data}, option=orjson.OPT_UTC_Z),
        headers={"content-type": CONTENT_TYPE, **headers},
    )


def _source(transition: StatusTransition) -> str:
    """Return Stripe's mode and the account, if it is known.

    A connected account is named by its id, your own account by ACCOUNT_NAME.
    """
    mode = "test" if transition.livemode is False else "live"
    name = transition.account or transition.account_name
    return f"/stripe/identity/{mode}" + (f"/{quote(name, safe='')}" if name else "")
