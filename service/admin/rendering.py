"""Templates become HTML: escaped always, strict about names, and with the formats of the page.

Only this module knows Jinja2. It is imported when the page is first asked for: a process whose page
is never looked at does without Jinja2's 10 MB.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import jinja2
from markupsafe import Markup

from ..monitoring.deployment_rules import is_choice
from ..monitoring.words import counted, duration
from ..stripe.events import EVENT_TYPE_PREFIX
from ..transitions.lifecycle import Status
from . import paths, static_files


class Renderer:
    """All templates, compiled once."""

    def __init__(self) -> None:
        self._environment = jinja2.Environment(
            loader=jinja2.PackageLoader(__package__),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
            cache_size=-1,
        )
        self._environment.globals.update(
            paths=paths,
            to=paths.to,
            static=static_files.path_of,
            now=lambda: datetime.now(UTC),
            statuses=frozenset(Status),
        )
        self._environment.filters.update(
            time=format_time,
            ago=format_ago,
            span=duration,
            number=format_number,
            plural=counted,
            capitalize_first=capitalize_first,
            code=mark_code,
            event_type=lambda text: text.removeprefix(EVENT_TYPE_PREFIX),
        )
        self._environment.tests.update(choice=is_choice)
        for name in self._environment.list_templates(["html"]):
            self._environment.get_template(name)

    def render(self, template: str, context: Mapping[str, Any]) -> str:
        """Return a template's HTML.

        Raises:
            jinja2.UndefinedError: The template uses a name that *context* lacks.
        """
        return self._environment.get_template(template).render(context)


def mark_code(text: str) -> Markup:
    """Return a text in which what stands between backticks is `<code>`."""
    shapes = (Markup("{}"), Markup("<code>{}</code>"))
    return Markup().join(shapes[n % 2].format(part) for n, part in enumerate(text.split("`")))


def format_time(at: datetime | None, *, date: bool = True) -> Markup:
    """Return a `<time>`: local to the server, with its offset; *date* says whether to show it."""
    if at is None:
        return Markup("unknown")
    local = at.astimezone()
    shown = f"{local:%Y-%m-%d %H:%M:%S}" if date else f"{local:%H:%M:%S}"
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        local.isoformat(timespec="milliseconds"), f"{local:%Y-%m-%d %H:%M:%S %z}", shown
    )


def format_ago(at: datetime | None) -> Markup:
    """Return a `<time>` with how long ago it was, such as `4 s ago`."""
    if at is None:
        return Markup("never")
    seconds = (datetime.now(UTC) - at).total_seconds()
    words = f"{duration(seconds)} ago" if seconds >= 0 else f"in {duration(-seconds)}"
    local = at.astimezone()
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        local.isoformat(timespec="milliseconds"), f"{local:%Y-%m-%d %H:%M:%S %z}", words
    )


def format_number(number: int | None) -> str:
    """Return a number with separators; `unknown` for None."""
    return "unknown" if number is None else f"{number:,}"


def capitalize_first(text: str) -> str:
    """Return a text that begins with a capital, and is otherwise as it was."""
    return text[:1].upper() + text[1:]
