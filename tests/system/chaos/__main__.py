"""Chaos runs of real processes on a real Redis: `python -m tests.system.chaos --help`.

Two runs at once, each in a process and a directory of its own; loopback only, and nothing is left
running. Exit code 1 when any promise was broken.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from itertools import groupby
from pathlib import Path
from random import Random

import click
import uvloop

from tests.system.chaos.faults import FAULTS
from tests.system.chaos.mixes import LONG, SHORT
from tests.system.chaos.needs import ConflictError, combined
from tests.system.chaos.runner import Outcome, Plan, run

MAX_SHOWN_PER_LAW = 5
# A run needs about half a core.
RUNS_AT_ONCE = 2


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--short", is_flag=True, help="The mix for every change: the same runs each time.")
@click.option("--fault", "faults", multiple=True, type=click.Choice([*FAULTS]),
              help="Only this fault; may be repeated, also with the same one.")  # fmt: skip
@click.option("--seed", type=int, help="Make the same choices again.")
@click.option("--runs", default=1, show_default=True, type=click.IntRange(1, 10_000),
              help="Runs of each mix, each with the next seed.")  # fmt: skip
@click.option("--rate", default=110.0, show_default=True, type=click.FloatRange(1, 2000),
              help="Events per second.")  # fmt: skip
@click.option("--seconds", default=30.0, show_default=True, type=click.FloatRange(1, 3600),
              help="How long the load of a run lasts at least.")  # fmt: skip
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path),
              help="Keep logs, call logs and Redis's files there.")  # fmt: skip
def main(
    *,
    short: bool,
    faults: tuple[str, ...],
    seed: int | None,
    runs: int,
    rate: float,
    seconds: float,
    keep: Path | None,
) -> None:
    """Inject faults, and report which promises held. Without options: the long mixes, once."""
    first = Random().randrange(10**6) if seed is None else seed
    mixes = {"chosen": faults} if faults else (SHORT if short else LONG)
    possible = {name: mix for name, all_of in mixes.items() if (mix := _possible(all_of))}
    planned = [
        (name, Plan(first + number, rate, seconds, mix), keep)
        for number in range(runs)
        for name, mix in possible.items()
    ]
    outcomes = []
    with multiprocessing.Pool(RUNS_AT_ONCE, _prepare_process) as pool:
        # On SIGTERM, end the runs first.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        for name, outcome in pool.imap(_run, planned):
            _report(name, outcome)
            outcomes.append((name, outcome))
    _print_table(outcomes)
    if any(outcome.judgement.violations for _, outcome in outcomes):
        sys.exit(1)


def _possible(mix: Sequence[str]) -> tuple[str, ...]:
    """Return the faults of a mix that this machine can inject; report why it cannot the others."""
    try:
        combined(FAULTS[name].needs for name in mix)
    except ConflictError as error:
        raise click.UsageError(f"These faults need different deployments: {error}") from None
    for name in mix:
        if reason := FAULTS[name].needs.missing:
            click.echo(f"skipped {name}: {reason}", err=True)
    return tuple(name for name in mix if not FAULTS[name].needs.missing)


def _slug(name: str) -> str:
    """Return a mix's name as a directory's: a preloaded library's path may hold no space."""
    return re.sub(r"\W+", "-", name)


def _prepare_process() -> None:
    """Leave Ctrl-C to the parent, and take ports of its own, as each process of a test run does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["PYTEST_XDIST_WORKER"] = f"gw{multiprocessing.current_process()._identity[0]}"


def _run(planned: tuple[str, Plan, Path | None]) -> tuple[str, Outcome]:
    """Make one run; return the name of its mix, and its outcome."""
    name, plan, keep = planned
    click.echo(f"{name}, seed {plan.seed}: {', '.join(plan.faults)}", err=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as made:
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
        directory = (
            tempfile.mkdtemp(prefix=f"{_slug(name)}-{plan.seed}-", dir=keep) if keep else made
        )
        try:
            return name, uvloop.run(_until_sigterm(run(plan, Path(directory))))
        except asyncio.CancelledError:
            sys.exit(1)


async def _until_sigterm(running: Coroutine[None, None, Outcome]) -> Outcome:
    """Make a run; on SIGTERM, end its processes and raise `CancelledError`."""
    task, loop = asyncio.ensure_future(running), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    finally:
        # From here on the signal ends this process at once.
        loop.remove_signal_handler(signal.SIGTERM)


def _report(name: str, outcome: Outcome) -> None:
    """Report all counts of a run, its violations, and how to repeat it."""
    counts = ", ".join(f"{count} {what}" for what, count in outcome.judgement.counts.items())
    click.echo(f"{name}, done: {counts}", err=True)
    for law, violations in groupby(outcome.judgement.violations, key=lambda one: one.law):
        found = [violation.what for violation in violations]
        click.echo(f"BROKEN {law}, {len(found)} times:", err=True)
        for what in found[:MAX_SHOWN_PER_LAW]:
            click.echo(f"  {what}", err=True)
    if outcome.judgement.violations:
        click.echo(f"again with: {_again(outcome.plan)}", err=True)


def _again(plan: Plan) -> str:
    faults = [f"--fault={name}" for name in plan.faults]
    numbers = [f"--seed={plan.seed}", f"--rate={plan.rate:g}", f"--seconds={plan.seconds:g}"]
    return shlex.join(["python", "-m", "tests.system.chaos", *numbers, *faults])


def _print_table(outcomes: Sequence[tuple[str, Outcome]]) -> None:
    columns = (
        "mix seed faults events /s longest requests none 503 delivered repeats dead lost restarts"
    )
    rows = [columns.split(), *([str(cell) for cell in _row(*one)] for one in outcomes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join([cells[0].strip().ljust(widths[0]), *cells[1:]]))


def _row(name: str, outcome: Outcome) -> tuple[object, ...]:
    counts = outcome.judgement.counts

    def total(prefix: str) -> int:
        return sum(count for what, count in counts.items() if what.startswith(prefix))

    return (
        name,
        outcome.plan.seed,
        len(outcome.plan.faults),
        counts["events"],
        round(outcome.rate),
        f"{outcome.longest_s:.1f}s",
        counts["requests"],
        counts.get("answered none", 0),
        counts.get("answered unavailable", 0),
        total("delivered"),
        total("repeats"),
        total("dead letters"),
        counts["forgotten"] + counts["deleted before delivery"],
        outcome.restarts,
    )


if __name__ == "__main__":
    main()
