"""The `Secret` type: a value that is shown only by an explicit call of `reveal`.

What counts as secret is decided where types are declared (`stripe`, `config`, `handlers`).
"""

from __future__ import annotations

from typing import Generic, NoReturn, TypeVar

T_co = TypeVar("T_co", covariant=True)

MASK = "**********"


class Secret(Generic[T_co]):
    """A value that must not leave the process by accident.

    `repr`, `str` and `format` show a mask. Pickling and all JSON encoders used here raise a
    TypeError. Copies are allowed.
    """

    __slots__ = ("_value",)

    def __init__(self, value: T_co) -> None:
        self._value = value

    def reveal(self) -> T_co:
        """Return the value. Every call of this method deserves attention in a review."""
        return self._value

    def __repr__(self) -> str:
        return MASK

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return MASK

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and bool(self._value == other._value)

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __bool__(self) -> bool:
        return bool(self._value)

    def __copy__(self) -> Secret[T_co]:
        return self

    def __deepcopy__(self, memo: object) -> Secret[T_co]:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret cannot be pickled")
