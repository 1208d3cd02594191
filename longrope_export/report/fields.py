"""Reading a stranger's JSON object by name, with every type checked: what is wrong is named by its place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from longrope_export.errors import InputFileError
from longrope_export.scaling import short_repr

# A page is for people: lists beyond this are not a result of this project.
MOST_ITEMS = 20_000


class Fields:
    """A JSON object at `where`; every getter gives None (or nothing) for null and for what is not there.

    Getters raise `InputFileError`, naming the place, for a value of another type than asked for.
    """

    def __init__(self, values: Any, where: str = "") -> None:
        if not isinstance(values, Mapping):
            raise InputFileError(f"{where or 'the file'} is {short_repr(values)}; it must be an object")
        self.values: Mapping[str, Any] = values
        self.where = where

    def real(self, name: str) -> float | None:
        """A finite number."""
        return None if self.values.get(name) is None else self._real(name, self.values[name])

    def integer(self, name: str) -> int | None:
        """A whole number from 0 to 2⁵³."""
        value = self.real(name)
        if value is not None and not (value.is_integer() and 0 <= value <= 2**53):
            raise self._wrong(name, self.values[name], "a whole number")
        return None if value is None else int(value)

    def text(self, name: str) -> str | None:
        """A text."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value, "a text")
        return value

    def object(self, name: str) -> Fields | None:
        """An object."""
        value = self.values.get(name)
        return None if value is None else Fields(value, self._place(name))

    def objects(self, name: str) -> Iterator[Fields]:
        """The objects of a list."""
        return (Fields(value, f"{self._place(name)}[{index}]") for index, value in enumerate(self.list(name)))

    def reals(self, name: str) -> list[float | None]:
        """A list of finite numbers and nulls."""
        return [None if each is None else self._real(name, each) for each in self.list(name)]

    def list(self, name: str) -> list[Any]:
        """A list of anything, of at most `MOST_ITEMS` values."""
        value = self.values.get(name)
        if value is not None and (not isinstance(value, list) or len(value) > MOST_ITEMS):
            raise self._wrong(name, value, f"a list of at most {MOST_ITEMS:,} values")
        return value or []

    def _real(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
            raise self._wrong(name, value, "a finite number")
        if not math.isfinite(value):
            raise self._wrong(name, value, "a finite number")
        return float(value)

    def _place(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def _wrong(self, name: str, value: Any, wanted: str) -> InputFileError:
        return InputFileError(f"{self._place(name)} is {short_repr(value)}; it must be {wanted}")


def is_object(value: Any) -> bool:
    """Whether a JSON value is an object."""
    return isinstance(value, Mapping)
