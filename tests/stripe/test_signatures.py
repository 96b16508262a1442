"""Only a body that is signed, unaltered and fresh is accepted, and no input raises another error.

The oracle signs with `hmac` alone, as Stripe's page on manual verification describes.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.errors import Rejected, RejectionReason
from service.secret import Secret
from service.stripe.signatures import MAX_OTHER_SECRETS, VerifiedPayload, fingerprint, sign, verify

KEY = b"whsec_tests"
OTHER_KEY = b"whsec_other"
BODY = '{"id": "evt_1", "name": "Zoë"}\n'.encode()
NOW = 1_785_931_200
T = str(NOW).encode()


def oracle(body: bytes = BODY, t: bytes = T, key: bytes = KEY) -> bytes:
    """Return the v1 digest of *body* at *t*."""
    return hmac.new(key, t + b"." + body, hashlib.sha256).hexdigest().encode()


def header(t: bytes = T, key: bytes = KEY) -> bytes:
    """Return the simplest valid header for BODY."""
    return b"t=%b,v1=%b" % (t, oracle(t=t, key=key))


def judge(
    signature: bytes | None,
    *,
    body: bytes = BODY,
    keys: tuple[bytes, ...] = (KEY,),
    now: float = NOW,
    others: tuple[bytes, ...] = (),
) -> str:
    """Return the fingerprint of the secret that matched, or the reason of the rejection."""
    secrets = [Secret(key) for key in keys]
    beside = map(Secret, others)
    try:
        payload = verify(body, signature, secrets, now=now, tolerance_s=300, other_secrets=beside)
    except Rejected as error:
        return error.reason if (error.field, error.__context__) == (None, None) else "leaky"
    assert payload.body is body
    return payload.secret_fingerprint


OK = fingerprint(Secret(KEY))
GOOD, BAD = oracle(), b"0" * 64
MISSING, MALFORMED = RejectionReason.SIGNATURE_MISSING, RejectionReason.SIGNATURE_MALFORMED
MISMATCH, OTHERS = RejectionReason.SIGNATURE_MISMATCH, RejectionReason.SIGNATURE_OF_OTHER_ENDPOINT

RULES = {
    "plain": (b"t=%b,v1=%b" % (T, GOOD), OK),
    "no header": (None, MISSING),
    "empty header": (b"", MISSING),
    "space only": (b" ", MALFORMED),
    "signature before timestamp": (b"v1=%b,t=%b" % (GOOD, T), OK),
    "space after a comma": (b"t=%b, v1=%b" % (T, GOOD), OK),
    "two spaces after a comma": (b"t=%b,  v1=%b" % (T, GOOD), MALFORMED),
    "tab after a comma": (b"t=%b,\tv1=%b" % (T, GOOD), MALFORMED),
    "space before the equals sign": (b"t=%b,v1 =%b" % (T, GOOD), MALFORMED),
    "trailing comma": (b"t=%b,v1=%b," % (T, GOOD), OK),
    "only commas": (b",,,,", MALFORMED),
    "no timestamp": (b"v1=%b" % GOOD, MALFORMED),
    "no signature": (b"t=%b" % T, MALFORMED),
    "empty timestamp": (b"t=,v1=%b" % GOOD, MALFORMED),
    "the same timestamp twice": (b"t=%b,v1=%b,t=%b" % (T, GOOD, T), OK),
    "two timestamps": (b"t=%b,t=%d,v1=%b" % (T, NOW - 1, GOOD), MALFORMED),
    "two timestamps, one ill-formed": (b"t=%b,t=x,v1=%b" % (T, GOOD), MALFORMED),
    "upper-case T": (b"T=%b,v1=%b" % (T, GOOD), MALFORMED),
    "upper-case V1": (b"t=%b,V1=%b" % (T, GOOD), MALFORMED),
    "v0 only": (b"t=%b,v0=%b" % (T, GOOD), MALFORMED),
    "v2 only": (b"t=%b,v2=%b" % (T, GOOD), MALFORMED),
    "v10 only": (b"t=%b,v10=%b" % (T, GOOD), MALFORMED),
    "a right v0 beside a wrong v1": (b"t=%b,v0=%b,v1=%b" % (T, GOOD, BAD), MISMATCH),
    "a right v2 beside a wrong v1": (b"t=%b,v2=%b,v1=%b" % (T, GOOD, BAD), MISMATCH),
    "a wrong v0 beside a right v1": (b"t=%b,v1=%b,v0=%b" % (T, GOOD, BAD), OK),
    "wrong v1 first": (b"t=%b,v1=%b,v1=%b" % (T, BAD, GOOD), OK),
    "wrong v1 last": (b"t=%b,v1=%b,v1=%b" % (T, GOOD, BAD), OK),
    "ill-formed v1 beside a right one": (b"t=%b,v1=zz,v1=%b" % (T, GOOD), OK),
    "all v1 wrong": (b"t=%b,v1=%b,v1=%b" % (T, BAD, b"f" * 64), MISMATCH),
    "upper-case digest": (b"t=%b,v1=%b" % (T, GOOD.upper()), MALFORMED),
    "digest too short": (b"t=%b,v1=%b" % (T, GOOD[:-1]), MALFORMED),
    "digest too long": (b"t=%b,v1=%b0" % (T, GOOD), MALFORMED),
    "digest and a newline": (b"t=%b,v1=%b\n" % (T, GOOD), MALFORMED),
    "digest with junk behind": (b"t=%b,v1=%b=junk" % (T, GOOD), MALFORMED),
    "timestamp with junk behind": (b"t=%b=1,v1=%b" % (T, GOOD), MALFORMED),
    "an item with a second equals sign counts for nothing": (b"t=%b,t=5=5,v1=%b" % (T, GOOD), OK),
    "item without equals sign": (b"t=%b,v1,junk,v1=%b" % (T, GOOD), OK),
    "not ASCII": (b"t=%b,v1=%b" % (T, b"\xe9" * 64), MALFORMED),
    "not ASCII beside a right v1": (b"t=%b,v1=\xff\xfe,\xf0=\x80,v1=%b" % (T, GOOD), OK),
    "NUL": (b"\x00=\x00,t=%b,v1=%b" % (T, GOOD), OK),
    "after 4,000 bytes": (b"t=%b,%bv1=%b" % (T, b"x=1," * 1000, GOOD), OK),
    "after 4,096 bytes": (b"t=%b,%bv1=%b" % (T, b"x=1," * 1020, GOOD), MALFORMED),
    "10,000 wrong v1 before the right one": (
        b"t=%b,%bv1=%b" % (T, b"v1=%b," % BAD * 10_000, GOOD),
        MISMATCH,
    ),
    "10,000 wrong v1 behind the right one": (
        b"t=%b,v1=%b%b" % (T, GOOD, b",v1=%b" % BAD * 10_000),
        OK,
    ),
    "right within 4 KiB": (b"x=%b,%b" % (b"1" * 4000, header()), OK),
    "right, but beyond 4 KiB": (b"x=%b,%b" % (b"1" * 4096, header()), MALFORMED),
    "a megabyte of nothing": (b"a" * 2**20, MALFORMED),
}


@pytest.mark.parametrize("name", RULES)
def test_header_rules(name: str) -> None:
    """Every form of the header is accepted or rejected as listed."""
    signature, expected = RULES[name]

    assert judge(signature) == expected


TIMESTAMPS = {
    "one digit": (b"7", 7, OK),
    "zero": (b"0", 0, OK),
    "twelve digits": (b"9" * 12, 10**12 - 1, OK),
    "thirteen digits": (b"1" * 13, int("1" * 13), MALFORMED),
    "leading zero": (b"0" + T, NOW, MALFORMED),
    "plus sign": (b"+" + T, NOW, MALFORMED),
    "minus sign": (b"-" + T, -NOW, MALFORMED),
    "underscore": (b"1_785_931_200", NOW, MALFORMED),
    "leading space": (b" " + T, NOW, MALFORMED),
    "trailing space": (T + b" ", NOW, MALFORMED),
    "trailing newline": (T + b"\n", NOW, MALFORMED),
    "fraction": (T + b".0", NOW, MALFORMED),
    "exponent": (b"1e9", 10**9, MALFORMED),
    "hexadecimal": (b"0x10", 16, MALFORMED),
    "Arabic digits": ("١٧٨٥٩٣١٢٠٠".encode(), NOW, MALFORMED),
    "superscript": ("²".encode(), 2, MALFORMED),
    "a word": (b"now", NOW, MALFORMED),
}


@pytest.mark.parametrize("name", TIMESTAMPS)
def test_timestamp_texts(name: str) -> None:
    """A timestamp is 1 to 12 ASCII digits without a leading zero; others fail even if signed."""
    text, now, expected = TIMESTAMPS[name]

    assert judge(header(t=text), now=now) == expected


@pytest.mark.parametrize(
    ("age_s", "expected"),
    [
        (0, OK),
        (300, OK),
        (300.001, RejectionReason.TIMESTAMP_TOO_OLD),
        (301, RejectionReason.TIMESTAMP_TOO_OLD),
        (10**9, RejectionReason.TIMESTAMP_TOO_OLD),
        (-300, OK),
        (-300.001, RejectionReason.TIMESTAMP_TOO_NEW),
        (-301, RejectionReason.TIMESTAMP_TOO_NEW),
        (-(10**10), RejectionReason.TIMESTAMP_TOO_NEW),
    ],
)
def test_the_tolerance_holds_in_both_directions(age_s: float, expected: str) -> None:
    """A timestamp may differ from now by the tolerance, in both directions, but no more."""
    assert judge(header(), now=NOW + age_s) == expected


@pytest.mark.parametrize("age_s", [-(10**6), -301, 301, 10**6])
def test_mismatch_wins_over_age(age_s: int) -> None:
    """A forged header is a mismatch, whatever its timestamp."""
    assert judge(header(key=OTHER_KEY), now=NOW + age_s) == MISMATCH


@pytest.mark.parametrize(
    "key",
    [KEY.removeprefix(b"whsec_"), KEY.upper(), KEY + b"\n", b" " + KEY, KEY[:-1], b""],
    ids=repr,
)
def test_the_key_is_the_whole_secret(key: bytes) -> None:
    """The key is the whole secret, including `whsec_`."""
    assert judge(header(key=key)) == MISMATCH


@pytest.mark.parametrize(
    ("signed_by", "keys"),
    [
        (KEY, (KEY, OTHER_KEY)),
        (KEY, (OTHER_KEY, KEY)),
        (OTHER_KEY, (KEY, OTHER_KEY)),
        (OTHER_KEY, (KEY, b"whsec_third", OTHER_KEY)),
    ],
)
def test_rotation_names_the_secret_that_matched(signed_by: bytes, keys: tuple[bytes, ...]) -> None:
    """Any of several secrets may match; the fingerprint says which one did."""
    expected = hashlib.sha256(signed_by).hexdigest()[:8]

    assert judge(header(key=signed_by), keys=keys) == expected


def test_the_first_of_two_matching_secrets_is_named() -> None:
    """If both secrets match, as during a rotation, the first configured one is named."""
    both = b"t=%b,v1=%b,v1=%b" % (T, oracle(key=OTHER_KEY), oracle(key=KEY))

    assert judge(both, keys=(KEY, OTHER_KEY)) == OK
    assert judge(both, keys=(OTHER_KEY, KEY)) == fingerprint(Secret(OTHER_KEY))


def test_without_secrets_nothing_passes() -> None:
    """If no secret is configured, every header is a mismatch."""
    assert judge(header(), keys=()) == MISMATCH


@given(body=st.binary(max_size=200), key=st.binary(min_size=1), at=st.integers(0, 10**12 - 1))
@example(body=b"a" * 2**18, key=KEY, at=NOW)
def test_what_is_signed_verifies(body: bytes, key: bytes, at: int) -> None:
    """`sign` writes the header that Stripe would write, and `verify` accepts it, for any body."""
    signature = sign(body, Secret(key), at).encode()

    assert signature == b"t=%d,v1=%b" % (at, oracle(body, b"%d" % at, key))
    assert judge(signature, body=body, keys=(key,), now=at) == fingerprint(Secret(key))


@given(bit=st.integers(0, len(BODY) * 8 - 1))
def test_no_bit_of_the_body_may_flip(bit: int) -> None:
    """A body with one flipped bit is rejected."""
    flipped = bytearray(BODY)
    flipped[bit // 8] ^= 1 << bit % 8

    assert judge(header(), body=bytes(flipped)) == MISMATCH


@given(bit=st.integers(0, len(header()) * 8 - 1))
def test_no_bit_of_the_header_may_flip(bit: int) -> None:
    """A header with one flipped bit, in its digest or anywhere else, is rejected."""
    flipped = bytearray(header())
    flipped[bit // 8] ^= 1 << bit % 8

    assert judge(bytes(flipped)) in {MALFORMED, MISMATCH}


def test_every_pair_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every secret is compared with every v1 by `hmac.compare_digest`, even after a match."""
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def spy(expected: bytes, given: bytes) -> bool:
        compared.append((expected, given))
        return real(expected, given)

    monkeypatch.setattr("service.stripe.signatures.hmac.compare_digest", spy)
    keys, others = (KEY, b"whsec_third"), (OTHER_KEY, b"whsec_fourth")
    digests = [BAD, oracle(key=OTHER_KEY), b"f" * 64]
    signature = b"t=%b," % T + b",".join(b"v1=" + digest for digest in digests)

    assert judge(signature, keys=(*keys, *others)) == fingerprint(Secret(OTHER_KEY))
    assert judge(signature, keys=keys, others=others) == OTHERS
    pairs = [(oracle(key=key), digest) for key in (*keys, *others) for digest in digests]
    assert compared == pairs * 2


@pytest.mark.parametrize("age_s", [0, 301, -301])
def test_a_signature_of_another_endpoint_has_its_own_reason(age_s: int) -> None:
    """A signature by another endpoint's secret is rejected with a reason of its own."""
    others = (b"whsec_third", OTHER_KEY)

    assert judge(header(key=OTHER_KEY), others=others, now=NOW + age_s) == OTHERS
    assert judge(header(key=b"whsec_stranger"), others=others, now=NOW + age_s) == MISMATCH
    assert judge(header(key=OTHER_KEY), others=(), now=NOW + age_s) == MISMATCH


def test_other_secrets_are_tried_only_if_none_matches() -> None:
    """After a match no other endpoint's secret is tried; without one, a bounded number is."""
    tried = []

    def others() -> Iterator[Secret[bytes]]:
        for number in range(1000):
            tried.append(number)
            yield Secret(b"whsec_%d" % number)

    verify(BODY, header(), [Secret(KEY)], now=NOW, tolerance_s=300, other_secrets=others())
    assert tried == []
    with pytest.raises(Rejected):
        verify(BODY, header(), [Secret(b"?")], now=NOW, tolerance_s=300, other_secrets=others())
    assert len(tried) == MAX_OTHER_SECRETS


def test_the_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a huge header the body is hashed once per secret, and at most 64 items are compared."""
    count = Counter[str]()

    def counted(place: Any, name: str) -> None:
        call = getattr(place, name)

        def counting(*arguments: Any) -> Any:
            count[name] += 1
            return call(*arguments)

        monkeypatch.setattr(place, name, counting)

    counted(hmac.HMAC, "update")
    counted(hmac, "compare_digest")
    huge = b"t=%b,%b" % (T, b"v1=%b," % BAD * 200_000)
    keys = tuple(b"whsec_%d" % n for n in range(16))
    assert judge(b"t=%b,v1=%b" % (T, BAD), keys=keys) == MISMATCH
    count.clear()

    assert judge(huge, keys=keys) == MISMATCH
    assert count["update"] == len(keys)
    assert 0 < count["compare_digest"] <= 64 * len(keys)


def test_a_verified_payload_does_not_show_its_body() -> None:
    """The repr of a `VerifiedPayload` does not contain the body."""
    assert "evt_1" not in repr(VerifiedPayload(BODY, OK))
