"""What Stripe answers instead of an object.

https://docs.stripe.com/api/errors
The wording follows answers that users of Stripe's API have published; programs must not read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

INVALID_REQUEST = "invalid_request_error"


class ApiError(Exception):
    """An error answer.

    Attributes:
        status: The HTTP status code.
        type: The `type` of the error, such as `invalid_request_error`.
        message: For people.
        code: The `code`, if any, such as `resource_missing`.
        param: The parameter that is wrong, if one is.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self, request_id: str) -> dict[str, Any]:
        """Return the body of the answer; /v1 and /v2 write it alike."""
        fields = {
            "code": self.code,
            "doc_url": self.code
            and f"https://stripe.com/docs/error-codes/{self.code.replace('_', '-')}",
            "message": self.message,
            "param": self.param,
            "request_log_url": f"https://dashboard.stripe.com/logs/{request_id}",
            "type": self.type,
        }
        return {"error": {name: value for name, value in fields.items() if value is not None}}


def missing(kind: str, id: str, *, param: str = "id") -> ApiError:
    """Return the answer for an object that does not exist, or not for this account and mode."""
    return ApiError(
        HTTPStatus.NOT_FOUND, f"No such {kind}: '{id}'", code="resource_missing", param=param
    )


def invalid(param: str, message: str) -> ApiError:
    """Return the answer for a parameter with a wrong value."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, code="parameter_invalid", param=param)


def unknown_parameter(param: str) -> ApiError:
    """Return the answer for a parameter that the endpoint does not have."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"Received unknown parameter: {param}",
        code="parameter_unknown",
        param=param,
    )


def unauthorized(message: str) -> ApiError:
    """Return the answer for a request without a key, or with one that is unknown or revoked."""
    return ApiError(HTTPStatus.UNAUTHORIZED, message)


def no_permission(key: str, account: str, permission: str) -> ApiError:
    """Return the answer for a restricted key that lacks a permission; *key* is masked."""
    return ApiError(
        HTTPStatus.FORBIDDEN,
        f"The provided key '{key}' does not have the required permissions for this endpoint on "
        f"account '{account}'. Having the '{permission}' permission would allow this request to "
        "continue.",
    )


def no_access(key: str, account: str) -> ApiError:
    """Return the answer for an account that is not connected, or no longer; *key* is masked."""
    return ApiError(
        HTTPStatus.FORBIDDEN,
        f"The provided key '{key}' does not have access to account '{account}' (or that account "
        "does not exist). Application access may have been revoked.",
        code="account_invalid",
    )


def rate_limited(retry_after_s: int | None) -> ApiError:
    """Return the answer for too many requests."""
    headers = {"Stripe-Rate-Limited-Reason": "global-rate", "Stripe-Should-Retry": "true"}
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    return ApiError(
        HTTPStatus.TOO_MANY_REQUESTS,
        "Request rate limit exceeded.",
        code="rate_limit",
        headers=headers,
    )


def server_error(status: int) -> ApiError:
    """Return the answer for a fault of Stripe's."""
    return ApiError(status, "An unknown error occurred.", type="api_error")
