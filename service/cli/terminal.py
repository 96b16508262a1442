"""What the commands share: tables and JSON, one line for an error, exit codes.

What is shown may hold text of strangers: it is printed as text, never as rich's markup, and no
control character of it reaches the terminal.

Exit codes: 0 all is well, 1 something was found wrong, 2 a setting or an argument is wrong,
3 Redis does not answer.
"""

from __future__ import annotations

import asyncio
import io
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
import orjson
from redis.exceptions import RedisError
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from ..errors import Unavailable, UnavailableReason
from ..secret import Secret
from ..storage.connections import display_address
from ..storage.redis_errors import unavailable_reason

Result = TypeVar("Result")

FOUND_WRONG, MISCONFIGURED, UNREACHABLE = 1, 2, 3

# Notes and progress: standard output holds only what a machine may want to read.
_NOTES = Console(stderr=True, highlight=False)
# Wider than any table: what is measured in it, or printed to a pipe, is neither cut nor folded.
_UNBOUNDED = 100_000

# What each word for a Redis that is of no use means, for one line.
_TROUBLES = {
    UnavailableReason.REDIS_SLOW: "does not answer in time",
    UnavailableReason.REDIS_UNTRUSTED: "certificate not trusted, by us or by it",
    UnavailableReason.REDIS_UNAUTHORIZED: "refuses the user, its password or its command",
    UnavailableReason.REDIS_FULL: "is full",
    UnavailableReason.REDIS_REFUSED: "answers, and refuses what it is asked",
    UnavailableReason.NOT_DURABLE: "cannot keep what it is given",
}

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")


def asking_redis(ask: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run *ask* to its end.

    Raises:
        Unavailable: Redis did not answer.
    """
    try:
        return asyncio.run(ask())
    except (RedisError, OSError) as error:
        raise Unavailable(unavailable_reason(error)) from None


def trouble(reason: UnavailableReason, url: Secret[str]) -> str:
    """Say in one line what is wrong with which Redis: its host and port, no user, no password."""
    said = _TROUBLES.get(reason, "does not answer")
    return f"Redis at {display_address(url)} {said} ({reason}); REDIS_URL says where"


def print_rows(
    columns: Sequence[str],
    rows: Sequence[tuple[object, ...]],
    *,
    as_json: bool,
    prose: Collection[str] = (),
) -> None:
    """Print a table, or a JSON list of objects.

    Only columns of *prose* are folded to fit a terminal. Any other cell may be an id that is typed
    next, so it stays whole, however wide its line becomes.
    """
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(Text(column), no_wrap=column not in prose, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else printable(str(cell))) for cell in row))
    console = Console()
    least = console.measure(table, options=console.options.update(width=_UNBOUNDED)).minimum
    console.width = max(least, console.width) if console.is_terminal else _UNBOUNDED
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def print_any_text() -> None:
    """Let characters that the encoding of standard output lacks be printed as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def print_json(found: object) -> None:
    """Print one line of JSON, in ASCII: standard output may have any encoding."""
    line = orjson.dumps(found).decode()
    click.echo("".join(c if c.isascii() and c.isprintable() else json.dumps(c)[1:-1] for c in line))


_PACKAGE = __name__.partition(".")[0]


def invoked() -> str:
    """Return how this program was called, as it is typed in the same shell and folder again."""
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return f"{shlex.quote(sys.orig_argv[0])} -m {_PACKAGE}"
    if script.is_file():
        is_on_path = shutil.which(script.name) == str(script)
        return shlex.quote(script.name if is_on_path else str(script))
    return f"{shlex.quote(sys.executable)} -m {_PACKAGE}"


def note(text: str, style: str = "") -> None:
    """Print a line to standard error, for people."""
    _NOTES.print(Text(printable(text), style), soft_wrap=True)


def printable(text: str) -> str:
    """Return *text* with everything escaped that a terminal would obey or not show."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def bar(what: str, *, total: int | None) -> Iterator[tuple[Progress, TaskID]]:
    """Show progress on a terminal, for as long as the block lasts; elsewhere nothing."""
    with Progress(console=_NOTES, transient=True, disable=not _NOTES.is_terminal) as progress:
        yield progress, progress.add_task(what, total=total)


def fail(lines: Sequence[str], code: int) -> NoReturn:
    """Print each line as an error and exit with *code*."""
    for line in lines:
        click.echo(f"error: {printable(line)}", err=True)
    sys.exit(code)
