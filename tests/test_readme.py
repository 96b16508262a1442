"""The README's promises about itself: its commands exist and its table is the settings'."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from service import cli, config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONSOLE = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in CONSOLE for line in block.splitlines()]


def settings_table() -> str:
    """Return the README's table of settings as the declarations give it."""
    rows = [f"| `{row.name}` | {row.default} | {row.description} |" for row in config.describe()]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


def test_the_table_of_settings_is_that_of_the_declarations() -> None:
    """Every setting stands in the README with its default and meaning."""
    found = re.search(r"<!-- settings -->\n(.*?)\n?<!-- /settings -->", README, re.DOTALL)

    assert found is not None
    assert found[1] == settings_table()


def test_two_commands_set_everything_up() -> None:
    """Exactly two commands install, one to run and one to test, from files that exist."""
    installing = [line for line in COMMANDS if line.startswith("python3 -m venv")]

    assert [line.rpartition(" && ")[2] for line in installing] == [
        ".venv/bin/python -m service dev",
        ".venv/bin/python -m pytest",
    ]
    for line in installing:
        required = re.search(r"-r (\S+)", line)
        assert required is not None
        assert (ROOT / required[1]).is_file()


@pytest.mark.parametrize("line", [line for line in COMMANDS if "-m service " in line])
def test_every_command_parses(line: str) -> None:
    """Each command of the README is one the command line takes, options and all."""
    words = shlex.split(line.rpartition("-m service ")[2])

    command = cli.commands.commands[words[0]]
    context = command.make_context(words[0], words[1:])

    assert isinstance(context, click.Context)
