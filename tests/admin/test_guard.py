"""The rules that every request for the page must pass, and the headers of every answer."""

from __future__ import annotations

import httpx2
import pytest

from service.admin import paths
from tests.support.logins import ACTING, READING, TOKENS, OpenPage

# A browser may load what is the page's own, and nothing else; no other site may show the page.
EXPECTED = {
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self';"
        " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
OUR_NAMES = [
    *("localhost", "LOCALHOST", "localhost:8001", "127.0.0.1", "127.0.0.1:8001", "10.9.8.7"),
    *("[::1]", "[::1]:8001", "[2001:db8::1]", "page.example", "Page.Example:8443", "ops"),
]
OTHER_NAMES = [
    *("evil.example", "localhost.evil.example", "evil-localhost", "page.example.evil", "xops"),
    *("127.0.0.1.evil.example", "1.2.3", "0x7f.1", "127.1", "2130706433", "[::1", "::1", "[ops]x"),
    *("", ":8001", "localhost:", "localhost:x", "localhost:123456", "localhost ", "a@localhost"),
    *("page.example.", "page.example,evil.example", "[::1%eth0]", "[page.example]", "[localhost]"),
]
FORGED = {
    "another site": {"Origin": "http://evil.example"},
    "another port": {"Origin": "http://localhost:8002"},
    "a longer name": {"Origin": "http://localhost.evil.example"},
    "a sandboxed frame": {"Origin": "null"},
    "no origin": {},
    "an empty one": {"Origin": ""},
    "another scheme": {"Origin": "ftp://localhost"},
    "no scheme": {"Origin": "localhost"},
    "with a path": {"Origin": "http://localhost/"},
}


async def test_only_our_names_are_answered(open_page: OpenPage) -> None:
    """A name that another site made lead here gets nothing; probes and metrics have any name."""
    async with open_page(admin_hosts=("page.example", "OPS")) as client:
        for host in OUR_NAMES:
            assert (await client.get("/", headers={"Host": host})).status_code == 200
        for host in OTHER_NAMES:
            refused = await client.get("/", headers={"Host": host})
            assert (refused.status_code, refused.content) == (421, b""), host
            assert (await client.get("/metrics", headers={"Host": host})).status_code == 200
            assert (await client.get("/livez", headers={"Host": host})).status_code == 200
    async with open_page() as client:
        assert (await client.get("/", headers={"Host": "page.example"})).status_code == 421


async def test_probes_and_metrics_are_no_pages(open_page: OpenPage) -> None:
    """Other methods than theirs are not allowed, and nothing about the page is said."""
    async with open_page(**TOKENS) as client:
        for path in ("/metrics", "/livez", "/readyz"):
            for method in ("POST", "TRACE"):
                refused = await client.request(method, path)
                assert (refused.status_code, refused.content) == (405, b""), (method, path)


@pytest.mark.parametrize("headers", FORGED.values(), ids=FORGED)
@pytest.mark.parametrize(
    "path", [paths.LOGIN, paths.LOGOUT, "/dead-letters/log/drop", "/", "/sessions", "/none"]
)
async def test_only_the_page_itself_may_send(
    open_page: OpenPage, headers: dict[str, str], path: str
) -> None:
    """A POST from elsewhere, or from an unknown place, is refused, with a login, too."""
    async with open_page(**TOKENS) as client:
        await client.post(paths.LOGIN, data={"token": ACTING})
        del client.headers["Origin"]
        refused = await client.post(path, headers=headers, data={"token": ACTING})

    assert refused.status_code == 403
    assert "was not sent by the page" in refused.text
    assert "set-cookie" not in refused.headers


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost", "http://localhost"),
        ("Page.example:8443", "https://page.example:8443"),
        ("[::1]:8001", "http://[::1]:8001"),
        # A proxy that ends TLS passes the name on: only the browser knows the scheme.
        ("page.example", "https://page.example"),
    ],
)
async def test_the_origin_is_the_name_we_were_asked_under(
    open_page: OpenPage, host: str, origin: str
) -> None:
    """Name and port are compared, not the scheme."""
    headers = {"Host": host, "Origin": origin}
    async with open_page(**TOKENS, admin_hosts=("page.example",)) as client:
        answered = await client.post(paths.LOGIN, headers=headers, data={"token": ACTING})

    assert answered.status_code == 303


async def test_every_answer_has_the_headers(open_page: OpenPage) -> None:
    """Pages, errors, redirects and refusals have them; only static files may be kept."""
    async with open_page(**TOKENS) as client:
        login = await client.get(paths.LOGIN)
        static = login.text.split('rel="stylesheet" href="')[1].split('"')[0]
        answers = [
            login,
            await client.get("/"),
            await client.get("/none"),
            await client.get("/", headers={"Host": "evil.example"}),
            await client.post("/", headers={"Origin": "null"}),
            await client.request("DELETE", paths.LOGIN),
        ]
        kept = await client.get(static)

    assert [one.status_code for one in answers] == [200, 303, 303, 421, 403, 405]
    for one in (*answers, kept):
        assert {name: one.headers[name] for name in EXPECTED} == EXPECTED
    assert {one.headers["cache-control"] for one in answers} == {"no-store"}
    assert "immutable" in kept.headers["cache-control"]


async def test_reading_may_need_a_login(open_page: OpenPage) -> None:
    """With ADMIN_READ_TOKENS a stranger gets the login form and nothing else, whatever they ask."""
    asked = ["/", "/sessions/vs_1", "/dead-letters/log?reason=x", "/actions/1", "/none", "/login/x"]
    async with open_page(**TOKENS) as client:
        for path in asked:
            refused = await client.get(path)
            assert refused.status_code == 303
            [(key, value)] = httpx2.URL(refused.headers["location"]).params.items()
            assert (key, value) == ("next", path)
        posted = await client.post("/sessions", data={"text": "vs_1"})
        assert (posted.status_code, "Log in first" in posted.text) == (403, True)
        for path in ("/metrics", "/livez"):
            assert (await client.get(path)).status_code == 200
        for token in (READING, ACTING):
            await client.post(paths.LOGIN, data={"token": token})
            assert (await client.get("/")).status_code == 200
            client.cookies.clear()
