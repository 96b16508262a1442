"""Variables: how a setting is declared, where its text may stand, and how it is read.

The only reader of environment names. Which settings there are is declared in `config` and, for
each queue, in its handler. Nothing here repeats a value in a problem.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from .errors import ConfigError
from .secret import Secret

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)
N = TypeVar("N", int, float)
S = TypeVar("S")

RUN_SECRETS = Path("/run/secrets")
# A letter too few, too many or another. In short names that is often another's name.
SIMILARITY, MIN_LENGTH = 0.88, 6


@dataclass(frozen=True, kw_only=True)
class Parser(Generic[T]):
    """What a text may be: `parse` raises ValueError on anything but what `expected` says."""

    expected: str
    parse: Callable[[str], T]


def matching(pattern: str, expected: str) -> Parser[str]:
    """Return the kind of texts that *pattern* matches as a whole."""

    def read(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError(expected)
        return text

    return Parser(expected=expected, parse=read)


def comma_separated(item: Parser[T], least: int, most: int, what: str) -> Parser[tuple[T, ...]]:
    """Return the kind of *least* to *most* different items, parted by commas."""
    expected = f"{least} to {most} different {what}, separated by commas only: {item.expected}"

    def read(text: str) -> tuple[T, ...]:
        items = tuple(item.parse(part) for part in text.split(",")) if text else ()
        if not least <= len(items) <= most or len(set(items)) < len(items):
            raise ValueError(expected)
        return items

    return Parser(expected=expected, parse=read)


def secret(kind: Parser[T]) -> Parser[Secret[T]]:
    """Return *kind* with what it reads kept secret."""
    return Parser(expected=kind.expected, parse=lambda text: Secret(kind.parse(text)))


REDIS_URL = matching(
    r"(rediss?(\+sentinel|\+cluster)?|unix)://[!-~]+",
    "redis://, rediss://, either with +sentinel or +cluster, or unix://",
)


def setting(default: T, kind: Parser[T], description: str) -> T:
    """Declare a setting. Its variable is the field's name in capitals."""
    return field(default=default, metadata={"parser": kind, "description": description})


def integer(default: int, low: int, high: int, description: str) -> int:
    """Declare a setting that is a whole number from *low* to *high*."""
    kind = _between(matching(r"[0-9]+", "a whole number"), int, low, high)
    return setting(default, kind, description)


def number(default: float, low: float, high: float, description: str) -> float:
    """Declare a setting that is a number from *low* to *high*."""
    kind = _between(matching(r"[0-9]+(\.[0-9]+)?", "a number"), float, low, high)
    return setting(default, kind, description)


def choice(default: E, description: str) -> E:
    """Declare a setting that is one word of its default's enum."""
    words = type(default)
    return setting(default, Parser(expected=f"one of {', '.join(words)}", parse=words), description)


class SettingRow(NamedTuple):
    """One setting as the documents show it."""

    name: str
    default: str
    description: str


class EnvironmentReader:
    """The places a setting may stand in, and by name what is wrong with what stands there.

    The sources of `NAME` are `NAME`, the file at `NAME_FILE`, and the files `NAME` or `name` in
    `$CREDENTIALS_DIRECTORY` and in *run_secrets*. One newline at a file's end is dropped. An
    empty variable is one not set.
    """

    def __init__(self, environ: Mapping[str, str], run_secrets: Path = RUN_SECRETS) -> None:
        self.problems: dict[str, str] = {}
        self._environ = environ
        self._directories = [_listing(environ.get("CREDENTIALS_DIRECTORY")), _listing(run_secrets)]

    def value(self, name: str, kind: Parser[T]) -> T | None:
        """Return what is set, or None where nothing is set or a problem was noted."""
        try:
            text = self._text(name)
            return None if text is None else kind.parse(text)
        except ConfigError as error:
            self.problems[name] = str(error)
        except ValueError:
            self.problems[name] = f"{name}: expected {kind.expected}"
        return None

    def values(self, declared: type[Any]) -> dict[str, Any]:
        """Return every setting that *declared* declares, its default where nothing is set."""
        found: dict[str, Any] = {}
        for item in _declarations(declared):
            value = self.value(item.name.upper(), item.metadata["parser"])
            found[item.name] = item.default if value is None else value
        return found

    def names(self, prefix: str) -> set[str]:
        """Return the names of all variables that begin with *prefix*, whatever their source."""
        names = {name.removesuffix("_FILE") for name in self._environ}
        for listing in self._directories:
            names.update(name.upper() if name.islower() else name for name in listing)
        return {name for name in names if name.startswith(prefix)}

    def _text(self, name: str) -> str | None:
        text, path = self._environ.get(name), self._environ.get(f"{name}_FILE")
        if text and path:
            raise ConfigError([f"{name}: expected alone, but {name}_FILE is set as well"])
        places = ((listing, key) for listing in self._directories for key in (name, name.lower()))
        file = path or next((listing[key] for listing, key in places if key in listing), None)
        if text or file is None:
            return text or None
        try:
            return Path(file).read_bytes().decode().removesuffix("\n")
        except (OSError, ValueError):
            source = f"{name}_FILE" if path else name
            raise ConfigError([f"{source}: expected a readable file of UTF-8 text"]) from None


def read(declared: type[S], environ: Mapping[str, str]) -> S:
    """Return the settings that a dataclass declares, from their sources.

    Raises:
        ConfigError: With every problem, each by name.
    """
    sources = EnvironmentReader(environ)
    values = sources.values(declared)
    if sources.problems:
        raise ConfigError(tuple(sources.problems.values()))
    return declared(**values)


def find_misspelled(environ: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """Return the variables that are no setting but nearly, each with the setting it is near to."""
    found = {}
    long = [name for name in names if len(name) >= MIN_LENGTH]
    for name in environ:
        plain = name.removesuffix("_FILE")
        if plain not in names and (near := get_close_matches(plain, long, 1, SIMILARITY)):
            found[name] = near[0]
    return found


def describe(declared: type[Any]) -> list[SettingRow]:
    """Return a row for every setting *declared* declares, in that order."""
    return [
        SettingRow(
            name=item.name.upper(),
            default=_shown(item.default),
            description=f"{item.metadata['description']} ({item.metadata['parser'].expected})",
        )
        for item in _declarations(declared)
    ]


def example(rows: list[SettingRow]) -> str:
    """Return the text of an environment file that sets every row to its default."""
    return "\n".join(f"# {row.description}\n{row.name}={row.default}\n" for row in rows)


def _between(numeral: Parser[str], convert: Callable[[str], N], low: N, high: N) -> Parser[N]:
    expected = f"{numeral.expected} from {low} to {high}"

    def read(text: str) -> N:
        number = convert(numeral.parse(text))
        if not low <= number <= high:
            raise ValueError(expected)
        return number

    return Parser(expected=expected, parse=read)


def _declarations(declared: type[Any]) -> list[Field[Any]]:
    return [item for item in fields(declared) if "parser" in item.metadata]


def _listing(directory: str | Path | None) -> Mapping[str, Path]:
    # A directory that cannot be listed is not ours: login shells inherit the variable as well.
    try:
        return {file.name: file for file in Path(directory).iterdir()} if directory else {}
    except (OSError, ValueError):
        return {}


def _shown(default: object) -> str:
    if isinstance(default, Secret):
        return _shown(default.reveal())
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return "" if default is MISSING or default is None else str(default)
