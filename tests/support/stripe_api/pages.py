"""Cuts lists into pages: by ids under /v1, by tokens under /v2.

https://docs.stripe.com/api/pagination and https://docs.stripe.com/api-v2-overview#list-pagination
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Final, TypeVar

import orjson

from .errors import ApiError, invalid
from .parameters import Parameters

Item = TypeVar("Item")

MAX_LIMIT: Final = 100
DEFAULT_LIMIT: Final = 10


def page_by_id(
    parameters: Parameters,
    items: Sequence[Item],
    *,
    url: str,
    kind: str,
    id_of: Callable[[Item], str | None],
    render: Callable[[Item], Mapping[str, Any]],
    admits: Callable[[Item], bool] = lambda _: True,
) -> dict[str, Any]:
    """Return a page of a list under /v1.

    Args:
        parameters: `limit`, `starting_after` and `ending_before` are read from it, then it must be
            empty.
        items: All items, the newest first, those that the filters hide included: a cursor may name
            any of them.
        url: The path of the list.
        kind: What an item is called in an error.
        id_of: Returns an item's id.
        render: Returns an item as the API shows it.
        admits: Decides whether the filters show an item.

    Raises:
        ApiError: 400, for wrong parameters and cursors.
    """
    limit = parameters.integer("limit", minimum=1, maximum=MAX_LIMIT, default=DEFAULT_LIMIT)
    after, before = parameters.text("starting_after"), parameters.text("ending_before")
    parameters.finish()
    if after and before:
        raise invalid("ending_before", "Pass only one of starting_after and ending_before.")

    def index(id: str, param: str) -> int:
        for number, item in enumerate(items):
            if id_of(item) == id:
                return number
        raise ApiError(400, f"No such {kind}: '{id}'", code="resource_missing", param=param)

    if before:
        left = items[: index(before, "ending_before")][::-1]
    else:
        left = items[index(after, "starting_after") + 1 :] if after else items
    shown = list(islice(filter(admits, left), limit + 1))
    page = shown[:limit]
    return {
        "object": "list",
        "data": [render(item) for item in (page[::-1] if before else page)],
        "has_more": len(shown) > limit,
        "url": url,
    }


def page_by_token(
    parameters: Parameters,
    items: Sequence[Item],
    *,
    url: str,
    filters: Mapping[str, Any],
    id_of: Callable[[Item], str],
    render: Callable[[Item], Mapping[str, Any]],
) -> dict[str, Any]:
    """Return a page of a list under /v2.

    The token of a page holds the limit, the filters and the id of the last item before it, so the
    URL of the next page needs nothing else and new items do not shift the pages. `token_filters`
    returns the filters of a token.

    Args:
        parameters: `limit` and `page` are read from it, then it must be empty.
        items: The items that the filters show, the newest first.
        url: The path of the list.
        filters: The parameters that the token must keep.
        id_of: Returns an item's id.
        render: Returns an item as the API shows it.

    Raises:
        ApiError: 400, for wrong parameters.
    """
    default = filters.get("limit", DEFAULT_LIMIT)
    limit = parameters.integer("limit", minimum=1, maximum=MAX_LIMIT, default=default)
    parameters.finish()
    ids = [id_of(item) for item in items]
    # An item that is gone was too old, and so are all that would follow it.
    [last] = filters.get("after", [None])
    start = 0 if last is None else ids.index(last) + 1 if last in ids else len(ids)
    end = start + limit
    token = _encode_token({**filters, "limit": limit, "after": ids[end - 1 : end]})
    return {
        "data": [render(item) for item in items[start:end]],
        "next_page_url": f"{url}?page={token}" if end < len(items) else None,
        "previous_page_url": None,
    }


def token_filters(parameters: Parameters) -> dict[str, Any]:
    """Read `page`, and return the filters in it; none if there is no token.

    Raises:
        ApiError: 400, for a token that is not of ours.
    """
    token = parameters.text("page")
    if token is None:
        return {}
    try:
        padded = token + "=" * (-len(token) % 4)
        decoded = orjson.loads(base64.urlsafe_b64decode(padded))
    except (binascii.Error, ValueError):
        raise invalid("page", "Invalid page token.") from None
    if not isinstance(decoded, dict):
        raise invalid("page", "Invalid page token.")
    return decoded


def _encode_token(filters: Mapping[str, Any]) -> str:
    return base64.urlsafe_b64encode(orjson.dumps(filters)).decode().rstrip("=")
