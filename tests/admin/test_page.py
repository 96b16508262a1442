"""The page as a whole: its layout, its files, its errors, and what it needs to be there at all."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx2
import pytest

from service.admin import page as page_module
from service.admin import paths
from service.admin.page import Page
from service.admin.rendering import mark_code
from service.config import Settings
from service.monitoring.overview import Overview
from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.keys import Keys
from tests.support.logins import OpenPage
from tests.support.programs import ROOT
from tests.support.roles import as_user
from tests.support.servers import free_port
from tests.support.shown import HOSTILE_WORDS, Shown

PAGES = (paths.OVERVIEW, paths.SESSIONS, paths.DEAD_LETTERS, paths.HANDLERS, paths.ENDPOINTS)
MAX_BYTES = 100_000


@pytest.mark.parametrize("path", PAGES)
async def test_each_page_has_the_layout(client: httpx2.AsyncClient, path: str) -> None:
    """Each page is whole HTML, leads to the others, and to nothing outside; its files are small."""
    answered = await client.get(path)
    shown = Shown(answered.text)
    names = [tag for tag, _ in shown.tags]

    assert answered.status_code == 200
    assert answered.headers["content-type"] == "text/html; charset=utf-8"
    assert [names.count(tag) for tag in ("h1", "main", "nav", "title")] == [1] * 4
    assert f'<a href="{path}" aria-current="page">' in answered.text
    assert {*PAGES} <= {*shown.links}
    assert {link[0] for link in shown.links} <= {"/", "#"}
    assert not {name for _, attributes in shown.tags for name in attributes} & {"style", "onclick"}
    files = [await client.get(link) for link in shown.links if link.startswith("/static/")]
    assert [one.status_code for one in files] == [200] * 3
    assert {one.headers["cache-control"] for one in files} == {
        "public, max-age=31536000, immutable"
    }
    assert len(answered.content) + sum(len(one.content) for one in files) < MAX_BYTES


@pytest.mark.parametrize("hostile", HOSTILE_WORDS, ids=range(len(HOSTILE_WORDS)))
async def test_no_address_is_an_error_of_ours(client: httpx2.AsyncClient, hostile: str) -> None:
    """Whatever stands where an id, a name or a filter belongs gets a clear page, never a 500."""
    text = quote(hostile, safe="", errors="surrogatepass")
    queries = [f"{name}={text}" for name in ("reason", "session", "since", "until", "before")]
    addresses = [
        f"/{text}",
        f"/sessions/{text}",
        f"/dead-letters/{text}",
        f"/dead-letters/log/{text}",
        f"/handlers/{text}",
        f"/static/{text}/page.css",
        f"/static/x/{text}",
    ]

    for address in addresses:
        assert (await client.get(address)).status_code == 404, address
    for query in queries:
        answered = await client.get(f"/dead-letters/log?{query}")
        assert answered.status_code in {200, 400}
        assert "Dead letters" in Shown(answered.text).text


async def test_methods_are_checked(client: httpx2.AsyncClient) -> None:
    """What only shows takes no other method, and HEAD answers without a body."""
    answers = [await client.request(method, "/handlers") for method in ("POST", "PUT", "HEAD")]

    assert [(one.status_code, bool(one.content)) for one in answers] == [
        (405, True),
        (405, True),
        (200, False),
    ]


async def test_what_redis_refuses_is_not_called_no_answer(
    open_page: OpenPage, connections: Connections, settings: Settings, keys: Keys
) -> None:
    """A process that may not read, as a receiver with the user of its own, says just that."""
    users = connections.client
    await users.execute_command("ACL", "SETUSER", "few", "on", ">few", "~*", "+ping")
    url = Secret(as_user(settings.redis_url.reveal(), "few"))
    async with connect(url) as refused, open_page(Page(settings, refused, keys)) as client:
        answered = await client.get("/sessions/vs_1")
        endpoints = await client.get("/endpoints")
    await users.execute_command("ACL", "DELUSER", "few")

    assert answered.status_code == 503
    assert "Redis refuses the user, its password or its command" in answered.text
    assert "redis_unauthorized" in answered.text
    assert "does not answer" not in answered.text + endpoints.text


async def test_redis_away(open_page: OpenPage, settings: Settings, keys: Keys) -> None:
    """The overview says that Redis does not answer; what cannot be shown without it gets a 503."""
    async with (
        connect(Secret(f"redis://127.0.0.1:{free_port()}")) as nowhere,
        open_page(Page(settings, nowhere, keys)) as client,
    ):
        overview = await client.get("/")
        others = [
            await client.get(path)
            for path in ("/handlers", "/dead-letters", "/dead-letters/log", "/sessions/vs_1")
        ]
        without = [await client.get(path) for path in ("/sessions", "/endpoints")]

    assert (overview.status_code, "Failing" in Shown(overview.text).text) == (200, True)
    assert [one.status_code for one in others] == [503] * 4
    assert all("redis_unreachable" in Shown(one.text).text for one in (overview, *others))
    assert [one.status_code for one in without] == [200] * 2


async def test_the_overview_is_collected_once_for_all(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten pages that are opened at once cost one collection, and those of the next seconds none."""
    collected: list[Overview] = []
    collect = page_module.collect  # type: ignore[attr-defined]

    async def count(*arguments: Any) -> Overview:
        collected.append(await collect(*arguments))
        return collected[-1]

    monkeypatch.setattr(page_module, "collect", count)
    await asyncio.gather(*(client.get(path) for path in 2 * PAGES))
    await client.get("/")
    assert len(collected) == 1

    monkeypatch.setattr(page_module, "KEPT_S", 0.0)
    await client.get("/")
    assert len(collected) == 2


async def test_without_jinja2_the_page_says_how_to_get_it(
    open_page: OpenPage, make_page: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the extra the address answers with a text, and metrics as ever."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "service.admin.rendering")
    page = make_page()
    page._renderer = None
    async with open_page(page) as client:
        answered = await client.get("/")
        assert answered.status_code == 200
        assert answered.headers["content-type"] == "text/plain; charset=utf-8"
        assert "identity-webhooks[page]" in answered.text
        assert (await client.get("/sessions")).status_code == 404
        assert (await client.get("/metrics")).status_code == 200

        monkeypatch.undo()
        loaded = await client.get("/")
        assert loaded.headers["content-type"] == "text/html; charset=utf-8"


def test_a_process_whose_page_is_not_opened_does_not_import_jinja2() -> None:
    """Its 10 MB are only for processes whose page is looked at."""
    program = "import sys; from service.cli import main; sys.exit('jinja2' in sys.modules)"

    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_templates_and_files_are_packaged() -> None:
    """A wheel holds all files of the package that Git does not ignore: also those of the page."""
    files = [
        path
        for path in (ROOT / "service").rglob("*")
        if path.is_file() and path.suffix in {".html", ".css", ".js", ".svg", ".lua"}
    ]
    command = ["git", "check-ignore", "--no-index", *map(str, files)]

    assert len({path.suffix for path in files}) == 5
    assert subprocess.run(command, cwd=ROOT, check=False, capture_output=True).stdout == b""


def test_what_stands_between_backticks_is_code() -> None:
    """All else is escaped, within them and without."""
    assert mark_code("type `dead list <b>` & look") == (
        "type <code>dead list &lt;b&gt;</code> &amp; look"
    )
