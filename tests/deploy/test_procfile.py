"""The Procfile: one line for each process, in the form that process managers read."""

from __future__ import annotations

from tests.support.programs import ROOT, run, tool

PROCFILE = ROOT / "Procfile"


def test_it_is_well_formed() -> None:
    """Honcho reads it, and finds the two processes."""
    assert "web, worker" in run(tool("honcho"), "check", "--procfile", PROCFILE)


def test_both_processes_fit_on_one_machine() -> None:
    """Their admin ports differ, and signals reach Python because of `exec`."""
    kinds = dict(line.split(": ") for line in PROCFILE.read_text().splitlines())
    assert kinds["web"] == "exec python -m service serve"
    assert kinds["worker"] == "ADMIN_PORT=8002 exec python -m service work"
