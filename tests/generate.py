"""Writes .env.example, and the tables of settings, metrics and packages in the documents.

Run `python -m tests.generate`; `test_readme` fails while a file differs from what it would write.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from prometheus_client import Counter, Gauge, Histogram

from service import config, environment
from service.environment import SettingRow
from service.handlers.kafka import KafkaSettings
from service.handlers.nats import NatsSettings
from service.handlers.rabbitmq import RabbitmqSettings
from service.handlers.redis_stream import RedisStreamSettings
from service.handlers.sqs import SqsSettings
from service.telemetry import metrics

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "service" / "README.md"
HANDLERS = ROOT / "service" / "handlers" / "README.md"
RUNBOOK = ROOT / "deploy" / "prometheus" / "runbook.md"
ENV_EXAMPLE = ROOT / ".env.example"

# The settings that a newcomer needs; .env.example lists all.
FIRST_SETTINGS = {
    *("STRIPE_WEBHOOK_SECRETS", "REDIS_URL", "PARTITIONS", "DURABILITY", "LIVEMODE", "PORT"),
    *("ADMIN_PORT", "SESSION_RETENTION_DAYS", "HANDLERS", "HANDLER_CONCURRENCY"),
    "STRIPE_API_KEY",
}
# The packages in the order of their table: the way in, the way out, and what they stand on.
PACKAGES = (
    *("server", "web", "inbox", "stripe", "transitions", "delivery", "handlers", "stripe_api"),
    *("admin", "monitoring", "storage", "telemetry", "runtime", "operations", "cli"),
)
UNLISTED = {"__init__", "__main__"}
QUEUES = (RabbitmqSettings, NatsSettings, KafkaSettings, SqsSettings, RedisStreamSettings)


def queue_settings() -> list[SettingRow]:
    """Return every setting of every queue's handler."""
    return [row for declared in QUEUES for row in environment.describe(declared)]


def series() -> list[Counter | Gauge | Histogram]:
    """Return every series of ours, in the order of their declarations."""
    return [one for one in vars(metrics).values() if isinstance(one, Counter | Gauge | Histogram)]


def series_name(one: Counter | Gauge | Histogram) -> str:
    """Return the name under which a series is asked for; a histogram's without its endings."""
    ending = "_total" if isinstance(one, Counter) else ""
    return f"{one._name}{ending}"


def generated() -> dict[Path, str]:
    """Return the text of every generated file by its path."""
    first = [row for row in config.describe() if row.name in FIRST_SETTINGS]
    return {
        ENV_EXAMPLE: environment.example([*config.describe(), *queue_settings()]),
        ARCHITECTURE: _with_table(ARCHITECTURE, "packages", _packages()),
        README: _with_table(README, "settings", _settings(first)),
        HANDLERS: _with_table(HANDLERS, "queues", _settings(queue_settings())),
        RUNBOOK: _with_table(RUNBOOK, "metrics", _metrics()),
    }


def _settings(rows: list[SettingRow]) -> list[str]:
    lines = [f"| `{row.name}` | {row.default} | {row.description} |" for row in rows]
    return ["| variable | default | meaning |", "|---|---|---|", *lines]


def _packages() -> list[str]:
    """Return a table of what is at the top of service/, each part with its docstring's first line.

    Raises:
        ValueError: `PACKAGES` are not the packages that there are.
    """
    service = ARCHITECTURE.parent
    found = {path.parent.name for path in service.glob("*/__init__.py")}
    if found != set(PACKAGES):
        raise ValueError(f"PACKAGES misses or invents {found ^ set(PACKAGES)}")
    modules = sorted(path for path in service.glob("*.py") if path.stem not in UNLISTED)
    lines = [
        *(f"| `{name}/` | {_promise(service / name / '__init__.py')} |" for name in PACKAGES),
        *(f"| `{path.name}` | {_promise(path)} |" for path in modules),
    ]
    return ["| part | what it does |", "|---|---|", *lines]


def _promise(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def _metrics() -> list[str]:
    lines = [
        f"| `{series_name(one)}` | {one._type} | {labels} | {one._documentation} |"
        for one in series()
        for labels in [", ".join(one._labelnames)]
    ]
    return ["| series | kind | labels | meaning |", "|---|---|---|---|", *lines]


def _with_table(document: Path, name: str, lines: list[str]) -> str:
    """Return the text of a document with the table between the marks of its name."""
    table = "\n".join(lines)
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    text = document.read_text(encoding="utf-8")
    found, count = marked.subn(lambda mark: f"{mark[1]}{table}\n{mark[2]}", text)
    if count != 1:
        raise ValueError(f"{document.name} needs the marks of {name} once")
    return found


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
