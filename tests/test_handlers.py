"""Laws of handlers: how a name becomes an open handler, and what the built-in one says."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
import structlog.testing

from service import handlers
from service.errors import ConfigError
from service.handlers import Handler, log
from service.transitions import StatusTransition

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


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a distribution with two handlers under the group of entry points."""
    (tmp_path / "acme_audit.py").write_text("def open(environ): ...\nnot_callable = 1\n")
    (tmp_path / "acme_broken.py").write_text("from acme_audit import missing\n")
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


@pytest.mark.usefixtures("installed")
def test_every_wrong_name_is_told_at_once() -> None:
    """All names that lead nowhere are reported together, each with where its way ended."""
    wrong = {
        "hidden": "neither a known name nor a path",
        "kafak": "neither a known name nor a path",
        ":open": "neither a known name nor a path",
        "acme_audit:": "neither a known name nor a path",
        "acme_missing.audit:open": "module acme_missing is not installed",
        "acme_broken:open": "module acme_broken cannot be imported",
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

    with pytest.raises(ConnectionError):
        async with handlers.open_all({"good": good, "bad": bad}, {}):
            pytest.fail("not reached")
    assert steps == ["closed"]


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
