"""Tries the promises on a running deployment, from outside: as Stripe, and as a forger.

Its sessions are synthetic. Their ids begin with SELFTEST_PREFIX, so workers acknowledge their
transitions without calling the handlers; with `deliver` they are ordinary sessions. What Redis
holds afterwards is looked at in `selftest_redis`.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from random import Random
from typing import Any, NamedTuple

import orjson

from ..config import DAY_S, Livemode, Settings
from ..secret import Secret
from ..stripe.signatures import sign
from ..transitions.lifecycle import Status
from ..transitions.transition import SELFTEST_PREFIX
from .sender import Answer, WebhookRequest, plan, send
from .synthetic_events import LIFECYCLES, SyntheticEvent, lifecycle_events

COPIES_AT_ONCE = 8
SHARE_OF_DUPLICATES = 0.5
# Long enough ago that the slowest step of a lifecycle is not in the future.
STARTED_BEFORE_S = 5 * DAY_S
# How far beyond a limit of the settings is tried.
BEYOND_S = 60
OTHER_SECRET = Secret(b"whsec_of_another_endpoint")


class Row(NamedTuple):
    """One promise, what shows that it is kept, and what was seen.

    Attributes:
        promise: In words.
        expected: What must be seen.
        seen: What was seen.
        kept: Whether that is as promised; None when it could not be observed.
    """

    promise: str
    expected: str
    seen: str
    kept: bool | None


class SentSession(NamedTuple):
    """One session that was sent, and what Redis must hold of it.

    Attributes:
        session_id: Its id.
        event_ids: Every event of it that was acknowledged; none if all were refused.
        status: Its final status.
        admitted: How many of its events were admitted.
        secrets: What of its events must not be stored.
    """

    session_id: str
    event_ids: frozenset[str]
    status: str
    admitted: int
    secrets: frozenset[bytes]


class _Case(NamedTuple):
    """One request that must be answered with one word; a balancer may have another."""

    promise: str
    expected: str
    request: WebhookRequest
    by_balancer: str = ""


@dataclass(kw_only=True)
class Selftest:
    """One run against one deployment.

    Attributes:
        urls: The address of each receiver, or that of their balancer.
        secret: The signing secret.
        settings: The deployment's settings: each limit is tried from just beyond.
        deliver: Whether the handlers are called for the sessions.
        random: The source of ids and of every choice.
        now: The time, in Unix seconds.
    """

    urls: Sequence[str]
    secret: Secret[bytes]
    settings: Settings
    deliver: bool = False
    random: Random
    now: int
    _sent: list[list[SyntheticEvent]] = field(default_factory=list, init=False)
    # What each body was answered, where the answer was a 2xx.
    _outcomes: dict[bytes, list[str]] = field(default_factory=lambda: defaultdict(list), init=False)

    async def find_silent(self) -> list[str]:
        """Return the addresses that do not answer.

        Raises:
            ConfigError: An address is no http or https URL.
        """
        unsigned = WebhookRequest(body=b"{}", signature="")
        found = [(url, await send([unsigned], to=url, secret=self.secret)) for url in self.urls]
        return [url for url, summary in found if "unreachable" in summary.counts]

    async def run(self) -> tuple[list[Row], list[SentSession]]:
        """Try every promise that can be observed from outside; return what Redis must hold too.

        Raises:
            ConfigError: An address is no http or https URL.
        """
        refused = self._events_of("verified")[:1]
        cases = [*self._refused_cases(refused[0]), *self._acknowledged_cases()]
        rows = [await self._try_case(case) for case in cases]
        rows.append(await self._try_order())
        rows.append(await self._try_copies())
        rows.append(await self._try_disorder())
        rows.append(await self._try_going_back())
        return rows, [self._session_of(events) for events in (*self._sent, refused)]

    def _events_of(self, lifecycle: str, age_s: int = STARTED_BEFORE_S) -> list[SyntheticEvent]:
        return lifecycle_events(
            lifecycle,
            random=self.random,
            started_at=self.now - age_s,
            session_prefix="vs_" if self.deliver else SELFTEST_PREFIX,
            livemode=self.settings.livemode is Livemode.LIVE,
        )

    def _refused_cases(self, event: SyntheticEvent) -> list[_Case]:
        body, now, settings = event.body, self.now, self.settings
        beyond = settings.signature_tolerance_s + BEYOND_S

        def signed(at: int, secret: Secret[bytes] = self.secret) -> str:
            return sign(body, secret, at)

        def case(
            outcome: str,
            what: str,
            signature: str | None,
            body: bytes = body,
            by_balancer: str = "",
        ) -> _Case:
            request = WebhookRequest(body=body, signature=signature)
            return _Case(f"{what} is refused", outcome, request, by_balancer)

        redated = f"t={now - 1},{signed(now).partition(',')[2]}"
        too_large = body.ljust(settings.max_body_bytes + 1)
        return [
            case("signature_mismatch", "a forged signature", signed(now, OTHER_SECRET)),
            case("signature_mismatch", "an altered body", signed(now), body + b" "),
            case("signature_mismatch", "a changed timestamp", redated),
            case("signature_missing", "no signature", ""),
            case("signature_malformed", "what is no signature", "nonsense"),
            case("signature_malformed", "a v0 signature", signed(now).replace("v1=", "v0=")),
            case("timestamp_too_old", "a stale signature", signed(now - beyond)),
            case("timestamp_too_new", "a signature from the future", signed(now + beyond)),
            case("body_not_json", "a body that is no JSON", None, body[:-2]),
            case("body_not_an_event", "a body that is no event", None, b"[]"),
            case("field_missing", "an event about no session", None, _change(body, data={})),
            case("body_too_large", "an oversized body", None, too_large, "http_413"),
        ]

    def _acknowledged_cases(self) -> list[_Case]:
        """Return genuine requests that are acknowledged and change nothing."""
        too_old_s = (self.settings.max_event_age_days + 10) * DAY_S
        other = _change(self._events_of("verified")[0].body, type="account.updated")
        old = self._events_of("canceled", too_old_s)[0].body
        return [
            _Case("an event of another type is ignored", "ignored", WebhookRequest(body=other)),
            _Case("an event that is too old is expired", "expired", WebhookRequest(body=old)),
        ]

    async def _try_case(self, case: _Case) -> Row:
        seen = await self._send_to_each([[case.request]] * len(self.urls))
        is_kept = seen.keys() <= {case.expected, case.by_balancer}
        return _row(case.promise, case.expected, seen, kept=is_kept)

    async def _try_order(self) -> Row:
        """Send each lifecycle in order, each to one receiver."""
        sessions = [self._events_of(name) for name in LIFECYCLES]
        self._sent += sessions
        seen = await self._send_to_each(
            [
                [WebhookRequest(body=event.body, ordering_key=event.session_id) for event in events]
                for events in sessions
            ]
        )
        return _row("events in order are admitted", "admitted", seen, kept=[*seen] == ["admitted"])

    async def _try_copies(self) -> Row:
        """Send one event to every receiver at once, several times."""
        events = self._events_of("canceled")[:1]
        self._sent.append(events)
        copies = [WebhookRequest(body=events[0].body)] * COPIES_AT_ONCE
        seen = await self._send_to_each([copies] * len(self.urls))
        expected = {"admitted": 1, "duplicate": COPIES_AT_ONCE * len(self.urls) - 1}
        return _row(
            "copies at once are admitted once", _format(expected), seen, kept=seen == expected
        )

    async def _try_disorder(self) -> Row:
        """Send all lifecycles to all receivers, in a random order and half of it twice."""
        sessions = [self._events_of(name) for name in LIFECYCLES]
        self._sent += sessions
        events = [event for each in sessions for event in each]
        mixed = plan(events, duplicates=SHARE_OF_DUPLICATES, shuffle=True, random=self.random)
        count = len(self.urls)
        seen = await self._send_to_each([mixed[n::count] for n in range(count)])
        copies = len(mixed) - len(events)
        is_judged_once = all(
            sum(outcome in {"admitted", "late"} for outcome in self._outcomes[event.body]) == 1
            for event in events
        )
        return _row(
            "disorder and copies change no verdict",
            f"{len(events)} admitted or late, {copies} duplicate",
            seen,
            kept=is_judged_once and seen["duplicate"] == copies,
        )

    async def _try_going_back(self) -> Row:
        """Send an older event of the session that is verified."""
        # The first sessions sent are those in order, one of each lifecycle.
        verified = self._sent[[*LIFECYCLES].index("verified")]
        processing = verified[1]
        id_ = f"{processing.id}again"
        older = replace(processing, id=id_, body=_change(processing.body, id=id_))
        verified.insert(0, older)
        seen = await self._send_to_each([[WebhookRequest(body=older.body)]])
        return _row("a verified session is not set back", "late", seen, kept=[*seen] == ["late"])

    async def _send_to_each(self, batches: Sequence[Sequence[WebhookRequest]]) -> Counter[str]:
        """Send each batch to the next receiver, all at once; count the answers."""
        answers: list[Answer] = []
        await asyncio.gather(
            *(
                send(batch, to=url, secret=self.secret, progress=answers.append)
                for batch, url in zip(batches, cycle(self.urls), strict=False)
            )
        )
        for answer in answers:
            if answer.ok:
                self._outcomes[answer.request.body].append(answer.outcome)
        return Counter(answer.outcome for answer in answers)

    def _session_of(self, events: Sequence[SyntheticEvent]) -> SentSession:
        last = events[-1]
        states = [orjson.loads(event.body)["data"]["object"] for event in events]
        secrets = {state[name] for state in states for name in ("client_secret", "url")}
        is_redacted = last.type.endswith(".redacted")
        return SentSession(
            session_id=last.session_id,
            event_ids=frozenset(event.id for event in events if self._outcomes[event.body]),
            status=Status.REDACTED if is_redacted else states[-1]["status"],
            admitted=sum("admitted" in self._outcomes[event.body] for event in events),
            secrets=frozenset(secret.encode() for secret in secrets if secret),
        )


def _row(promise: str, expected: str, seen: Mapping[str, int], *, kept: bool) -> Row:
    return Row(promise, expected, _format(seen), kept)


def _format(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))


def _change(body: bytes, **fields: Any) -> bytes:
    return orjson.dumps(orjson.loads(body) | fields)
