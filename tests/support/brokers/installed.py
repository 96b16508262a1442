"""Every broker that is installed on this machine, one of each kind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

import pytest

from tests.support.brokers.broker import Broker


def start_installed(
    names: Iterable[str], running: ExitStack, directory: Path
) -> tuple[dict[str, Broker], dict[str, str]]:
    """Start and empty the brokers of these handlers; return them, and why others are absent."""
    brokers: dict[str, Broker] = {}
    absent: dict[str, str] = {}
    for name in names:
        module = import_module(f"tests.support.brokers.{name}")
        try:
            brokers[name] = running.enter_context(module.run_broker(directory))
        except pytest.skip.Exception as skipped:
            absent[name] = str(skipped)
        else:
            asyncio.run(brokers[name].empty())
    return brokers, absent
