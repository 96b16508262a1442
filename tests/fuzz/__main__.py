"""Fuzzing: `python -m tests.fuzz LAW`, or `http`, from the root; see `--help`.

`http` needs the project's own environment. The laws of `targets` are searched by atheris, which is
not part of it: `python3 -m venv .venv-fuzz`, then
`.venv-fuzz/bin/pip install --no-deps -r deploy/requirements/runtime.txt 'atheris>=3,<4'`, and
`.venv-fuzz/bin/python -m tests.fuzz body --seconds 300`. The corpus is kept in `.fuzz/` for the
next search. So is an input that broke a law, as `.fuzz/LAW-crash-…`: `--again FILE` runs it once
more. Exit code 0 when nothing was found.
"""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from typing import Any

import click

KEPT = Path(__file__).parents[2] / ".fuzz"
LAWS = ("signature", "body", "report", "environment")
MAX_BYTES = 8192


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("law", type=click.Choice([*LAWS, "http"]))
@click.option("--seconds", default=60, show_default=True, type=click.IntRange(1, 86_400),
              help="Length of the search; not for http.")  # fmt: skip
@click.option("--requests", default=5000, show_default=True, type=click.IntRange(1, 10**6),
              help="Requests to send in each state; only for http.")  # fmt: skip
@click.option("--seed", type=int, help="Seed of the random choices.")
@click.option("--again", type=click.Path(exists=True, path_type=Path),
              help="Run one kept input instead of a search.")  # fmt: skip
def main(law: str, seconds: int, requests: int, seed: int | None, again: Path | None) -> None:
    """Search for bytes that break a LAW, or for HTTP that a listener does not survive."""
    seed = random.randrange(1, 2**31) if seed is None else seed
    click.echo(f"seed {seed}")
    if law == "http":
        sys.exit(_attack(requests, seed))
    _search(law, seconds, seed, again)


def _attack(requests: int, seed: int) -> int:
    # Not imported at the top: the environment of atheris lacks what it needs.
    client: Any = importlib.import_module("tests.fuzz.http")
    faults = 0
    for state in client.STATES:
        found = client.run(requests, seed, state)
        answers = ", ".join(f"{status}: {count}" for status, count in sorted(found.answers.items()))
        click.echo(f"{state}: {found.requests} requests; answers {answers} (0 is no response)")
        click.echo(
            f"longest callback {found.worst_s * 1000:.1f} ms, while sending {found.worst!r:.120}"
        )
        for fault in found.faults[:20]:
            click.echo(f"FAULT {fault}")
        click.echo(f"{len(found.faults)} faults")
        faults += len(found.faults)
    return int(bool(faults))


def _search(law: str, seconds: int, seed: int, again: Path | None) -> None:
    """Run libFuzzer, which ends the process."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["service", "tests.fuzz.targets"]):
        targets = importlib.import_module("tests.fuzz.targets")
    directory = KEPT / law
    directory.mkdir(parents=True, exist_ok=True)
    for n, example in enumerate(targets.corpus(law)):
        (directory / f"example-{n}").write_bytes(example)
    options = [
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-max_len={MAX_BYTES}",
        f"-artifact_prefix={KEPT}/{law}-",
        "-print_final_stats=1",
        "-verbosity=1",
    ]
    what = str(directory) if again is None else str(again)
    atheris.Setup([sys.argv[0], *options, what], targets.LAWS[law])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
