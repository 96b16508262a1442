"""The documents are right: commands parse, links lead somewhere, files that they name exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest

import service
from service.cli.main import commands
from tests.generate import PACKAGES, generated, series, series_name

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [
    path
    for part in (".", ".github", "deploy", "service", "tests")
    for path in sorted((ROOT / part).glob("*.md" if part == "." else "**/*.md"))
]
TEXTS = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
PROSE = {path: re.sub(r"```.*?```", "", text, flags=re.DOTALL) for path, text in TEXTS.items()}
COMMANDS = {
    path: [
        line
        for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    for path, text in TEXTS.items()
}
MAX_README_BYTES = 14_000
every_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def test_the_readme_is_short() -> None:
    """The README is for a newcomer; what else there is to say stands beside what it describes."""
    assert README.stat().st_size <= MAX_README_BYTES


def test_two_commands_set_everything_up() -> None:
    """Exactly two commands install, one to run and one to test, from files that exist."""
    installing = [line for line in COMMANDS[README] if line.startswith("python3 -m venv")]

    assert [line.rpartition(" && ")[2] for line in installing] == [
        ".venv/bin/python -m service dev",
        ".venv/bin/python -m pytest",
    ]
    for line in installing:
        # What is pinned is whole. Resolving it again fails as soon as anything newer appears.
        required = re.search(r"pip install -q --no-deps -r (\S+)", line)
        assert required is not None
        assert (ROOT / required[1]).is_file()


@pytest.mark.parametrize(
    "line", [line for lines in COMMANDS.values() for line in lines if "-m service " in line]
)
def test_every_command_parses(line: str) -> None:
    """The command line takes each command in the documents, options and all."""
    words = shlex.split(line.rpartition("-m service ")[2])
    command: click.Command = commands
    # click keeps a command's help option from its first context: that has to be the program's.
    context = click.Context(commands, **commands.context_settings)
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
        if isinstance(command, click.Group):
            context = click.Context(command, info_name=command.name, parent=context)
    assert command.make_context(command.name, words, parent=context).command.callback


def anchors(path: Path) -> set[str]:
    """Return what a link into a document may point to: headings, and anchors of their own."""
    headings = re.findall(r"^#+ (.*)$", PROSE[path], re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', PROSE[path]))


@every_document
def test_every_link_leads_somewhere(path: Path) -> None:
    """A relative link names a file that exists, and an anchor that the document has."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", PROSE[path]):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)

    assert dead == []


@every_document
def test_every_file_named_exists(path: Path) -> None:
    """A path into the project that a document names, in prose or in a command, is there."""
    named = re.findall(r"(?<![\w/.])(?:deploy|service|tests)(?:/[\w.-]+)+/?", TEXTS[path])
    alone = re.findall(r"`(Procfile|LICENSE|\.[a-z]+\.example|\.ci/\w+)`", PROSE[path])
    beside = re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.(?:py|lua))`", PROSE[path])

    missing = {name for name in (*named, *alone, *beside) if not (ROOT / name).exists()}
    assert {name for name in missing if not (path.parent / name).exists()} == set()


@every_document
def test_every_module_of_the_tests_exists(path: Path) -> None:
    """A module that a document says to run is there."""
    modules = re.findall(r"-m (tests(?:\.\w+)+)|`(tests(?:\.\w+)+)`", TEXTS[path])
    names = {first or second for first, second in modules}

    assert [name for name in names if importlib.util.find_spec(name) is None] == []


@every_document
def test_every_series_named_exists(path: Path) -> None:
    """A metric that a document names is one that `metrics` declares."""
    known = {series_name(one) for one in series()}

    assert set(re.findall(r"\bidv_\w+", TEXTS[path])) <= known


@pytest.mark.parametrize("path", generated(), ids=str)
def test_generated_files_are_current(path: Path) -> None:
    """Each generated file is what `python -m tests.generate` would write."""
    assert path.read_text(encoding="utf-8") == generated()[path]


def test_the_package_names_its_parts() -> None:
    """The docstring of the whole names every package; service/README.md has their promises."""
    assert service.__doc__ is not None
    assert [name for name in PACKAGES if f"`{name}`" not in service.__doc__] == []


def test_the_changelog_has_this_version() -> None:
    """The changelog says what the present version brings to its users."""
    assert f"\n**{service.__version__}**" in PROSE[README].partition("\n## Changelog\n")[2]
