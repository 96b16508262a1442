"""The message: a transition as CloudEvents 1.0 structured JSON, the same bytes on every queue.

The form on our own streams is in `wire`; what a queue does with a message, in its handler; what
its readers are promised, in `schema`.
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
# The attributes that go along outside the body as well.
REPEATED = ("id", "type", "subject", "sessionepoch", "sessionsequence", "traceparent")


class Message(NamedTuple):
    """One transition, ready for a queue.

    Attributes:
        id: The event id; a repeat and a replay carry the same.
        deduplication_id: What a queue may drop repeats by: the id, but its own for each replay.
        key: The session id: what order is kept by.
        type: `com.stripe.` and the event type.
        body: The CloudEvent.
        headers: What routers and consumers may want without parsing the body.
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
    """Return the message that carries *transition*."""
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
        # Not the extension `sequence`, which orders all events of a source, and as texts do.
        "sessionepoch": str(transition.epoch),
        "sessionsequence": str(transition.sequence),
        "replay": transition.replay,
        # The distributed tracing extension: where it all began, not the last hop.
        "traceparent": transition.traceparent,
    }
    # CloudEvents has no empty attribute.
    attributes = {name: value for name, value in attributes.items() if value}
    repeated = {name: attributes[name] for name in REPEATED if name in attributes}
    replay = f".{transition.replay}" if transition.replay else ""
    data = msgspec.to_builtins(transition)
    return Message(
        id=transition.event_id,
        deduplication_id=transition.event_id + replay,
        key=transition.session_id,
        type=attributes["type"],
        body=orjson.dumps({**attributes, "data": data}, option=orjson.OPT_UTC_Z),
        headers={"content-type": CONTENT_TYPE, **repeated},
    )


def _source(transition: StatusTransition) -> str:
    """Return where the event came from: Stripe's world, and the account if it is known.

    A connected account is named by its id, one's own by what ACCOUNT_NAME says.
    """
    world = "test" if transition.livemode is False else "live"
    name = transition.account or transition.account_name
    return f"/stripe/identity/{world}" + (f"/{quote(name, safe='')}" if name else "")
