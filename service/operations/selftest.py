"""What a deployment promises, tried against itself: lives, copies, disorder, forgeries.

The sessions are synthetic and their ids begin with `transitions.SELFTEST_PREFIX`: every handler's
dispatcher settles them without showing them to it. Asked to deliver, they are ordinary sessions
such as `send` makes. What is left in Redis is looked at in `traces`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
DUPLICATES = 0.5
BEGAN_BEFORE_S = 5 * DAY_S
BEYOND_S = 60
SOMEBODY_ELSE = Secret(b"whsec_of_somebody_else")

_ADMITTED, _DUPLICATE, _LATE = "admitted", "duplicate", "late"


class Row(NamedTuple):
    """One promise, what shows that it is kept, and what was seen.

    Attributes:
        promise: In words.
        expected: The words that must be seen, or what must be so.
        seen: What was.
        kept: Whether that is as promised; None when it could not be looked at.
    """

    promise: str
    expected: str
    seen: str
    kept: bool | None


class Lived(NamedTuple):
    """One session that was sent, and what the ledger must hold of it.

    Attributes:
        session_id: Its id.
        event_ids: Every event of it that was acknowledged.
        status: What it is in the end.
        admitted: How many of its events were admitted.
        secrets: What of its events may be nowhere.
    """

    session_id: str
    event_ids: frozenset[str]
    status: str
    admitted: int
    secrets: frozenset[bytes]


class Trial(NamedTuple):
    """All that was seen from outside.

    Attributes:
        rows: One for each promise.
        lives: Every session that the ledger must know.
        refused: Sessions of which the ledger may know nothing.
    """

    rows: list[Row]
    lives: list[Lived]
    refused: list[str]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is tried: its endpoints, and the settings it runs with.

    Attributes:
        urls: One address for each receiver, or that of their balancer.
        secret: The signing secret.
        settings: Limits are tried just beyond where they say.
        deliver: Whether the handlers are to get the sessions.
    """

    urls: Sequence[str]
    secret: Secret[bytes]
    settings: Settings
    deliver: bool = False


async def examine(subject: Subject, *, random: Random, now: float) -> Trial:
    """Try every promise that can be seen from outside.

    Raises:
        ConfigError: There is no HTTP client, or an address is none.
    """
    return await _Examination(subject, random, int(now)).run()


async def silent(subject: Subject) -> list[str]:
    """Return the addresses at which nothing answers.

    Raises:
        ConfigError: There is no HTTP client, or an address is none.
    """
    counts = [
        (
            await send([WebhookRequest(body=b"{}", signature="")], to=url, secret=subject.secret)
        ).counts
        for url in subject.urls
    ]
    return [
        url for url, answers in zip(subject.urls, counts, strict=True) if "unreachable" in answers
    ]


class _Case(NamedTuple):
    """One request and the one word that answers it, or the balancer's own answer instead."""

    promise: str
    expected: str
    request: WebhookRequest
    of_balancer: str = ""


class _Examination:
    def __init__(self, subject: Subject, random: Random, now: int) -> None:
        self._subject = subject
        self._random = random
        self._now = now
        self._answers: dict[bytes, list[Answer]] = {}
        self._lives: list[list[SyntheticEvent]] = []
        self._verified: list[SyntheticEvent] = []

    async def run(self) -> Trial:
        refusals = self._refusals(stranger := self._life("verified")[0])
        rows = [await self._case(case) for case in (*refusals, *self._passed_by())]
        rows.append(await self._orderly())
        rows.append(await self._copies())
        rows.append(await self._disorderly())
        rows.append(await self._set_back())
        return Trial(rows, [self._lived(life) for life in self._lives], [stranger.session_id])

    def _life(self, name: str, age_s: int = BEGAN_BEFORE_S) -> list[SyntheticEvent]:
        return lifecycle_events(
            name,
            random=self._random,
            started_at=self._now - age_s,
            session_prefix="vs_" if self._subject.deliver else SELFTEST_PREFIX,
            livemode=self._subject.settings.livemode is Livemode.LIVE,
        )

    def _refusals(self, event: SyntheticEvent) -> list[_Case]:
        """Return what must be refused, each for its own reason."""
        body, now, settings = event.body, self._now, self._subject.settings
        oversized = body.ljust(settings.max_body_bytes + 1)
        beyond = settings.signature_tolerance_s + BEYOND_S

        def signed(at: int, secret: Secret[bytes] = self._subject.secret) -> str:
            return sign(body, secret, at)

        def case(
            expected: str, what: str, signature: str | None, body: bytes = body, instead: str = ""
        ) -> _Case:
            request = WebhookRequest(body=body, signature=signature)
            return _Case(f"{what} is refused", expected, request, instead)

        return [
            case("signature_mismatch", "a forged signature", signed(now, SOMEBODY_ELSE)),
            case("signature_mismatch", "an altered body", signed(now), body + b" "),
            case("signature_mismatch", "a changed timestamp", _redated(signed(now), now - 1)),
            case("signature_missing", "no signature", ""),
            case("signature_malformed", "what is no signature", "nonsense"),
            case("signature_malformed", "a v0 signature", signed(now).replace("v1=", "v0=")),
            case("timestamp_too_old", "a stale signature", signed(now - beyond)),
            case("timestamp_too_new", "a signature from the future", signed(now + beyond)),
            case("body_not_json", "a body that is no JSON", None, body[:-2]),
            case("body_not_an_event", "a body that is no event", None, b"[]"),
            case("field_missing", "an event about no session", None, _changed(body, data={})),
            # A balancer that counts bodies too refuses it before a receiver sees it.
            case("body_too_large", "an oversized body", None, oversized, "http_413"),
        ]

    def _passed_by(self) -> list[_Case]:
        """Return what is genuine and acknowledged, and changes nothing."""
        too_old = (self._subject.settings.max_event_age_days + 10) * DAY_S
        [other, *_], [expired, *_] = self._life("verified"), self._life("canceled", too_old)
        body = _changed(other.body, type="account.updated")
        return [
            _Case("an event of another type is ignored", "ignored", WebhookRequest(body=body)),
            _Case(
                "what is too old to judge is expired", "expired", WebhookRequest(body=expired.body)
            ),
        ]

    async def _case(self, case: _Case) -> Row:
        answers = [await self._send([case.request], url) for url in self._subject.urls]
        seen = Counter(answer.outcome for each in answers for answer in each)
        kept = seen.keys() <= {case.expected, case.of_balancer}
        return _row(case.promise, case.expected, seen, kept=kept)

    async def _orderly(self) -> Row:
        """Send one life of each kind, its events in their order, each life to one receiver."""
        lives = [self._life(name) for name in LIFECYCLES]
        self._lives += lives
        self._verified = lives[[*LIFECYCLES].index("verified")]
        urls = cycle(self._subject.urls)
        answers = await asyncio.gather(
            *(
                self._send(
                    [
                        WebhookRequest(body=event.body, ordering_key=event.session_id)
                        for event in life
                    ],
                    url,
                )
                for life, url in zip(lives, urls, strict=False)
            )
        )
        seen = Counter(answer.outcome for each in answers for answer in each)
        return _row("events in order are admitted", _ADMITTED, seen, kept=[*seen] == [_ADMITTED])

    async def _copies(self) -> Row:
        """Send one event to every receiver at once, many times."""
        life = self._life("canceled")[:1]
        self._lives.append(life)
        copies = [WebhookRequest(body=life[0].body)] * COPIES_AT_ONCE
        answers = await asyncio.gather(*(self._send(copies, url) for url in self._subject.urls))
        seen = Counter(answer.outcome for each in answers for answer in each)
        expected = {_ADMITTED: 1, _DUPLICATE: COPIES_AT_ONCE * len(self._subject.urls) - 1}
        return _row(
            "copies at once are admitted once", _counted(expected), seen, kept=seen == expected
        )

    async def _disorderly(self) -> Row:
        """Send one life of each kind, everything mixed and much of it twice, to all receivers."""
        lives = [self._life(name) for name in LIFECYCLES]
        self._lives += lives
        events = [event for life in lives for event in life]
        mixed = plan(events, duplicates=DUPLICATES, shuffle=True, random=self._random)
        count = len(self._subject.urls)
        answers = await asyncio.gather(
            *(self._send(mixed[n::count], url) for n, url in enumerate(self._subject.urls))
        )
        seen = Counter(answer.outcome for each in answers for answer in each)
        once = all(
            len([said for said in self._said(event) if said in {_ADMITTED, _LATE}]) == 1
            for event in events
        )
        kept = once and seen[_DUPLICATE] == len(mixed) - len(events)
        expected = f"{len(events)} admitted or late, {len(mixed) - len(events)} duplicate"
        return _row("disorder and copies change no verdict", expected, seen, kept=kept)

    async def _set_back(self) -> Row:
        """Send, of a session that is verified, an event from before."""
        _, processing, _ = self._verified
        id_ = f"{processing.id}again"
        before = replace(processing, id=id_, body=_changed(processing.body, id=id_))
        self._verified.insert(0, before)
        [answer] = await self._send([WebhookRequest(body=before.body)], self._subject.urls[0])
        kept = answer.outcome == _LATE
        return _row("a verified session is not set back", _LATE, {answer.outcome: 1}, kept=kept)

    async def _send(self, requests: Sequence[WebhookRequest], url: str) -> list[Answer]:
        answers: list[Answer] = []
        await send(requests, to=url, secret=self._subject.secret, progress=answers.append)
        for answer in answers:
            self._answers.setdefault(answer.request.body, []).append(answer)
        return answers

    def _said(self, event: SyntheticEvent) -> list[str]:
        return [answer.outcome for answer in self._answers.get(event.body, ()) if answer.ok]

    def _lived(self, life: Sequence[SyntheticEvent]) -> Lived:
        last = life[-1]
        ended = orjson.loads(last.body)["data"]["object"]["status"]
        return Lived(
            session_id=last.session_id,
            event_ids=frozenset(event.id for event in life if self._said(event)),
            status=Status.REDACTED if last.type.endswith(".redacted") else ended,
            admitted=sum(_ADMITTED in self._said(event) for event in life),
            secrets=frozenset(_secrets(life)),
        )


def _in_order(life: Iterable[SyntheticEvent]) -> list[WebhookRequest]:
    return [WebhookRequest(body=event.body, ordering_key=event.session_id) for event in life]


def _row(promise: str, expected: str, seen: Mapping[str, int], *, kept: bool) -> Row:
    return Row(promise, expected, _counted(seen), kept)


def _counted(words: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {word}" for word, count in sorted(words.items()))


def _changed(body: bytes, **fields: Any) -> bytes:
    return orjson.dumps(orjson.loads(body) | fields)


def _redated(signature: str, at: int) -> str:
    return f"t={at},{signature.partition(',')[2]}"


def _secrets(life: Iterable[SyntheticEvent]) -> Iterable[bytes]:
    """Yield what must not leave the process that received it."""
    for event in life:
        session = orjson.loads(event.body)["data"]["object"]
        for name in ("client_secret", "url"):
            if session[name]:
                yield session[name].encode()
