"""Rules for all modules: imports, owners of libraries, names and lengths."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SERVICE = Path(__file__).parents[1] / "service"

# The ground: modules of `service/` that all packages may import, and that import only each other.
# The other modules at the top are the version, the command, and `testing` for custom handlers.
GROUND = {"cancellation", "config", "environment", "errors", "findings", "parsers", "secret"}
# Each package, and the packages it may import.
MAY_IMPORT: dict[str, set[str]] = {
    name: set(below.split())
    for name, below in {
        "stripe": "",
        "transitions": "stripe",
        "telemetry": "",
        "storage": "telemetry",
        "inbox": "stripe transitions telemetry storage",
        "handlers": "transitions telemetry storage",
        "delivery": "transitions telemetry storage handlers",
        "stripe_api": "stripe transitions telemetry storage inbox delivery",
        "monitoring": "transitions telemetry storage inbox delivery stripe_api",
        "server": "telemetry",
        "web": "telemetry inbox",
        "admin": "stripe transitions telemetry storage delivery monitoring web",
        "operations": "stripe transitions storage inbox handlers stripe_api monitoring",
        "runtime": "stripe telemetry storage inbox handlers delivery stripe_api monitoring server"
        " web admin",
        "cli": "stripe transitions telemetry storage inbox delivery stripe_api monitoring"
        " operations runtime",
    }.items()
}
# Imports between packages that only some modules may use.
ONLY = {
    ("handlers", "storage"): {"handlers.redis_stream"},
    ("handlers", "telemetry"): {"handlers.log"},
}

# The packages or modules that may import a library; no others may.
OWNERS = {
    "starlette": {"web", "admin", "server", "runtime.composition"},
    "jinja2": {"admin.rendering"},
    "markupsafe": {"admin.rendering"},
    "uvicorn": {"server"},
    "uvloop": {"runtime.process"},
    "click": {"cli"},
    "rich": {"cli.terminal", "cli.status_view", "cli.session_view"},
    "httpx2": {"operations.sender", "stripe_api.client"},
    "prometheus_client": {"telemetry.metrics"},
    "opentelemetry": {"telemetry.tracing"},
    "redis": {f"storage.{name}" for name in ("clients", "cluster", "redis_connection", "urls")},
    "hmac": {"stripe.signatures", "admin.logins"},
}
# What each of these libraries has that any module may import.
KNOWN_TO_ALL = {"redis": "redis.exceptions."}
# Attributes, imported names and arguments of calls, and the packages or modules that may use them.
USERS = {
    # Who chooses status codes; and two who read those of other servers, and redis-py's name for the
    # first word of an error.
    "status_code status_code=": {
        *("web.app", "admin", "operations.sender", "stripe_api.client", "storage.redis_errors"),
    },
    # Who reads the environment; other modules receive a mapping.
    "environ environb getenv": {"cli.main", "cli.run", "cli.defaults"},
    # Where secrets are used: to sign, to connect, to show defaults.
    "reveal": {
        *("storage.connections", "stripe.signatures", "stripe_api.keys", "environment"),
        *("admin.logins", "handlers.kafka", "handlers.nats", "handlers.rabbitmq", "handlers.sqs"),
    },
}
FORBIDDEN_WORDS = {
    *("util", "utils", "helper", "helpers", "common", "core", "base", "manager", "processor"),
    *("abstract", "impl", "data", "info", "obj"),
}
# Names with forbidden words that others chose.
OTHERS_NAMES = {
    "data": "Stripe's name for the envelope's wrapper",
    "INFO": "the standard library's name of a severity",
    "info": "structlog's name of the same severity",
    "data_received": "asyncio's name of a method of protocols",
    "exc_info": "the standard library's name for a raised exception",
    "ExcInfo": "as above",
    "stripe_api_base": "after --api-base of Stripe's own command",
}
MAX_LINES_PER_FUNCTION = 40
MAX_LINES_PER_SCRIPT = 60
MAX_LINES_PER_MODULE = 350


def _name(path: Path) -> str:
    parts = path.relative_to(SERVICE).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


PATHS = {_name(path): path for path in sorted(SERVICE.rglob("*.py"))}
SCRIPTS = sorted(SERVICE.rglob("*.lua"))


@functools.cache
def tree_of(name: str) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse(PATHS[name].read_text())


def every_module(rule: Callable[[str], None]) -> Callable[[], None]:
    """Return one test of a rule for modules; its failure names those that break the rule."""

    def test() -> None:
        broken = []
        for name in PATHS:
            try:
                rule(name)
            except AssertionError as error:
                broken.append(f"{name}: {error}")
        assert not broken, "\n".join(broken)

    test.__doc__ = rule.__doc__
    return test


def package(name: str) -> str:
    """Return the package of a module; empty for modules at the top."""
    first = name.partition(".")[0]
    return first if first in MAY_IMPORT else ""


@functools.cache
def imported(name: str) -> set[str]:
    """Return the modules of ours that a module imports, at any depth of its code."""
    package = name if PATHS[name].stem == "__init__" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree_of(name)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if package else []
        start = ".".join([*filter(None, above), *filter(None, [node.module])])
        for alias in node.names:
            inner = f"{start}.{alias.name}".removeprefix(".")
            found.add(inner if inner in PATHS else start or "__init__")
    return found - {name}


@functools.cache
def foreign(name: str) -> set[str]:
    """Return the dotted names that a module imports from libraries."""
    found: set[str] = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@functools.cache
def words_used(name: str) -> set[str]:
    """Return the attributes, the names from libraries, and the `arguments=` that a module uses."""
    found = {dotted.rpartition(".")[2] for dotted in foreign(name)}
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        if isinstance(node, ast.keyword):
            found.add(f"{node.arg}=")
    return found


def top(dotted: str) -> str:
    """Return the first part of a dotted name."""
    return dotted.partition(".")[0]


def test_packages_import_only_packages_below() -> None:
    """Each package imports the packages in the table, and no others."""
    found: dict[str, set[str]] = {name: set() for name in MAY_IMPORT}
    for name in PATHS:
        if package(name):
            found[package(name)] |= {package(other) for other in imported(name)}

    assert {name: below - {name, ""} for name, below in found.items()} == MAY_IMPORT


@pytest.mark.parametrize("arrow", ONLY, ids=" imports ".join)
def test_some_imports_are_for_few_modules(arrow: tuple[str, str]) -> None:
    """An import that the table allows for the sake of some modules is used by those only."""
    ours, below = arrow
    users = {
        name
        for name in PATHS
        if package(name) == ours and below in {package(other) for other in imported(name)}
    }

    assert users == ONLY[arrow]


@every_module
def test_the_ground_imports_only_itself(name: str) -> None:
    """Ground modules import only each other, and all imports of ours are relative."""
    assert name not in GROUND or imported(name) <= GROUND
    assert "service" not in {top(dotted) for dotted in foreign(name)}


def test_the_package_is_marked_as_typed() -> None:
    """Type checkers read the annotations of a package with this file (PEP 561)."""
    assert (SERVICE / "py.typed").is_file()


def test_imports_have_no_cycle() -> None:
    """The modules can be ordered so that each imports only earlier ones."""
    order = list(TopologicalSorter({name: imported(name) for name in PATHS}).static_order())

    assert len(order) == len(PATHS)


@pytest.mark.parametrize("library", OWNERS)
def test_each_library_has_one_owner(library: str) -> None:
    """Each library is imported by its owners, modules or packages, and by no others."""
    open_to_all = KNOWN_TO_ALL.get(library, "-")
    users = {
        name
        for name in PATHS
        for dotted in foreign(name)
        if top(dotted) == library and not dotted.startswith(open_to_all)
    }

    assert {name for name in users if not {name, package(name)} & OWNERS[library]} == set()


def test_only_web_knows_http() -> None:
    """Only `web` and `admin` import Starlette; others know the type of an application alone."""
    users = [name for name in PATHS if package(name) not in {"web", "admin"}]
    known = {dotted for name in users for dotted in foreign(name) if top(dotted) == "starlette"}

    assert known <= {"starlette.types.ASGIApp"}


@pytest.mark.parametrize("words", USERS)
def test_some_words_are_for_few_modules(words: str) -> None:
    """Only the modules and packages in the table use any of the words."""
    users = {name for name in PATHS if words_used(name) & {*words.split()}}

    assert {name for name in users if not {name, package(name)} & USERS[words]} == set()


@every_module
def test_only_settings_are_read_by_name(name: str) -> None:
    """Variables are read by `environment`, except for those listed here."""
    looked_up = {
        node.args[0].value
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func).endswith("environ.get")
        and isinstance(node.args[0], ast.Constant)
    }
    owned = {
        "environment": {"CREDENTIALS_DIRECTORY"},
        "runtime.embedded_redis": {"REDIS_SERVER", "PATH"},
        "cli.defaults": {"REDIS_URL", "REDIS_URL_FILE", "PORT", "PORT_FILE", "NO_COLOR"},
        "telemetry.tracing": {"OTEL_SDK_DISABLED", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_SERVICE_NAME"},
    }

    assert name.startswith("handlers.") or looked_up <= owned.get(name, set())


def names(tree: ast.Module) -> Iterator[str]:
    """Yield every name that a module gives to classes, functions, parameters and variables."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node.name
            case ast.arg():
                yield node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr
            case ast.alias(asname=str()):
                yield str(node.asname)


@every_module
def test_no_name_has_a_forbidden_word(name: str) -> None:
    """No name contains one of the words that say nothing."""
    given = {*names(tree_of(name)), *name.split(".")} - OTHERS_NAMES.keys()
    words = {
        (each, word.lower()) for each in given for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", each)
    }

    assert not {(each, word) for each, word in words if word in FORBIDDEN_WORDS}


@every_module
def test_functions_are_short(name: str) -> None:
    """No function is longer than forty lines, without its signature and docstring."""
    long = {}
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
            lines = (node.end_lineno or 0) - first.lineno + 1
            if lines > MAX_LINES_PER_FUNCTION:
                long[node.name] = lines

    assert not long


@every_module
def test_modules_are_short(name: str) -> None:
    """No module exceeds the maximum length."""
    assert len(PATHS[name].read_text().splitlines()) <= MAX_LINES_PER_MODULE


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts(path: Path) -> None:
    """A script begins with its keys, arguments and results, and its functions are short."""
    text = path.read_text()
    uncommented = re.sub(r"^ *--.*\n", "", text, flags=re.MULTILINE)
    function = re.compile(r"^(?:local )?function .*?^end", flags=re.DOTALL | re.MULTILINE)
    functions, code = function.findall(uncommented), function.sub("", uncommented)

    assert text.startswith("#!lua")
    for word in ("KEYS", "ARGV", "Returns"):
        assert re.search(rf"^-- {word}", text, flags=re.MULTILINE)
    assert max(len(part.splitlines()) for part in [*functions, code]) <= MAX_LINES_PER_SCRIPT


def test_no_test_file_imports_another() -> None:
    """Tests share code through modules without tests, such as those in `support`."""
    imports = re.compile(r"^(?:from|import) tests[\w.]*(?:\.| import .*\b)test_", re.MULTILINE)
    tests = Path(__file__).parent.rglob("*.py")

    assert [path.name for path in tests if imports.search(path.read_text())] == []
