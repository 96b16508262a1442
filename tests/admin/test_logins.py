"""Logging in: what a token is worth, how long, and that no failure shows one or blocks others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from http.cookies import SimpleCookie

import pytest
from structlog.typing import EventDict

from service.admin import paths
from service.admin.logins import LOGIN_S, MAX_WAITING, Logins, Viewer
from service.admin.page import Page
from service.config import Settings
from service.parsers import AdminToken
from service.secret import Secret
from service.telemetry import metrics
from tests.support.logins import ACTING, READING, TOKENS, OpenPage
from tests.support.waiting import until

NOW = 1_800_000_000.0
COOKIE = "idv_admin_idv"


@pytest.fixture
def logins() -> Logins:
    """Return the logins of a process with tokens."""
    return Logins(replace(Settings(), **TOKENS))


def logged_in(logins: Logins, token: str = ACTING) -> str:
    """Return the cookie of a login."""
    found = logins.log_in(token, NOW)
    assert found is not None
    return found[1]


def failures() -> float:
    """Return how many logins have failed."""
    value = metrics.REGISTRY.get_sample_value("idv_admin_logins_total", {"outcome": "failed"})
    return value or 0.0


def test_a_token_is_worth_what_its_list_says(logins: Logins) -> None:
    """Tokens of the one list may act, those of the other may read; no other text is a token."""
    shown = [
        logins.viewer(logged_in(logins, token), NOW) for token in (ACTING, ACTING[::-1], READING)
    ]

    assert shown == [
        Viewer("alice", may_act=True, can_log_in=True),
        Viewer("bob", may_act=True, can_log_in=True),
        Viewer("carol", may_act=False, can_log_in=True),
    ]
    for wrong in ("", ACTING[:-1], ACTING + "x", f"alice:{ACTING}", ACTING.upper(), "é", "\0"):
        assert logins.log_in(wrong, NOW) is None


def test_a_cookie_is_as_good_in_any_process_with_the_token(logins: Logins) -> None:
    """What is compared is a signature with the token: nothing is kept anywhere."""
    other = Logins(replace(Settings(), admin_tokens=TOKENS["admin_tokens"][:1]))

    assert other.viewer(logged_in(logins), NOW).name == "alice"
    assert other.viewer(logged_in(logins, READING), NOW).name is None


def test_a_cookie_ends_with_its_time_or_its_token(logins: Logins) -> None:
    """It ends after twelve hours, or when the token is taken away, changed or may only read."""
    cookie = logged_in(logins)

    assert logins.viewer(cookie, NOW + LOGIN_S - 1).may_act
    assert logins.viewer(cookie, NOW + LOGIN_S).name is None
    for acting, reading in (
        ((), ()),
        ((AdminToken("alice", Secret("another-token-00")),), ()),
        ((AdminToken("bob", Secret(ACTING)),), ()),
        ((), (AdminToken("alice", Secret(ACTING)),)),
    ):
        logins.acting, logins.reading = acting, reading
        assert logins.viewer(cookie, NOW).name is None


@pytest.mark.parametrize(
    "forged",
    [
        *(
            "bob.{expires}.{signature}",
            "{name}.{later}.{signature}",
            "{name}.0{expires}.{signature}",
        ),
        *("{name}.{expires}.{backwards}", "{name}.{expires}.{upper}", "{name}.{expires}.", ""),
        *("{name}.{expires}.{signature}.", "{name}.²{expires}.{signature}", "{name}.{expires}.ééé"),
        *("{name}.{expires}.{token}", "{name}.99999999999{expires}.{signature}", "{name}"),
    ],
)
def test_a_forged_cookie_is_none(logins: Logins, forged: str) -> None:
    """A cookie of which anything was changed is as good as none."""
    cookie = logged_in(logins)
    name, expires, signature = cookie.split(".")
    words = {"name": name, "expires": expires, "signature": signature, "token": ACTING}
    changed = {"later": int(expires) + 1, "backwards": signature[::-1], "upper": signature.upper()}

    assert logins.viewer(forged.format(**words, **changed), NOW) == Viewer(can_log_in=True)
    assert logins.viewer(cookie, NOW).name == "alice"


def test_a_cookie_is_of_one_deployment(logins: Logins) -> None:
    """Deployments on one host share cookies, so each has a name and signatures of its own."""
    other = Logins(replace(Settings(), redis_prefix="test", **TOKENS))

    assert (logins.cookie, other.cookie) == (COOKIE, "idv_admin_test")
    assert other.viewer(logged_in(logins), NOW).name is None


@pytest.mark.parametrize(
    ("origin", "flags"), [("http://localhost", {}), ("https://localhost", {"secure": True})]
)
async def test_the_cookie_stays_on_the_page(
    open_page: OpenPage, origin: str, flags: dict[str, bool]
) -> None:
    """No script and no other site gets it; over HTTPS it is not sent without. It can be left."""
    async with open_page(**TOKENS) as client:
        answered = await client.post(
            paths.LOGIN, data={"token": ACTING, "next": "/handlers"}, headers={"Origin": origin}
        )
        [cookie] = SimpleCookie(answered.headers["set-cookie"]).values()
        left = await client.post(paths.LOGOUT, headers={"Origin": origin})
        [gone] = SimpleCookie(left.headers["set-cookie"]).values()

    assert (answered.status_code, answered.headers["location"]) == (303, "/handlers")
    assert ACTING not in answered.headers["set-cookie"]
    attributes = {name: value for name, value in cookie.items() if value}
    assert (cookie.key, attributes) == (
        COOKIE,
        {"httponly": True, "samesite": "strict", "path": "/", "max-age": str(LOGIN_S), **flags},
    )
    assert (gone.key, gone.value, gone["max-age"]) == (COOKIE, "", "0")


@pytest.mark.parametrize(
    "asked",
    [
        *(
            "//evil.example",
            "/\\evil.example",
            "https://evil.example",
            "evil",
            "",
            "/\t/evil.example",
        ),
        *("/ /evil", "javascript:alert(1)", "/\n/evil.example", "/é", "/" + "a" * 3000),
    ],
)
async def test_a_login_leads_to_the_page_only(open_page: OpenPage, asked: str) -> None:
    """Whatever a link to the login form asks for, it leads nowhere else."""
    async with open_page(**TOKENS) as client:
        answered = await client.post(paths.LOGIN, data={"token": ACTING, "next": asked})
        shown = await client.get(paths.LOGIN, params={"next": asked})

    assert (answered.status_code, answered.headers["location"]) == (303, "/")
    assert '<input type="hidden" name="next" value="/">' in shown.text


async def test_a_login_leads_back(open_page: OpenPage) -> None:
    """The link on a page leads to the form, and that to the page again, with its query.

    Reading needs no login where all tokens are for acting.
    """
    async with open_page(admin_tokens=TOKENS["admin_tokens"]) as client:
        page = await client.get("/dead-letters/log", params={"reason": "exhausted"})
        form = await client.get(f"{paths.LOGIN}?next=%2Fdead-letters%2Flog%3Freason%3Dexhausted")
        refused = await client.post("/sessions", data={"text": ""})

    assert 'href="/login?next=%2Fdead-letters%2Flog%3Freason%3Dexhausted"' in page.text
    assert 'name="next" value="/dead-letters/log?reason=exhausted"' in form.text
    for answered in (form, refused):
        assert 'href="/login"' in answered.text


async def test_a_wrong_token_costs_time_and_blocks_no_other(
    open_page: OpenPage, make_page: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of those who guess wait; meanwhile the right token is let in at once."""
    monkeypatch.setattr("service.admin.logins.WRONG_TOKEN_S", 60.0)
    before = failures()
    async with open_page(make_page(**TOKENS)) as client:

        async def guess() -> int:
            answered = await client.post(paths.LOGIN, data={"token": "canary-wrong-token"})
            assert "This token is wrong" in answered.text
            assert "canary" not in answered.text
            return answered.status_code

        guessing = [asyncio.create_task(guess()) for _ in range(MAX_WAITING + 3)]
        await until(lambda: sum(one.done() for one in guessing) == 3)
        answered = await client.post(paths.LOGIN, data={"token": ACTING})
        assert sum(one.done() for one in guessing) == 3
        for one in guessing:
            one.cancel()
        ended = await asyncio.gather(*guessing, return_exceptions=True)

    assert (answered.status_code, ended.count(403)) == (303, 3)
    assert failures() - before == MAX_WAITING + 3


async def test_logins_are_logged_by_name(
    open_page: OpenPage, monkeypatch: pytest.MonkeyPatch, lines: list[EventDict]
) -> None:
    """The line of a login has the token's name, that of a failure nothing of who failed."""
    monkeypatch.setattr("service.admin.logins.WRONG_TOKEN_S", 0.0)
    async with open_page(**TOKENS) as client:
        await client.post(paths.LOGIN, data={"token": "wrong"}, headers={"User-Agent": "canary"})
        await client.post(paths.LOGIN, data={"token": READING})

    assert lines == [
        {"log_level": "warning", "event": "admin.login_failed"},
        {"log_level": "info", "event": "admin.logged_in", "by": "carol"},
    ]


async def test_without_tokens_there_is_no_login(
    open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form says what to set; a token gets in nowhere, and an empty one neither."""
    monkeypatch.setattr("service.admin.logins.WRONG_TOKEN_S", 0.0)
    async with open_page() as client:
        shown = await client.get(paths.LOGIN)
        answered = await client.post(paths.LOGIN, data={"token": ""})

    assert (shown.status_code, "ADMIN_TOKENS" in shown.text) == (404, True)
    assert answered.status_code == 403
    assert "set-cookie" not in answered.headers
