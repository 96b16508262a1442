"""One request to the API: who asks, for which account, with which parameters.

Keys are sent as `Authorization: Bearer`, see
https://docs.stripe.com/api/authentication. https://docs.stripe.com/api/idempotent_requests
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .accounts import API_VERSION, ApiKey, Permission, Scope
from .errors import ApiError, invalid, unauthorized
from .events import Request
from .parameters import Parameters, decode_form
from .stand_in import StripeStandIn


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request that was let in.

    Attributes:
        stand_in: What it is asked of.
        key: The key.
        scope: The account and the mode that it reads.
        id: The id in the path; "" if there is none.
        parameters: What was sent in the query or the body.
        request: Its id and its idempotency key, for the event that it causes.
    """

    stand_in: StripeStandIn
    key: ApiKey
    scope: Scope
    id: str
    parameters: Parameters
    request: Request


Handler: TypeAlias = Callable[[Call], Mapping[str, Any]]


def guarded(
    stand_in: StripeStandIn, handler: Handler, permission: Permission
) -> Callable[[HttpRequest], Any]:
    """Return an endpoint that answers with what *handler* returns, or with its `ApiError`."""

    async def endpoint(http: HttpRequest) -> Response:
        sent = await http.body()
        request_id = stand_in.tokens.new_id("req")
        try:
            call = _let_in(stand_in, permission, http, sent, request_id)
            return _response(handler(call), request_id, http)
        except ApiError as error:
            return _response(error.body(request_id), request_id, http, error)

    return endpoint


def not_found(http: HttpRequest, _: Exception) -> Response:
    """Answer a request for a path that the API does not have."""
    error = ApiError(404, f"Unrecognized request URL ({http.method}: {http.url.path}).")
    return _response(error.body("req_unrecognized"), "req_unrecognized", http, error)


def _let_in(
    stand_in: StripeStandIn, permission: Permission, http: HttpRequest, sent: bytes, request_id: str
) -> Call:
    key = stand_in.directory.key(_secret(http))
    scope = stand_in.directory.scope(key, named_account(http))
    key.require(permission, scope.account)
    return Call(
        stand_in=stand_in,
        key=key,
        scope=scope,
        id=http.path_params.get("id", ""),
        parameters=Parameters(_decode(http, sent)),
        request=Request(request_id, http.headers.get("idempotency-key")),
    )


def named_account(http: HttpRequest) -> str | None:
    """Return the account that a request names: the last one of a path of contexts."""
    named = http.headers.get("stripe-account") or http.headers.get("stripe-context")
    return named.rpartition("/")[2] if named else None


def _secret(http: HttpRequest) -> str:
    scheme, _, value = http.headers.get("authorization", "").partition(" ")
    if scheme != "Bearer":
        raise unauthorized("You did not provide an API key.")
    return value


def _decode(http: HttpRequest, sent: bytes) -> dict[str, Any]:
    if http.method == "GET" or not sent:
        return decode_form(http.url.query)
    if not http.url.path.startswith("/v2/"):
        return decode_form(sent.decode())
    try:
        decoded = orjson.loads(sent)
    except orjson.JSONDecodeError:
        decoded = None
    if not isinstance(decoded, dict):
        raise invalid("body", "The body is not a JSON object.")
    return decoded


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
    for name in ("stripe-account", "idempotency-key"):
        if name in http.headers:
            headers[name] = http.headers[name]
    return Response(
        orjson.dumps(body, option=None if is_v2 else orjson.OPT_INDENT_2),
        status_code=error.status if error else 200,
        headers={**headers, **(error.headers if error else {})},
    )
