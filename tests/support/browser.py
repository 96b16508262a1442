"""A real browser that looks at pages, and records whatever must not happen in one.

`TEST_AXE` names axe-core's `axe.min.js`, `TEST_HTML_VALIDATE` the program `html-validate`, and
`TEST_SCREENSHOTS` a folder that screenshots are written to.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Dialog, Page, Request, Response, expect

from tests.support.programs import missing, run
from tests.support.waiting import PATIENCE_S

Scheme = Literal["light", "dark"]

WIDTHS = (400, 1600)
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
_HEIGHTS = {400: 800, 1600: 1000}
expect.set_options(timeout=PATIENCE_S * 1000)
# What a page's own code cannot hide: the browser runs this before anything of the page.
_WATCH = """
document.addEventListener('securitypolicyviolation', event =>
    console.error('securitypolicyviolation', event.effectiveDirective, event.blockedURI));
"""
_RUN_AXE = """
async () => (await axe.run({preload: false})).violations.flatMap(violation =>
    violation.nodes.map(node => [
        violation.id, violation.help, node.html, node.failureSummary,
        ...node.any.flatMap(check => check.relatedNodes.map(related => related.html)),
    ].join(' | ')))
"""
# Chromium reports each response of 400 and above there; the tests look at statuses themselves.
_STATUS = re.compile(r"Failed to load resource: the server responded with a status of")


class Looks(NamedTuple):
    """What a page looks like to the reader.

    Attributes:
        width: Pixels.
        scheme: Which colours the reader prefers.
    """

    width: int
    scheme: Scheme


LOOKS = [Looks(width, scheme) for width in WIDTHS for scheme in SCHEMES]


class Tab:
    """A page of a browser with cookies of its own.

    Attributes:
        page: Playwright's.
        troubles: What must not happen: requests that leave the origin, dialogs, errors, violations
            of the page's own policy.
    """

    def __init__(self, browser: Browser, origin: str, *, runs_scripts: bool = True) -> None:
        self._origin = origin
        self._context = browser.new_context(base_url=origin, java_script_enabled=runs_scripts)
        self._context.set_default_timeout(PATIENCE_S * 1000)
        self._context.add_init_script(_WATCH)
        self.page = self._context.new_page()
        self.troubles: list[str] = []
        self._shown: Response | None = None
        self._listen(self.page)

    def open(self, path: str, *, status: int = 200) -> Page:
        """Load a page, which must answer with *status*."""
        response = self.page.goto(path)
        assert isinstance(response, Response)
        assert response.status == status, (path, response.status, self.page.content())
        return self.page

    def log_in(self, token: str) -> None:
        """Fill in the form of the login page, which the tab shows, and send it."""
        self.page.get_by_label("Token").fill(token)
        self.page.get_by_role("main").get_by_role("button", name="Log in").click()

    def source(self) -> str:
        """Return the HTML of the page as it came."""
        assert self._shown is not None
        return self._shown.text()

    def look(self, looks: Looks) -> None:
        """Show the page as another reader sees it."""
        # Without motion: what is half way from light to dark has neither's contrast.
        self.page.emulate_media(color_scheme=looks.scheme, reduced_motion="reduce")
        self.page.set_viewport_size({"width": looks.width, "height": _HEIGHTS[looks.width]})

    def overflow(self) -> int:
        """Return how many pixels of the page lie beyond the right edge of the window."""
        wide: int = self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        return wide

    def photograph(self, name: str) -> None:
        """Write screenshots of the whole page where `TEST_SCREENSHOTS` says."""
        if folder := os.environ.get("TEST_SCREENSHOTS"):
            for looks in LOOKS:
                self.look(looks)
                path = Path(folder) / f"{name}-{looks.width}-{looks.scheme}.png"
                self.page.screenshot(path=path, full_page=True, animations="disabled")

    def accessibility_problems(self) -> list[str]:
        """Return what axe-core finds in the page as it looks now."""
        self.page.evaluate(axe_source())
        found: list[str] = self.page.evaluate(_RUN_AXE)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Close it; nothing in `troubles` may have happened."""
        self._context.close()
        assert error[0] or not self.troubles, self.troubles

    def _listen(self, page: Page) -> None:
        page.on("request", self._on_request)
        page.on("response", self._on_response)
        page.on("dialog", self._on_dialog)
        page.on("pageerror", lambda error: self.troubles.append(f"error {error}"))
        page.on(
            "console",
            lambda line: (
                self.troubles.append(f"console {line.type} {line.text}")
                if line.type in ("error", "warning") and not _STATUS.match(line.text)
                else None
            ),
        )

    def _on_request(self, request: Request) -> None:
        if urlsplit(request.url)[:2] != urlsplit(self._origin)[:2]:
            self.troubles.append(f"request {request.url}")

    def _on_response(self, response: Response) -> None:
        is_page = response.request.is_navigation_request()
        if is_page and not 300 <= response.status < 400:
            self._shown = response

    def _on_dialog(self, dialog: Dialog) -> None:
        self.troubles.append(f"dialog {dialog.message}")
        dialog.dismiss()


def axe_source() -> str:
    """Return the source of axe-core, or skip."""
    return _named("TEST_AXE", "axe-core's axe.min.js").read_text()


def check_html(pages: Sequence[tuple[str, str]], directory: Path) -> None:
    """Assert that html-validate has nothing to say of pages, each a name and its source."""
    for name, source in pages:
        (directory / f"{name}.html").write_text(source)
    validator = _named("TEST_HTML_VALIDATE", "the program html-validate")
    run(validator, "--preset", "standard", "--formatter", "text", directory)


def _named(variable: str, what: str) -> Path:
    if variable not in os.environ:
        missing(f"{variable} does not name {what}")
    return Path(os.environ[variable])
