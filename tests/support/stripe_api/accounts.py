"""Accounts and the keys that read them.

A platform's key reads its own account, and each connected account that a request names in
`Stripe-Account` or `Stripe-Context`. A key belongs to live mode or to test mode. https://docs.stripe.com/keys
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

from .errors import no_access, no_permission, unauthorized
from .tokens import Tokens

API_VERSION: Final = "2026-10-28.endive"


class Permission(StrEnum):
    """What a restricted key may do, by Stripe's own names.

    Of event destinations and thin events Stripe does not publish the permission; here they need
    those of webhook endpoints and events.
    """

    EVENTS_READ = "rak_event_read"
    IDENTITY_READ = "rak_identity_product_read"
    WEBHOOKS_READ = "rak_webhook_read"


READ_ONLY: Final = frozenset(Permission)


class Scope(NamedTuple):
    """Whose objects, and of which mode: no request sees objects of another scope."""

    account: str
    livemode: bool


@dataclass(kw_only=True)
class Account:
    """An account.

    Attributes:
        id: `acct_…`.
        platform: The account that it is connected to; None for a platform.
        is_authorized: Whether the platform still has access to it.
    """

    id: str
    platform: str | None = None
    is_authorized: bool = True


@dataclass(kw_only=True)
class ApiKey:
    """A key.

    Attributes:
        secret: `sk_live_…`, `sk_test_…`, `rk_live_…` or `rk_test_…`.
        account: The account that it belongs to.
        livemode: Whether it is a live key.
        permissions: What a restricted key may do; None for a secret key, which may do everything.
        is_revoked: Whether it is rejected from now on.
    """

    secret: str = field(repr=False)
    account: str
    livemode: bool
    permissions: frozenset[Permission] | None = None
    is_revoked: bool = False

    @property
    def masked(self) -> str:
        """The key as error messages show it."""
        start = self.secret[: len("sk_test_")]
        return f"{start}{'*' * (len(self.secret) - len(start) - 4)}{self.secret[-4:]}"

    def require(self, permission: Permission, account: str) -> None:
        """Raise `ApiError` (403) unless the key has a permission."""
        if self.permissions is not None and permission not in self.permissions:
            raise no_permission(self.masked, account, permission)


class Directory:
    """The platform, its connected accounts and all keys."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._keys: dict[str, ApiKey] = {}
        self.platform = Account(id=tokens.new_id("acct"))
        self.accounts = {self.platform.id: self.platform}

    def connect(self) -> Account:
        """Add a connected account."""
        account = Account(id=self._tokens.new_id("acct"), platform=self.platform.id)
        self.accounts[account.id] = account
        return account

    def deauthorize(self, account: str) -> None:
        """Take the platform's access to a connected account away."""
        self.accounts[account].is_authorized = False

    def add_key(
        self, *, livemode: bool = False, permissions: Iterable[Permission] | None = None
    ) -> ApiKey:
        """Add a key: a secret one, or a restricted one with these permissions."""
        prefix = f"{'sk' if permissions is None else 'rk'}_{'live' if livemode else 'test'}_"
        key = ApiKey(
            secret=self._tokens.new_secret(prefix),
            account=self.platform.id,
            livemode=livemode,
            permissions=None if permissions is None else frozenset(permissions),
        )
        self._keys[key.secret] = key
        return key

    def key(self, secret: str) -> ApiKey:
        """Return a key.

        Raises:
            ApiError: 401, for a key that is unknown or revoked.
        """
        key = self._keys.get(secret)
        if key is None:
            raise unauthorized(f"Invalid API Key provided: {secret[:8]}{'*' * 12}")
        if key.is_revoked:
            raise unauthorized("This API key has been revoked.")
        return key

    def scope(self, key: ApiKey, account: str | None) -> Scope:
        """Return what a request reads.

        Args:
            key: The key of the request.
            account: The account that it names in a header; None for the key's own.

        Raises:
            ApiError: 403, for an account that the key has no access to.
        """
        named = account or key.account
        found = self.accounts.get(named)
        is_own = named == key.account
        is_connected = found and found.platform == key.account and found.is_authorized
        if not (is_own or is_connected):
            raise no_access(key.masked, named)
        return Scope(named, key.livemode)
