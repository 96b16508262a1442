"""What the commands share: tables and JSON, one line for an error, exit codes.

Exit codes: 0 all is well, 1 something was found wrong, 2 a setting or an argument is wrong,
3 Redis does not answer.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import click
import orjson
from redis.exceptions import RedisError
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from .connections import shortage
from .errors import Unavailable

Result = TypeVar("Result")

FOUND_WRONG, MISCONFIGURED, UNREACHABLE = 1, 2, 3

# What a machine may want to read goes to standard output, everything else here.
NOTES = Console(stderr=True)

_out = Console()

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")


def asking_redis(ask: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run *ask* to its end.

    Raises:
        Unavailable: Redis did not answer.
    """
    try:
        return asyncio.run(ask())
    except (RedisError, OSError) as error:
        raise Unavailable(shortage(error)) from None


def print_rows(
    columns: Sequence[str], rows: Sequence[tuple[object, ...]], *, as_json: bool
) -> None:
    """Print a table, or a JSON list of objects."""
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row))
    _out.print(table)


def print_json(found: object) -> None:
    """Print one line of JSON."""
    click.echo(orjson.dumps(found))


@contextmanager
def bar(what: str, *, total: int | None) -> Iterator[tuple[Progress, TaskID]]:
    """Show progress on a terminal, for as long as the block lasts; elsewhere nothing."""
    with Progress(console=NOTES, transient=True, disable=not NOTES.is_terminal) as progress:
        yield progress, progress.add_task(what, total=total)


def fail(lines: Sequence[str], code: int) -> NoReturn:
    """Print each line as an error and exit with *code*."""
    for line in lines:
        click.echo(f"error: {line}", err=True)
    sys.exit(code)
