"""What all commands print, and how: tables, JSON, notes, one line for each error, exit codes.

What is printed may hold text from requests. It is never read as rich's markup, and its control
characters are escaped.

Exit codes: 0 all is well, 1 a problem was found, 2 a setting or an argument is wrong, 3 Redis does
not answer.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
import orjson
from redis.exceptions import RedisError
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from ..errors import Unavailable, UnavailableReason
from ..findings import Severity
from ..monitoring.overview import describe_no_answer
from ..secret import Secret
from ..storage.connections import display_address
from ..storage.redis_errors import unavailable_reason

Result = TypeVar("Result")

_PACKAGE = __name__.partition(".")[0]

EXIT_FAILED, EXIT_MISCONFIGURED, EXIT_UNREACHABLE = 1, 2, 3

# For notes and progress. Standard output holds results only, which a program may read.
_NOTES = Console(stderr=True, highlight=False)
# Wider than any table, so that nothing printed to a pipe is cut or folded.
_UNBOUNDED = 100_000

# The colours of the words for how bad something is.
SEVERITY_STYLES = {"fatal": "bold red", "warning": "yellow", "fine": "green"}

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")


def run_async(call: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run an async function to its end.

    Raises:
        Unavailable: Redis did not answer.
    """
    try:
        return asyncio.run(call())
    except (RedisError, OSError) as error:
        raise Unavailable(unavailable_reason(error)) from None


def describe_unavailable(reason: UnavailableReason, url: Secret[str]) -> str:
    """Return one line on what is wrong with Redis: with its host and port, without credentials."""
    meaning = describe_no_answer(reason)
    return f"Redis at {display_address(url)} {meaning} ({reason}); REDIS_URL says where"


def print_rows(
    columns: Sequence[str],
    rows: Sequence[tuple[object, ...]],
    *,
    as_json: bool,
    prose: Collection[str] = (),
) -> None:
    """Print a table, or a JSON list of objects.

    Only the columns in *prose* are folded to fit a terminal. Any other cell may be an id to
    copy, so it stays on one line, however wide that becomes.
    """
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(Text(column), no_wrap=column not in prose, overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    print_view(table)


def _cell(value: object) -> Text:
    style = SEVERITY_STYLES.get(value, "") if isinstance(value, Severity) else ""
    return Text("" if value is None else escape(str(value)), style)


def print_view(view: RenderableType) -> None:
    """Print what rich has arranged, wide enough that no cell is cut."""
    # Rich cuts cells that do not fit. A console as wide as the widest row needs never does.
    console = Console()
    needed = console.measure(view, options=console.options.update(width=_UNBOUNDED)).minimum
    console.width = max(needed, console.width) if console.is_terminal else _UNBOUNDED
    with console.capture() as captured:
        console.print(view)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


@contextmanager
def live_view() -> Iterator[Callable[[RenderableType], None]]:
    """Yield a function that replaces what is shown on a terminal; elsewhere it prints it below."""
    console = Console()
    if not console.is_terminal:
        yield print_view
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield partial(live.update, refresh=True)


def draws_charts() -> bool:
    """Say whether standard output is a terminal that shows more than ASCII."""
    console = Console()
    return console.is_terminal and console.encoding.lower().startswith("utf")


def open_standard_streams() -> None:
    """Open what a shell has closed, to nothing: else the next socket gets a stream's number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # A file that is opened gets the lowest free number, which is that of the closed stream.
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - stays open


def escape_unencodable_output() -> None:
    """Print characters that the encoding of standard output lacks as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def print_json(found: object) -> None:
    """Print one line of JSON, in ASCII: standard output may have any encoding."""
    # orjson leaves non-ASCII and control characters such as U+009B as they are.
    line = orjson.dumps(found).decode()
    click.echo("".join(c if c.isascii() and c.isprintable() else json.dumps(c)[1:-1] for c in line))


def program() -> str:
    """Return what to type to call this program again, from the same shell and folder."""
    # `python -m` sets argv[0] to the path of __main__.py; orig_argv keeps what was typed.
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return f"{shlex.quote(sys.orig_argv[0])} -m {_PACKAGE}"
    if script.is_file():
        is_on_path = shutil.which(script.name) == str(script)
        return shlex.quote(script.name if is_on_path else str(script))
    return f"{shlex.quote(sys.executable)} -m {_PACKAGE}"


def print_note(text: str, style: str = "") -> None:
    """Print a line to standard error."""
    _NOTES.print(Text(escape(text), style), soft_wrap=True)


def escape(text: str) -> str:
    """Return *text* with all characters escaped that a terminal interprets or does not show."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def progress_bar(label: str, *, total: int | None) -> Iterator[tuple[Progress, TaskID]]:
    """Show a progress bar on a terminal until the block is left; show nothing elsewhere."""
    with Progress(console=_NOTES, transient=True, disable=not _NOTES.is_terminal) as progress:
        yield progress, progress.add_task(label, total=total)


def fail(lines: Sequence[str], code: int) -> NoReturn:
    """Print each line as an error and exit with *code*."""
    for line in lines:
        click.echo(f"error: {escape(line)}", err=True)
    sys.exit(code)
