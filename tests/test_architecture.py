"""The laws of the whole: who may import whom, who owns what, how things are named, how long."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SERVICE = Path(__file__).parents[1] / "service"

# What stands at the top of `service/` without a package of its own: imported by all, importing
# nothing of ours but each other. The rest of the top is for others: the package's version, the
# command, and what tests of one's own handlers need.
GROUND = {"cancellation", "config", "environment", "errors", "secret"}
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
        "server": "telemetry",
        "web": "telemetry inbox",
        "operations": "stripe transitions storage inbox handlers delivery",
        "runtime": "stripe transitions telemetry storage inbox handlers delivery server web",
        "cli": "stripe transitions telemetry storage inbox delivery operations runtime",
    }.items()
}
# Of a package that may import another, the modules that alone do so.
ONLY = {
    ("handlers", "storage"): {"handlers.redis_stream"},
    ("handlers", "telemetry"): {"handlers.log"},
}

# Who alone may import what is foreign.
OWNERS = {
    "starlette": {"web", "server", "runtime.composition"},
    "uvicorn": {"server"},
    "uvloop": {"runtime.process"},
    "click": {"cli"},
    "rich": {"cli.terminal"},
    "httpx2": {"operations.sender"},
    "prometheus_client": {"telemetry.metrics"},
    "opentelemetry": {"telemetry.tracing"},
    "hmac": {"stripe.signatures"},
}
FORBIDDEN_WORDS = {
    *("util", "utils", "helper", "helpers", "common", "core", "base", "manager", "processor"),
    *("abstract", "impl", "data", "info", "obj"),
}
# Names that are not ours to choose.
OTHERS_NAMES = {
    "data": "Stripe's name for the envelope's wrapper",
    "INFO": "the standard library's name of a severity",
    "info": "structlog's name of the same",
    "data_received": "asyncio's name of a protocol's method",
    "exc_info": "the standard library's name for a raised exception",
    "ExcInfo": "as above",
}
MAX_LINES_PER_FUNCTION = 40
MAX_LINES_PER_SCRIPT = 60
MAX_LINES_PER_MODULE = 350


def _name(path: Path) -> str:
    parts = path.relative_to(SERVICE).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


PATHS = {_name(path): path for path in sorted(SERVICE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}
SCRIPTS = sorted(SERVICE.rglob("*.lua"))
every_module = pytest.mark.parametrize("name", TREES)


def package(name: str) -> str:
    """Return the package a module is in; empty for the modules at the top."""
    first = name.partition(".")[0]
    return first if first in MAY_IMPORT else ""


def imported(name: str) -> set[str]:
    """Return what a module imports of ours, at any depth of its code."""
    package = name if PATHS[name].stem == "__init__" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(TREES[name]):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if package else []
        start = ".".join([*filter(None, above), *filter(None, [node.module])])
        for alias in node.names:
            inner = f"{start}.{alias.name}".removeprefix(".")
            found.add(inner if inner in PATHS else start or "__init__")
    return found - {name}


def foreign(name: str) -> set[str]:
    """Return the foreign modules a module imports, by their dotted names."""
    found: set[str] = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def top(dotted: str) -> str:
    """Return the first word of a dotted name."""
    return dotted.partition(".")[0]


def test_packages_import_what_is_below_them() -> None:
    """Each package imports those packages that the table names, and no others."""
    found: dict[str, set[str]] = {name: set() for name in MAY_IMPORT}
    for name in TREES:
        if package(name):
            found[package(name)] |= {package(other) for other in imported(name)}

    assert {name: below - {name, ""} for name, below in found.items()} == MAY_IMPORT


@pytest.mark.parametrize("arrow", ONLY, ids=" imports ".join)
def test_few_modules_look_further(arrow: tuple[str, str]) -> None:
    """Where the table lets a package import another for the sake of some modules, only those do."""
    ours, below = arrow
    users = {
        name
        for name in TREES
        if package(name) == ours and below in {package(other) for other in imported(name)}
    }

    assert users == ONLY[arrow]


@every_module
def test_the_ground_imports_nothing_above_it(name: str) -> None:
    """The modules at the top import each other at most; all of ours is imported relatively."""
    assert name not in GROUND or imported(name) <= GROUND
    assert "service" not in {top(dotted) for dotted in foreign(name)}


def test_the_package_says_that_it_is_typed() -> None:
    """Type checkers read a package's annotations where they find this file (PEP 561)."""
    assert (SERVICE / "py.typed").is_file()


def test_arrows_point_down() -> None:
    """The modules can be put in an order in which each imports only those before it."""
    order = list(TopologicalSorter({name: imported(name) for name in TREES}).static_order())

    assert len(order) == len(TREES)


@pytest.mark.parametrize("library", OWNERS)
def test_one_owner_for_each_foreign_thing(library: str) -> None:
    """Each foreign library is imported by its owner, a module or a package, and by no other."""
    users = {name for name in TREES if library in {top(dotted) for dotted in foreign(name)}}

    assert {name for name in users if not {name, package(name)} & OWNERS[library]} == set()


def test_only_storage_knows_the_client() -> None:
    """Clients are built in `clients`; a few modules beside it amend them; others know errors."""
    known = {
        (name, dotted)
        for name in TREES
        for dotted in foreign(name)
        if top(dotted) == "redis" and not dotted.startswith("redis.exceptions.")
    }

    modules = {"clients", "cluster", "redis_connection", "urls"}
    assert {name for name, _ in known} == {f"storage.{module}" for module in modules}


def test_only_web_knows_http() -> None:
    """Routes, requests and responses are `web`'s; who runs it knows the application's type only."""
    users = [name for name in TREES if name != "web.app"]
    known = {dotted for name in users for dotted in foreign(name) if top(dotted) == "starlette"}

    assert known <= {"starlette.types.ASGIApp"}


@every_module
def test_only_web_knows_status_codes(name: str) -> None:
    """Status codes are `web`'s, and `sender`'s, which reads other servers' answers.

    To redis-py, a status code is the first word of an error of Redis.
    """
    spoken = {
        node.arg if isinstance(node, ast.keyword) else node.attr
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.keyword | ast.Attribute)
    }

    assert "status_code" not in spoken or name in {
        "web.app",
        "operations.sender",
        "storage.redis_errors",
    }


@every_module
def test_only_the_command_line_reads_the_environment(name: str) -> None:
    """`os.environ` is touched in `cli` and nowhere else: everybody else is handed a mapping."""
    touched = {
        node.attr
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv"}
    }
    brought = {dotted for dotted in foreign(name) if dotted in {"os.environ", "os.getenv"}}

    assert not (touched | brought) or name in {"cli.main", "cli.run", "cli.defaults"}


@every_module
def test_only_settings_are_read_by_name(name: str) -> None:
    """Nobody looks a variable up by name but `variables` for `config`, and a few who say so."""
    looked_up = {
        node.args[0].value
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func).endswith("environ.get")
        and isinstance(node.args[0], ast.Constant)
    }
    owned = {
        "environment": {"CREDENTIALS_DIRECTORY"},
        "runtime.embedded_redis": {"REDIS_SERVER", "PATH"},
        "cli.defaults": {"REDIS_URL", "REDIS_URL_FILE", "PORT", "PORT_FILE"},
        "telemetry.tracing": {"OTEL_SDK_DISABLED", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_SERVICE_NAME"},
    }

    assert name.startswith("handlers.") or looked_up <= owned.get(name, set())


@every_module
def test_no_secret_is_revealed_in_passing(name: str) -> None:
    """`.reveal()` is called where secrets are used: to sign, to connect, to read settings."""
    calls = [
        node
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute) and node.attr == "reveal"
    ]

    queues = {"handlers.kafka", "handlers.nats", "handlers.rabbitmq", "handlers.sqs"}
    assert not calls or name in {"storage.connections", "stripe.signatures", "environment", *queues}


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Yield every public class, function, and method of public classes, by its dotted name."""

    def within(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.AST]]:
        for node in body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if node.name.startswith("_"):
                continue
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from within(node.body, f"{prefix}{node.name}.")

    yield from within(tree.body, "")


@every_module
def test_docstrings(name: str) -> None:
    """Every module and every public name says what it is; a first line ends like a sentence."""
    documented = [(name, TREES[name]), *definitions(TREES[name])]
    silent = [
        dotted
        for dotted, node in documented
        if not (ast.get_docstring(node) or "").partition("\n")[0].endswith((".", ":"))  # type: ignore[arg-type]
    ]

    assert not silent


def names(tree: ast.Module) -> Iterator[str]:
    """Yield every name a module gives: to classes, functions, parameters, variables, fields."""
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
def test_words_we_do_not_use(name: str) -> None:
    """No name we give holds one of the words that say nothing."""
    given = {*names(TREES[name]), *name.split(".")} - OTHERS_NAMES.keys()
    words = {
        (each, word.lower()) for each in given for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", each)
    }

    assert not {(each, word) for each, word in words if word in FORBIDDEN_WORDS}


@every_module
def test_functions_are_short(name: str) -> None:
    """No function, docstring included or not, is longer than forty lines of code."""
    long = {}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
            # The signature and the docstring are there to be read; the code is what is counted.
            lines = (node.end_lineno or 0) - first.lineno + 1
            if lines > MAX_LINES_PER_FUNCTION:
                long[node.name] = lines

    assert not long


@every_module
def test_modules_are_short(name: str) -> None:
    """No module is longer than can be read in one sitting."""
    assert len(PATHS[name].read_text().splitlines()) <= MAX_LINES_PER_MODULE


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts(path: Path) -> None:
    """A script opens with its keys, arguments and returns, and no function of it is long."""
    text = path.read_text()
    uncommented = re.sub(r"^ *--.*\n", "", text, flags=re.MULTILINE)
    function = re.compile(r"^(?:local )?function .*?^end", flags=re.DOTALL | re.MULTILINE)
    functions, code = function.findall(uncommented), function.sub("", uncommented)

    assert text.startswith("#!lua")
    for word in ("KEYS", "ARGV", "Returns"):
        assert re.search(rf"^-- {word}", text, flags=re.MULTILINE)
    assert max(len(part.splitlines()) for part in [*functions, code]) <= MAX_LINES_PER_SCRIPT
