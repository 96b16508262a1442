"""Only `reveal` gives the value of a `Secret`."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Callable
from typing import Any

import msgspec
import orjson
import pytest

from service.secret import MASK, Secret

CANARY = "canary-66600666"


SHOWS: dict[str, Callable[[object], str]] = {
    "repr": repr,
    "str": str,
    "ascii": ascii,
    "format": "{}".format,
    "padded": "{:>40}".format,
    "conversion": "{!r}".format,
    "f-string": lambda secret: f"{secret}",
    "percent": lambda secret: "%s %r" % (secret, secret),  # noqa: UP031 - one of the ways
    "nested": lambda secret: repr([{"a": (secret,)}]),
    "record": lambda secret: logging.LogRecord("", 0, "", 0, "%s", (secret,), None).getMessage(),
    "exception": lambda secret: str(ValueError(secret)),
}


@pytest.mark.parametrize("way", SHOWS)
@pytest.mark.parametrize("value", [CANARY, CANARY.encode(), [CANARY], 66600666], ids=repr)
def test_no_way_of_showing_shows_it(way: str, value: object) -> None:
    """Every way to turn a Secret into text gives a mask."""
    shown = SHOWS[way](Secret(value))

    assert MASK in shown
    assert "66600666" not in shown


@pytest.mark.parametrize(
    "encode",
    [json.dumps, orjson.dumps, msgspec.json.encode, msgspec.to_builtins, pickle.dumps],
    ids=["json", "orjson", "msgspec", "builtins", "pickle"],
)
def test_no_encoder_accepts_it(encode: Callable[[object], Any]) -> None:
    """Every encoder raises a TypeError that does not hold the value."""
    with pytest.raises(TypeError) as refused:
        encode({"a": Secret(CANARY)})

    assert CANARY not in str(refused.value)


def test_reveal_returns_the_value() -> None:
    """`reveal` returns the value itself."""
    value = [CANARY]

    assert Secret(value).reveal() is value


def test_copies_are_the_same_secret() -> None:
    """A copy, deep or shallow, is the Secret itself, so structs that hold one can be copied."""
    secret = Secret([CANARY])

    assert copy.copy(secret) is secret
    assert copy.deepcopy({"a": secret})["a"] is secret


def test_secrets_compare_by_value_with_secrets_only() -> None:
    """Two Secrets are equal when their values are; a Secret never equals a bare value."""
    assert Secret(CANARY) == Secret(CANARY)
    assert Secret(CANARY) != Secret("other")
    assert Secret(CANARY) != CANARY
    assert len({Secret(CANARY), Secret(CANARY), Secret("other")}) == 2


def test_an_empty_secret_is_false() -> None:
    """A Secret has the truth value of its value."""
    assert Secret(CANARY)
    assert not Secret("")


def test_nothing_can_be_attached() -> None:
    """A Secret has no attribute dictionary in which a value could be found."""
    assert not hasattr(Secret(CANARY), "__dict__")
