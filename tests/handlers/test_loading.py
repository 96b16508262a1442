"""From the names in HANDLERS to open handlers, and what is reported on the way."""

from __future__ import annotations

import asyncio
import importlib
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from service.errors import ConfigError, Unreachable
from service.handlers import Handler, OpenHandler, destination_of, loading, log
from service.testing import transition
from service.transitions.transition import StatusTransition
from tests.support.waiting import until


class Own:
    """A handler that does nothing."""

    async def __call__(self, transition: StatusTransition, /) -> None:
        """Do nothing."""


class Checking(Own):
    """A handler whose check fails."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def check(self) -> None:
        """Raise the error."""
        raise self.error


MODULES = {
    "acme_broken": "from acme_audit import missing\n",
    "acme_syntax": "def open(environ)\n    pass\n",
    "acme_name": "import os\nopen = nowhere\n",
    "acme_needs": "import os\nimport acme_dependency\n",
    "acme_exits": "import asyncio\nraise asyncio.CancelledError\n",
    "acme_plain": "def handle(transition): ...\n",
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

@asynccontextmanager
async def empty(environ):
    if not environ:
        return
    yield
""",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a distribution with two entry points, and modules that cannot be loaded."""
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


@pytest.mark.usefixtures("installed")
def test_an_entry_point_and_a_path_are_found_in_the_order_named() -> None:
    """Names of entry points and dotted paths are found, in the order in which they are named."""
    found = loading.find(["acme_audit:open", "audit", "log"])

    assert list(found) == ["acme_audit:open", "audit", "log"]
    assert found["audit"].__module__ == found["acme_audit:open"].__module__ == "acme_audit"


@pytest.mark.usefixtures("installed")
def test_a_built_in_name_cannot_be_taken() -> None:
    """An entry point named `log` does not replace the built-in handler."""
    assert loading.find(["log"]) == {"log": log.open}


def unfit(name: str) -> str:
    """Return the beginning of the problem of a module that cannot be imported."""
    return f"module acme_{name} cannot be imported:"


@pytest.mark.usefixtures("installed")
def test_all_wrong_names_are_reported_at_once(tmp_path: Path) -> None:
    """One error lists every name that cannot be loaded, each with its reason."""
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
        "acme_exits:open": f"{unfit('exits')} CancelledError ({tmp_path}/acme_exits.py:2 ",
        "acme_plain:handle": "is no coroutine function: write `async def`",
        "acme_audit:missing": "module acme_audit has no callable missing",
        "acme_audit:not_callable": "module acme_audit has no callable not_callable",
    }
    with pytest.raises(ConfigError) as raised:
        loading.find(["log", *wrong, "audit"])

    assert len(raised.value.problems) == len(wrong)
    for (name, why), problem in zip(wrong.items(), raised.value.problems, strict=True):
        assert problem.startswith(f"HANDLERS: {name}: {why}")
        assert problem.endswith("are audit, kafka, log, nats, rabbitmq, redis_stream, sqs")


async def test_handlers_are_opened_in_order_and_closed_in_reverse() -> None:
    """Each handler is opened with the environment; the last one opened is closed first."""
    steps: list[str] = []

    def opener(name: str) -> OpenHandler:
        @asynccontextmanager
        async def open_one(environ: Mapping[str, str]) -> AsyncIterator[Handler]:
            steps.append(f"open {name} {environ['PLACE']}")

            async def handle(_: StatusTransition) -> None: ...

            yield handle
            steps.append(f"close {name}")

        return open_one

    openers = {name: opener(name) for name in ("a", "b")}
    async with loading.open_all(openers, {"PLACE": "here"}) as opened:
        assert list(opened) == ["a", "b"]
        assert steps == ["open a here", "open b here"]
    assert steps[2:] == ["close b", "close a"]


@pytest.mark.parametrize(
    "opened", [None, print, lambda transition: transition], ids=["nothing", "builtin", "lambda"]
)
async def test_only_a_coroutine_function_is_a_handler(opened: Any) -> None:
    """An opener that yields anything else is reported under the handler's name."""

    @asynccontextmanager
    async def opener(_: Mapping[str, str]) -> AsyncIterator[Any]:
        yield opened

    with pytest.raises(ConfigError, match=r"^HANDLERS: own: what it opens is no corou"):
        async with loading.open_all({"own": opener}, {}):
            pytest.fail("not reached")


async def test_a_handler_that_cannot_open_closes_the_others() -> None:
    """When a handler fails to open, the handlers opened before it are closed."""
    steps: list[str] = []

    @asynccontextmanager
    async def good(_: Mapping[str, str]) -> AsyncIterator[Handler]:
        try:
            yield Own()
        finally:
            steps.append("closed")

    @asynccontextmanager
    async def bad(_: Mapping[str, str]) -> AsyncIterator[Handler]:
        raise ConnectionError
        yield

    with pytest.raises(ConfigError, match=r"^HANDLERS: bad cannot be opened: ConnectionError \("):
        async with loading.open_all({"good": good, "bad": bad}, {}):
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
        ("empty", "cannot be opened: RuntimeError ({}:25 empty)"),
    ],
)
async def test_a_handler_that_cannot_be_opened_is_reported_with_its_place(
    tmp_path: Path, name: str, problem: str
) -> None:
    """The problem names handler, file and line, and does not quote the exception's message."""
    path = f"acme_wrong:{name}"
    with pytest.raises(ConfigError) as raised:
        async with loading.open_all(loading.find([path]), {}):
            pytest.fail("not reached")
    assert problem.format(tmp_path / "acme_wrong.py") in str(raised.value)
    assert str(raised.value).startswith(f"HANDLERS: {path}")
    assert "canary" not in str(raised.value)


async def test_a_check_says_what_is_wrong_or_out_of_reach() -> None:
    """A check ends in the handler's ConfigError or in Unreachable; a handler may have none."""
    assert not await loading.check("own", Own())
    with pytest.raises(Unreachable, match=r"^name_unresolved$"):
        await loading.check("own", Checking(socket.gaierror()))
    with pytest.raises(ConfigError, match=r"^wrong$"):
        await loading.check("own", Checking(ConfigError(["wrong"])))


@pytest.mark.parametrize("kind", [ValueError, SystemExit, StopIteration, asyncio.CancelledError])
async def test_an_opener_and_a_check_may_raise_anything(kind: type[BaseException]) -> None:
    """No error of a handler ends the process without a word: each has its class and place."""

    @asynccontextmanager
    async def opener(_: Mapping[str, str]) -> AsyncIterator[Handler]:
        raise kind
        yield

    place = rf"\w+ \({__file__}:\d+ (opener|check)\)"
    with pytest.raises(ConfigError, match=f"own cannot be opened: {place}"):
        async with loading.open_all({"own": opener}, {}):
            pytest.fail("not reached")
    with pytest.raises(ConfigError, match=f"own cannot be checked: {place}"):
        await loading.check("own", Checking(kind()))


async def test_a_handler_that_holds_up_the_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a handler is opened or checked, the process delivers nothing: its log says why."""
    monkeypatch.setattr(loading, "STUCK_S", 0.0)

    class Slow(Own):
        async def check(self) -> None:
            await until(lambda: len(lines) == 2)

    @asynccontextmanager
    async def opener(_: Mapping[str, str]) -> AsyncIterator[Handler]:
        await until(lambda: len(lines) == 1)
        yield Slow()

    with structlog.testing.capture_logs() as lines:
        async with loading.open_all({"own": opener}, {}) as opened:
            await loading.check("own", opened["own"])
    assert {(line["event"], line["handler"]) for line in lines} == {("handler.stuck", "own")}


BARE = """
import functools

taken = []

async def function(one):
    taken.append(one)

class Instance:
    async def __call__(self, anything):
        taken.append(anything)

    def destination(self, transition):
        return "there"

instance = Instance()
partial = functools.partial(function)
"""


@pytest.mark.parametrize("name", ["function", "instance", "partial"])
async def test_a_coroutine_function_needs_no_opener(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coroutine function, or an object with an `async __call__`, is a handler as it is."""
    (tmp_path / "acme_bare.py").write_text(BARE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "acme_bare", raising=False)
    path = f"acme_bare:{name}"
    async with loading.open_all(loading.find([path]), {}) as opened:
        await opened[path](transition())
        destination = destination_of(opened[path])
    assert importlib.import_module("acme_bare").taken == [transition()]
    assert (destination is not None) == (name == "instance")
