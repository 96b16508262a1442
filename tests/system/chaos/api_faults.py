"""Faults of Stripe: webhooks that it never sends, and an API that fails.

Each function injects its fault, and returns when it is over. Webhooks are lost until the load ends.
"""

from __future__ import annotations

import asyncio
from random import Random

from tests.support.stripe_api import Fault, broken, too_many_requests
from tests.system.chaos.deployment import Deployment
from tests.system.chaos.stripe_client import Stripe

LOST_SHARE = THIN_SHARE = 0.05
FAILING_S, FAILING_SHARE = 10.0, 0.12


async def webhooks_lost(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """From now on a share of the webhooks is never sent, and as many are thin."""
    stripe.unsent_share, stripe.thin_share = LOST_SHARE, THIN_SHARE


async def api_fails(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """About half of the requests to the API fail, each in one of five ways."""
    assert deployment.stand_in
    faults = deployment.stand_in.faults
    for fault in (
        too_many_requests(1, share=FAILING_SHARE),
        too_many_requests(share=FAILING_SHARE),
        broken(share=FAILING_SHARE),
        Fault(kind="hang", share=FAILING_SHARE),
        Fault(kind="cut", share=FAILING_SHARE),
    ):
        faults.add(fault)
    await asyncio.sleep(FAILING_S)
    faults.clear()
