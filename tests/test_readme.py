"""The README's promises about itself: its commands exist and are taken."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from service import __version__
from service.cli.main import commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONSOLE = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
COMMANDS = [line for block in CONSOLE for line in block.splitlines()]


def test_two_commands_set_everything_up() -> None:
    """Exactly two commands install, one to run and one to test, from files that exist."""
    installing = [line for line in COMMANDS if line.startswith("python3 -m venv")]

    assert [line.rpartition(" && ")[2] for line in installing] == [
        ".venv/bin/python -m service dev",
        ".venv/bin/python -m pytest",
    ]
    for line in installing:
        # What is pinned is whole. Resolving it again fails as soon as anything newer appears.
        required = re.search(r"pip install -q --no-deps -r (\S+)", line)
        assert required is not None
        assert (ROOT / required[1]).is_file()


@pytest.mark.parametrize("line", [line for line in COMMANDS if "-m service " in line])
def test_every_command_parses(line: str) -> None:
    """Each command of the README is one the command line takes, options and all."""
    words = shlex.split(line.rpartition("-m service ")[2])

    command: click.Command = commands
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]

    assert isinstance(command.make_context(command.name, words), click.Context)


def anchors() -> set[str]:
    """Return what a link within the README may point to: headings, and anchors of their own."""
    headings = re.findall(r"^#+ (.*)$", PROSE, re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', PROSE))


def test_every_link_leads_somewhere() -> None:
    """A link within the README has its anchor, a link to a file has its file."""
    links = re.findall(r"\]\(([^)\s]+)\)", PROSE)
    inner = {link.removeprefix("#") for link in links if link.startswith("#")}
    files = {link for link in links if not link.startswith(("#", "https://"))}

    assert links
    assert inner <= anchors()
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_every_file_named_exists() -> None:
    """A path into the project that the README names, in prose or in a command, is there."""
    named = re.findall(r"(?<![\w/])(?:deploy|service|tests)(?:/[\w.-]+)+/?", README)
    alone = re.findall(r"`(Procfile|LICENSE|\.[a-z]+\.example|\.ci/\w+)`", PROSE)

    assert {"deploy/Dockerfile", "tests/stripe/test_signatures.py"} <= set(named)
    assert [path for path in {*named, *alone} if not (ROOT / path).exists()] == []


def test_this_version_is_told_of() -> None:
    """The changes say what the present version is to its users."""
    assert f"\n**{__version__}**" in PROSE.partition("\n## Changes\n")[2]
