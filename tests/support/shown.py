"""What a page shows: its elements, links and text; and what it may show as text only. No tests."""

from __future__ import annotations

from html.parser import HTMLParser

# What a stranger may have stored where a page shows a text.
HOSTILE_TEXTS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' autofocus onfocus=alert(1) '",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "</table></main><!--",
    "\u202egnp.exe &amp; \x1b[31m",
)
# What a stranger may put where an id, a name or a filter belongs.
HOSTILE_WORDS = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}",
    "../../etc/passwd",
    "\x00",
    "\r\nSet-Cookie: a=b",
    "\ud7ff\u202e\U0001f4a3",
    "%",
    "*",
    "vs_" + "a" * 300,
    "9" * 5000,
    "-1-0-0",
    "0-0-99999999999999999999999",
    "0-1-1' OR '1'='1",
)
_VOID = {"input", "link", "meta"}


class Shown(HTMLParser):
    """What a page consists of.

    Attributes:
        tags: Each element with the names of its attributes, in order.
        links: The addresses that its links, forms and files lead to.
        text: Its text, and the values of its fields, with single spaces.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.links: list[str] = []
        self._open: list[str] = []
        self._texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, self._open

    @property
    def text(self) -> str:
        """Everything that can be read."""
        return " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        if tag not in _VOID:
            self._open.append(tag)
        for name, value in attrs:
            if name in {"href", "src", "action", "formaction"}:
                self.links.append(value or "")
            if name == "value":
                self._texts.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        """Check that an element ends where it should."""
        assert self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        """Note a text."""
        self._texts.append(data)
