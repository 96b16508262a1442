"""Who may read what: keys, permissions, modes and connected accounts."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.support.stripe_api import READ_ONLY, Permission, StripeStandIn, client_of
from tests.support.stripe_api.app import ROUTES

SESSIONS = "/v1/identity/verification_sessions"
REPORT = "last_verification_report"
DAY_S = 24 * 3600


async def get(
    stand_in: StripeStandIn, secret: str, path: str, **headers: str
) -> tuple[int, dict[str, Any]]:
    """Return the status and the body of an answer."""
    async with client_of(stand_in, secret) as client:
        answer = await client.get(
            path, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        return answer.status_code, answer.json()


@pytest.mark.parametrize(
    ("method", "path", "permission"), [(row[0], row[1], row[3]) for row in ROUTES]
)
async def test_a_restricted_key_needs_the_permission_of_each_path(
    method: str, path: str, permission: Permission
) -> None:
    """With all others it is refused, and the answer names what is missing."""
    stand_in = StripeStandIn()
    writing = {
        Permission.IDENTITY_READ: Permission.IDENTITY_WRITE,
        Permission.WEBHOOKS_READ: Permission.WEBHOOKS_WRITE,
    }
    lacking = set(Permission) - {permission, writing.get(permission)}
    for permissions, is_refused in ((lacking, True), ({permission}, False)):
        key = stand_in.directory.add_key(permissions=permissions)
        async with client_of(stand_in, key.secret) as client:
            answer = await client.request(method, path.format(id="none"))
        assert (answer.status_code == 403) is is_refused, answer.text
        assert (permission in answer.text) is is_refused
        assert key.secret not in answer.text


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Bearer sk_test_unknown", "Basic !", "Digest sk_test_x"]
)
async def test_a_request_needs_a_key(authorization: str) -> None:
    """An unknown one is no key."""
    answer = await get(StripeStandIn(), "", "/v1/events", authorization=authorization)
    assert (answer[0], answer[1]["error"]["type"]) == (401, "invalid_request_error")


async def test_a_key_may_be_a_user_name_and_be_revoked() -> None:
    """As `curl -u sk_test_…:` sends it."""
    stand_in = StripeStandIn()
    key = stand_in.directory.add_key()
    basic = "Basic " + base64.b64encode(f"{key.secret}:".encode()).decode()
    assert (await get(stand_in, "", "/v1/events", authorization=basic))[0] == 200
    key.is_revoked = True
    assert (await get(stand_in, "", "/v1/events", authorization=basic))[0] == 401


async def test_modes_and_accounts_see_their_own() -> None:
    """A key of one mode sees nothing of the other; accounts are named in a header."""
    stand_in = StripeStandIn()
    account = stand_in.directory.connect().id
    scopes = {
        "test": stand_in.scope(),
        "live": stand_in.scope(livemode=True),
        "connected": stand_in.scope(account),
    }
    made = {name: stand_in.sessions.create(scope=scope).id for name, scope in scopes.items()}
    test = stand_in.directory.add_key(permissions=READ_ONLY).secret
    live = stand_in.directory.add_key(livemode=True).secret
    for secret, headers, seen in (
        (test, {}, "test"),
        (live, {}, "live"),
        (test, {"stripe_account": account}, "connected"),
        (test, {"stripe_context": account}, "connected"),
        (test, {"stripe_context": f"{stand_in.scope().account}/{account}"}, "connected"),
    ):
        for path in ("/v1/events", "/v2/core/events", SESSIONS):
            _, body = await get(stand_in, secret, path, **headers)
            [one] = body["data"]
            shown = one["id"] if path == SESSIONS else (one.get("related_object") or {}).get("id")
            assert (shown or one["data"]["object"]["id"]) == made[seen]
        for name, session in made.items():
            status, _ = await get(stand_in, secret, f"{SESSIONS}/{session}", **headers)
            assert status == (200 if name == seen else 404)
    _, body = await get(stand_in, test, "/v1/events", stripe_account=account)
    assert (body["data"][0]["account"], body["data"][0]["context"]) == (account, account)


async def test_an_account_that_was_deauthorised_is_lost() -> None:
    """As one that never was connected, with the same words; others go on."""
    stand_in = StripeStandIn()
    gone, kept = (stand_in.directory.connect().id for _ in range(2))
    key = stand_in.directory.add_key().secret
    stand_in.directory.deauthorize(gone)
    for account, status in ((gone, 403), ("acct_none", 403), (kept, 200)):
        found, body = await get(stand_in, key, "/v1/events", stripe_account=account)
        assert found == status
        assert status == 200 or body["error"]["code"] == "account_invalid"


@pytest.mark.parametrize(
    ("permissions", "age_s", "status"),
    [
        (None, 0, 403),
        (READ_ONLY, 0, 403),
        (READ_ONLY | {Permission.SENSITIVE_RECENT}, DAY_S, 200),
        (READ_ONLY | {Permission.SENSITIVE_RECENT}, 3 * DAY_S, 403),
        (READ_ONLY | {Permission.SENSITIVE_ALL}, 3 * DAY_S, 200),
    ],
)
@pytest.mark.parametrize(
    "path",
    ["verified_outputs.dob", "verified_outputs.id_number", f"{REPORT}.document.number"],
)
async def test_sensitive_results_need_more(
    permissions: frozenset[Permission] | None, age_s: int, status: int, path: str
) -> None:
    """A secret key never gets them; a restricted one for 48 hours, or with yet another one."""
    stand_in = StripeStandIn()
    session = stand_in.sessions.create().id
    stand_in.sessions.submit(session)
    stand_in.sessions.verify(session)
    stand_in.clock.advance(age_s)
    key = stand_in.directory.add_key(permissions=permissions).secret
    for url, prefix in ((f"{SESSIONS}/{session}", ""), (SESSIONS, "data.")):
        assert (await get(stand_in, key, f"{url}?expand[]={prefix}{path}"))[0] == status
    plain = f"{SESSIONS}/{session}?expand[]=verified_outputs&expand[]={REPORT}"
    found, body = await get(stand_in, key, plain)
    assert found == 200
    assert {"dob", "id_number"}.isdisjoint(body["verified_outputs"])
    assert {"dob", "number", "expiration_date"}.isdisjoint(body[REPORT]["document"])


async def test_what_cannot_be_expanded_is_refused() -> None:
    """By the name that was sent."""
    stand_in = StripeStandIn()
    session = stand_in.sessions.create().id
    key = stand_in.directory.add_key().secret
    for path in (
        f"{SESSIONS}/{session}?expand[]=data.verified_outputs",
        f"{SESSIONS}?expand[]=url",
    ):
        status, body = await get(stand_in, key, path)
        assert (status, body["error"]["param"]) == (400, "expand")
