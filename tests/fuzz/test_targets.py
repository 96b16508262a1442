"""The laws of `targets`, with inputs that Hypothesis derives from real events and settings."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import Rejected
from service.stripe.events import Event, Ignored, ThinEvent, parse
from service.stripe.signatures import VerifiedPayload
from tests.fuzz import targets
from tests.fuzz.targets import BETWEEN, DIGEST, NAMES, TIME
from tests.support.depth import SEARCH_TIMEOUT_S, searching

EVENTS = [orjson.loads(found) for found in targets.corpus("body")]
SEEDS = [event for event in EVENTS if isinstance(event, dict)]

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["", "0", "1", "true", "redacted", "verified", "evt_1", "vs_1", "\0", "é" * 300]
    )
    | st.sampled_from([0, 1, -1, 10**11, 10**11 - 1, 2**53, 10**400, 1e300, 0.0, 1785931200.0])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "status", "code", "x", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)
pytestmark = pytest.mark.timeout(SEARCH_TIMEOUT_S)


def places(found: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path to every value in a JSON tree."""
    inner: Iterable[tuple[Any, Any]] = found.items() if isinstance(found, dict) else ()
    inner = enumerate(found) if isinstance(found, list) else inner
    return [path, *(one for key, value in inner for one in places(value, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Draw an event of Stripe's in which some values are replaced or missing."""
    event = orjson.loads(orjson.dumps(draw(st.sampled_from(SEEDS))))
    for _ in range(draw(st.integers(0, 4))):
        path = draw(st.sampled_from(places(event)[1:]))
        parent = event
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.booleans()):
            parent[path[-1]] = draw(VALUES)
        else:
            del parent[path[-1]]
        if not event:
            break
    # The standard library writes numbers of any size.
    return json.dumps(event).encode()


HOSTILE = [
    b"",
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\0}\0",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"type":"identity.verification_session.created","data":' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"type":1e999}',
    b'{"type":NaN}',
    b'{"type":"\\ud800"}',
    b'{"type":"identity.verification_session.\\u0000"}',
    b"1" * 100_000,
    b'"' + b"a" * 100_000,
    b'{"type":"identity.verification_session.created","created":' + b"9" * 5000 + b"}",
    b"{" + b'"id":"evt_1",' * 5000 + b'"type":"x"}',
]

ITEMS = st.sampled_from(
    [b"t=" + TIME, b"v1=" + DIGEST, b"v0=" + DIGEST, b"t=1", b"v1=" + b"0" * 64, b"t", b"", b" "]
)
PIECES = st.sampled_from([b",", b", ", b"=", b";", b" ", b"\t", b"\0", b"\xff", TIME, DIGEST])
HEADERS = st.lists(ITEMS | PIECES | st.binary(max_size=6), max_size=12).map(b",".join) | st.lists(
    ITEMS | PIECES, max_size=20
).map(b"".join)

VARIABLES = st.lists(
    st.tuples(
        st.integers(0, len(NAMES) - 1),
        st.text(max_size=12)
        | st.sampled_from(["0", "1", "-1", "1e3", "٣", "1_0", " 1", "nan", "inf", "9" * 5000])
        | st.sampled_from(
            ["redis://", "redis+sentinel://a/b", "unix:///x", "log,log", "a:b", "both"]
        )
        | st.from_regex(r"\A[0-9]{1,6}(\.[0-9]{1,3})?\Z"),
    ),
    max_size=4,
)


@given(found=mutated())
@searching(200)
def test_any_change_of_an_event_is_parsed_or_rejected(found: bytes) -> None:
    """An event with any value in any place is delivered whole, ignored or rejected."""
    targets.body(found)


@given(found=mutated())
@searching(300)
def test_both_parsers_agree(found: bytes) -> None:
    """Text beyond ASCII, which only the lenient parser takes, changes nothing about the rest."""
    event = json.loads(found)

    assert outcome(event) == outcome(event | {"unheard_of": "é"})


def outcome(event: Any) -> Event | ThinEvent | Ignored | tuple[str, str | None]:
    """Return what *event*, sent without escapes, is parsed to, or why it is rejected."""
    try:
        return parse(VerifiedPayload(json.dumps(event, ensure_ascii=False).encode(), ""))
    except Rejected as rejected:
        return rejected.reason, rejected.field


@given(found=mutated(), cut=st.integers(0, 4000), junk=st.binary(max_size=8))
@searching(100)
def test_any_damage_to_the_bytes_is_parsed_or_rejected(found: bytes, cut: int, junk: bytes) -> None:
    """Bytes lost, added or replaced in an event lead to a rejection at worst."""
    targets.body(found[:cut] + junk + found[cut + len(junk) :])
    targets.body(found[:cut] + junk)


@pytest.mark.parametrize("found", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("law", ["body", "report"])
def test_hostile_json_is_rejected(found: bytes, law: str) -> None:
    """JSON that attacks a parser, by depth, size or alphabet, is rejected like any other."""
    targets.LAWS[law](found)


@given(event=mutated())
@searching(100)
def test_any_change_of_a_session_is_parsed_or_rejected(event: bytes) -> None:
    """A session or report with any value in any place is parsed or rejected."""
    found = json.loads(event)
    inner = found.get("data") if isinstance(found, dict) else None
    targets.report(json.dumps(inner.get("object") if isinstance(inner, dict) else inner).encode())


@given(header=HEADERS, body=st.binary(max_size=20).filter(lambda body: BETWEEN not in body))
@searching(300)
def test_any_header_of_valid_parts_is_verified_or_rejected(header: bytes, body: bytes) -> None:
    """A header of valid and invalid parts passes with time and digest, or not at all."""
    targets.signature(header + BETWEEN + body)


@given(variables=VARIABLES)
@searching(200)
def test_any_variables_are_accepted_or_rejected(variables: list[tuple[int, str]]) -> None:
    """Settings are accepted or rejected, several at once, in words independent of the values."""
    lines = [targets.line(n, value) for n, value in variables]
    targets.environment(b"\n".join(lines))


@pytest.mark.parametrize("name", targets.LAWS)
def test_the_examples_of_a_search_hold_the_law(name: str) -> None:
    """Each law has examples to start from, and they hold it."""
    examples = targets.corpus(name)

    assert examples
    for example in examples:
        targets.LAWS[name](example)
