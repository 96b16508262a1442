"""What commands print: text is never interpreted, and no id is cut."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner

from service.cli import terminal
from tests.support.terminals import OnTerminal

# Markup of rich, and control sequences: clear the screen, write the clipboard, CSI as one
# character, reverse the writing direction, start another line.
HOSTILE = "[/x][red]a\x1b[2J\x1b]52;c;aGk=\x07\x9b2J\u202eb\r\nc\x7f"
SHOWN = r"[/x][red]a\x1b[2J\x1b]52;c;aGk=\x07\x9b2J\u202eb\r\nc\x7f"
LONG = "vs_" + "0123456789" * 20


def printed(call: Any, *arguments: Any, **options: Any) -> str:
    """Return what a call prints to standard output, or else to standard error."""
    with CliRunner().isolation() as (out, err, _):
        call(*arguments, **options)
    return (out.getvalue() or err.getvalue()).decode()


def lines_on_a_terminal(program: str, directory: Path, *, columns: int) -> list[str]:
    """Return what a program prints on a terminal with *columns* columns."""
    process = OnTerminal("own", directory=directory, program=program, COLUMNS=str(columns))
    assert process.wait() == 0, process.err
    return process.out.decode().splitlines()


def test_a_table_prints_text_as_text() -> None:
    """Markup in a cell or a column name is printed, control characters are escaped."""
    table = printed(
        terminal.print_rows, ("[b]id", "text"), [("[/x]", HOSTILE), (None, 3)], as_json=False
    )
    assert table == f"[b]id  text\n[/x]   {SHOWN}\n       3\n"


def test_json_prints_no_control_character() -> None:
    """Parsed, the text is the same; printed, it has no control characters."""
    line = printed(terminal.print_rows, ("text",), [(HOSTILE + "\U000e0001é",)], as_json=True)
    assert line.removesuffix("\n").isprintable()
    assert line.isascii()
    assert orjson.loads(line) == [{"text": HOSTILE + "\U000e0001é"}]


def test_notes_and_errors_print_text_as_text() -> None:
    """A note and an error are one line of text each."""
    assert printed(terminal.print_note, HOSTILE) == f"{SHOWN}\n"
    with CliRunner().isolation() as (_, err, _out), pytest.raises(SystemExit) as ended:
        terminal.fail([HOSTILE], 2)
    assert (ended.value.code, err.getvalue().decode()) == (2, f"error: {SHOWN}\n")


@pytest.mark.parametrize("columns", ["80", "1"])
def test_a_pipe_gets_whole_lines(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pipe a row is one line without trailing blanks, whatever COLUMNS is."""
    monkeypatch.setenv("COLUMNS", columns)
    rows = [(LONG, "word " * 40, 1), ("short", "", 2)]
    table = printed(
        terminal.print_rows, ("id", "meaning", "n"), rows, as_json=False, prose=("meaning",)
    )
    lines = table.splitlines()
    assert len(lines) == 3
    assert lines[1] == f"{LONG}  {'word ' * 40}  1"
    assert not [line for line in lines if line.endswith(" ")]


@pytest.mark.parametrize("columns", [80, 20])
def test_a_terminal_cuts_no_id(columns: int, tmp_path: Path) -> None:
    """On a narrow terminal prose is folded, and every other cell stays on one line."""
    program = f"""
from service.cli import terminal
rows = [({LONG!r}, "{"word " * 40}"), ("vs_short", "[/x]")]
terminal.print_rows(("id", "meaning"), rows, as_json=False, prose=("meaning",))
"""
    lines = lines_on_a_terminal(program, tmp_path, columns=columns)
    assert sum(LONG in line for line in lines) == 1
    assert len(lines) > 4
    assert any("[/x]" in line for line in lines)


def test_a_table_that_fits_is_as_wide_as_it_needs_to_be(tmp_path: Path) -> None:
    """A narrow table on a wide terminal has one line for each row."""
    program = """
from service.cli import terminal
terminal.print_rows(("id", "meaning"), [("a", "b c")], as_json=False, prose=("meaning",))
"""
    lines = lines_on_a_terminal(program, tmp_path, columns=120)
    assert len(lines) == 2
    assert lines[1] == "a   b c"


def test_a_console_script_is_called_by_its_name_where_that_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name if the shell finds that, else by the path that was typed."""
    script = tmp_path / "my scripts" / "identity-webhooks"
    script.parent.mkdir()
    script.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(script), "dev"])
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert terminal.program() == f"'{script}'"
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin")
    assert terminal.program() == "identity-webhooks"
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert terminal.program() == f"{sys.executable} -m service"
