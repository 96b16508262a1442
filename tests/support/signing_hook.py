"""Signs the requests that schemathesis generates; see `SCHEMATHESIS_HOOKS` in `test_openapi`.

It runs in schemathesis' environment, so it does not import the service. A request without the
signature header, or with one that is wrong on purpose, is not signed.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
import json
import os
import time
from typing import Any

schemathesis: Any = importlib.import_module("schemathesis")

KEY = os.environ["SIGN_WITH"].encode()
HEADER = "Stripe-Signature"


def encoded(value: Any) -> bytes:
    """Return the bytes of a body, which are both signed and sent."""
    return value if isinstance(value, bytes) else json.dumps(_written(value)).encode()


def _written(value: Any) -> Any:
    """Write whole numbers without a fraction: JSON Schema takes 1.0 for an integer, we do not."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _written(one) for name, one in value.items()}
    return [_written(one) for one in value] if isinstance(value, list) else value


def serialized(_: Any, value: Any) -> bytes:
    """Serialize a body."""
    return encoded(value)


def before_call(_: Any, case: Any, kwargs: Any) -> None:
    """Sign a request that has the header, unless the header is wrong on purpose."""
    if case.method == "POST" and HEADER in case.headers and not _is_wrong(case):
        body = b"" if type(case.body).__name__ == "NotSet" else encoded(case.body)
        now = int(time.time())
        digest = hmac.digest(KEY, b"%d.%b" % (now, body), hashlib.sha256).hex()
        case.headers[HEADER] = f"t={now},v1={digest}"


def _is_wrong(case: Any) -> bool:
    components = case.meta.components if case.meta is not None else {}
    return any(
        "header" in str(place).lower() and component.mode.is_negative
        for place, component in components.items()
    )


schemathesis.serializer("application/json")(serialized)
schemathesis.hook(before_call)
