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

from .transitions import StatusTransition

CONTENT_TYPE = "application/cloudevents+json"
TYPE_PREFIX = "com.stripe."
SCHEMA = "urn:identity-webhooks:status-transition:1"


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
    event_type = TYPE_PREFIX + transition.event_type
    sequence = str(transition.sequence)
    envelope: dict[str, Any] = {
        "specversion": "1.0",
        "id": transition.event_id,
        "source": _source(transition),
        "type": event_type,
        "subject": transition.session_id,
        "time": transition.occurred_at,
        "datacontenttype": "application/json",
        "dataschema": SCHEMA,
        "partitionkey": transition.session_id,
        "sequence": sequence,
        "sequencetype": "Integer",
        "data": msgspec.to_builtins(transition),
    }
    headers = {
        "content-type": CONTENT_TYPE,
        "id": transition.event_id,
        "type": event_type,
        "subject": transition.session_id,
        "sequence": sequence,
    }
    if transition.traceparent:
        # The distributed tracing extension: where it all began, not the last hop.
        envelope["traceparent"] = headers["traceparent"] = transition.traceparent
    deduplication_id = transition.event_id
    if transition.replay is not None:
        envelope["replay"] = transition.replay
        deduplication_id += f".{transition.replay}"
    return Message(
        id=transition.event_id,
        deduplication_id=deduplication_id,
        key=transition.session_id,
        type=event_type,
        body=orjson.dumps(envelope, option=orjson.OPT_UTC_Z),
        headers=headers,
    )


def _source(transition: StatusTransition) -> str:
    """Return where the event came from: Stripe's world, and the connected account if any."""
    world = "test" if transition.livemode is False else "live"
    account = f"/{quote(transition.account, safe='')}" if transition.account else ""
    return f"/stripe/identity/{world}{account}"
