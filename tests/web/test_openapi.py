"""The laws of the OpenAPI document: it says what the service does, by an independent judge too."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import orjson
import pytest

from service.config import Settings
from service.errors import RejectionReason
from service.inbox.admission import Outcome
from service.openapi import openapi
from service.web import app
from tests.fuzz import targets
from tests.generate import DEPLOY
from tests.support.depth import DEPTH
from tests.support.harness import SECRET, Process, open_sandbox
from tests.support.programs import FIXTURES, ROOT

HERE = Path(__file__).parent
SUPPORT = ROOT / "tests" / "support"
PREFIX = "identity.verification_session."
DOCUMENT = DEPLOY / "openapi.yaml"
JUDGE_TIMEOUT_S = 240 * DEPTH
EXAMPLES = 25 * DEPTH

WHOLE = openapi()
NOTIFICATION = jsonschema_rs.Draft202012Validator(
    {"$ref": "#/components/schemas/Notification", "components": WHOLE["components"]}
)


REFUSALS = ("Refused", "NotAllowed", "NoSuchEndpoint", "TooLarge", "HeadersTooLarge")


def words(response: str) -> list[str]:
    """Return the words that an answer of the document may hold."""
    [content] = WHOLE["components"]["responses"][response]["content"].values()
    schema = content["schema"]
    found: list[str] = schema["properties"][schema["required"][0]]["enum"]
    return found


def test_every_word_is_in_the_document_once() -> None:
    """Each outcome and each refusal has its place, with the status it is answered with."""
    refusals = [word for name in REFUSALS for word in words(name)]

    assert words("Outcome") == [*Outcome]
    assert sorted(refusals) == sorted(RejectionReason)
    assert words("Unavailable") == ["unavailable"]


def test_every_path_is_in_the_document() -> None:
    """The document has the paths that the two applications route, and no other."""
    nobody: Any = None
    entrance: Any = app.create_app(nobody, nobody, Settings())
    routes: list[Any] = [*entrance.routes, *app.create_admin_app(nobody).routes]

    assert WHOLE["paths"].keys() == {route.path_format for route in routes}


@pytest.mark.parametrize("body", targets.corpus("body"), ids=range(8))
def test_what_stripe_sends_is_valid(body: bytes) -> None:
    """Every event of Stripe's that is kept here is what the document asks for."""
    found = orjson.loads(body)
    events = found if isinstance(found, list) else [found]

    for event in events:
        if "type" in event and "data" in event:
            NOTIFICATION.validate(event)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("id",), "evt-1"),
        (("id",), None),
        (("created",), "yesterday"),
        (("created",), 10**11),
        (("data", "object", "id"), "cs_1"),
        (("data", "object", "status"), ""),
        (("data", "object", "metadata"), {"order": 1}),
        (("data", "object", "verified_outputs"), {"dob": {"day": "first"}}),
        (("data",), {}),
    ],
    ids=repr,
)
def test_what_is_refused_or_left_out_is_invalid(path: tuple[str, ...], wrong: Any) -> None:
    """What the service cannot read of an event of ours, the document does not allow."""
    event = orjson.loads((FIXTURES / f"{PREFIX}verified.json").read_bytes())
    part = event
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = wrong

    assert not NOTIFICATION.is_valid(event)


judged = pytest.mark.skipif(
    "TEST_SCHEMATHESIS" not in os.environ,
    reason="schemathesis has an environment of its own: set TEST_SCHEMATHESIS to its command",
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Serve on ports of the system's choice, with a second endpoint."""
    with open_sandbox(tmp_path_factory.mktemp("served")) as opened:
        secret = SECRET.reveal().decode()
        yield opened.start("serve", STRIPE_WEBHOOK_SECRETS_CONNECT=secret).ready()


def judge(url: str, *options: str, **environ: str) -> None:
    """Let schemathesis hold the service to its document; its report is the failure's text."""
    command = [os.environ["TEST_SCHEMATHESIS"], "--config-file", str(HERE / "schemathesis.toml")]
    # The same examples for every change; new ones each time by command.
    seed = ["--seed", "1"] if DEPTH == 1 else []
    running = [
        "run",
        str(DOCUMENT),
        "--url",
        url,
        "--no-color",
        "-n",
        str(EXAMPLES),
        *seed,
        *options,
    ]
    ended = subprocess.run(
        [*command, *running],
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
    """Say whether the service runs on and has logged nothing that no stranger may cause."""
    return served.popen.poll() is None and not [
        line for line in served.lines() if line["level"] in {"error", "critical"}
    ]


@judged
@pytest.mark.timeout(JUDGE_TIMEOUT_S)
def test_signed_requests_are_answered_as_the_document_says(served: Process) -> None:
    """What the document allows is accepted when it is signed, and answered as it says."""
    signing = {"SCHEMATHESIS_HOOKS": "signing_hook", "SIGN_WITH": SECRET.reveal().decode()}
    url = f"http://127.0.0.1:{served.port}"
    judge(url, "--exclude-path", "/metrics", "--phases", "examples,coverage,fuzzing", **signing)

    assert served.lines("event.admitted") or served.lines("event.expired")
    assert is_well(served)


@judged
@pytest.mark.timeout(JUDGE_TIMEOUT_S)
def test_unsigned_requests_are_answered_as_the_document_says(served: Process) -> None:
    """Whatever comes without a signature is refused in the words of the document."""
    unsigned = ("--exclude-checks", "positive_data_acceptance")
    url = f"http://127.0.0.1:{served.port}"
    judge(url, "--exclude-path", "/metrics", "--phases", "fuzzing", *unsigned)

    assert is_well(served)


@judged
@pytest.mark.timeout(JUDGE_TIMEOUT_S)
def test_the_admin_port_answers_as_the_document_says(served: Process) -> None:
    """Metrics and probes are what the document says, and take no other method."""
    judge(served.admin, "--include-path-regex", "^/(metrics|livez|readyz)$")


@judged
def test_an_independent_reader_accepts_the_document() -> None:
    """The document is valid OpenAPI 3.1, by a validator that is not ours."""
    validator = Path(os.environ["TEST_SCHEMATHESIS"]).with_name("openapi-spec-validator")
    ended = subprocess.run(
        [validator, "--schema", "3.1", DOCUMENT],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
