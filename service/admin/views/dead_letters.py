"""Dead letters: of which handlers there are any, one handler's, and one of them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...delivery.dead_letters import Entry, find_one
from ...delivery.deliverer import DeadLetterReason
from ...delivery.letter_pages import read_page
from .. import paths
from ..letter_filter import read_filter
from ..page import Page, PageError

# What a page shows of a dead letter's item: ids, statuses and words, as the log does.
_SHOWN = (
    *("event_id", "event_type", "occurred_at", "session_id", "session_type", "previous", "current"),
    *("sequence", "epoch", "expected", "reversal", "stripe_status", "last_error_code"),
    *("redaction_status", "report_id", "livemode", "account", "account_name", "context", "origin"),
    *("endpoint", "replay", "created", "snapshot_event_id"),
)


def routes(page: Page) -> list[Route]:
    """Return the routes that show dead letters."""

    async def show_handlers(request: Request) -> Response:
        return page.respond(request, "dead_letters.html", handlers=await page.handler_states())

    async def show_letters(request: Request) -> Response:
        return await _respond_letters(page, request)

    async def show_letter(request: Request) -> Response:
        handler = (await page.handler_state(request)).name
        letter_id = request.path_params["letter_id"]
        letter = await find_one(page.connections, page.keys, handler, letter_id)
        if letter is None:
            text = "It was replayed, dropped or deleted as too old, or the id is wrong."
            raise PageError(404, "There is no such dead letter", text)
        return page.respond(
            request, "dead_letter.html", handler=handler, letter=letter, shown=describe(letter)
        )

    return [
        Route(paths.DEAD_LETTERS, show_handlers),
        Route(paths.HANDLER_DEAD_LETTERS, show_letters),
        Route(paths.DEAD_LETTER, show_letter),
    ]


async def _respond_letters(page: Page, request: Request) -> Response:
    handler = (await page.handler_state(request)).name
    asked = read_filter(request.query_params)
    before = request.query_params.get("before", "")
    try:
        async with page.searching():
            found = await read_page(
                page.connections, page.keys, handler, asked.wanted, before=before
            )
    except ValueError:
        raise PageError(400, "The list cannot go on from there", "Begin it again.") from None
    goes_on = {**asked.fields, "before": found.goes_on_at or ""}
    return page.respond(
        request,
        "handler_dead_letters.html",
        handler=handler,
        found=found,
        fields=asked.fields,
        is_first=not before,
        reasons=[*DeadLetterReason],
        goes_on=paths.to(paths.HANDLER_DEAD_LETTERS, handler=handler, query=goes_on),
    )


def describe(letter: Entry) -> list[tuple[str, object]]:
    """Return what may be shown of a letter's item, each with its name."""
    found = ((name, getattr(letter.item, name, None)) for name in _SHOWN)
    words = {True: "yes", False: "no"}
    return [
        (name, words[value] if isinstance(value, bool) else value)
        for name, value in found
        if value is not None
    ]
