"""The command that sends synthetic lives of sessions, or files, to an endpoint."""

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

from ..operations import sender
from ..operations.synthetic_events import LIFECYCLES, SyntheticEvent, lifecycle_events
from ..runtime import signals
from ..secret import Secret
from . import send_target, terminal

# Long enough ago that even the slowest step of a synthetic life is not in the future.
LIFE_BEGAN_BEFORE_S = 5 * 86_400
# The answers after which the ledger knows the session.
_REMEMBERED = {"admitted", "duplicate", "late", "unchanged"}
MAX_HINTS = 3


@click.command(epilog="\b\n" + "\n".join(["LIFECYCLE is one of:", *LIFECYCLES]))
@click.argument("lifecycles", nargs=-1, metavar="LIFECYCLE...", type=click.Choice([*LIFECYCLES]))
@click.option("--count", default=1, show_default=True, type=click.IntRange(1, 1_000_000),
              help="Sessions per lifecycle.")  # fmt: skip
@click.option("--rate", type=click.FloatRange(0.01), help="At most so many events per second.")
@click.option("--duplicates", default=0.0, show_default=True, type=click.FloatRange(0, 1),
              help="Share of events sent a second time.")  # fmt: skip
@click.option("--shuffle", is_flag=True, help="Mix the order of everything.")
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
    files: Sequence[Path],
    secret_file: Path | None,
    seed: int | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Send signed synthetic lifecycles, or the bodies of files, to an endpoint.

    Interrupted, it says what was answered so far.
    """
    if bool(lifecycles) == bool(files):
        raise click.UsageError("name either lifecycles or --file")
    random = Random(secrets.randbits(64) if seed is None else seed)  # noqa: S311 - invented sessions
    events = _lives(lifecycles, count, random)
    requests = [sender.WebhookRequest(body=path.read_bytes()) for path in files] or sender.plan(
        events, duplicates=duplicates, shuffle=shuffle, random=random
    )
    answers: list[sender.Answer] = []
    summary = _sent(requests, answers, send_target.signing_secret(secret_file), **how)
    terminal.print_rows(("outcome", "answers"), sorted(summary.counts.items()), as_json=as_json)
    if not as_json:
        _print_hints(events, answers)
    is_whole = summary.total == len(requests)
    if not is_whole:
        terminal.note(f"interrupted after {summary.total} of {len(requests)} events")
    if not (is_whole and summary.ok):
        sys.exit(terminal.FOUND_WRONG)


def _sent(
    requests: Sequence[sender.WebhookRequest],
    answers: list[sender.Answer],
    secret: Secret[bytes],
    *,
    to: str | None,
    rate: float | None,
) -> sender.Summary:
    """Send, and note each answer as it comes; SIGINT and SIGTERM end it between two events."""
    with terminal.bar("sending", total=len(requests)) as (progress, bar):

        def note(answer: sender.Answer) -> None:
            answers.append(answer)
            progress.advance(bar)

        async def work() -> sender.Summary:
            return await sender.send(
                requests,
                to=to or send_target.default_address(),
                secret=secret,
                rate=rate,
                progress=note,
                stopping=signals.stopping(),
            )

        return asyncio.run(work())


def _print_hints(events: Sequence[SyntheticEvent], answers: Sequence[sender.Answer]) -> None:
    """Say how to look at the first of those sessions that the ledger knows now."""
    known = {answer.request.body for answer in answers if answer.outcome in _REMEMBERED}
    sessions = dict.fromkeys(event.session_id for event in events if event.body in known)
    for session_id in [*sessions][:MAX_HINTS]:
        terminal.note(f"look at it with: {terminal.invoked()} session {session_id}", "dim")


def _lives(lifecycles: Sequence[str], count: int, random: Random) -> list[SyntheticEvent]:
    began_at = int(time.time()) - LIFE_BEGAN_BEFORE_S
    return [
        event
        for _ in range(count)
        for name in lifecycles
        for event in lifecycle_events(name, random=random, started_at=began_at)
    ]
