"""No secret, no personal data and no control character is in a line."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.parsers import API_KEYS
from service.secret import MASK, Secret
from service.telemetry import redaction
from service.telemetry.redaction import FORBIDDEN_KEYS, is_clean, one_line, sanitize, scrub
from tests.support.usage import cost

CANARY = "canary-66600666"
HEX = "0123456789abcdef" * 4

SECRETS = {
    "signing secret": "whsec_canary66600666",
    "signing secret of any characters": 'whsec_canary"66600666\\!~',
    "client secret": "vs_1Ab_secret_test_canary66600666",
    "client secret of a long id": "vs_" + "a" * 250 + "_secret_canary66600666",
    "secret key": "sk_live_canary66600666",
    "test key": "sk_test_canary66600666",
    "restricted key": "rk_live_canary66600666",
    "organization key": "sk_org_canary66600666",
    "link": "https://verify.stripe.com/start/test_canary66600666#fid",
    "digest": "v1=" + HEX,
    "digest of v0": "v0=" + HEX,
    "digest in capitals": "v1=" + HEX.upper(),
    "credentials": "rediss://user:canary66600666@host:6379/0",
    "password alone": "redis://:canary66600666@host",
    "password with a slash": "redis://u:canary/66600666@host",
    "password with quotes": "redis://u:canary\"'66600666@host",
    "sentinel": "redis+sentinel://u:canary66600666@a:1,b:2/mymaster",
}
SURROUNDINGS = {
    "alone": "{}",
    "sentence": "it was {} and nothing else",
    "glued": "x{}",
    "after a line": "one\n{}\nthree",
    "escaped": r"one\n{}\nthree",
    "quoted": "a='{}' b=\"{}\"",
    "listed": "[{}, {}]",
    "twice": "{} {}",
    "JSON": '{{"a": "{}", "next": 1}}',
    "not ASCII": "é{} ü",
}


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_masked(name: str, around: str) -> None:
    """Everything that looks like a secret is masked, whatever text surrounds it."""
    scrubbed = scrub(SURROUNDINGS[around].format(SECRETS[name], SECRETS[name]))

    assert "66600666" not in scrubbed
    assert HEX not in scrubbed.lower()
    assert MASK in scrubbed


@pytest.mark.parametrize(
    "text",
    [
        "evt_1NG8Du2eZvKYlo2CUI79vXWy",
        "vs_1NG8Du2eZvKYlo2CUI79vXWy",
        "secret_fingerprint",
        "signature_mismatch",
        "identity.verification_session.verified",
        "redis://host:6379/0",
        "https://docs.stripe.com/webhooks",
        "v1=abc",
        "task_1",
        "a@b",
        "",
        "whsec",
        API_KEYS.expected,
    ],
)
def test_other_texts_stay(text: str) -> None:
    """Ids, words and addresses without credentials are left alone."""
    assert scrub(text) == text


@given(st.text(), st.sampled_from(sorted(SECRETS)), st.text())
def test_scrubbing_is_final(before: str, name: str, after: str) -> None:
    """In any text a secret is masked, and scrubbing again changes nothing."""
    scrubbed = scrub(before + SECRETS[name] + after)

    assert "66600666" not in scrubbed
    assert scrub(scrubbed) == scrubbed


@pytest.mark.parametrize("part", ["://", "://a", "vs_", "vs_a_secret", "v1=", "whsec", "sk_"])
def test_scrubbing_takes_linear_time(part: str) -> None:
    """A text with many possible beginnings of a secret takes time in proportion to its length."""
    short, long = (part * (size // len(part)) for size in (2**13, 2**15))

    assert cost(lambda: scrub(long)) < 8 * cost(lambda: scrub(short)), "16 if each met each"


def test_only_the_beginning_of_a_long_text_is_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long text no more is scrubbed than twice the part that is shown."""
    lengths = []

    def spy(text: str) -> str:
        lengths.append(len(text))
        return scrub(text)

    monkeypatch.setattr(redaction, "scrub", spy)
    sanitize({"a": "://" * 2**18})

    assert max(lengths) == 2 * redaction.MAX_CHARACTERS


@pytest.mark.parametrize("key", sorted(FORBIDDEN_KEYS))
@pytest.mark.parametrize("value", [CANARY, 66600666, [CANARY], {"a": CANARY}, None], ids=str)
def test_forbidden_keys_are_masked(key: str, value: object) -> None:
    """A field with a forbidden name is masked, whatever its value, at any depth."""
    spelled = key.upper().replace("_", "-")

    assert sanitize({key: value, "kept": 1}) == {key: MASK, "kept": 1}
    assert sanitize({spelled: value}) == {spelled: MASK}
    assert sanitize({"a": [{"b": ({key: value},)}]}) == {"a": [{"b": [{key: MASK}]}]}


def test_personal_fields_of_stripe_are_forbidden() -> None:
    """The list contains Stripe's secret and personal fields."""
    never = "client_secret url verified_outputs provided_details metadata body stripe_signature"

    assert set(never.split()) <= FORBIDDEN_KEYS


UNRULY = ["\r", "\n", "\x00", "\x1b", "\x07", "\x08", "\x7f", "\x85", "\x9b", "\u2028", "\u2029"]
TURNING = ["\u061c", "\u200e", "\u200f", "\u202a", "\u202e", "\u2066", "\u2069"]


@pytest.mark.parametrize("character", UNRULY + TURNING, ids=ascii)
def test_no_character_breaks_or_turns_a_line(character: str) -> None:
    """Line ends, terminal commands and changes of direction are escaped."""
    assert one_line(f"a{character}é") == f"a{ascii(character)[1:-1]}é"


@given(st.text(st.characters(exclude_categories=())))
def test_one_line_is_one_line(text: str) -> None:
    """Any text becomes one line that can be encoded; printable text stays as it is."""
    line = one_line(text)

    assert len((line + "x").splitlines()) == 1
    assert not re.search("[\x00-\x1f\x7f-\x9f]", line)
    assert line.encode().decode() == line
    assert line == text or not text.isprintable()


class Unprintable:
    """An object whose repr fails."""

    def __repr__(self) -> str:
        raise RuntimeError(CANARY)


CIRCULAR: list[Any] = []
CIRCULAR.append(CIRCULAR)

ODD: dict[str, tuple[object, object]] = {
    "bytes": (CANARY.encode(), "15 bytes"),
    "bytearray": (bytearray(3), "3 bytes"),
    "exception": (ValueError(CANARY), "ValueError"),
    "secret": (Secret(CANARY), MASK),
    "unprintable": (Unprintable(), "Unprintable"),
    "object": (1j, "1j"),
    "huge": (10**30, "100 bits"),
    "beyond text": (10**5000, "16610 bits"),
    "surrogate": ("\ud800", "\\ud800"),
    "set": ({1}, "{1}"),
    "set of secrets": ({"whsec_canary"}, "{'" + MASK),
    "long": ("a" * 5000, "a" * 1000),
    "pair": ((1, "a"), [1, "a"]),
    "odd keys": ({1: 2, None: 3}, {"1": 2, "None": 3}),
    "secret key": ({"whsec_a": 1}, {MASK: 1}),
    "number": (1.5, 1.5),
    "truth": (True, True),
    "none": (None, None),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_values(name: str) -> None:
    """A value that is not a plain one is replaced by a short text."""
    value, expected = ODD[name]

    assert sanitize({"a": value}) == {"a": expected}


def test_a_text_is_scrubbed_before_it_is_cut() -> None:
    """Cutting a long text leaves no half of a secret."""
    assert "canary" not in sanitize({"a": "a" * 985 + "redis://u:canary@h"})["a"]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.binary()
    | st.text(st.characters(exclude_categories=()))
    | st.sampled_from(
        [each for name, (each, _) in ODD.items() if not name.startswith(("unp", "bey"))]
    )
    | st.just(CIRCULAR),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(st.characters(exclude_categories=())) | st.integers(), inner)
    ),
    max_leaves=10,
)


PIECES = st.lists(
    st.sampled_from(["whsec_", "k_", "sk", "_live_", "vs_1", "_secret_", "://", "u:p@", "v1=", HEX])
    | st.sampled_from(["evt_1", " ", '"', "\\", "{", "é", "\n", "\u202e", "a" * 300]),
    max_size=6,
).map("".join)
KEYS = st.sampled_from([*sorted(FORBIDDEN_KEYS), "E-mail", "Date-of-Birth", "event", "sequence"])


@given(st.dictionaries(KEYS | PIECES, VALUES | PIECES, max_size=4))
def test_clean_lines_need_no_sanitizing(fields: dict[str, Any]) -> None:
    """A line that passes for clean is exactly what sanitizing its fields would give."""
    try:
        line = orjson.dumps(fields)
    except TypeError:
        return
    assert not is_clean(line, tuple(fields)) or line == orjson.dumps(sanitize(fields))


@pytest.mark.parametrize("name", SECRETS)
def test_no_line_with_a_secret_is_clean(name: str) -> None:
    """A secret in a value keeps a line from taking the shortcut."""
    assert not is_clean(orjson.dumps({"event": SECRETS[name]}), ("event",))


@pytest.mark.parametrize("value", [-(2**63), 2**63, 2**64 - 1, 1.5, None, True, "evt_1", ""])
def test_usual_lines_are_clean(value: object) -> None:
    """A line of ordinary fields takes the shortcut."""
    fields = {"event": "event.admitted", "value": value}
    line = orjson.dumps(fields)
    assert is_clean(line, tuple(fields))
    assert line == orjson.dumps(sanitize(fields))


@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_any_fields_can_be_written(fields: dict[str, Any]) -> None:
    """Any fields become JSON on one line, without a secret."""
    line = orjson.dumps(sanitize(fields)).decode()

    assert isinstance(json.loads(line), dict)
    assert len(line.splitlines()) == 1
    assert "canary" not in line
