"""A stand-in for Stripe's API, its webhooks and the people behind them.

    stand_in = StripeStandIn()
    stand_in.subscribe("http://127.0.0.1:8080/webhooks/stripe")
    key = stand_in.directory.add_key(permissions=READ_ONLY)
    async with served(stand_in) as address:
        session = stand_in.sessions.create()
        stand_in.sessions.submit(session.id)
        stand_in.sessions.verify(session.id)

It knows nothing of the service, but answers only what the service asks for. What Stripe documents
is written with its source; what is assumed is called an assumption where it is made.
"""

from .accounts import API_VERSION, READ_ONLY, ApiKey, Permission, Scope
from .destinations import Destination
from .events import Event
from .faults import Fault, answer, broken, fail, too_many_requests
from .lives import LIVES, MAX_LIFE_S, final_states, live, max_duration_s
from .pushes import in_one_form, lose_all, lose_nothing, thin_only
from .serving import client_of, running, served
from .sessions import Session
from .stand_in import StripeStandIn, all_types
from .tokens import CANARY, CANARY_NUMBERS

__all__ = [
    "API_VERSION",
    "CANARY",
    "CANARY_NUMBERS",
    "LIVES",
    "MAX_LIFE_S",
    "READ_ONLY",
    "ApiKey",
    "Destination",
    "Event",
    "Fault",
    "Permission",
    "Scope",
    "Session",
    "StripeStandIn",
    "all_types",
    "answer",
    "broken",
    "client_of",
    "fail",
    "final_states",
    "in_one_form",
    "live",
    "lose_all",
    "lose_nothing",
    "max_duration_s",
    "running",
    "served",
    "thin_only",
    "too_many_requests",
]
