"""Replaying and dropping dead letters: what would be done, doing it, and how far that has come."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple

from starlette.datastructures import ImmutableMultiDict
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from ...delivery import dead_letters
from ...delivery.letter_pages import MAX_SCANNED, read_page
from .. import paths
from ..forms import TOKEN_FIELD, issue_token, read_form, spend_token
from ..letter_actions import Action, Progress, Verb
from ..letter_filter import LetterFilter, read_filter
from ..page import Page, PageError

# So many letters may be named in one form.
MAX_NAMED = 1000
# An action writes its progress at least so often, unless Redis or its process is gone.
STALLED_S = 30.0
SHORT_S = 0.5

_ACTION_ID = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{4}")
_TOTAL = re.compile(r"[0-9]{1,9}")


class _Choice(NamedTuple):
    """Which letters of a handler are meant: those named, or all; of either, those of a filter."""

    handler: str
    ids: tuple[str, ...]
    filter: LetterFilter


def routes(page: Page) -> list[Route]:
    """Return the routes of both actions, and of their progress."""
    actions: tuple[tuple[str, Verb], ...] = ((paths.REPLAY, "replay"), (paths.DROP, "drop"))
    return [
        *(Route(path, partial(_ask, page, verb)) for path, verb in actions),
        *(Route(path, partial(_act, page, verb), methods=["POST"]) for path, verb in actions),
        Route(paths.ACTION, partial(_show, page)),
    ]


async def _ask(page: Page, verb: Verb, request: Request) -> Response:
    """Show what would be done, in a form that does it."""
    if page.logins.acting and request.state.viewer.name is None:
        login = paths.to(paths.LOGIN, query={"next": paths.of(request)})
        return RedirectResponse(login, 303)
    _check_viewer(page, request)
    asked = await _read_choice(page, request, verb, request.query_params)
    choice = await _with_end(page, asked)
    async with page.searching():
        total, is_complete = await _count(page, choice, is_filtered=bool(asked.filter.fields))
    return page.respond(
        request,
        "confirm.html",
        verb=verb,
        choice=choice,
        total=total,
        is_complete=is_complete,
        max_scanned=MAX_SCANNED,
        token_field=TOKEN_FIELD,
        token=await issue_token(page.connections, page.keys, _purpose(request, verb, choice)),
    )


async def _act(page: Page, verb: Verb, request: Request) -> Response:
    """Start what the form asks for, and lead to its progress."""
    _check_viewer(page, request)
    form = await read_form(request)
    choice = await _read_choice(page, request, verb, form)
    text = "It runs another replay or drop, or is being stopped. Try again."
    busy = PageError(409, "This process is busy", text)
    if page.actions.is_busy:
        raise busy
    await spend_token(page.connections, page.keys, form, _purpose(request, verb, choice))
    total = form.get("total", "")
    action = Action(
        verb,
        choice.handler,
        choice.ids,
        choice.filter.wanted,
        by=request.state.viewer.name,
        total=int(total) if _TOTAL.fullmatch(total) else None,
    )
    if (action_id := await page.actions.start(action)) is None:
        raise busy
    # A short action then has only one page: that of its end.
    await page.actions.wait(SHORT_S)
    return RedirectResponse(paths.to(paths.ACTION, action_id=action_id), 303)


async def _show(page: Page, request: Request) -> Response:
    """Show how far an action has come, in whichever process it runs."""
    action_id = request.path_params["action_id"]
    progress = await page.actions.read(action_id) if _ACTION_ID.fullmatch(action_id) else None
    if progress is None:
        raise PageError(404, "There is no such action", "Actions are kept for a day.")
    return page.respond(request, "action.html", action=progress, stalled=_is_stalled(progress))


def _check_viewer(page: Page, request: Request) -> None:
    """Refuse all who did not log in with a token of ADMIN_TOKENS."""
    viewer = request.state.viewer
    if viewer.may_act:
        return
    if not page.logins.acting:
        text = "To act here, set ADMIN_TOKENS. The commands dead replay and dead drop do the same."
        raise PageError(403, "This page only shows", text)
    if viewer.name is None:
        raise PageError(403, "Log in first")
    raise PageError(403, "Your login may only read", "Log in with a token of ADMIN_TOKENS.")


def _purpose(request: Request, verb: Verb, choice: _Choice) -> str:
    return f"{verb} {choice.handler} {request.state.viewer.name}"


async def _read_choice(
    page: Page, request: Request, verb: Verb, form: ImmutableMultiDict[str, str]
) -> _Choice:
    """Return which letters a query or a form means.

    Raises:
        PageError: It means none, too many, or a handler that cannot have a replay.
    """
    handler = await page.handler_state(request)
    if verb == "replay" and not handler.is_configured:
        text = "It is not among HANDLERS. Configure it, or drop its letters."
        raise PageError(409, "No worker would call this handler", text)
    ids = tuple(form.getlist("id"))
    if not ids and "all" not in form:
        raise PageError(400, "No letter was chosen", "Choose some of them, or all.")
    if len(ids) > MAX_NAMED:
        raise PageError(
            400, "Too many letters were chosen", "Filter them, and take all that match."
        )
    return _Choice(handler.name, ids, read_filter(form))


async def _with_end(page: Page, choice: _Choice) -> _Choice:
    """Return a choice without the letters that are made after it was looked at."""
    seconds, microseconds = await page.connections.client.time()
    now = datetime.fromtimestamp(seconds, UTC).replace(microsecond=microseconds)
    until = choice.filter.wanted.until
    if choice.ids or (until is not None and until < now):
        return choice
    fields = {**choice.filter.fields, "until": now.isoformat(timespec="milliseconds")}
    return choice._replace(filter=read_filter(fields))


async def _count(page: Page, choice: _Choice, *, is_filtered: bool) -> tuple[int, bool]:
    """Return how many letters are meant, and whether all letters were looked at for that."""
    at = page.connections, page.keys, choice.handler
    wanted = choice.filter.wanted
    if choice.ids:
        chunks = dead_letters.letter_chunks(*at, wanted, choice.ids)
        return sum([len(chunk) async for chunk in chunks]), True
    if not is_filtered:
        return await dead_letters.count(*at), True
    found = await read_page(*at, wanted, size=MAX_SCANNED)
    return len(found.letters), found.goes_on_at is None


def _is_stalled(progress: Progress) -> bool:
    age_s = (datetime.now(UTC) - progress.moved_at).total_seconds()
    return progress.state == "running" and age_s > STALLED_S
