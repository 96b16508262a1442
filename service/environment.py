"""How a setting is declared, where its value may come from, and how it is read.

The only reader of environment variables. Which settings there are is declared in `config` and, for
each queue, in its handler. No problem reported here repeats a value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from .errors import ConfigError
from .secret import Secret

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)
N = TypeVar("N", int, float)

RUN_SECRETS = Path("/run/secrets")
# One letter too few, too many or different. A short name is too often similar to another one.
MIN_SIMILARITY, MIN_SIMILAR_LENGTH = 0.88, 6


@dataclass(frozen=True, kw_only=True)
class Parser(Generic[T]):
    """Turns text into a value.

    Attributes:
        expected: What the text must be, for documents and problems.
        parse: Returns the value; raises ValueError for any other text.
    """

    expected: str
    parse: Callable[[str], T]


def matching(pattern: str, expected: str) -> Parser[str]:
    """Return a parser of texts that *pattern* matches as a whole."""

    def parse(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError(expected)
        return text

    return Parser(expected=expected, parse=parse)


def comma_separated(
    item: Parser[T], min_items: int, max_items: int, what: str
) -> Parser[tuple[T, ...]]:
    """Return a parser of *min_items* to *max_items* different items, separated by commas."""
    expected = (
        f"{min_items} to {max_items} different {what}, separated by commas only: {item.expected}"
    )

    def parse(text: str) -> tuple[T, ...]:
        items = tuple(item.parse(part) for part in text.split(",")) if text else ()
        if not min_items <= len(items) <= max_items or len(set(items)) < len(items):
            raise ValueError(expected)
        return items

    return Parser(expected=expected, parse=parse)


def secret(parser: Parser[T]) -> Parser[Secret[T]]:
    """Return *parser* with its values wrapped in `Secret`."""
    return Parser(expected=parser.expected, parse=lambda text: Secret(parser.parse(text)))


REDIS_URL = matching(
    r"(rediss?(\+sentinel|\+cluster)?|unix)://[!-~]+",
    "redis://, rediss://, either with +sentinel or +cluster, or unix://",
)


def setting(default: T, parser: Parser[T], description: str) -> T:
    """Declare a setting. Its variable is the field's name in capitals."""
    return field(default=default, metadata={"parser": parser, "description": description})


def integer(default: int, low: int, high: int, description: str) -> int:
    """Declare a setting that is a whole number from *low* to *high*."""
    digits = matching(r"[0-9]+", f"a whole number from {low} to {high}")
    return setting(default, _between(digits, int, low, high), description)


def number(default: float, low: float, high: float, description: str) -> float:
    """Declare a setting that is a number from *low* to *high*."""
    digits = matching(r"[0-9]+(\.[0-9]+)?", f"a number from {low} to {high}")
    return setting(default, _between(digits, float, low, high), description)


def choice(default: E, description: str) -> E:
    """Declare a setting that is one word of its default's enum."""
    words = type(default)
    return setting(default, Parser(expected=f"one of {', '.join(words)}", parse=words), description)


def _between(digits: Parser[str], convert: Callable[[str], N], low: N, high: N) -> Parser[N]:
    # Not msgspec's conversion and bounds: it also takes 1e3, 80.0 for an integer, and nan.
    def parse(text: str) -> N:
        value = convert(digits.parse(text))
        if not low <= value <= high:
            raise ValueError(digits.expected)
        return value

    return Parser(expected=digits.expected, parse=parse)


class SettingRow(NamedTuple):
    """One setting as the documents show it."""

    name: str
    default: str
    description: str


class EnvironmentReader:
    """Reads settings from their sources and collects what is wrong with them.

    The value of `NAME` is taken from the first of: the variable `NAME`, the file at `NAME_FILE`,
    the file `NAME` or `name` in `$CREDENTIALS_DIRECTORY` (systemd), the same in *run_secrets*
    (Docker). One newline at the end of a file is dropped. An empty variable counts as not set.

    Attributes:
        problems: What is wrong, by the name of the variable.
    """

    def __init__(self, environ: Mapping[str, str], run_secrets: Path = RUN_SECRETS) -> None:
        self.problems: dict[str, str] = {}
        self._environ = environ
        self._directories = [_files(environ.get("CREDENTIALS_DIRECTORY")), _files(run_secrets)]

    def value(self, name: str, parser: Parser[T]) -> T | None:
        """Return the value of a variable; None if it is not set, or wrong (see `problems`)."""
        try:
            text = self._text(name)
            return None if text is None else parser.parse(text)
        except ConfigError as error:
            self.problems[name] = str(error)
        except ValueError:
            self.problems[name] = f"{name}: expected {parser.expected}"
        return None

    def values(self, declared: type[Any]) -> dict[str, Any]:
        """Return the value, or else the default, of every setting that *declared* declares."""
        found: dict[str, Any] = {}
        for item in _declarations(declared):
            value = self.value(item.name.upper(), item.metadata["parser"])
            found[item.name] = item.default if value is None else value
        return found

    def names(self, prefix: str) -> set[str]:
        """Return the names of all variables that begin with *prefix*, from every source."""
        names = {name.removesuffix("_FILE") for name in self._environ}
        for files in self._directories:
            names.update(name.upper() if name.islower() else name for name in files)
        return {name for name in names if name.startswith(prefix)}

    def raise_problems(self) -> None:
        """Raise a `ConfigError` with all problems, if there are any."""
        if self.problems:
            raise ConfigError(tuple(self.problems.values()))

    def _text(self, name: str) -> str | None:
        text, path = self._environ.get(name), self._environ.get(f"{name}_FILE")
        if text and path:
            raise ConfigError([f"{name}: expected alone, but {name}_FILE is set as well"])
        candidates = ((files, key) for files in self._directories for key in (name, name.lower()))
        file = path or next((files[key] for files, key in candidates if key in files), None)
        if text or file is None:
            return text or None
        try:
            return Path(file).read_bytes().decode().removesuffix("\n")
        except (OSError, ValueError):
            source = f"{name}_FILE" if path else name
            raise ConfigError([f"{source}: expected a readable file of UTF-8 text"]) from None


def read(declared: type[T], environ: Mapping[str, str]) -> T:
    """Return the settings that a dataclass declares, from their sources.

    Raises:
        ConfigError: With every problem, each by name.
    """
    reader = EnvironmentReader(environ)
    values = reader.values(declared)
    reader.raise_problems()
    return declared(**values)


def find_misspelled(environ: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """Return the variables whose name is almost that of a setting, each with that setting."""
    found = {}
    long = [name for name in names if len(name) >= MIN_SIMILAR_LENGTH]
    for name in environ:
        plain = name.removesuffix("_FILE")
        if plain not in names and (near := get_close_matches(plain, long, 1, MIN_SIMILARITY)):
            found[name] = near[0]
    return found


def describe(declared: type[Any]) -> list[SettingRow]:
    """Return a row for every setting that *declared* declares, in that order."""
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


def _declarations(declared: type[Any]) -> list[Field[Any]]:
    return [item for item in fields(declared) if "parser" in item.metadata]


def _files(directory: str | Path | None) -> Mapping[str, Path]:
    # A login shell may inherit a CREDENTIALS_DIRECTORY that is not ours and cannot be listed.
    try:
        return {file.name: file for file in Path(directory).iterdir()} if directory else {}
    except (OSError, ValueError):
        return {}


def _shown(default: object) -> str:
    if isinstance(default, Secret):
        return _shown(default.reveal())
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default)
