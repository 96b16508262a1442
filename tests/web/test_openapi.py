"""deploy/contracts/openapi.yaml against the service, also by schemathesis."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import orjson
import pytest

from service.admin.app import AdminApp
from service.config import Settings
from service.errors import Rejected, RejectionReason
from service.inbox.admission import Outcome
from service.storage.health import REASONS
from service.stripe import events
from service.stripe.signatures import VerifiedPayload
from service.web.app import create_app
from service.web.responses import STATUS_CODES
from tests.fuzz import targets
from tests.support.depth import DEPTH
from tests.support.harness import SECRET
from tests.support.processes import Process, open_sandbox
from tests.support.programs import CONTRACTS, FIXTURES, ROOT, documents

HERE = Path(__file__).parent
SUPPORT = ROOT / "tests" / "support"
OPENAPI = CONTRACTS / "openapi.yaml"
THIN = FIXTURES / "thin_event.json"
VERIFIED = FIXTURES / "identity.verification_session.verified.json"
JUDGE_TIMEOUT_S = 240 * DEPTH
EXAMPLES = 25 * DEPTH


@cache
def document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    [found] = documents(OPENAPI)
    assert isinstance(found, dict)
    return found


@cache
def event_schema() -> jsonschema_rs.Draft202012Validator:
    """Return a validator of request bodies."""
    return jsonschema_rs.Draft202012Validator(
        {"$ref": "#/components/schemas/Event", "components": document()["components"]}
    )


def words(response: dict[str, Any], name: str) -> list[str]:
    """Return the words that one property of a response's body may hold."""
    found: list[str] = response["content"]["application/json"]["schema"]["properties"][name]["enum"]
    return found


def test_every_word_has_its_status() -> None:
    """Each outcome, rejection and reason is in the document, with the status that answers it."""
    paths, responses = document()["paths"], document()["components"]["responses"]
    rejections = {
        reason: status
        for status, reference in paths["/webhooks/stripe"]["post"]["responses"].items()
        if status not in {"200", "503"}
        for reason in words(responses[reference["$ref"].rpartition("/")[2]], "error")
    }
    ready = paths["/readyz"]["get"]["responses"]["503"]

    assert words(responses["Outcome"], "outcome") == [*Outcome]
    assert words(responses["Unavailable"], "error") == ["unavailable"]
    assert words(ready, "reason") == [*REASONS]
    assert rejections.pop("headers_too_large") == "431"
    assert rejections == {
        reason: str(STATUS_CODES.get(reason, 400))
        for reason in RejectionReason
        if reason != RejectionReason.HEADERS_TOO_LARGE
    }


def test_every_path_is_in_the_document() -> None:
    """The document has the paths that the two applications route, and no others."""
    absent: Any = None
    entrance: Any = create_app(absent, absent, Settings())
    routes: list[Any] = [*entrance.routes, *AdminApp(absent).routes]

    assert document()["paths"].keys() == {route.path_format for route in routes}


@pytest.mark.parametrize("body", targets.corpus("body"), ids=range(9))
def test_events_from_stripe_are_valid(body: bytes) -> None:
    """Every recorded event of Stripe matches the schema."""
    found = orjson.loads(body)
    events = found if isinstance(found, list) else [found]

    for event in events:
        if "type" in event and ("data" in event or "related_object" in event):
            event_schema().validate(event)


@pytest.mark.parametrize(
    ("example", "path", "wrong"),
    [
        (VERIFIED, "id", "evt-1"),
        (VERIFIED, "id", None),
        (VERIFIED, "created", "yesterday"),
        (VERIFIED, "created", 10**11),
        (VERIFIED, "livemode", "yes"),
        (VERIFIED, "account", 1),
        (VERIFIED, "data", {}),
        (VERIFIED, "data.object.id", "cs_1"),
        (VERIFIED, "data.object.status", ""),
        (VERIFIED, "data.object.redaction", {"status": 1}),
        (THIN, "id", "evt-1"),
        (THIN, "created", 1_791_201_600),
        (THIN, "created", "1969-12-31T23:59:59Z"),
        (THIN, "livemode", "yes"),
        (THIN, "context", "acct 1"),
        (THIN, "related_object", None),
        (THIN, "related_object.id", "pi_1"),
        (THIN, "related_object.type", "payment_intent"),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else repr(value),
)
def test_events_that_are_rejected_are_invalid(example: Path, path: str, wrong: Any) -> None:
    """What the service rejects in an event about a session does not match the schema either."""
    event = orjson.loads(example.read_bytes())
    *parents, last = path.split(".")
    part = event
    for name in parents:
        part = part[name]
    part[last] = wrong

    assert not event_schema().is_valid(event)
    with pytest.raises(Rejected):
        events.parse(VerifiedPayload(orjson.dumps(event), ""))


judged = pytest.mark.skipif(
    "TEST_SCHEMATHESIS" not in os.environ,
    reason="schemathesis has an environment of its own: set TEST_SCHEMATHESIS to its command",
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Serve on ports of the system's choice, with a second endpoint."""
    with open_sandbox(tmp_path_factory.mktemp("served")) as opened:
        secret = SECRET.reveal().decode()
        keys = "sk_live_tests,sk_test_tests"
        yield opened.start(
            "serve", STRIPE_WEBHOOK_SECRETS_CONNECT=secret, STRIPE_API_KEY=keys
        ).ready()


def judge(url: str, *options: str, **environ: str) -> None:
    """Run schemathesis against the service; a failure shows its report."""
    command = [os.environ["TEST_SCHEMATHESIS"], "--config-file", str(HERE / "schemathesis.toml")]
    # The same examples in every run, unless more depth is asked for.
    seed = ["--seed", "1"] if DEPTH == 1 else []
    running = ["run", str(OPENAPI), "--url", url, "--no-color", "-n", str(EXAMPLES)]
    ended = subprocess.run(
        [*command, *running, *seed, *options],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": str(SUPPORT), **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=JUDGE_TIMEOUT_S,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "No issues found" in ended.stdout or "warning" in ended.stdout, ended.stdout


def is_well(served: Process) -> bool:
    """Return whether the service still runs and has logged no error."""
    return served.popen.poll() is None and not [
        line for line in served.lines() if line["level"] in {"error", "critical"}
    ]


@judged
@pytest.mark.timeout(JUDGE_TIMEOUT_S)
def test_signed_requests_are_answered_as_the_document_says(served: Process) -> None:
    """Signed requests that match the document are accepted and answered as it says."""
    signing = {"SCHEMATHESIS_HOOKS": "signing_hook", "SIGN_WITH": SECRET.reveal().decode()}
    url = f"http://127.0.0.1:{served.port}"
    judge(url, "--exclude-path", "/metrics", "--phases", "examples,coverage,fuzzing", **signing)

    decided = served.lines("event.admitted") + served.lines("event.expired")
    thin = served.lines("event.queued") + served.lines("event.expired")
    assert [line for line in decided if line["event_type"].startswith("identity.")]
    assert [line for line in thin if line["event_type"].startswith("v1.identity.")]
    assert is_well(served)


@judged
@pytest.mark.timeout(JUDGE_TIMEOUT_S)
def test_unsigned_requests_are_answered_as_the_document_says(served: Process) -> None:
    """Unsigned requests are rejected as the document says."""
    unsigned = ("--exclude-checks", "positive_data_acceptance")
    url = f"http://127.0.0.1:{served.port}"
    judge(url, "--exclude-path", "/metrics", "--phases", "fuzzing", *unsigned)

    assert is_well(served)


@judged
@pytest.mark.timeout(JUDGE_TIMEOUT_S)
def test_the_admin_port_answers_as_the_document_says(served: Process) -> None:
    """Metrics and probes answer as the document says, and accept no other method."""
    judge(served.admin, "--include-path-regex", "^/(metrics|livez|readyz)$")


@judged
def test_the_document_is_valid_openapi() -> None:
    """openapi-spec-validator accepts the document."""
    validator = Path(os.environ["TEST_SCHEMATHESIS"]).with_name("openapi-spec-validator")
    ended = subprocess.run(
        [validator, "--schema", "3.1", OPENAPI],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
