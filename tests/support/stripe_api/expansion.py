"""Which fields a request sees: `expand[]`, and the permissions that sensitive results need.

https://docs.stripe.com/identity/access-verification-results
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from .accounts import ApiKey, Permission, Scope
from .errors import ApiError

_SENSITIVE_REPORT: Final = frozenset(
    {
        *("document.dob", "document.expiration_date", "document.number"),
        *("id_number.dob", "id_number.id_number"),
    }
)
_REPORT: Final = _SENSITIVE_REPORT | {
    *("document.sex", "document.unparsed_place_of_birth", "document.unparsed_sex")
}
_SENSITIVE_OUTPUTS: Final = frozenset({"verified_outputs.dob", "verified_outputs.id_number"})
_OUTPUTS: Final = _SENSITIVE_OUTPUTS | {
    *("verified_outputs", "verified_outputs.sex", "verified_outputs.unparsed_place_of_birth"),
    "verified_outputs.unparsed_sex",
}
_REPORT_FIELD: Final = "last_verification_report"


def _within_report(paths: Iterable[str]) -> frozenset[str]:
    return frozenset(f"{_REPORT_FIELD}.{path}" for path in paths)


SESSION_PATHS: Final = _OUTPUTS | {"provided_details", _REPORT_FIELD} | _within_report(_REPORT)
SENSITIVE_PATHS: Final = _SENSITIVE_REPORT | _SENSITIVE_OUTPUTS | _within_report(_SENSITIVE_REPORT)


def wanted_paths(
    sent: Iterable[str], expandable: frozenset[str], *, in_list: bool = False
) -> frozenset[str]:
    """Return the paths that a request expands, and all above them.

    Args:
        sent: The values of `expand[]`.
        expandable: The paths that the object has, such as `SESSION_PATHS`.
        in_list: Whether the object is an item of a list, so that paths begin with `data.`.

    Raises:
        ApiError: 400, for a path that cannot be expanded.
    """
    wanted: set[str] = set()
    for text in sent:
        path = text.removeprefix("data.") if in_list else text
        if path not in expandable or (in_list and path == text):
            raise ApiError(400, f"This property cannot be expanded ({text}).", param="expand")
        parts = path.split(".")
        wanted |= {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return frozenset(wanted)


def require_sensitive(wanted: frozenset[str], key: ApiKey, scope: Scope) -> None:
    """Raise `ApiError` (403) if a request expands sensitive results that its key may not read."""
    if wanted & SENSITIVE_PATHS:
        key.require(Permission.SENSITIVE, scope.account)


def prune(
    found: dict[str, Any], wanted: frozenset[str], expandable: frozenset[str], prefix: str = ""
) -> dict[str, Any]:
    """Return an object without the fields that were not expanded; a report becomes its id."""
    pruned: dict[str, Any] = {}
    for name, value in found.items():
        path = prefix + name
        if path == _REPORT_FIELD and path not in wanted:
            pruned[name] = value and value["id"]
        elif path in expandable and path not in wanted:
            continue
        elif isinstance(value, dict):
            pruned[name] = prune(value, wanted, expandable, f"{path}.")
        else:
            pruned[name] = value
    return pruned
