"""The message contracts in deploy/contracts against the messages that the service sends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import environment, handlers
from service.handlers import kafka, nats, rabbitmq, redis_stream, sqs
from service.transitions import cloudevents
from service.transitions.lifecycle import TYPE_RANKS, Status
from service.transitions.transition import Origin, StatusTransition
from tests.support.programs import CONTRACTS, documents
from tests.support.transitions import TRACEPARENT, TRANSITION, TRANSITIONS, WORD

SCHEMA: dict[str, Any] = json.loads((CONTRACTS / "status-transition.schema.json").read_text())
SETTINGS: dict[str, Any] = {
    "kafka": kafka.KafkaSettings,
    "nats": nats.NatsSettings,
    "rabbitmq": rabbitmq.RabbitmqSettings,
    "redis_stream": redis_stream.RedisStreamSettings,
    "sqs": sqs.SqsSettings,
}
PARSER = "@asyncapi/parser@3.6.3"
NPM_TIMEOUT_S = 120
PARSE = """
const { Parser } = require('@asyncapi/parser');
const source = process.argv[2];
const text = require('fs').readFileSync(source, 'utf8');
new Parser().parse(text, { source }).then(({ document, diagnostics }) => {
  const operations = document ? document.operations().all().map((one) => one.id()) : [];
  console.log(JSON.stringify({ operations, diagnostics }));
});
"""


@cache
def asyncapi() -> dict[str, Any]:
    """Return the AsyncAPI document."""
    [document] = documents(CONTRACTS / "asyncapi.yaml")
    assert isinstance(document, dict)
    return document


@cache
def validator(name: str) -> jsonschema_rs.Draft202012Validator:
    """Return a validator of one schema of the AsyncAPI document."""
    registry = jsonschema_rs.Registry([("urn:contracts:status-transition.schema.json", SCHEMA)])
    components = json.dumps(asyncapi()["components"]).replace(
        "./status-transition.schema.json", "urn:contracts:status-transition.schema.json"
    )
    part = {"$ref": f"#/components/schemas/{name}", "components": json.loads(components)}
    return jsonschema_rs.Draft202012Validator(part, registry=registry, validate_formats=True)


def sent(transition: StatusTransition) -> Any:
    """Return the body of a message as a consumer decodes it."""
    return json.loads(cloudevents.message(transition).body)


def plain(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema in one notation, without what it says in words."""
    if "anyOf" in schema:
        [schema] = [one for one in schema["anyOf"] if one != {"type": "null"}]
        return {**plain(schema), "nullable": True}
    found: dict[str, Any] = {}
    kinds = schema["type"]
    if isinstance(kinds, list):
        found["nullable"] = True
        [kinds] = [one for one in kinds if one != "null"]
    found["type"] = kinds
    if "properties" in schema:
        found["properties"] = {name: plain(one) for name, one in schema["properties"].items()}
        found["required"] = schema.get("required", [])
    if "additionalProperties" in schema:
        found["values"] = plain(schema["additionalProperties"])
    return found


def test_the_schema_has_the_fields_of_a_transition() -> None:
    """Names, types and required fields are those of the class."""
    _, components = msgspec.json.schema_components([StatusTransition], ref_template="{name}")
    generated = components.pop("StatusTransition")
    text = json.dumps(generated)
    for name, part in components.items():
        text = text.replace(f'{{"$ref": "{name}"}}', json.dumps(part))

    assert plain(SCHEMA) == plain(json.loads(text))
    assert SCHEMA["$id"] == cloudevents.SCHEMA
    assert jsonschema_rs.meta.is_valid(SCHEMA)


def test_the_schema_lists_the_known_words() -> None:
    """The examples of each field with known words are those words; none of the lists is closed."""
    examples = {
        name: one["examples"] for name, one in SCHEMA["properties"].items() if "examples" in one
    }

    assert examples.pop("event_type") == [*TYPE_RANKS]
    assert examples.pop("origin") == [*Origin]
    assert examples.pop("current") == examples.pop("previous") == [*Status]
    assert examples.pop("stripe_status") == [one for one in Status if one is not Status.REDACTED]
    assert examples.keys() == {"session_type", "redaction_status"}


@given(transition=TRANSITIONS, replay=st.none() | WORD)
def test_every_message_is_valid(transition: StatusTransition, replay: str | None) -> None:
    """Body and headers of any transition match the schemas."""
    changed = msgspec.structs.replace(transition, replay=replay)

    validator("Message").validate(sent(changed))
    validator("Headers").validate(dict(cloudevents.message(changed).headers))


def test_every_attribute_is_described() -> None:
    """A message has no attribute and no header that the document does not name."""
    full = msgspec.structs.replace(TRANSITION, traceparent=TRACEPARENT, replay="again")
    schemas = asyncapi()["components"]["schemas"]

    assert sent(full).keys() == schemas["Message"]["properties"].keys()
    assert cloudevents.message(full).headers.keys() == schemas["Headers"]["properties"].keys()
    required = {name: {*schemas[name]["required"]} for name in schemas}
    assert required["Message"] == sent(TRANSITION).keys()
    assert required["Headers"] == cloudevents.message(TRANSITION).headers.keys()


def test_new_words_and_fields_are_valid() -> None:
    """A consumer that checks against today's schema accepts the messages of later releases."""
    body = sent(TRANSITION)
    for field in ("current", "previous", "event_type", "session_type", "redaction_status"):
        body["data"][field] = "a_new_word"
    body["new"] = body["data"]["new"] = {"more": 1}

    validator("Message").validate(body)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("specversion",), "0.3"),
        (("id",), ""),
        (("source",), "/stripe/identity/moon"),
        (("type",), "com.example.verified"),
        (("time",), "yesterday"),
        (("dataschema",), "urn:identity-webhooks:status-transition:0"),
        (("sessionsequence",), 3),
        (("sessionepoch",), "now"),
        (("data", "occurred_at"), "yesterday"),
        (("data", "sequence"), "3"),
        (("data", "current"), None),
        (("data", "related_person"), "person_1"),
        (("data", "metadata"), {"order": 6735}),
    ],
    ids=lambda found: ".".join(found) if isinstance(found, tuple) else repr(found),
)
def test_wrong_messages_are_invalid(path: tuple[str, ...], wrong: Any) -> None:
    """The schemas reject what no message of ours contains."""
    body = sent(TRANSITION)
    part = body if len(path) == 1 else body[path[0]]
    part[path[-1]] = wrong

    assert not validator("Message").is_valid(body)


def test_every_queue_is_in_the_document() -> None:
    """Each built-in handler but the log has a server, a channel and an operation that sends."""
    found = asyncapi()

    assert found["channels"].keys() == handlers.BUILT_IN.keys() - {"log"}
    assert found["servers"].keys() == found["channels"].keys()
    assert found["operations"].keys() == {f"send_{name}" for name in found["channels"]}
    for name, channel in found["channels"].items():
        assert channel["servers"] == [{"$ref": f"#/servers/{name}"}]
        operation = found["operations"][f"send_{name}"]
        assert (operation["action"], operation["channel"]) == (
            "send",
            {"$ref": f"#/channels/{name}"},
        )


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_those_of_the_handler(name: str) -> None:
    """The settings that the document names exist, with the defaults that it gives."""
    settings = environment.read(SETTINGS[name], {})
    [(setting, parameter)] = asyncapi()["channels"][name]["parameters"].items()
    host = asyncapi()["servers"][name]["variables"]["host"]
    url = getattr(settings, host["description"].rpartition(" ")[2].rstrip(".").lower())

    assert getattr(settings, setting.lower()) == parameter.get("default", "")
    assert not url or f"//{host['default']}" in url.reveal()


def test_the_example_is_a_message_of_ours() -> None:
    """The document's example is exactly what its transition is sent as."""
    [example] = asyncapi()["components"]["messages"]["transition"]["examples"]
    transition = msgspec.convert(example["payload"]["data"], StatusTransition)

    assert sent(transition) == example["payload"]
    assert cloudevents.message(transition).headers == example["headers"]


@pytest.mark.skipif(
    os.environ.get("TEST_ASYNCAPI") != "1",
    reason="AsyncAPI's own parser comes from npm: set TEST_ASYNCAPI=1",
)
@pytest.mark.timeout(2 * NPM_TIMEOUT_S)
def test_the_parser_of_asyncapi_accepts_the_document(tmp_path: Path) -> None:
    """AsyncAPI's parser reads `asyncapi.yaml` without an error or a warning."""
    install(tmp_path)
    script = tmp_path / "parse.cjs"
    script.write_text(PARSE)
    node = shutil.which("node") or pytest.skip("there is no node")
    answer = subprocess.run(
        [node, script, CONTRACTS / "asyncapi.yaml"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
        timeout=NPM_TIMEOUT_S / 2,
    )
    found = json.loads(answer.stdout)

    assert not [one for one in found["diagnostics"] if one["severity"] < 2]
    assert {*found["operations"]} == asyncapi()["operations"].keys()


def install(folder: Path) -> None:
    """Install the parser into *folder*, or skip with the reason."""
    npm = shutil.which("npm") or pytest.skip("there is no npm")
    try:
        subprocess.run(
            [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", PARSER],
            cwd=folder,
            capture_output=True,
            check=True,
            timeout=NPM_TIMEOUT_S,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        pytest.skip(f"npm cannot install {PARSER}: {error} {error.stderr!r:.400}")
