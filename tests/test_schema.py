"""The laws of what we promise readers: every message keeps it, and the files say it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import environment, handlers, schema
from service.handlers import kafka, nats, rabbitmq, redis_stream, sqs
from service.secret import Secret
from service.transitions import cloudevents
from service.transitions.transition import StatusTransition
from tests.generate import DEPLOY, generated
from tests.transitions.test_cloudevents import TRACEPARENT, TRANSITION, TRANSITIONS, WORD

PARSER = "@asyncapi/parser@3.6.3"
NPM_TIMEOUT_S = 120
PARSE = """
const { Parser } = require('@asyncapi/parser');
const text = require('fs').readFileSync(process.argv[2], 'utf8');
new Parser().parse(text).then(({ document, diagnostics }) => {
  const operations = document ? document.operations().all().map((one) => one.id()) : [];
  console.log(JSON.stringify({ operations, diagnostics }));
});
"""
SETTINGS: dict[str, Any] = {
    "kafka": kafka.KafkaSettings,
    "nats": nats.NatsSettings,
    "rabbitmq": rabbitmq.RabbitmqSettings,
    "redis_stream": redis_stream.RedisStreamSettings,
    "sqs": sqs.SqsSettings,
}

every_queue = pytest.mark.parametrize("name", schema.QUEUES)


def validator(part: dict[str, Any]) -> jsonschema_rs.Draft202012Validator:
    """Return an independent reader of a schema, which may refer to that of a transition."""
    registry = jsonschema_rs.Registry([(cloudevents.SCHEMA, schema.transition_schema())])
    return jsonschema_rs.Draft202012Validator(part, registry=registry, validate_formats=True)


WHOLE = validator(schema.message_schema())
HEADERS = validator(schema.headers_schema())


def sent(transition: StatusTransition) -> Any:
    """Return a message's body as its readers see it."""
    return json.loads(cloudevents.message(transition).body)


@given(transition=TRANSITIONS, replay=st.none() | WORD)
def test_every_message_is_valid(transition: StatusTransition, replay: str | None) -> None:
    """Whatever a transition holds, body and headers are what the schemas say."""
    changed = msgspec.structs.replace(transition, replay=replay)

    WHOLE.validate(sent(changed))
    HEADERS.validate(dict(cloudevents.message(changed).headers))


@given(transition=TRANSITIONS)
def test_every_field_sent_is_described(transition: StatusTransition) -> None:
    """A message holds no attribute, field or header that the schemas do not name."""
    transition = msgspec.structs.replace(transition, traceparent=TRACEPARENT)
    body = sent(transition)
    described = schema.transition_schema()

    assert body.keys() <= schema.message_schema()["properties"].keys()
    assert body["data"].keys() == described["properties"].keys()
    assert (body["data"]["related_person"] or {}).keys() <= (
        described["$defs"]["RelatedPerson"]["properties"].keys()
    )
    assert cloudevents.message(transition).headers.keys() == (
        schema.headers_schema()["properties"].keys()
    )


@pytest.mark.parametrize(
    "field",
    ["current", "previous", "event_type", "session_type", "last_error_code", "redaction_status"],
)
def test_words_nobody_knows_yet_are_valid(field: str) -> None:
    """No list of words is closed: what Stripe calls things tomorrow is valid today."""
    body = sent(TRANSITION)
    body["data"][field] = "a_word_of_tomorrow"

    assert WHOLE.is_valid(body)


def test_fields_nobody_knows_yet_are_valid() -> None:
    """A reader that checks against today's schema takes the messages of tomorrow's release."""
    body = sent(TRANSITION)
    body["later"] = body["data"]["later"] = {"more": 1}

    assert WHOLE.is_valid(body)


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
def test_what_is_wrong_is_invalid(path: tuple[str, ...], wrong: Any) -> None:
    """The schemas refuse what no message of ours holds, so that being valid means something."""
    body = sent(TRANSITION)
    part = body if len(path) == 1 else body[path[0]]
    part[path[-1]] = wrong

    assert not WHOLE.is_valid(body)


@pytest.mark.parametrize("name", schema.message_schema()["required"])
def test_what_is_required_is_required(name: str) -> None:
    """A message without one of its attributes is invalid."""
    body = sent(TRANSITION)
    del body[name]

    assert not WHOLE.is_valid(body)


def test_schemas_are_schemas() -> None:
    """Both are valid JSON Schema of the dialect they name, and bear the name messages give."""
    found = schema.transition_schema()

    assert found["$id"] == sent(TRANSITION)["dataschema"]
    for part in (found, schema.message_schema(), schema.headers_schema()):
        assert jsonschema_rs.meta.is_valid({"$schema": schema.DIALECT, **part})


def test_every_field_is_described_in_words() -> None:
    """Each field of a transition says what it is, in the words of its class."""
    found = schema.transition_schema()

    assert found["description"].startswith("One real change of one session")
    assert "Attributes" not in json.dumps(found)
    for name, part in found["properties"].items():
        assert part["description"].endswith("."), name


def test_schemas_are_made_anew() -> None:
    """What one caller does to a schema, the next does not see."""
    schema.transition_schema()["properties"].clear()

    assert schema.transition_schema()["properties"]


@pytest.mark.parametrize("path", generated(), ids=str)
def test_files_are_current(path: Path) -> None:
    """The files in `deploy` are what `python -m tests.generate` would write."""
    assert path.read_text(encoding="utf-8") == generated()[path]


def test_every_queue_is_in_the_document() -> None:
    """Each built-in handler but the log has a server, a channel, and an operation that sends."""
    found = schema.asyncapi()

    assert found["channels"].keys() == handlers.BUILT_IN.keys() - {"log"}
    assert found["servers"].keys() == found["channels"].keys()
    assert {one["channel"]["$ref"] for one in found["operations"].values()} == {
        f"#/channels/{name}" for name in found["channels"]
    }
    assert {one["action"] for one in found["operations"].values()} == {"send"}


@every_queue
def test_settings_are_those_of_the_handlers(name: str) -> None:
    """The settings named in the document exist, with the defaults it tells."""
    queue = schema.QUEUES[name]
    found = environment.read(SETTINGS[name], {})
    url = getattr(found, queue.url.lower())

    assert getattr(found, queue.setting.lower()) == (queue.address or "")
    if isinstance(url, Secret):
        assert f"//{queue.host}" in url.reveal()


def test_references_lead_somewhere() -> None:
    """Each reference in the document points at a part of it."""
    document = schema.asyncapi()

    def visit(part: Any) -> int:
        if isinstance(part, list):
            return sum(map(visit, part))
        if not isinstance(part, dict):
            return 0
        if "$ref" not in part:
            return sum(map(visit, part.values()))
        target: Any = document
        for step in part["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        return 1

    assert visit(document) > 3 * len(schema.QUEUES)


def test_the_example_is_a_message_of_ours() -> None:
    """What the document shows could have been sent."""
    (example,) = schema.asyncapi()["components"]["messages"]["transition"]["examples"]
    transition = msgspec.convert(example["payload"]["data"], StatusTransition)

    assert sent(transition) == example["payload"]
    assert cloudevents.message(transition).headers == example["headers"]


@pytest.mark.skipif(
    os.environ.get("TEST_ASYNCAPI") != "1",
    reason="AsyncAPI's own parser comes from npm: set TEST_ASYNCAPI=1",
)
@pytest.mark.timeout(2 * NPM_TIMEOUT_S)
def test_its_own_parser_accepts_the_document(tmp_path: Path) -> None:
    """AsyncAPI's parser reads `asyncapi.yaml` without an error or a warning."""
    install(tmp_path)
    script = tmp_path / "parse.cjs"
    script.write_text(PARSE)
    node = shutil.which("node") or pytest.skip("there is no node")
    answer = subprocess.run(
        [node, script, DEPLOY / "asyncapi.yaml"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
        timeout=NPM_TIMEOUT_S / 2,
    )
    found = json.loads(answer.stdout)
    problems = [one for one in found["diagnostics"] if one["severity"] < 2]

    assert not problems
    assert set(found["operations"]) == schema.asyncapi()["operations"].keys()


def install(folder: Path) -> None:
    """Install the parser into *folder*; skip, and say why, where that cannot be done."""
    npm = shutil.which("npm") or pytest.skip("there is no npm")
    try:
        subprocess.run(
            [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", PARSER],
            cwd=folder,
            capture_output=True,
            check=True,
            timeout=NPM_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm had not installed {PARSER} after {NPM_TIMEOUT_S} s")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"npm cannot install {PARSER}: {error.stderr.decode()[:400]}")
