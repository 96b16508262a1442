"""Every field that Stripe sends is read, and nothing personal is shown."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin
from zlib import crc32

import msgspec
import orjson
import pytest
from rich.pretty import pretty_repr

from service.secret import MASK, Secret
from service.stripe.stripe_object import decode_secret
from service.stripe.verification_report import (
    CalendarDate,
    CheckError,
    VerificationReport,
)
from service.stripe.verification_session import (
    LastError,
    Redaction,
    VerificationSession,
    VerifiedOutputs,
)
from tests.support.programs import FIXTURES

EVENTS = sorted(FIXTURES.glob("*identity.verification_session.*.json"))
BARE = {"id": "vs_1", "status": "processing"}

# Every leaf that is not a Secret. A new field fails the test until it is listed here or a Secret.
PLAIN = {
    *("CheckError.code", "DocumentCheck.status", "DocumentCheck.type"),
    *("DocumentOptions.allowed_types", "DocumentOptions.require_id_number"),
    *("DocumentOptions.require_live_capture", "DocumentOptions.require_matching_selfie"),
    *("EmailCheck.status", "EmailOptions.require_verification", "IdNumberCheck.id_number_type"),
    *("IdNumberCheck.status", "LastError.code", "MatchingOptions.dob", "MatchingOptions.name"),
    *("PhoneCheck.status", "PhoneOptions.require_verification", "Redaction.status"),
    *("RelatedPerson.account", "RelatedPerson.person", "SelfieCheck.status"),
    *("VerificationReport.client_reference_id", "VerificationReport.created"),
    *("VerificationReport.id", "VerificationReport.livemode", "VerificationReport.object"),
    *("VerificationReport.type", "VerificationReport.verification_flow"),
    *("VerificationReport.verification_session", "VerificationSession.client_reference_id"),
    *("VerificationSession.created", "VerificationSession.id", "VerificationSession.livemode"),
    *("VerificationSession.metadata", "VerificationSession.object"),
    *("VerificationSession.related_customer", "VerificationSession.related_customer_account"),
    *("VerificationSession.status", "VerificationSession.type"),
    *("VerificationSession.verification_flow", "VerifiedOutputs.id_number_type"),
}

# The text leaves that the repr of each struct may show; of other structs it shows none.
SHOWN = {
    "CheckError": {"CheckError.code"},
    "DocumentOptions": {"DocumentOptions.allowed_types"},
    "LastError": {"LastError.code"},
    "MatchingOptions": {"MatchingOptions.dob", "MatchingOptions.name"},
    "Redaction": {"Redaction.status"},
    "ReportOptions": {"DocumentOptions.allowed_types"},
    "SessionOptions": {
        "DocumentOptions.allowed_types",
        "MatchingOptions.dob",
        "MatchingOptions.name",
    },
    "VerificationReport": {
        "VerificationReport.id",
        "VerificationReport.type",
        "VerificationReport.verification_session",
    },
    "VerificationSession": {
        *("LastError.code", "Redaction.status", "VerificationReport.id"),
        *("VerificationSession.id", "VerificationSession.status", "VerificationSession.type"),
    },
}


class Spot(NamedTuple):
    """One field inside a session: its path, its struct and the type of its value."""

    path: tuple[str, ...]
    owner: str
    struct: type[msgspec.Struct] | None
    leaf: Any

    @property
    def sealed(self) -> bool:
        """Whether the field is declared a Secret."""
        return get_origin(self.leaf) is Secret


def walk(kind: type[msgspec.Struct], path: tuple[str, ...] = ()) -> Iterator[Spot]:
    """Yield every field of `kind` and of the structs inside it."""
    for field in msgspec.structs.fields(kind):
        union = get_origin(field.type) in (Union, UnionType)
        kinds = [
            k for k in (get_args(field.type) if union else (field.type,)) if k is not type(None)
        ]
        struct = next(
            (k for k in kinds if isinstance(k, type) and issubclass(k, msgspec.Struct)), None
        )
        leaf = None if struct else kinds[0]
        here = (*path, field.name)
        yield Spot(here, f"{kind.__name__}.{field.name}", struct, leaf)
        if struct:
            yield from walk(struct, here)


SPOTS = list(walk(VerificationSession))
SEALED = [spot for spot in SPOTS if spot.sealed]
STRUCTS = [VerificationSession, *dict.fromkeys(spot.struct for spot in SPOTS if spot.struct)]
by_path = pytest.mark.parametrize("spot", SPOTS, ids=lambda spot: ".".join(spot.path))


def canary(spot: Spot) -> Any:
    """Return a value that fits the leaf and can be recognized in any text."""
    text, inner = f"canary<{spot.owner}>", get_args(spot.leaf)[0] if spot.sealed else spot.leaf
    if inner is int:
        return 7_000_000_000 + crc32(text.encode()) % 1_000_000_000
    if get_origin(inner) is list:
        return [text]
    if get_origin(inner) is dict:
        return {text: text}
    return {str: text, bool: True}.get(inner, 1_785_931_200)


def planted(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Return JSON for `kind` with a canary in every leaf below it."""
    return {
        spot.path[0]: planted(spot.struct) if spot.struct else canary(spot)
        for spot in walk(kind)
        if len(spot.path) == 1
    }


def placed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return the smallest session that has `value` at `path`."""
    for name in reversed(path):
        value = {name: value}
    return {**BARE, **value}


def seen(text: str) -> set[str]:
    """Return the owners of all canaries in `text`."""
    leaves = ((spot.owner, canary(spot)) for spot in SPOTS if not spot.struct)
    marks = {owner: value for owner, value in leaves if value not in (True, 1_785_931_200)}
    return {
        owner
        for owner, value in marks.items()
        if f"canary<{owner}>" in text or (isinstance(value, int) and str(value) in text)
    }


def opened(value: Any) -> Any:
    """Turn structs and secrets back into plain values, without those that are None."""
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, msgspec.Struct):
        value = {name: getattr(value, name) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {name: opened(inner) for name, inner in value.items() if inner is not None}
    return value


def session_of(path: Path) -> dict[str, Any]:
    """Return the session inside a fixture's event."""
    found: dict[str, Any] = json.loads(path.read_bytes())["data"]["object"]
    return found


def refusal(source: Any) -> ValueError | None:
    """Return the error that `source` raises, or None if it is read."""
    try:
        VerificationSession.from_json(source)
    except ValueError as error:
        return error
    return None


def everything_in(error: BaseException) -> str:
    """Return all that an error reporter could find: the whole chain, arguments, attributes."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link:
        links.append(link)
        link = link.__cause__ or link.__context__
    extras = ("doc", "object", "msg", "reason")
    return ascii([(str(e), e.args, vars(e), [getattr(e, x, "") for x in extras]) for e in links])


@pytest.mark.parametrize("path", EVENTS, ids=lambda path: path.stem)
def test_every_fixture_reads_back_whole(path: Path) -> None:
    """Every field of every recorded session is read, with its value."""
    found = session_of(path)

    session = VerificationSession.from_json(found)

    assert opened(session) == opened(found)
    assert session.id == found["id"]
    assert session.created == 1785931200
    assert session.livemode is False


class SdkObject:
    """An object like those of Stripe's SDK: not a mapping, but convertible to one."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found

    def to_dict(self) -> dict[str, Any]:
        """Return the object as a dict."""
        return self._found


READINGS: dict[str, Callable[[Any], Any]] = {
    "bytes": orjson.dumps,
    "bytearray": lambda found: bytearray(orjson.dumps(found)),
    "memoryview": lambda found: memoryview(orjson.dumps(found)),
    "text": json.dumps,
    "mapping": MappingProxyType,
    "the SDK's object": SdkObject,
}


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
def test_every_kind_of_source_gives_the_same_session(read: Callable[[Any], Any]) -> None:
    """JSON, mappings and the SDK's objects are read to equal sessions."""
    found = session_of(FIXTURES / "identity.verification_session.created.json")

    assert VerificationSession.from_json(read(found)) == VerificationSession.from_json(found)


def test_the_readmes_example() -> None:
    """The example of reading sessions in service/README.md works."""
    readme = (Path(__file__).parents[2] / "service" / "README.md").read_text()
    [example] = [
        code
        for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
        if "VerificationSession.from_json(found)" in code
    ]
    greeted: list[str] = []
    path = FIXTURES / "expanded_report.identity.verification_session.verified.json"
    found = session_of(path) | {"verified_outputs": {"first_name": "Jenny"}}

    exec(example, {"found": SdkObject(found), "greet": greeted.append})  # noqa: S102 - it is ours

    assert greeted == ["Jenny"]


def test_a_report_reads_on_its_own() -> None:
    """A report alone is read like one inside a session, which has its id."""
    path = FIXTURES / "expanded_report.identity.verification_session.verified.json"
    found = session_of(path)

    report = VerificationReport.from_json(orjson.dumps(found["last_verification_report"]))

    session = VerificationSession.from_json(found)
    assert report == session.last_verification_report
    assert session.report_id == report.id == "vr_1TzFixA0ExampleRep00002"


@pytest.mark.parametrize("check", ["document", "email", "id_number", "phone", "selfie"])
def test_each_check_of_a_report_has_its_error(check: str) -> None:
    """A check that failed says why; no fixture has one."""
    report = VerificationReport.from_json({check: {"error": {"code": "c", "reason": "r"}}})

    assert getattr(report, check).error == CheckError(code="c", reason=Secret("r"))


def test_the_seed_sample_reads_with_its_quirks() -> None:
    """Digits in text are a number, 0 and 1 are booleans, and a report may be only its id."""
    [found] = json.loads((FIXTURES / "seed_api_sample.array.json").read_bytes())

    session = VerificationSession.from_json(found)

    assert session.created == 1662261086
    assert session.livemode is False
    assert session.options
    assert session.options.document
    assert session.options.document.require_matching_selfie is True
    assert session.last_verification_report == session.report_id == "vr_MMt18CcerTGCqLkvTzwaSqfw"
    assert (session.metadata, session.client_secret, session.url) == ({}, None, None)


def test_the_barest_session_reads() -> None:
    """Only id and status are required; all other fields are None if missing."""
    session = VerificationSession.from_json(BARE)

    assert opened(session) == BARE
    assert session.last_error_code is None
    assert session.redaction_status is None
    assert session.report_id is None


@pytest.mark.parametrize("missing", ["id", "status"])
def test_id_and_status_are_required(missing: str) -> None:
    """A session without id or status is refused with the name of the field."""
    with pytest.raises(ValueError, match=f"required field `{missing}`"):
        VerificationSession.from_json({k: v for k, v in BARE.items() if k != missing})


def test_shortcuts_read_the_parts() -> None:
    """The properties return the code, the status and the id inside the parts."""
    session = VerificationSession(
        id="vs_1",
        status="requires_input",
        last_error=LastError(code="document_expired"),
        redaction=Redaction(status="validated"),
        last_verification_report=VerificationReport(id="vr_1"),
    )

    assert session.last_error_code == "document_expired"
    assert session.redaction_status == "validated"
    assert session.report_id == "vr_1"


def test_unknown_words_stay_text() -> None:
    """A status, type, code or sex that Stripe adds later is kept as text."""
    session = VerificationSession.from_json(
        {
            "id": "vs_1",
            "status": "on_hold",
            "type": "telepathy",
            "last_error": {"code": "aura_mismatch", "reason": None},
            "redaction": {"status": "pending"},
            "verified_outputs": {"sex": "x", "id_number_type": "mars_id"},
        }
    )

    assert (session.status, session.type) == ("on_hold", "telepathy")
    assert (session.last_error_code, session.redaction_status) == ("aura_mismatch", "pending")
    assert session.verified_outputs == VerifiedOutputs(sex=Secret("x"), id_number_type="mars_id")


@pytest.mark.parametrize("kind", STRUCTS)
def test_unknown_fields_are_ignored(kind: type[msgspec.Struct]) -> None:
    """A field that Stripe adds to any part is ignored."""
    found = planted(kind)

    assert convert(found | {"brand_new": {"canary": ["x"]}}, kind) == convert(found, kind)


def test_an_error_without_code_is_no_error() -> None:
    """Stripe's `{"code": null, "reason": null}` is no failure."""
    session = VerificationSession.from_json(placed(("last_error",), {"code": None, "reason": None}))

    assert session.last_error == LastError()
    assert session.last_error_code is None


@pytest.mark.parametrize("name", ["null", "Null", "NULL", "true", "1"])
def test_people_may_be_called_null(name: str) -> None:
    """The lenient conversion never turns text into None, a boolean or a number."""
    session = VerificationSession.from_json(placed(("verified_outputs", "last_name"), name))

    assert session.verified_outputs == VerifiedOutputs(last_name=Secret(name))


def test_numbers_inside_secrets_may_be_digits() -> None:
    """A secret number may be sent as digits, and is read as a number."""
    session = VerificationSession.from_json(placed(("verified_outputs", "dob"), {"year": "1984"}))

    assert session.verified_outputs
    assert session.verified_outputs.dob == CalendarDate(year=Secret(1984))


@pytest.mark.parametrize("created", [0, "1662261086", 99_999_999_999, 1785931200.0])
def test_moments_within_reason_are_read(created: object) -> None:
    """Whole seconds from 1970 for some three thousand years are accepted."""
    assert VerificationSession.from_json(placed(("created",), created)).created == float(
        str(created)
    )


@pytest.mark.parametrize(
    "created", [-1, 10**11, 10**30, "9" * 5000, True, 1.5, float("nan"), "1_0", " 1", "", [], {}]
)
def test_moments_beyond_reason_are_refused(created: object) -> None:
    """Anything else is refused, and the error names the field."""
    with pytest.raises(ValueError, match=r"\$\.created|neither JSON"):
        VerificationSession.from_json(placed(("created",), created))


@pytest.mark.parametrize("kind", STRUCTS)
def test_structs_cannot_be_changed(kind: type[msgspec.Struct]) -> None:
    """Every struct is frozen, keyword-only and not tracked by the garbage collector."""
    settled = kind.__struct_config__

    assert (settled.frozen, settled.gc) == (True, False)
    with pytest.raises(TypeError):
        kind("positional")


def test_every_leaf_is_secret_or_on_the_list() -> None:
    """Every leaf that is not a Secret is on the list of plain leaves."""
    assert {spot.owner for spot in SPOTS if not spot.struct and not spot.sealed} == PLAIN


def convert(found: Mapping[str, Any], kind: type[msgspec.Struct]) -> msgspec.Struct:
    """Convert as `from_json` does, for any struct."""
    return msgspec.convert(found, kind, strict=False, dec_hook=decode_secret)


@pytest.mark.parametrize("kind", STRUCTS)
@pytest.mark.parametrize(
    "show",
    [repr, str, format, pretty_repr, "{!s:>9}".format, lambda part: repr({"a": [part]})],
    ids=["repr", "str", "format", "rich", "spec", "nested"],
)
def test_no_way_of_showing_shows_more_than_listed(
    kind: type[msgspec.Struct], show: Callable[[object], str]
) -> None:
    """However a struct is printed, only the listed leaves are shown."""
    assert seen(show(convert(planted(kind), kind))) == SHOWN.get(kind.__name__, set())


def test_masked_structs_show_a_mask() -> None:
    """A struct with personal fields only shows a mask; a session shows its safe fields."""
    assert repr(VerifiedOutputs(id_number_type="us_ssn")) == f"VerifiedOutputs({MASK})"
    assert repr(CheckError(code="c", reason=Secret("r"))) == "CheckError(code='c')"
    assert repr(VerificationSession(id="vs_1", status="verified", metadata={"a": "b"})) == (
        "VerificationSession(id='vs_1', status='verified', type=None, last_error_code=None, "
        "redaction_status=None, report_id=None, livemode=None, created=None)"
    )


@pytest.mark.parametrize("spot", SEALED, ids=lambda spot: ".".join(spot.path))
def test_no_secret_is_serialised(spot: Spot) -> None:
    """Every encoder and pickle refuse a session that holds a secret, without quoting it."""
    session = VerificationSession.from_json(placed(spot.path, canary(spot)))

    assert seen(repr(opened(session))) == {spot.owner}
    for encode in (msgspec.json.encode, msgspec.to_builtins, orjson.dumps, pickle.dumps):
        with pytest.raises(TypeError) as refused:
            encode(session)
        assert not seen(everything_in(refused.value))
    assert copy.deepcopy(session) == session


WRONG: list[Any] = [
    "canary",
    ["canary"],
    [{"canary": "canary"}],
    {"canary": {"canary": "canary"}},
    {"canary": ["canary"]},
    b"canary",
    66_600_666,
    10**30 + 66_600_666,
    -66_600_666,
    66_600_666.5,
    float("nan"),
    "66600666" * 999,
    True,
]


@by_path
def test_errors_name_the_path_and_never_the_value(spot: Spot) -> None:
    """A wrong value is refused with its path; no error in the chain holds the value."""
    errors = [error for wrong in WRONG if (error := refusal(placed(spot.path, wrong)))]

    assert errors
    for error in errors:
        # A caller can catch msgspec's own error, a ValueError.
        assert isinstance(error, msgspec.ValidationError)
        assert f"`$.{'.'.join(spot.path)}" in str(error)
        assert "canary" not in everything_in(error)
        assert "66600666" not in everything_in(error)


@by_path
def test_broken_text_is_refused_without_it(spot: Spot) -> None:
    """Text with a lone surrogate, which Python's own errors quote, is not quoted by ours."""
    broken = ("\ud800canary", {"\ud800canary": "\ud800canary"}, ["canary\udfff"])
    errors = [error for wrong in broken if (error := refusal(placed(spot.path, wrong)))]

    assert errors
    assert not any("canary" in everything_in(error) for error in errors)


@pytest.mark.parametrize(
    "source",
    [
        b'{"canary',
        '{"canary": 1,}',
        b"canary",
        b"\xffcanary",
        "\ud800canary",
        b'"\\ud800canary"',
        b"",
        b'{"canary": NaN}',
        b'{"canary":' + b"[" * 5000,
        *(None, 7, ["canary"], object()),
    ],
)
@pytest.mark.parametrize("kind", [VerificationSession, VerificationReport])
def test_what_is_no_source_is_refused_without_it(
    kind: type[VerificationSession | VerificationReport], source: Any
) -> None:
    """What is neither JSON nor a mapping is refused, and the decoder's error is not kept."""
    expected = r"^neither JSON nor a mapping nor an object with to_dict\(\)$"
    with pytest.raises(ValueError, match=expected) as refused:
        kind.from_json(source)

    assert "canary" not in everything_in(refused.value)
    assert refused.value.__context__ is None


@pytest.mark.parametrize("source", [b"[]", b'"canary"', b"null", b"7", b'["canary"]'])
def test_what_is_no_object_is_refused(source: bytes) -> None:
    """JSON that is not an object is refused."""
    with pytest.raises(ValueError, match=r"^Expected `object`, got `\w+`$"):
        VerificationSession.from_json(source)
