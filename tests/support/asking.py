"""Processes that ask a stand-in for Stripe, and get its webhooks in both forms at one URL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from tests.support.harness import WEBHOOK
from tests.support.processes import PATIENT, Process, Processes
from tests.support.servers import free_port
from tests.support.stripe_api import READ_ONLY, StripeStandIn, served

# `python -m service` that kills itself at the first call of a function: `before` or `after` it.
KILLED_AT = """
import importlib, os, signal
when, module, path = {when!r}, {module!r}, {path!r}
owner = importlib.import_module(module)
*outer, name = path.split(".")
for each in outer:
    owner = getattr(owner, each)
call = getattr(owner, name)
async def killed(*arguments, **keywords):
    if when == "after":
        await call(*arguments, **keywords)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, killed)
from service.cli import main
main()
"""


class Asking:
    """Starts processes that ask a stand-in.

    Attributes:
        settings: Theirs. They do not reconcile, unless `RECONCILE_EVERY_S` is set.
    """

    def __init__(self, processes: Processes, settings: Mapping[str, str]) -> None:
        self._processes = processes
        self.settings = settings

    async def start(self, command: str, *, program: str = PATIENT) -> Process:
        """Start a process, and wait until it listens."""
        return await asyncio.to_thread(self.launch(command, program=program).ready)

    def launch(self, *arguments: str, program: str = PATIENT) -> Process:
        """Start a process that may end before it listens."""
        return self._processes.start(*arguments, program=program, **self.settings)

    async def run(self, *arguments: str) -> Process:
        """Run a command to its end."""
        return await asyncio.to_thread(self._processes.run, *arguments, **self.settings)


@asynccontextmanager
async def asking(
    stand_in: StripeStandIn, processes: Processes, **settings: str
) -> AsyncIterator[Asking]:
    """Serve a stand-in, and let it push both forms to the URL of the receivers that are started."""
    port = free_port()
    url = f"http://127.0.0.1:{port}{WEBHOOK}"
    destinations = [stand_in.subscribe(url, payload=payload) for payload in ("snapshot", "thin")]
    stand_in.pushes.retry_delays_s = [0.5] * 120
    async with served(stand_in) as address:
        common = {
            "PORT": str(port),
            "LEASE_TTL_S": "1",
            "STRIPE_API_BASE": address,
            "STRIPE_API_KEY": stand_in.directory.add_key(permissions=READ_ONLY).secret,
            "STRIPE_API_RATE": "100",
            "STRIPE_WEBHOOK_SECRETS": ",".join(one.secret for one in destinations),
            "RECONCILE_EVERY_S": "0",
        }
        yield Asking(processes, {**common, **settings})


def killed_at(when: str, place: str) -> str:
    """Return the program that kills itself `before` or `after` a call: *place* is `module:name`."""
    module, _, path = place.partition(":")
    return KILLED_AT.format(when=when, module=module, path=path)


def latest_states(worker: Process) -> dict[str, str]:
    """Return what a consumer of the handler `log` believes of each session.

    It follows the documented rule: what is not above the last epoch and sequence is ignored.
    """
    places: dict[str, tuple[int, int]] = {}
    states: dict[str, str] = {}
    for line in worker.lines("transition"):
        place = (line["epoch"], line["sequence"])
        if place > places.get(line["session_id"], (0, 0)):
            places[line["session_id"]] = place
            states[line["session_id"]] = line["current"]
    return states
