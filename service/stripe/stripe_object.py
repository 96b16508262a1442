"""What Stripe's objects share: how they are read, and that no personal value is shown.

Nothing here knows events, Redis or the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Protocol, TypeAlias, TypeVar, runtime_checkable

import msgspec
import orjson

from ..secret import MASK, Secret

T = TypeVar("T")


@runtime_checkable
class StripeObject(Protocol):
    """An object of Stripe's SDK, which is not a mapping in newer releases."""

    def to_dict(self) -> dict[str, Any]:
        """Return the object as plain dictionaries and lists."""


Source: TypeAlias = bytes | bytearray | memoryview | str | Mapping[str, Any] | StripeObject

EpochSeconds = Annotated[int, msgspec.Meta(ge=0, lt=10**11)]


def decode_secret(kind: Any, found: Any) -> Any:
    """Wrap a value in the `Secret[...]` that its field declares: the `dec_hook` for msgspec.

    Raises:
        ValueError: The value does not fit. msgspec adds the path and makes it a `ValidationError`;
            neither holds the value.
    """
    inner = kind.__args__[0]
    if type(found) is inner:
        return Secret(found)
    with suppress(msgspec.ValidationError, UnicodeError):
        return Secret(msgspec.convert(found, inner, strict=False))
    # Not raised inside `except`: a UnicodeError holds its input, even as the context of an error.
    raise ValueError(f"Expected `{inner.__name__}`")


def read(kind: type[T], source: Source) -> T:
    """Convert JSON text, a mapping or an object of Stripe's SDK to a *kind*, leniently.

    Strings of digits pass as numbers, 0 and 1 as booleans; undeclared fields are ignored.

    Raises:
        ValueError: The source is none of these, or does not fit (`msgspec.ValidationError`, naming
            the path). Neither holds any of the source.
    """
    if isinstance(source, StripeObject):
        source = source.to_dict()
    with suppress(orjson.JSONDecodeError, UnicodeError):
        found = source if isinstance(source, Mapping) else orjson.loads(source)
        return msgspec.convert(found, kind, strict=False, dec_hook=decode_secret)
    # Not raised inside `except`: JSONDecodeError.doc is the whole input.
    raise ValueError("neither JSON nor a mapping nor an object with to_dict()")


class HiddenRepr(msgspec.Struct, frozen=True, gc=False):
    """A struct whose `repr` shows only the attributes named in `shown`, else a mask."""

    shown: ClassVar[tuple[str, ...]] = ()

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in self.shown]

    def __repr__(self) -> str:
        attributes = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({attributes or MASK})"
