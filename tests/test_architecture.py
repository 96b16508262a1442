"""The laws of the whole: who may import whom, who owns what, how things are named, how long."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SERVICE = Path(__file__).parents[1] / "service"

# Every module, and all it may import of ours: the table of the design, read top down. A module
# that is not here yet fails the first test until somebody decides where it stands.
MAY_IMPORT: dict[str, str] = {
    "__init__": "",
    "errors": "",
    "secret": "",
    "coalesce": "tasks",
    "deadlines": "",
    "tasks": "",
    "metrics": "__init__",
    "simulate": "",
    "floods": "",
    "redaction": "secret",
    "variables": "errors secret",
    "sources": "",
    "config": "errors secret sources variables",
    "signatures": "errors secret",
    "keyring": "secret signatures",
    "reloading": "errors metrics",
    "signals": "reloading",
    "findings": "config",
    "headers": "",
    "lag": "connections layout",
    "tracing": "__init__ errors events handlers receiver secret transitions",
    "reports": "secret",
    "sessions": "reports secret",
    "transitions": "reports sessions",
    "testing": "transitions",
    "decoding": "errors reports",
    "events": "decoding errors reports sessions signatures transitions",
    "wire": "transitions",
    "log_writer": "metrics",
    "logs": "config floods log_writer redaction",
    "tether": "",
    "embedded": "errors tether",
    "exchange": "",
    "redis_connection": "",
    "urls": "errors",
    "loop_lag": "metrics",
    "cluster": "exchange redis_connection",
    "connections": "cluster errors exchange loop_lag redis_connection secret urls",
    "layout": "connections errors",
    "ledger": "connections layout transitions wire",
    "janitor": "connections lag layout metrics",
    "replays": "connections layout transitions wire",
    "arrivals": "connections tasks",
    "health": "config connections errors exchange findings layout metrics",
    "headroom": "connections layout metrics",
    "inbox": (
        "coalesce config connections deadlines errors events exchange headroom layout metrics"
        " transitions wire"
    ),
    "script_batches": "coalesce connections exchange",
    "mailbox": "arrivals coalesce connections exchange layout script_batches transitions wire",
    "leases": "connections layout mailbox",
    "endings": "",
    "letter_expiry": "config connections layout metrics",
    "upkeep": "circuit config connections janitor lag layout letter_expiry metrics",
    "receiver": "config errors events inbox secret signatures transitions",
    "failures": "errors",
    "handlers": "errors failures transitions",
    "messages": "transitions",
    "schema": "messages transitions",
    "openapi": "__init__ errors events health inbox metrics secret transitions web",
    "handlers.log": "config errors handlers logs transitions",
    "handlers.link": "errors failures secret variables",
    "handlers.redis_stream": (
        "coalesce connections errors handlers handlers.link messages secret transitions variables"
    ),
    "circuit": "metrics",
    "retries": "",
    "attempts": "handlers metrics transitions",
    "blocking": "attempts loop_lag",
    "backlog": "circuit mailbox",
    "delivery": (
        "attempts backlog circuit errors failures handlers mailbox metrics retries transitions"
    ),
    "dispatch": "backlog circuit delivery handlers mailbox retries tasks",
    "worker": (
        "arrivals circuit config connections dispatch endings errors handlers layout leases"
        " mailbox metrics retries script_batches tasks upkeep"
    ),
    "journal": "errors events inbox metrics receiver transitions",
    "web": "config errors headers health journal metrics receiver secret sources",
    "cycle": "",
    "framing": "errors",
    "terms": "errors metrics",
    "closing": "framing metrics terms",
    "protocol": "closing cycle framing",
    "server": "errors protocol terms",
    "sender": "errors secret signatures simulate",
    "selftest": "config secret sender signatures simulate transitions",
    "traces": "config connections errors layout ledger selftest transitions wire",
    "processes": (
        "blocking config connections errors handlers health inbox keyring layout loop_lag metrics"
        " receiver reloading server signals sources tasks tracing web worker"
    ),
    "checks": "config connections errors findings handlers health janitor layout mailbox",
    "terminal": "connections errors secret",
    "local": "errors secret",
    "deployment": "config connections errors janitor layout local",
    "mail_options": "transitions",
    "mail_commands": (
        "config connections deployment errors janitor layout local logs mail_options replays"
        " signals terminal"
    ),
    "group_commands": "config deployment errors janitor local logs terminal",
    "session_command": "config deployment ledger terminal transitions",
    "send_target": "config errors local secret web",
    "send_command": "secret send_target sender signals simulate terminal",
    "cli": (
        "__init__ checks config embedded errors findings group_commands local logs mail_commands"
        " processes redaction selftest send_command send_target session_command terminal traces"
    ),
    "__main__": "cli",
}
# A handler for one queue needs the protocol, errors, and the message; the queues come and go.
ANY_HANDLER = "errors handlers handlers.link messages secret transitions variables"

# Who alone may import what is foreign.
OWNERS = {
    "starlette": {"web", "server", "processes"},
    "uvicorn": {"closing", "cycle", "protocol", "server"},
    "uvloop": {"processes"},
    "click": {
        *("cli", "group_commands", "mail_commands", "mail_options", "send_command"),
        *("session_command", "terminal"),
    },
    "rich": {"terminal"},
    "httpx2": {"sender"},
    "prometheus_client": {"metrics"},
    "opentelemetry": {"tracing"},
    "hmac": {"signatures"},
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
MOST_LINES_PER_FUNCTION = 40
MOST_LINES_PER_SCRIPT = 60
MOST_LINES_PER_MODULE = 350


def _name(path: Path) -> str:
    parts = path.relative_to(SERVICE).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


PATHS = {_name(path): path for path in sorted(SERVICE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}
SCRIPTS = sorted((SERVICE / "lua").glob("*.lua"))
every_module = pytest.mark.parametrize("name", TREES)


def allowed(name: str) -> set[str]:
    """Return what a module may import of ours."""
    default = ANY_HANDLER if name.startswith("handlers.") else None
    assert name in MAY_IMPORT or default is not None, f"{name} is not in the table"
    return set(MAY_IMPORT.get(name, default or "").split())


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


@every_module
def test_imports_are_those_of_the_table(name: str) -> None:
    """A module imports of ours nothing but what the table lets it, and always relatively."""
    assert imported(name) <= allowed(name)
    assert "service" not in {top(dotted) for dotted in foreign(name)}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_the_table_allows_no_more_than_is_needed(name: str) -> None:
    """What the table lets a module import, it does import; otherwise the table would rot."""
    assert imported(name) == allowed(name)


def test_the_package_says_that_it_is_typed() -> None:
    """Type checkers read a package's annotations where they find this file (PEP 561)."""
    assert (SERVICE / "py.typed").is_file()


def test_arrows_point_down() -> None:
    """The modules can be put in an order in which each imports only those before it."""
    order = list(TopologicalSorter({name: imported(name) for name in TREES}).static_order())

    assert len(order) == len(TREES)


@pytest.mark.parametrize("library", OWNERS)
def test_one_owner_for_each_foreign_thing(library: str) -> None:
    """Each foreign library is imported by its owner and nobody else."""
    users = {name for name in TREES if library in {top(dotted) for dotted in foreign(name)}}

    assert users <= OWNERS[library]


def test_only_connections_knows_the_client() -> None:
    """Clients are built in `connections`; a few modules beside it mend them; others know errors."""
    known = {
        (name, dotted)
        for name in TREES
        for dotted in foreign(name)
        if top(dotted) == "redis" and not dotted.startswith("redis.exceptions.")
    }

    assert {name for name, _ in known} == {"cluster", "connections", "redis_connection", "urls"}


def test_only_web_knows_http() -> None:
    """Routes, requests and responses are `web`'s; who runs it knows the application's type only."""
    users = [name for name in TREES if name != "web"]
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

    assert "status_code" not in spoken or name in {"web", "sender", "connections"}


@every_module
def test_only_the_command_line_reads_the_environment(name: str) -> None:
    """`os.environ` is touched in `cli` and nowhere else: everybody else is handed a mapping."""
    touched = {
        node.attr
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv"}
    }
    brought = {dotted for dotted in foreign(name) if dotted in {"os.environ", "os.getenv"}}

    assert not (touched | brought) or name in {"cli", "local"}


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
        "variables": {"CREDENTIALS_DIRECTORY"},
        "embedded": {"REDIS_SERVER", "PATH"},
        "local": {"REDIS_URL", "REDIS_URL_FILE", "PORT", "PORT_FILE"},
        "tracing": {"OTEL_SDK_DISABLED", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_SERVICE_NAME"},
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
    assert not calls or name in {"connections", "signatures", "variables", *queues}


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
            if lines > MOST_LINES_PER_FUNCTION:
                long[node.name] = lines

    assert not long


@every_module
def test_modules_are_short(name: str) -> None:
    """No module is longer than can be read in one sitting."""
    assert len(PATHS[name].read_text().splitlines()) <= MOST_LINES_PER_MODULE


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
    assert max(len(part.splitlines()) for part in [*functions, code]) <= MOST_LINES_PER_SCRIPT
