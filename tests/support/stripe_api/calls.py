"""One request to the API: who asks, for which account, with which parameters.

Keys are sent as `Authorization: Bearer`. https://docs.stripe.com/api/authentication
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .accounts import API_VERSION, Permission, Scope
from .errors import ApiError, unauthorized
from .parameters import Parameters
from .stand_in import StripeStandIn


class Call(NamedTuple):
    """A request that was let in.

    Attributes:
        stand_in: What it is asked of.
        scope: The account and the mode that it reads.
        id: The id in the path; "" if there is none.
        parameters: What was sent in the query.
    """

    stand_in: StripeStandIn
    scope: Scope
    id: str
    parameters: Parameters


Handler: TypeAlias = Callable[[Call], Mapping[str, Any]]


def guarded(
    stand_in: StripeStandIn, handler: Handler, permission: Permission
) -> Callable[[HttpRequest], Any]:
    """Return an endpoint that answers with what *handler* returns, or with its `ApiError`."""

    async def endpoint(http: HttpRequest) -> Response:
        request_id = stand_in.tokens.new_id("req")
        try:
            return _response(handler(_let_in(stand_in, permission, http)), request_id, http)
        except ApiError as error:
            return _response(error.body(request_id), request_id, http, error)

    return endpoint


def _let_in(stand_in: StripeStandIn, permission: Permission, http: HttpRequest) -> Call:
    key = stand_in.directory.key(_secret(http))
    scope = stand_in.directory.scope(key, named_account(http))
    key.require(permission, scope.account)
    return Call(stand_in, scope, http.path_params.get("id", ""), Parameters(http.url.query))


def named_account(http: HttpRequest) -> str | None:
    """Return the account that a request names: the last one of a path of contexts."""
    named = http.headers.get("stripe-account") or http.headers.get("stripe-context")
    return named.rpartition("/")[2] if named else None


def _secret(http: HttpRequest) -> str:
    scheme, _, value = http.headers.get("authorization", "").partition(" ")
    if scheme != "Bearer":
        raise unauthorized("You did not provide an API key.")
    return value


def _response(
    body: Mapping[str, Any], request_id: str, http: HttpRequest, error: ApiError | None = None
) -> Response:
    """Write an answer: indented under /v1, compact under /v2, both with Stripe's headers."""
    is_v2 = http.url.path.startswith("/v2/")
    headers = {
        "Content-Type": "application/json",
        "Request-Id": request_id,
        "Stripe-Version": http.headers.get("stripe-version", API_VERSION),
        "Cache-Control": "no-cache, no-store",
    }
    if "stripe-account" in http.headers:
        headers["stripe-account"] = http.headers["stripe-account"]
    return Response(
        orjson.dumps(body, option=None if is_v2 else orjson.OPT_INDENT_2),
        status_code=error.status if error else 200,
        headers={**headers, **(error.headers if error else {})},
    )
