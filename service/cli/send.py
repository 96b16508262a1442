"""The command that sends synthetic lifecycles, or files, to an endpoint."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import click

from ..config import DAY_S
from ..operations import sender
from ..operations.synthetic_events import (
    LIFECYCLES,
    SyntheticEvent,
    lifecycle_events,
    thin_event,
)
from ..runtime import signals
from ..secret import Secret
from . import defaults, terminal

# Long enough ago that the slowest step of a lifecycle is not in the future.
STARTED_BEFORE_S = 5 * DAY_S
MAX_HINTS = 3
# The answers after which there is a record of the session.
_RECORDED = {"admitted", "duplicate", "late", "unchanged"}


@click.command(epilog="\b\n" + "\n".join(["LIFECYCLE is one of:", *LIFECYCLES]))
@click.argument("lifecycles", nargs=-1, metavar="LIFECYCLE...", type=click.Choice([*LIFECYCLES]))
@click.option("--count", default=1, show_default=True, type=click.IntRange(1, 1_000_000),
              help="Sessions per lifecycle.")  # fmt: skip
@click.option("--rate", type=click.FloatRange(0.01), help="Maximum number of events per second.")
@click.option("--duplicates", default=0.0, show_default=True, type=click.FloatRange(0, 1),
              help="Share of events sent a second time.")  # fmt: skip
@click.option("--shuffle", is_flag=True, help="Send all events in a random order.")
@click.option("--thin", is_flag=True,
              help="Send thin events; a worker will not find them at Stripe.")  # fmt: skip
@click.option("--file", "files", multiple=True, type=click.Path(exists=True, dir_okay=False,
              path_type=Path), help="Send this body instead; may be repeated.")  # fmt: skip
@click.option("--to", default=None, metavar="URL",
              help="The endpoint; default: on PORT, else the one of dev.")  # fmt: skip
@click.option("--secret-file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="The signing secret; default: STRIPE_WEBHOOK_SECRETS, or dev's.")  # fmt: skip
@click.option("--seed", type=int, help="Make the same sessions again.")
@terminal.json_option
def send(
    lifecycles: Sequence[str],
    *,
    count: int,
    duplicates: float,
    shuffle: bool,
    thin: bool,
    files: Sequence[Path],
    secret_file: Path | None,
    seed: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Send signed synthetic events, or files.

    When interrupted, it prints what was answered so far.
    """
    if bool(lifecycles) == bool(files):
        raise click.UsageError("name either lifecycles or --file")
    if thin and files:
        raise click.UsageError("--thin is for lifecycles; a file is sent as it is")
    random = Random(secrets.randbits(64) if seed is None else seed)  # noqa: S311 - synthetic data
    events = _make_events(lifecycles, count, random)
    if thin:
        events = [thin_event(event, random=random) for event in events]
    requests = [sender.WebhookRequest(body=path.read_bytes()) for path in files] or sender.plan(
        events, duplicates=duplicates, shuffle=shuffle, random=random
    )
    answers: list[sender.Answer] = []
    summary = _send(requests, answers, defaults.find_signing_secret(secret_file), **options)
    terminal.print_rows(("outcome", "answers"), sorted(summary.counts.items()), as_json=as_json)
    # A worker has yet to make the record of a thin event's session.
    if not as_json and not thin:
        _print_hints(events, answers)
    is_complete = summary.total == len(requests)
    if not is_complete:
        terminal.print_note(f"interrupted after {summary.total} of {len(requests)} events")
    if not (is_complete and summary.ok):
        sys.exit(terminal.EXIT_FAILED)


def _send(
    requests: Sequence[sender.WebhookRequest],
    answers: list[sender.Answer],
    secret: Secret[bytes],
    *,
    to: str | None,
    rate: float | None,
) -> sender.Summary:
    """Send, and append each answer to *answers*; SIGINT and SIGTERM stop it between two events."""
    with terminal.progress_bar("sending", total=len(requests)) as (progress, task):

        def note(answer: sender.Answer) -> None:
            answers.append(answer)
            progress.advance(task)

        async def run() -> sender.Summary:
            return await sender.send(
                requests,
                to=to or defaults.find_endpoint(),
                secret=secret,
                rate=rate,
                progress=note,
                stopping=signals.stop_event(),
            )

        return asyncio.run(run())


def _print_hints(events: Sequence[SyntheticEvent], answers: Sequence[sender.Answer]) -> None:
    """Print the command that shows a session, for the first sessions that are recorded now."""
    recorded = {answer.request.body for answer in answers if answer.outcome in _RECORDED}
    session_ids = dict.fromkeys(event.session_id for event in events if event.body in recorded)
    for session_id in [*session_ids][:MAX_HINTS]:
        terminal.print_note(f"look at it with: {terminal.program()} session {session_id}", "dim")


def _make_events(lifecycles: Sequence[str], count: int, random: Random) -> list[SyntheticEvent]:
    started_at = int(time.time()) - STARTED_BEFORE_S
    return [
        event
        for _ in range(count)
        for name in lifecycles
        for event in lifecycle_events(name, random=random, started_at=started_at)
    ]
