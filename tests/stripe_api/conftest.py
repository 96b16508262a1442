"""Stripe's API as tests of what asks it have it: the stand-in, served, and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from service.secret import Secret
from service.stripe_api import client
from service.stripe_api.client import StripeApi, open_api
from service.stripe_api.keys import ApiKeys
from tests.support.stripe_api import StripeStandIn, served


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attempts follow each other at once."""
    monkeypatch.setattr(client, "RETRY_INITIAL_DELAY_S", 0.001)


@pytest.fixture
def stand_in() -> StripeStandIn:
    """Return a stand-in for Stripe."""
    return StripeStandIn()


@pytest.fixture
async def address(stand_in: StripeStandIn) -> AsyncIterator[str]:
    """Serve the stand-in and yield its address."""
    async with served(stand_in) as found:
        yield found


@pytest.fixture
def api_keys(stand_in: StripeStandIn) -> ApiKeys:
    """Return a key of test mode that the stand-in knows."""
    return ApiKeys([Secret(stand_in.directory.add_key().secret)])


@pytest.fixture
async def api(address: str, api_keys: ApiKeys) -> AsyncIterator[StripeApi]:
    """Yield a client of the stand-in without a limit of its own."""
    async with open_api(address, api_keys) as opened:
        yield opened
