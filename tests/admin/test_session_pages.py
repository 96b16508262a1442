"""Pages of sessions: the search, which leaves no trace of what was typed, and the timeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from structlog.typing import EventDict

from service.admin.page import Page
from service.admin.views import sessions
from service.config import Settings
from service.inbox.admission import Inbox
from service.storage.connections import Connections
from service.storage.keys import Keys
from tests.admin import samples
from tests.support.admissions import (
    CREATED,
    EVENT_ID,
    PROCESSING,
    SESSION_ID,
    VERIFIED,
    InspectedInbox,
    make_event,
    make_notification,
)
from tests.support.logins import OpenPage
from tests.support.shown import HOSTILE_TEXTS, Shown

REFERENCE = "order <7> & canary4711"
PERSONAL: Any = {
    "client_reference_id": REFERENCE,
    "metadata": {"name": "canary-metadata"},
    "related_customer": "cus_canary",
    "verified_outputs": {"first_name": "canary-name"},
}


@pytest.fixture
def inbox(connections: Connections, settings: Settings, keys: Keys) -> InspectedInbox:
    """Return an inbox of the deployment that the page shows."""
    return InspectedInbox(Inbox(connections, keys, settings), connections.client, keys)


async def test_a_timeline(client: httpx2.AsyncClient, inbox: InspectedInbox) -> None:
    """Each arrival is there with its change, its times and how it came; and nothing personal."""
    late = make_event("processing", "processing", id="evt_late", at=15)
    reversal = make_event("requires_input", "requires_input", at=3000, **PERSONAL)
    await inbox.admit(CREATED, PROCESSING, VERIFIED, late, reversal, VERIFIED)

    answered = await client.get(f"/sessions/{SESSION_ID}")
    text = Shown(answered.text).text

    assert answered.status_code == 200
    for part in (
        "new → requires_input", "requires_input → processing", "processing → verified",
        "Reversal : a final status was overridden verified → requires_input",
        "late older than the state of the session: it changed nothing evt_late",
        "1 copy answered as duplicates", "by webhook", "sequence 4", "log waiting",
    ):  # fmt: skip
        assert part in text, part
    assert "canary" not in answered.text
    assert f"https://dashboard.stripe.com/identity/verification-sessions/{SESSION_ID}" in (
        answered.text
    )


async def test_every_state_of_a_delivery(
    open_page: OpenPage, make_page: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What became of a transition at each handler is said, with failed attempts to open."""

    async def read(*_: Any) -> Any:
        return samples.timeline()

    monkeypatch.setattr(sessions, "read_timeline", read)
    async with open_page(make_page()) as client:
        text = Shown((await client.get(f"/sessions/{samples.SESSION}")).text).text
        monkeypatch.setattr(sessions, "MAX_STEPS", 2)
        short = Shown((await client.get(f"/sessions/{samples.SESSION}")).text).text

    for part in (
        "log delivered 14:05:09", "rabbitmq dead letter Show the dead letter 3 attempts failed",
        "rabbitmq retrying 2 attempts failed", "rabbitmq settled", "open_crm waiting",
        "dead-lettered 2026-07-31 14:08:09 : TimeoutError at my_handler.py:41 in post",
        "by thin event", "by Stripe's list of events", "at connect", "67 min later",
        "Transition 9: the stream no longer holds it", "sequence 1 of an earlier epoch",
    ):  # fmt: skip
        assert part in text, part
    assert text.count("of an earlier epoch") == 1
    assert ("arrivals" in text, "The latest 2 of 7 arrivals" in short) == (False, True)


async def test_thin_events_that_are_not_fetched(
    client: httpx2.AsyncClient, inbox: InspectedInbox
) -> None:
    """They are shown where they are all that is known of a session, and beside its record."""
    await inbox.note(make_notification())
    alone = await client.get(f"/sessions/{SESSION_ID}")
    await inbox.admit(PROCESSING)
    beside = await client.get(f"/sessions/{SESSION_ID}")

    for answered, known in ((alone, "There is no record of this session"), (beside, "Timeline")):
        text = Shown(answered.text).text
        assert answered.status_code == 200
        assert "Thin events that are not fetched" in text
        assert "verified evt_thin created 20" in text
        assert "test mode" in text
        assert f"com/test/identity/verification-sessions/{SESSION_ID}" in answered.text
        assert known in text


@pytest.mark.parametrize("hostile", HOSTILE_TEXTS)
async def test_hostile_texts_stay_texts(
    client: httpx2.AsyncClient, inbox: InspectedInbox, hostile: str
) -> None:
    """Whatever Stripe's events hold, the page has the elements of any other session's."""

    async def look(session: str, text: str) -> Shown:
        fields: Any = {"status": text, "error": text, "report": text, "type": text}
        await inbox.admit(make_event("created", **fields, id=f"evt_{session}", session=session))
        return Shown((await client.get(f"/sessions/{session}")).text)

    expected, found = await look("vs_a", "harmless"), await look("vs_b", hostile)

    assert found.tags == expected.tags
    assert found.text.count(hostile) == expected.text.count("harmless") >= 4


async def test_the_search(
    client: httpx2.AsyncClient, inbox: InspectedInbox, lines: list[EventDict]
) -> None:
    """Ids and references lead to sessions; what was typed is in no address and no log line."""
    other = make_event(id="evt_other", session="vs_other", **PERSONAL)
    mine = make_event(id=EVENT_ID, **PERSONAL)
    await inbox.admit(mine)

    async def find(text: str) -> httpx2.Response:
        return await client.post("/sessions", data={"text": text})

    for text in (SESSION_ID, f"  {SESSION_ID} ", EVENT_ID, REFERENCE):
        found = await find(text)
        assert (found.status_code, found.headers["location"]) == (303, f"/sessions/{SESSION_ID}")
    await inbox.admit(other)
    both = Shown((await find(REFERENCE)).text)
    nothing = Shown((await find("order 8")).text)
    assert {f"/sessions/{SESSION_ID}", "/sessions/vs_other"} <= {*both.links}
    assert "2 sessions found" in both.text
    assert "0 sessions found" in nothing.text
    assert not any("canary" in link for link in both.links)
    assert lines == []


async def test_searching_further_back(
    client: httpx2.AsyncClient, inbox: InspectedInbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are older transitions, a button goes on, with the text in the form."""
    monkeypatch.setattr("service.monitoring.session_search.MAX_SEARCHED", 1)
    await inbox.admit(make_event(id=EVENT_ID, **PERSONAL), PROCESSING, VERIFIED)

    first = await client.post("/sessions", data={"text": EVENT_ID})
    shown = Shown(first.text)
    assert "Search further back" in shown.text
    cursor = first.text.partition('name="cursor" value="')[2].partition('"')[0]
    while first.status_code == 200:
        first = await client.post("/sessions", data={"text": EVENT_ID, "cursor": cursor})
        cursor = first.text.partition('name="cursor" value="')[2].partition('"')[0]

    assert first.headers["location"] == f"/sessions/{SESSION_ID}"


@pytest.mark.parametrize(
    "form",
    [{"text": ""}, {"text": "x" * 300}, {"text": "a\x00b"}, {"text": "a", "cursor": "b"}, {}],
)
async def test_what_cannot_be_searched(client: httpx2.AsyncClient, form: dict[str, str]) -> None:
    """It is refused with the form and what is wrong."""
    refused = await client.post("/sessions", data={**form, "more": "1"})

    assert refused.status_code == 400
    assert "printable characters" in Shown(refused.text).text


async def test_sessions_that_cannot_be_shown(
    client: httpx2.AsyncClient, connections: Connections, keys: Keys
) -> None:
    """An unknown session, what is no id, and a record that cannot be read are not found."""
    raw: Any = connections.client
    await raw.hset(keys.session("vs_bad"), "state", "x")

    answers = [await client.get(f"/sessions/{one}") for one in ("vs_none", "cs_1", "vs_bad")]

    assert [one.status_code for one in answers] == [404] * 3
    assert len({Shown(one.text).text for one in answers}) == 3


def test_the_dashboard_of_each_account() -> None:
    """A session of test mode, or of a connected account, has an address of its own."""
    assert sessions.dashboard_address("vs_1", "acct_1", is_test=True) == (
        "https://dashboard.stripe.com/acct_1/test/identity/verification-sessions/vs_1"
    )
