"""The laws of `signatures`: what is not signed, whole and fresh does not pass, and nothing breaks.

The oracle signs with nothing but `hmac`, as Stripe's page on manual verification describes.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import Rejected, RejectionReason
from service.secret import Secret
from service.stripe.signatures import (
    MAX_OTHER_SECRETS,
    VerifiedPayload,
    fingerprint,
    sign,
    verify,
)

KEY = b"whsec_tests"
OTHER_KEY = b"whsec_other"
BODY = '{"id": "evt_1", "name": "Zoë"}\n'.encode()
NOW = 1_785_931_200
T = str(NOW).encode()


def oracle(body: bytes = BODY, t: bytes = T, key: bytes = KEY) -> bytes:
    """Return the v1 digest of *body* at *t*."""
    return hmac.new(key, t + b"." + body, hashlib.sha256).hexdigest().encode()


def header(t: bytes = T, key: bytes = KEY) -> bytes:
    """Return the plainest header that is right for BODY."""
    return b"t=%b,v1=%b" % (t, oracle(t=t, key=key))


def judge(
    signature: bytes | None,
    *,
    body: bytes = BODY,
    keys: tuple[bytes, ...] = (KEY,),
    now: float = NOW,
    others: tuple[bytes, ...] = (),
) -> str:
    """Return the fingerprint of the secret that matched, or the word of the refusal."""
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
    "an item with a second equals sign counts for nothing": (
        b"t=%b,t=5=5,v1=%b" % (T, GOOD),
        OK,
    ),
    "item without equals sign": (b"t=%b,v1,junk,v1=%b" % (T, GOOD), OK),
    "not ASCII": (b"t=%b,v1=%b" % (T, b"\xe9" * 64), MALFORMED),
    "not ASCII beside a right v1": (b"t=%b,v1=\xff\xfe,\xf0=\x80,v1=%b" % (T, GOOD), OK),
    "NUL": (b"\x00=\x00,t=%b,v1=%b" % (T, GOOD), OK),
    "the 64th item": (b"t=%b,%bv1=%b" % (T, b"x=1," * 62, GOOD), OK),
    "the 65th item": (b"t=%b,%bv1=%b" % (T, b"x=1," * 63, GOOD), MALFORMED),
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
    """Each way of writing a header is judged as the rules of the design say."""
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
    """Only 1 to 12 ASCII digits without a leading zero are a timestamp, even rightly signed."""
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
def test_time_has_two_sides(age_s: float, expected: str) -> None:
    """A signature is taken up to the tolerance, on either side of now, and not beyond."""
    assert judge(header(), now=NOW + age_s) == expected


@pytest.mark.parametrize("age_s", [-(10**6), -301, 301, 10**6])
def test_mismatch_wins_over_age(age_s: int) -> None:
    """A forged header is a mismatch, however old or new it says it is."""
    assert judge(header(key=OTHER_KEY), now=NOW + age_s) == MISMATCH


@pytest.mark.parametrize(
    "key",
    [
        KEY.removeprefix(b"whsec_"),
        KEY.upper(),
        KEY + b"\n",
        b" " + KEY,
        KEY[:-1],
        b"",
    ],
    ids=repr,
)
def test_the_key_is_the_whole_secret(key: bytes) -> None:
    """The key is the secret to the last byte, `whsec_` included."""
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
    """Any of several secrets will do, and the fingerprint says which one did."""
    expected = hashlib.sha256(signed_by).hexdigest()[:8]

    assert judge(header(key=signed_by), keys=keys) == expected


def test_the_first_of_two_matching_secrets_is_named() -> None:
    """Signed by both secrets, as while a secret is rolled, the first configured one is named."""
    both = b"t=%b,v1=%b,v1=%b" % (T, oracle(key=OTHER_KEY), oracle(key=KEY))

    assert judge(both, keys=(KEY, OTHER_KEY)) == OK
    assert judge(both, keys=(OTHER_KEY, KEY)) == fingerprint(Secret(OTHER_KEY))


def test_without_secrets_nothing_passes() -> None:
    """Where no secret is configured, no header is right."""
    assert judge(header(), keys=()) == MISMATCH


@pytest.mark.parametrize(
    "altered",
    [b"", BODY + b" ", BODY.strip(), BODY.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + BODY],
    ids=["none", "longer", "shorter", "line ends", "byte order mark"],
)
def test_an_altered_body_is_refused(altered: bytes) -> None:
    """Not one byte of the body may be missing, added or rewritten."""
    assert judge(header(), body=altered) == MISMATCH


@pytest.mark.parametrize("body", [b"", b"\x00", b"\xff\xfe\x00", b"a" * 2**18], ids=len)
def test_any_body_can_be_signed(body: bytes) -> None:
    """The body is bytes: empty, not text, or large, it verifies when rightly signed."""
    assert judge(b"t=%b,v1=%b" % (T, oracle(body)), body=body) == OK


def test_sign_is_what_the_oracle_says() -> None:
    """`sign` writes the header that Stripe would write."""
    assert sign(BODY, Secret(KEY), NOW).encode() == header()


@given(body=st.binary(max_size=200), key=st.binary(min_size=1), at=st.integers(0, 10**12 - 1))
def test_what_is_signed_verifies(body: bytes, key: bytes, at: int) -> None:
    """What `sign` signs, `verify` accepts, with any key, at any time."""
    signature = sign(body, Secret(key), at).encode()

    assert judge(signature, body=body, keys=(key,), now=at) == fingerprint(Secret(key))


@given(bit=st.integers(0, len(BODY) * 8 - 1))
def test_no_bit_of_the_body_may_flip(bit: int) -> None:
    """A body with one bit flipped is refused."""
    flipped = bytearray(BODY)
    flipped[bit // 8] ^= 1 << bit % 8

    assert judge(header(), body=bytes(flipped)) == MISMATCH


@given(bit=st.integers(0, len(header()) * 8 - 1))
def test_no_bit_of_the_header_may_flip(bit: int) -> None:
    """A header with one bit flipped, in its digest or anywhere else, is refused."""
    flipped = bytearray(header())
    flipped[bit // 8] ^= 1 << bit % 8

    assert judge(bytes(flipped)) in {MALFORMED, MISMATCH}


PIECES = st.sampled_from([b"t=", b"v1=", b"v0=", b",", b"=", b" ", T, GOOD, BAD, b"\xff", b"\x00"])
HEADERS = st.binary(max_size=300) | st.lists(PIECES, max_size=30).map(b"".join)


@settings(max_examples=300)
@given(signature=st.none() | HEADERS, body=st.binary(max_size=50))
def test_anything_is_proven_or_refused(signature: bytes | None, body: bytes) -> None:
    """Any header and body at all are refused with a word; strangers' bytes raise nothing else."""
    assert judge(signature, body=body) in set(RejectionReason)


@given(signature=st.none() | HEADERS)
def test_no_header_passes_without_the_digest(signature: bytes | None) -> None:
    """A header passes only if the right digest, made with the secret, stands in it."""
    passed = judge(signature) == OK

    assert not passed or GOOD in (signature or b"")


def test_every_pair_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every secret is held against every v1 by `hmac.compare_digest`, whichever matches."""
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def spy(expected: bytes, given: bytes) -> bool:
        compared.append((expected, given))
        return real(expected, given)

    monkeypatch.setattr("service.stripe.signatures.hmac.compare_digest", spy)
    keys = (KEY, OTHER_KEY)
    given_digests = [GOOD, BAD, b"f" * 64]
    judge(b"t=%b," % T + b",".join(b"v1=" + digest for digest in given_digests), keys=keys)

    assert sorted(compared) == sorted(
        (oracle(key=key), digest) for key in keys for digest in given_digests
    )


@pytest.mark.parametrize("age_s", [0, 301, -301])
def test_a_signature_of_another_endpoint_has_its_own_word(age_s: int) -> None:
    """Signed with a secret of another endpoint nothing passes, and the sender hears why."""
    others = (b"whsec_third", OTHER_KEY)

    assert judge(header(key=OTHER_KEY), others=others, now=NOW + age_s) == OTHERS
    assert judge(header(key=b"whsec_stranger"), others=others, now=NOW + age_s) == MISMATCH
    assert judge(header(key=OTHER_KEY), others=(), now=NOW + age_s) == MISMATCH


def test_other_secrets_are_looked_at_only_where_none_matches() -> None:
    """What is right costs no look at other endpoints' secrets; what is not, a bounded number."""
    looked_at = []

    def others() -> Iterator[Secret[bytes]]:
        for number in range(1000):
            looked_at.append(number)
            yield Secret(b"whsec_%d" % number)

    verify(BODY, header(), [Secret(KEY)], now=NOW, tolerance_s=300, other_secrets=others())
    assert looked_at == []
    with pytest.raises(Rejected):
        verify(BODY, header(), [Secret(b"?")], now=NOW, tolerance_s=300, other_secrets=others())
    assert len(looked_at) == MAX_OTHER_SECRETS


def test_other_secrets_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them matches, every one is held against every v1."""
    compared = []
    real = hmac.compare_digest

    def spy(expected: bytes, given: bytes) -> bool:
        compared.append((expected, given))
        return real(expected, given)

    monkeypatch.setattr("service.stripe.signatures.hmac.compare_digest", spy)
    others = (OTHER_KEY, b"whsec_third", b"whsec_fourth")
    assert judge(header(key=OTHER_KEY), others=others) == OTHERS

    assert compared == [(oracle(key=key), oracle(key=OTHER_KEY)) for key in (KEY, *others)]


def test_much_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large a header is, the body is hashed once and no more than 64 items are compared."""
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


def test_a_proven_payload_does_not_show_its_body() -> None:
    """The body, secrets and all, is not in the repr of what `verify` returns."""
    assert "evt_1" not in repr(VerifiedPayload(BODY, OK))


def test_fingerprint() -> None:
    """A secret's public name is the first eight hex digits of its SHA-256."""
    assert fingerprint(Secret(KEY)) == hashlib.sha256(KEY).hexdigest()[:8]
