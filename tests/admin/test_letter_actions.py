"""Replaying and dropping on the page: who may, what becomes of the letters, and what is shown."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html import unescape
from typing import Any

import httpx2
import msgspec
import pytest
from structlog.typing import EventDict

from service.admin import paths
from service.admin.letter_actions import Action, LetterActions, Progress, Verb
from service.admin.page import Page
from service.admin.views import letter_actions as view
from service.delivery import consumer_groups, dead_letters, letter_pages
from service.delivery.dead_letters import MAX_PER_CALL, EntryFilter
from service.parsers import FETCH
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.telemetry import metrics
from tests.admin.conftest import AddLetter
from tests.support.logins import ACTING, READING, TOKENS, OpenPage
from tests.support.shown import HOSTILE_WORDS
from tests.support.waiting import until

HANDLER = "log"
VERBS: tuple[Verb, ...] = ("replay", "drop")
both_verbs = pytest.mark.parametrize("verb", VERBS)


@dataclass(frozen=True)
class Deployment:
    """Dead letters on an empty server, and pages that act on them."""

    connections: Connections
    keys: Keys
    make_page: Callable[..., Page]
    open_page: OpenPage
    add_letter: AddLetter
    opened: AsyncExitStack

    @property
    def client(self) -> Any:
        """The client of its Redis."""
        return self.connections.client

    async def add(self, count: int, *, handler: str = HANDLER, **fields: str) -> list[str]:
        """Add letters, each of another session, of a handler with a group; return their ids."""
        await consumer_groups.create_groups(self.connections, self.keys, (handler,))
        return [await self.add_letter(f"vs_{n}", handler=handler, **fields) for n in range(count)]

    async def count(self, handler: str = HANDLER) -> tuple[int, int]:
        """Return how many dead letters and how many replays a handler has."""
        replays = [self.keys.replays(partition, handler) for partition in range(8)]
        letters = await dead_letters.count(self.connections, self.keys, handler)
        return letters, sum([await self.client.xlen(stream) for stream in replays])

    async def open(self, token: str = ACTING, **changes: Any) -> Viewer:
        """Return a browser with the page of another process open, logged in by a token if any."""
        page = self.make_page(**{**TOKENS, "admin_read_tokens": (), **changes})
        viewer = Viewer(page, await self.opened.enter_async_context(self.open_page(page)))
        self.opened.push_async_callback(page.actions.stop)
        if token:
            await viewer.client.post(paths.LOGIN, data={"token": token})
        return viewer


@dataclass(frozen=True)
class Viewer:
    """A browser, and the page of the process that it speaks to."""

    page: Page
    client: httpx2.AsyncClient

    async def ask(self, verb: Verb, *, handler: str = HANDLER, **query: Any) -> httpx2.Response:
        """Open the form of an action."""
        path = paths.to(f"/dead-letters/{{handler}}/{verb}", handler=handler)
        return await self.client.get(path, params=query)

    async def form(self, verb: Verb, *, handler: str = HANDLER, **query: Any) -> Any:
        """Return the fields of the form of an action."""
        asked = await self.ask(verb, handler=handler, **query)
        assert asked.status_code == 200, asked.text
        fields: dict[str, list[str]] = {}
        for name, value in re.findall(r'type="hidden" name="(.*?)" value="(.*?)"', asked.text):
            fields.setdefault(name, []).append(unescape(value))
        return fields

    async def send(
        self, verb: Verb, form: Any, *, handler: str = HANDLER, **headers: str
    ) -> httpx2.Response:
        """Send a form."""
        path = paths.to(f"/dead-letters/{{handler}}/{verb}", handler=handler)
        return await self.client.post(path, data=form, headers=headers)

    async def act(self, verb: Verb, *, handler: str = HANDLER, **query: Any) -> str:
        """Open the form of an action, send it, and return the page of its end."""
        form = await self.form(verb, handler=handler, **query)
        sent = await self.send(verb, form, handler=handler)
        assert sent.status_code == 303, sent.text
        return await self.end_of(sent.headers["location"])

    async def end_of(self, path: str) -> str:
        """Wait for the end of an action, and return its page."""

        async def is_over() -> bool:
            return "so far" not in (await self.client.get(path)).text

        await until(is_over)
        return (await self.client.get(path)).text


@pytest.fixture
async def deployment(
    connections: Connections,
    keys: Keys,
    make_page: Callable[..., Page],
    open_page: OpenPage,
    add_letter: AddLetter,
) -> AsyncIterator[Deployment]:
    """Yield an empty deployment."""
    async with AsyncExitStack() as opened:
        yield Deployment(connections, keys, make_page, open_page, add_letter, opened)


# What an action does


@both_verbs
async def test_letters_are_chosen_or_all_are_meant(deployment: Deployment, verb: Verb) -> None:
    """One, several, all that match, and all; others stay, and the end says how many there were."""
    ids = await deployment.add(20)
    await deployment.add(5, reason="refused")
    viewer = await deployment.open()

    past = {"replay": "replayed", "drop": "dropped"}[verb]
    for query, count, left in (
        ({"id": ids[3]}, 1, 24),
        ({"id": [ids[4], ids[5], ids[5], ids[3], "0-1-1"]}, 2, 22),
        ({"all": "1", "reason": "refused"}, 5, 17),
        ({"id": [ids[6], ids[7]], "reason": "refused"}, 0, 17),
        ({"all": "1", "session": "vs_8"}, 1, 16),
        ({"all": "1"}, 16, 0),
    ):
        if count:
            shown = await viewer.act(verb, **query)
            noun = "1 dead letter of" if count == 1 else f"{count} dead letters of"
            assert noun in shown
            assert past in shown
            assert "It is done." in shown
            assert "alice" in shown
        else:
            assert "There is nothing to" in (await viewer.ask(verb, **query)).text
        assert await deployment.count() == (left, (25 - left) * (verb == "replay"))


async def test_a_replay_is_moved_under_the_name_that_is_shown(deployment: Deployment) -> None:
    """Each message carries the name of its action."""
    await deployment.add(1)
    shown = await (await deployment.open()).act("replay", all="1")

    stream = deployment.keys.replays(deployment.keys.partition("vs_0"), HANDLER)
    [(_, fields)] = await deployment.client.xrange(stream)
    name = fields[b"replay"].decode()
    assert f'<dd class="id">{name}</dd>' in shown
    # Its progress can be seen for a day.
    assert 0 < await deployment.client.ttl(deployment.keys.action(name)) <= 86_400


async def test_what_cannot_be_replayed_is_counted(deployment: Deployment) -> None:
    """A letter that cannot be read stays a dead letter, and the end says that there is one."""
    await deployment.add(2)
    stream = deployment.keys.dead_letters(0, HANDLER)
    await deployment.client.xadd(stream, {"change": "x", "reason": "unreadable", "attempts": 0})
    shown = await (await deployment.open()).act("replay", all="1")

    assert "2 dead letters of" in shown
    assert "1 more was found" in shown
    assert "cannot be read" in shown
    assert await deployment.count() == (1, 2)


@both_verbs
async def test_what_comes_after_the_question_is_not_meant(
    deployment: Deployment, verb: Verb
) -> None:
    """Letters that are made while someone reads the form stay, whatever the filter says."""
    await deployment.add(3)
    viewer = await deployment.open()
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    for query in ({"all": "1"}, {"all": "1", "until": later}, {"all": "1", "reason": "exhausted"}):
        form = await viewer.form(verb, **query)
        assert form["total"] == ["3"]
        await asyncio.sleep(0.005)
        await deployment.add(3)
        sent = await viewer.send(verb, form)
        await viewer.end_of(sent.headers["location"])
        assert (await deployment.count())[0] == 3


async def test_a_filter_that_covers_much_is_counted_in_part(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question does not wait until all letters are looked at; the action looks at all."""
    await deployment.add(30)
    for module in (view, letter_pages):
        monkeypatch.setattr(module, "MAX_SCANNED", 20)
    viewer = await deployment.open()
    asked = await viewer.ask("drop", all="1", reason="exhausted")

    assert "at least 20 dead letters" in asked.text
    assert "30 dead letters" in await viewer.act("drop", all="1", reason="exhausted")


@both_verbs
async def test_a_handler_without_worker_gets_no_replay(deployment: Deployment, verb: Verb) -> None:
    """Letters of a handler that is no longer configured can only be dropped; fetch is ours."""
    await deployment.add(2, handler="gone")
    await deployment.add(2, handler=FETCH)
    viewer = await deployment.open(stripe_api_key=())

    assert "2 dead letters" in await viewer.act(verb, handler=FETCH, all="1")
    asked = await viewer.ask(verb, handler="gone", all="1")
    assert asked.status_code == {"replay": 409, "drop": 200}[verb]
    assert (await viewer.ask(verb, handler="unknown", all="1")).status_code == 404
    assert (await deployment.count("gone"))[0] == 2


@pytest.mark.parametrize(
    "query",
    [
        *({}, {"reason": "exhausted"}, {"id": []}, {"all": "1", "reason": "<script>"}),
        *({"all": "1", "session": "canary"}, {"all": "1", "since": "canary"}),
        *({"all": "1", "until": "9999-99-99"}, {"id": ["1-1-1"] * 1001}),
    ],
    ids=str,
)
async def test_a_choice_must_be_clear(deployment: Deployment, query: dict[str, Any]) -> None:
    """Nothing chosen is not everything; a filter that cannot be used is not left out."""
    await deployment.add(1)
    viewer = await deployment.open()
    form = await viewer.form("drop", all="1")
    kept = {name: form[name] for name in ("form_token",)}

    asked = await viewer.ask("drop", **query)
    sent = await viewer.send("drop", {**kept, **query})

    assert (asked.status_code, sent.status_code) == (400, 400)
    for answered in (asked, sent):
        assert "<script>" not in answered.text
        assert "canary" not in answered.text
    assert await deployment.count() == (1, 0)


@pytest.mark.parametrize("hostile", HOSTILE_WORDS, ids=range(len(HOSTILE_WORDS)))
@both_verbs
async def test_whatever_a_form_holds_is_text(
    deployment: Deployment, verb: Verb, hostile: str
) -> None:
    """In any field it is shown as text, refused or not used; it never breaks anything."""
    [letter] = await deployment.add(1)
    viewer = await deployment.open()
    token = (await viewer.form("drop", all="1"))["form_token"]
    fields: dict[str, Any] = {"id": [letter, hostile], "form_token": hostile, hostile: hostile}
    fields["total"] = hostile
    for query in (fields, *({**fields, name: hostile} for name in ("reason", "until", "session"))):
        asked = await viewer.ask(verb, **query)
        sent = await viewer.send(verb, query)
        assert (asked.status_code in {200, 400}, sent.status_code in {400, 409}) == (True, True)
        for answered in (asked, sent):
            assert "<script>" not in answered.text
    sent = await viewer.send("drop", {**fields, "form_token": token})

    assert "was dropped" in await viewer.end_of(sent.headers["location"])


# Who may


@both_verbs
async def test_only_a_login_that_may_act_acts(deployment: Deployment, verb: Verb) -> None:
    """Without one a form leads to the login, or says why it does nothing; so does sending it."""
    await deployment.add(1)
    form = await (await deployment.open()).form(verb, all="1")
    stranger = await deployment.open(token="")
    reader = await deployment.open(token=READING, admin_read_tokens=TOKENS["admin_read_tokens"])
    nowhere = await deployment.open(token="", admin_tokens=())

    asked = await stranger.ask(verb, all="1")
    path = f"/dead-letters/log/{verb}?all=1"
    assert (asked.status_code, asked.headers["location"]) == (
        303,
        paths.to(paths.LOGIN, query={"next": path}),
    )
    for viewer in (reader, nowhere):
        assert (await viewer.ask(verb, all="1")).status_code == 403
    for viewer in (stranger, reader, nowhere):
        assert (await viewer.send(verb, form)).status_code == 403
    assert await deployment.count() == (1, 0)


@both_verbs
async def test_a_token_that_is_taken_away_acts_no_more(deployment: Deployment, verb: Verb) -> None:
    """A login ends with its token, also between the question and the answer."""
    await deployment.add(1)
    viewer = await deployment.open()
    form = await viewer.form(verb, all="1")
    viewer.page.logins.acting = TOKENS["admin_tokens"][1:]

    assert (await viewer.send(verb, form)).status_code == 403
    assert await deployment.count() == (1, 0)


@both_verbs
async def test_looking_changes_nothing(deployment: Deployment, verb: Verb) -> None:
    """A form that is opened, with all that it would send in its address, does nothing."""
    await deployment.add(1)
    viewer = await deployment.open()
    form = await viewer.form(verb, all="1")
    for method in ("GET", "HEAD"):
        await viewer.client.request(method, f"/dead-letters/log/{verb}", params=form)
    for method in ("PUT", "DELETE", "PATCH"):
        refused = await viewer.client.request(method, f"/dead-letters/log/{verb}", data=form)
        assert refused.status_code == 405

    assert await deployment.count() == (1, 0)


async def test_a_form_is_for_one_action_of_one_viewer(deployment: Deployment) -> None:
    """That of another action, handler or viewer, and none at all, are refused."""
    await deployment.add(1)
    await deployment.add(1, handler=FETCH)
    alice = await deployment.open()
    bob = await deployment.open(token=ACTING[::-1])
    refused = [
        await alice.send("drop", await alice.form("replay", all="1")),
        await alice.send("drop", await alice.form("drop", handler=FETCH, all="1")),
        await alice.send("drop", await bob.form("drop", all="1")),
        await alice.send("drop", {"all": "1"}),
        await alice.send("drop", {"all": "1", "form_token": "x" * 43}),
    ]

    assert [one.status_code for one in refused] == [409] * 5
    assert (await deployment.count(), (await deployment.count(FETCH))[0]) == ((1, 0), 1)


# How far it has come


async def test_any_process_serves_any_step(deployment: Deployment) -> None:
    """Question, answer and progress may each be served by another process on the same Redis."""
    await deployment.add(3)
    first, second, third = [await deployment.open() for _ in range(3)]
    sent = await second.send("replay", await first.form("replay", all="1"))

    assert "3 dead letters" in await third.end_of(sent.headers["location"])
    assert await deployment.count() == (0, 3)


async def test_an_action_is_interrupted_between_chunks(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its process stops, the chunk is finished and the rest stays; meanwhile no other runs."""
    await deployment.add(300)
    viewer, other = await deployment.open(), await deployment.open()
    drop, going_on = dead_letters.drop, asyncio.Event()
    reached = asyncio.Event()

    async def slow(*arguments: Any) -> int:
        reached.set()
        await going_on.wait()
        return await drop(*arguments)

    monkeypatch.setattr(dead_letters, "drop", slow)
    form = await viewer.form("drop", all="1")
    path = (await viewer.send("drop", await viewer.form("drop", all="1"))).headers["location"]
    await reached.wait()
    shown = await other.client.get(path)
    busy = await viewer.send("drop", form)
    stopping = asyncio.create_task(viewer.page.actions.stop())
    await asyncio.sleep(0)
    going_on.set()
    await stopping
    stopped = await viewer.send("drop", form)
    ended = (await other.client.get(path)).text

    assert "0 of 300 so far" in shown.text
    assert "data-refreshes" in shown.text
    assert (busy.status_code, stopped.status_code) == (409, 409)
    left, _ = await deployment.count()
    assert 0 < 300 - left <= MAX_PER_CALL
    assert f"{300 - left} dead letters" in ended
    assert "It was interrupted" in ended
    assert "data-refreshes" not in ended


async def test_an_action_whose_process_died_does_not_move(
    deployment: Deployment, keys: Keys
) -> None:
    """The page says since when; one that is unknown, or no name of an action, is not found."""
    long_ago = datetime.now(UTC) - timedelta(minutes=5)
    name = dead_letters.new_name()
    progress = Progress(name, "drop", HANDLER, "alice", 9, long_ago, long_ago, found=4, done=4)
    await deployment.client.set(keys.action(name), msgspec.json.encode(progress))
    viewer = await deployment.open(token="")
    shown = (await viewer.client.get(f"/actions/{name}")).text

    assert "It does not move any more" in shown
    assert "4 letters" in shown
    assert "5 min ago" in shown
    for other in (dead_letters.new_name(), "x", f"{name}x", "*"):
        assert (await viewer.client.get(paths.to(paths.ACTION, action_id=other))).status_code == 404


@pytest.mark.parametrize(
    ("error", "said", "word"),
    [
        (ConnectionResetError, "<code>redis_unreachable</code>", "redis_unreachable"),
        (KeyError, "a fault of this service", None),
    ],
)
async def test_a_failure_ends_an_action(
    deployment: Deployment,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[EventDict],
    *,
    error: type[Exception],
    said: str,
    word: str | None,
) -> None:
    """It does not seem to run for ever; its page and its log line say how far it came, and why."""
    await deployment.add(250)
    actions = LetterActions(deployment.connections, deployment.keys)
    calls, drop = 0, dead_letters.drop

    async def failing(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        return await drop(*arguments)

    monkeypatch.setattr(dead_letters, "drop", failing)
    name = await actions.start(Action("drop", HANDLER, (), EntryFilter(), "alice", 250))
    await until(lambda: lines and lines[-1]["event"] == "dead_letters.dropped")
    viewer = await deployment.open(token="")
    shown = (await viewer.client.get(f"/actions/{name}")).text
    left, _ = await deployment.count()

    assert f"{250 - left} dead letters" in shown
    assert said in shown
    *crashed, last = lines
    assert (last["outcome"], last.get("error")) == ("failed", word)
    assert [line["event"] for line in crashed] == ["dead_letters.crashed"] * (word is None)
    assert not actions.is_busy


async def test_every_action_is_logged_and_counted(
    deployment: Deployment, lines: list[EventDict]
) -> None:
    """The line says who did what with how many letters of which handler, and which were meant."""
    ids = await deployment.add(3)
    labels = {"action": "drop", "outcome": "done"}
    name = "idv_admin_actions_total"
    before = metrics.REGISTRY.get_sample_value(name, labels) or 0.0
    viewer = await deployment.open(token=ACTING[::-1])
    await viewer.act("replay", all="1", session="vs_1")
    await viewer.act("drop", id=[ids[0], ids[2]])
    await until(lambda: lines[-1]["event"] == "dead_letters.dropped")

    replay, drop = lines[-2:]
    for line in (replay, drop):
        assert line.pop("action")
    assert replay.pop("until")
    everywhere = {"log_level": "warning", "handler": HANDLER, "by": "bob", "outcome": "done"}
    replayed = {"event": "dead_letters.replayed", "replayed": 1, "session_id": "vs_1"}
    assert replay == everywhere | replayed
    assert drop == {**everywhere, "event": "dead_letters.dropped", "dropped": 2, "chosen": "2"}
    assert metrics.REGISTRY.get_sample_value(name, labels) == before + 1
