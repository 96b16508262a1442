"""Laws of handlers: how a name becomes an open handler, and what the built-in one says."""

from __future__ import annotations

import importlib
import socket
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog.testing

from service import handlers
from service.errors import ConfigError, Unreachable
from service.handlers import Handler, log
from service.transitions.transition import StatusTransition

TRANSITION = StatusTransition(
    event_id="evt_1",
    event_type="identity.verification_session.requires_input",
    occurred_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    livemode=True,
    account="acct_1",
    session_id="vs_1",
    session_type="document",
    current="requires_input",
    last_error_code="consent_declined",
    redaction_status=None,
    report_id="vr_1",
    client_reference_id="canary_reference",
    related_customer="cus_canary",
    metadata={"tenant": "acme", "order": "canary_metadata"},
    previous="processing",
    sequence=3,
    epoch=1,
    expected=True,
)


MODULES = {
    "acme_broken": "from acme_audit import missing\n",
    "acme_syntax": "def open(environ)\n    pass\n",
    "acme_name": "import os\nopen = nowhere\n",
    "acme_needs": "import os\nimport acme_dependency\n",
    "acme_exits": "import sys\nsys.exit(3)\n",
    "acme_wrong": """
from contextlib import asynccontextmanager

def no_argument():
    pass

def no_context(environ):
    return 1

async def no_decorator(environ):
    yield print

@asynccontextmanager
async def raising(environ):
    raise LookupError("canary")
    yield

class NoContext:
    def __init__(self, environ):
        pass

    async def __call__(self, transition):
        pass
""",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a distribution with two handlers under the group of entry points."""
    (tmp_path / "acme_audit.py").write_text("def open(environ): ...\nnot_callable = 1\n")
    for name, text in MODULES.items():
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(text)
    information = tmp_path / "acme-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[verification_handlers]\naudit = acme_audit:open\nlog = acme_audit:open\n"
        "[another_group]\nhidden = acme_audit:open\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_a_built_in_name_is_found() -> None:
    """`log` is built in."""
    assert handlers.find(["log"]) == {"log": log.open}


@pytest.mark.usefixtures("installed")
def test_an_entry_point_and_a_path_are_found_in_the_order_named() -> None:
    """Installed names and dotted paths are handlers too, in the order in which they are named."""
    found = handlers.find(["acme_audit:open", "audit", "log"])

    assert list(found) == ["acme_audit:open", "audit", "log"]
    assert found["audit"].__module__ == found["acme_audit:open"].__module__ == "acme_audit"


@pytest.mark.usefixtures("installed")
def test_a_built_in_name_cannot_be_taken() -> None:
    """An entry point that calls itself `log` does not replace ours."""
    assert handlers.find(["log"]) == {"log": log.open}


def unfit(name: str) -> str:
    """Return how a module is told of that cannot be imported."""
    return f"module acme_{name} cannot be imported:"


@pytest.mark.usefixtures("installed")
def test_every_wrong_name_is_told_at_once(tmp_path: Path) -> None:
    """All names that lead nowhere are reported together, each with where its way ended."""
    wrong = {
        "hidden": "neither a known name nor a path",
        "kafak": "neither a known name nor a path",
        ":open": "neither a known name nor a path",
        "acme_audit:": "neither a known name nor a path",
        "acme_missing.audit:open": "module acme_missing is not installed",
        "acme_broken:open": f"{unfit('broken')} ImportError ({tmp_path}/acme_broken.py:1 ",
        "acme_syntax:open": f"{unfit('syntax')} SyntaxError ({tmp_path}/acme_syntax.py:1 ",
        "acme_name:open": f"{unfit('name')} NameError ({tmp_path}/acme_name.py:2 ",
        "acme_needs:open": f"module acme_dependency is not installed ({tmp_path}/acme_needs.py:2 ",
        "acme_exits:open": f"{unfit('exits')} SystemExit ({tmp_path}/acme_exits.py:2 ",
        "acme_audit:missing": "module acme_audit has no callable missing",
        "acme_audit:not_callable": "module acme_audit has no callable not_callable",
    }
    with pytest.raises(ConfigError) as raised:
        handlers.find(["log", *wrong, "audit"])

    assert len(raised.value.problems) == len(wrong)
    for (name, why), problem in zip(wrong.items(), raised.value.problems, strict=True):
        assert problem.startswith(f"HANDLERS: {name}: {why}")
        assert problem.endswith("are audit, kafka, log, nats, rabbitmq, redis_stream, sqs")


async def test_handlers_are_opened_in_order_and_closed_in_reverse() -> None:
    """Every handler is opened with the environment, and closed last in, first out."""
    steps: list[str] = []

    def opener(name: str) -> handlers.OpenHandler:
        @asynccontextmanager
        async def open_one(environ: Mapping[str, str]) -> AsyncIterator[Handler]:
            steps.append(f"open {name} {environ['PLACE']}")

            async def handle(_: StatusTransition) -> None: ...

            yield handle
            steps.append(f"close {name}")

        return open_one

    openers = {name: opener(name) for name in ("a", "b")}
    async with handlers.open_all(openers, {"PLACE": "here"}) as opened:
        assert list(opened) == ["a", "b"]
        assert steps == ["open a here", "open b here"]
    assert steps[2:] == ["close b", "close a"]


async def test_a_plain_callable_is_run_in_a_thread() -> None:
    """A handler that is no coroutine function neither blocks the loop nor swallows errors."""
    threads: list[int] = []

    @asynccontextmanager
    async def plain(_: Mapping[str, str]) -> AsyncIterator[Handler]:
        def handle(_: StatusTransition) -> None:
            threads.append(threading.get_ident())
            raise LookupError

        yield handle  # type: ignore[misc]

    async with handlers.open_all({"plain": plain}, {}) as opened:
        with pytest.raises(LookupError):
            await opened["plain"](TRANSITION)
    assert threads != [threading.get_ident()]


async def test_what_cannot_be_called_is_no_handler() -> None:
    """A context that yields something else is refused by the handler's name."""

    @asynccontextmanager
    async def nothing(_: Mapping[str, str]) -> AsyncIterator[Handler]:
        yield None  # type: ignore[misc]

    with pytest.raises(ConfigError, match="HANDLERS: nothing: what it opens cannot be called"):
        async with handlers.open_all({"nothing": nothing}, {}):
            pytest.fail("not reached")


async def test_a_handler_that_cannot_open_closes_the_others() -> None:
    """When one handler fails to open, those opened before it are closed."""
    steps: list[str] = []

    @asynccontextmanager
    async def good(_: Mapping[str, str]) -> AsyncIterator[Handler]:
        try:
            yield print  # type: ignore[misc]
        finally:
            steps.append("closed")

    @asynccontextmanager
    async def bad(_: Mapping[str, str]) -> AsyncIterator[Handler]:
        raise ConnectionError
        yield

    with pytest.raises(ConfigError, match=r"^HANDLERS: bad cannot be opened: ConnectionError \("):
        async with handlers.open_all({"good": good, "bad": bad}, {}):
            pytest.fail("not reached")
    assert steps == ["closed"]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_argument", "cannot be opened: TypeError ({}:4 no_argument)"),
        ("no_context", "what {}:7 no_context returns is no async context manager"),
        ("no_decorator", "what {}:10 no_decorator returns is no async context manager"),
        ("raising", "cannot be opened: LookupError ({}:15 raising)"),
        ("NoContext", "what {}:19 __init__ returns is no async context manager"),
    ],
)
async def test_a_handler_that_cannot_be_opened_is_named_with_its_place(
    tmp_path: Path, name: str, problem: str
) -> None:
    """What is wrong with an opener is told with the handler's name, file and line; no message."""
    path = f"acme_wrong:{name}"
    with pytest.raises(ConfigError) as raised:
        async with handlers.open_all(handlers.find([path]), {}):
            pytest.fail("not reached")
    assert problem.format(tmp_path / "acme_wrong.py") in str(raised.value)
    assert str(raised.value).startswith(f"HANDLERS: {path}")
    assert "canary" not in str(raised.value)


async def test_a_check_that_fails_is_named_with_its_place() -> None:
    """A handler's look at its queue raises a setting's problem, Unreachable, or is told by name."""

    class Checking:
        def __init__(self, error: Exception) -> None:
            self.error = error

        async def __call__(self, transition: StatusTransition, /) -> None: ...

        async def check(self) -> None:
            raise self.error

    assert not await handlers.examine("own", print)  # type: ignore[arg-type]
    with pytest.raises(Unreachable, match=r"^name_unresolved$"):
        await handlers.examine("own", Checking(socket.gaierror()))
    with pytest.raises(ConfigError, match=r"^wrong$"):
        await handlers.examine("own", Checking(ConfigError(["wrong"])))
    with pytest.raises(
        ConfigError, match=rf"own cannot be checked: ValueError \({__file__}:\d+ chec"
    ):
        await handlers.examine("own", Checking(ValueError("canary")))


BARE = """
import functools
from service.transitions import StatusTransition

taken = []

async def coroutine(transition):
    taken.append(transition)

def plain(transition):
    taken.append(transition)

def annotated(one: StatusTransition):
    taken.append(one)

class Instance:
    async def __call__(self, anything):
        taken.append(anything)

    def destination(self, transition):
        return "there"

instance = Instance()
partial = functools.partial(coroutine)
"""


@pytest.mark.parametrize("name", ["coroutine", "plain", "annotated", "instance", "partial"])
async def test_what_takes_a_transition_itself_opens_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare callable is a handler: any coroutine function, and what says that it takes one."""
    (tmp_path / "acme_bare.py").write_text(BARE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "acme_bare", raising=False)
    path = f"acme_bare:{name}"
    async with handlers.open_all(handlers.find([path]), {}) as opened:
        await opened[path](TRANSITION)
        destination = handlers.destination_of(opened[path])
    assert importlib.import_module("acme_bare").taken == [TRANSITION]
    assert (destination is not None) == (name == "instance")


async def test_whoever_wraps_a_handler_keeps_its_destinations(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A plain handler in threads, and one whose failures are shown, still say where they go."""

    class Plain:
        def __call__(self, transition: StatusTransition, /) -> None:
            raise LookupError("shown in dev only")

        def destination(self, transition: StatusTransition) -> str:
            return transition.current

    @asynccontextmanager
    async def opener(_: Mapping[str, str]) -> AsyncIterator[Any]:
        yield Plain()

    async with handlers.open_all({"own": opener}, {}) as opened:
        shown = handlers.showing_tracebacks(opened["own"])
        with pytest.raises(LookupError):
            await shown(TRANSITION)
        destination = handlers.destination_of(shown)
    assert destination is not None
    assert destination(TRANSITION) == TRANSITION.current
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):")
    assert printed.endswith("LookupError: shown in dev only\n")


async def test_the_log_handler_writes_exactly_the_allow_list() -> None:
    """One line per transition holds the listed fields; no reference and no metadata."""
    async with log.open({}) as handle:
        with structlog.testing.capture_logs() as lines:
            await handle(TRANSITION)

    assert lines == [
        {
            "event": "transition",
            "log_level": "info",
            "event_id": "evt_1",
            "event_type": "identity.verification_session.requires_input",
            "occurred_at": "2026-01-02T03:04:05+00:00",
            "session_id": "vs_1",
            "previous": "processing",
            "current": "requires_input",
            "sequence": 3,
            "epoch": 1,
            "expected": True,
            "reversal": False,
            "replay": None,
            "stripe_status": None,
            "last_error_code": "consent_declined",
            "redaction_status": None,
            "report_id": "vr_1",
            "livemode": True,
            "account": "acct_1",
            "account_name": None,
            "context": None,
            "origin": "webhook",
            "endpoint": None,
        }
    ]


async def test_the_log_handler_warns_of_a_reversal_and_names_a_replay() -> None:
    """A final status that was changed stands out; what comes again says so."""
    changed = {"previous": "verified", "reversal": True, "replay": "again"}
    async with log.open({}) as handle:
        with structlog.testing.capture_logs() as lines:
            await handle(msgspec.structs.replace(TRANSITION, **changed))

    [line] = lines
    assert line["log_level"] == "warning"
    assert line.items() >= changed.items()


async def test_the_log_handler_adds_the_metadata_that_is_named() -> None:
    """Metadata is written for the keys in LOG_METADATA_KEYS that a transition has, and no other."""
    async with log.open({"LOG_METADATA_KEYS": "tenant,absent"}) as handle:
        with structlog.testing.capture_logs() as lines:
            await handle(TRANSITION)

    [line] = lines
    assert {key: line[key] for key in line if key.startswith("metadata")} == {
        "metadata.tenant": "acme"
    }
    assert "canary" not in str(line)
