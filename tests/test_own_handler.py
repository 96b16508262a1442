"""Laws of your own handlers: the README's example works as installed; plain callables too."""

from __future__ import annotations

import asyncio
import functools
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from harness import DEADLINE_S, Process, Yard, eventually, yard
from msgspec import structs

from service import checks, handlers
from service.config import Settings
from service.errors import Undeliverable
from service.findings import Severity
from service.transitions import StatusTransition

README = (Path(__file__).parents[1] / "README.md").read_text()
# The one thing that the example leaves to its reader.
DATABASE = """
from contextlib import asynccontextmanager
from pathlib import Path


class Users:
    def __init__(self, path):
        self.path = path

    async def set_status(self, *words):
        with self.path.open("a") as file:
            print(*words, file=file)


@asynccontextmanager
async def connect(url):
    yield Users(Path(url))
"""
NAMES = ("audit", "own_audit:open")


def example() -> str:
    """Return the README's example of a handler."""
    section = README.partition("\n## Handlers\n")[2].partition("\n## ")[0]
    [code] = [
        block
        for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        if "async def open(environ" in block
    ]
    return str(code)


def transition(n: int = 1, session: str = "vs_1") -> StatusTransition:
    """Return a transition."""
    return StatusTransition(
        event_id=f"evt_{n}",
        event_type="t",
        occurred_at=datetime(2026, 1, 1, tzinfo=UTC),
        session_id=session,
        client_reference_id="user_1",
        current="verified",
        sequence=n,
        epoch=1,
        expected=True,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel of the example and let pip install it; return where."""
    directory = tmp_path_factory.mktemp("own")
    wheel = directory / "own_audit-1.0-py3-none-any.whl"
    information = "own_audit-1.0.dist-info"
    content = {
        "own_audit.py": example(),
        "database.py": DATABASE,
        f"{information}/METADATA": "Metadata-Version: 2.1\nName: own-audit\nVersion: 1.0\n",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
        f"{information}/entry_points.txt": f"[{handlers.ENTRY_POINT_GROUP}]\n"
        "audit = own_audit:open\n",
    }
    content[f"{information}/RECORD"] = "".join(
        f"{name},,\n" for name in [*content, f"{information}/RECORD"]
    )
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    target = directory / "site"
    options = "install -q --no-deps --no-index --no-compile --disable-pip-version-check --target"
    command = [sys.executable, "-m", "pip", *options.split(), str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return target


@pytest.fixture
def importable(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the installed package importable here."""
    monkeypatch.syspath_prepend(installed)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    """Yield a yard with a server."""
    with yard(tmp_path_factory.mktemp("yard")) as opened:
        yield opened


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("name", NAMES)
async def test_the_example_delivers(tmp_path: Path, name: str) -> None:
    """The README's example is found by its name and by its path, opened, and takes transitions."""
    environ = {"DATABASE_URL": str(tmp_path / "out")}
    async with handlers.open_all(handlers.find([name]), environ) as opened:
        await opened[name](transition())
        with pytest.raises(Undeliverable):
            await opened[name](structs.replace(transition(), client_reference_id=None))

    assert (tmp_path / "out").read_text() == "user_1 verified (1, 1)\n"


def test_check_says_what_is_loaded_and_from_where(
    ground: Yard, installed: Path, tmp_path: Path
) -> None:
    """`check` names each handler, its module and what installed it; and whether it opens."""

    def check(**settings: str) -> tuple[int, dict[str, dict[str, str]]]:
        names = {"HANDLERS": ",".join(NAMES), "PYTHONPATH": str(installed)}
        process: Process = ground.run("check", "--json", **names, **settings)
        return process.wait(), {one["name"]: one for one in orjson.loads(process.out)}

    code, found = check(DATABASE_URL=str(tmp_path / "out"))
    assert code == 0
    assert found["handler audit"]["meaning"] == "opens (own_audit:open of own-audit 1.0)"
    assert found["handler own_audit:open"]["meaning"] == "opens (own_audit:open)"

    code, found = check()
    assert code == 1
    assert found["handler audit"]["severity"] == Severity.FATAL


async def opened_with(call: Any) -> handlers.Handler:
    """Return a handler as it comes out of being opened."""

    @asynccontextmanager
    async def opener(_: Mapping[str, str]) -> AsyncIterator[Any]:
        yield call

    async with handlers.open_all({"own": opener}, {}) as opened:
        return opened["own"]


class Slow:
    """A plain callable that waits for leave to go on.

    Attributes:
        most: How many of its calls ran at once for one session, at most.
    """

    def __init__(self) -> None:
        self.leave = threading.Event()
        self.running: list[str] = []
        self.most = 0
        self.begun = 0
        self.ended = 0

    def __call__(self, taken: StatusTransition) -> None:
        """Take a transition, slowly."""
        self.running.append(taken.session_id)
        self.begun += 1
        self.most = max(self.most, self.running.count(taken.session_id))
        self.leave.wait(DEADLINE_S)
        self.running.remove(taken.session_id)
        self.ended += 1


async def test_a_plain_call_that_outlasts_its_time_is_not_overlapped() -> None:
    """After a time-out the session's next attempt waits for the thread; other sessions do not."""
    slow = Slow()
    handle = await opened_with(slow)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await handle(transition())
    assert slow.begun == 1
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await handle(transition(session="vs_2"))
    assert slow.begun == 2

    again = asyncio.create_task(handle(transition()))
    await asyncio.sleep(0)
    slow.leave.set()
    await asyncio.wait_for(again, DEADLINE_S)
    assert (slow.begun, slow.most) == (3, 1)
    await eventually(lambda: slow.ended == 3)


async def test_many_plain_calls_run_side_by_side() -> None:
    """As many plain calls run at once as are made: nobody waits for a free thread."""
    slow = Slow()
    handle = await opened_with(slow)
    calls = [asyncio.create_task(handle(transition(session=f"vs_{n}"))) for n in range(100)]
    await eventually(lambda: len(slow.running) == 100)
    slow.leave.set()
    await asyncio.gather(*calls)


async def test_what_a_thread_raises_late_disturbs_nobody() -> None:
    """The error of a call nobody waits for any more is not raised into the next one."""
    leave = threading.Event()
    fails = True

    def plain(_: StatusTransition) -> None:
        if fails:
            leave.wait(DEADLINE_S)
            raise LookupError

    handle = await opened_with(plain)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await handle(transition())
    fails = False
    leave.set()
    await asyncio.wait_for(handle(transition()), DEADLINE_S)


async def _coroutine(note: Callable[[], None], _: StatusTransition) -> None:
    await asyncio.sleep(0)
    note()


async def test_coroutines_in_disguise_are_awaited() -> None:
    """A partial or a decorated coroutine function delivers before it counts as done."""
    taken: list[int] = []
    direct = functools.partial(_coroutine, lambda: taken.append(1))

    def decorated(taken_over: StatusTransition) -> object:
        return direct(taken_over)

    for call in (direct, decorated):
        before = len(taken)
        await (await opened_with(call))(transition())
        assert len(taken) == before + 1


def test_a_hanging_thread_does_not_hold_the_process(tmp_path: Path) -> None:
    """A process ends though a plain call never does."""
    program = """
import asyncio, time
from contextlib import asynccontextmanager
from service import handlers

@asynccontextmanager
async def opener(_):
    yield lambda transition: time.sleep(3600)

class Transition:
    session_id = "vs_1"

async def main():
    async with handlers.open_all({"own": opener}, {}) as opened:
        try:
            async with asyncio.timeout(0.05):
                await opened["own"](Transition)
        except TimeoutError:
            print("timed out")

asyncio.run(main())
"""
    process = Process("own", directory=tmp_path, program=program)
    try:
        assert process.wait() == 0
        assert process.out == b"timed out\n"
        assert process.err == b""
    finally:
        process.end()


@pytest.mark.usefixtures("connections")
async def test_what_opens_to_no_callable_is_fatal_in_check(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check` goes the way the worker goes: what cannot be called is found before it is needed."""

    @asynccontextmanager
    async def nothing(_: Mapping[str, str]) -> AsyncIterator[Any]:
        yield None

    monkeypatch.setattr(handlers, "find", lambda _: {"log": nothing})
    [found] = [f for f in await checks.findings(settings, {}) if f.name == "handler log"]
    assert found.severity is Severity.FATAL
    assert "cannot be called" in found.meaning
