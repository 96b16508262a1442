"""Serves a stand-in as a process of its own: `python -m tests.support.stripe_api PORT [SEED]`.

Prints one line of JSON with its address, a secret key and a restricted key of test mode.
"""

from __future__ import annotations

import asyncio
import sys

import orjson

from .accounts import READ_ONLY
from .serving import served
from .stand_in import StripeStandIn


async def main(port: int, seed: int) -> None:
    """Serve until the process is ended."""
    stand_in = StripeStandIn(seed=seed)
    keys = {
        "secret_key": stand_in.directory.add_key().secret,
        "restricted_key": stand_in.directory.add_key(permissions=READ_ONLY).secret,
    }
    async with served(stand_in, port=port) as address:
        sys.stdout.write(orjson.dumps({"address": address, **keys}).decode() + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    port, seed = (*map(int, sys.argv[1:]), 0, 0)[:2]
    asyncio.run(main(port, seed))
