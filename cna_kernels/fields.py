"""Checked fields of a JSON object that somebody else wrote: an error names the file and the field."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any

from .errors import InputError
from .files import FilePath

LARGEST = sys.float_info.max
REQUIRED: Any = object()  # the default of a field that must be present; elsewhere null means the default


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole_number(name: str, value: Any) -> int:
    """Return the value, a number of NumPy or PyTorch too, as an int. Raises InputError for all others, bools too."""
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).removeprefix("torch.") == "bool"
    try:
        number = None if is_bool else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise InputError(name, f"expected a whole number, got {short(value)}")
    return number


def is_number(value: Any) -> bool:
    """Whether a value is a number that a double holds; true and false are none, nor is 1 with 400 zeros."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def short(value: Any) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Fields:
    """One JSON object and where it comes from. Each method reads a field, or raises InputError.

    Args:
        record: the parsed JSON; anything but an object is refused.
        where: the file, or the file and line.
        prefix: the fields that lead to this object, each with a dot behind it.
    """

    def __init__(self, record: Any, where: FilePath, prefix: str = "") -> None:
        if not isinstance(record, dict):
            at = f"{where}: {prefix.rstrip('.')}" if prefix else where
            raise InputError(at, f"expected a JSON object, got {short(record)}" if prefix else "expected a JSON object")
        self.record, self.where, self.prefix = record, where, prefix

    def error(self, name: str, what: str) -> InputError:
        """An error that names this field."""
        return InputError(f"{self.where}: {self.prefix}{name}", what)

    def read(self, name: str, default: Any, expected: str, accepts: Callable[[Any], bool]) -> Any:
        """A field's value if ``accepts(value)``; ``expected`` is what an error says."""
        value = self.record.get(name)
        if value is None:
            if default is REQUIRED:
                raise self.error(name, f"expected {expected}, got null" if name in self.record else "is missing")
            return default
        if not accepts(value):
            raise self.error(name, f"expected {expected}, got {short(value)}")
        return value

    def integer(self, name: str, bounds: tuple[int, int], default: Any = REQUIRED) -> Any:
        """A whole number within bounds, both included."""
        low, high = bounds
        expected = f"a whole number from {low} to {high}"
        return self.read(name, default, expected, lambda x: is_whole(x) and low <= x <= high)

    def number(self, name: str, bounds: tuple[float, float], default: Any = REQUIRED) -> Any:
        """A number within bounds, both included, as a float."""
        low, high = bounds
        expected = f"a number from {low:g} to {high:g}"
        value = self.read(name, default, expected, lambda x: is_number(x) and low <= x <= high)
        return value if value is default else float(value)

    def boolean(self, name: str, default: Any = REQUIRED) -> Any:
        """true or false."""
        return self.read(name, default, "true or false", lambda x: isinstance(x, bool))

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        """A string."""
        return self.read(name, default, "text", lambda x: isinstance(x, str))

    def one_of(self, name: str, allowed: Collection[str], default: Any = REQUIRED) -> Any:
        """One of the strings ``allowed``."""
        expected = " or ".join(sorted(allowed))
        return self.read(name, default, expected, lambda x: isinstance(x, str) and x in allowed)

    def items(self, name: str, each: Callable[[Any], bool], expected: str, default: Any = REQUIRED) -> Any:
        """A list whose every item ``each`` accepts."""
        values = self.read(name, default, expected, lambda x: isinstance(x, list))
        if values is not default:
            for place, value in enumerate(values):
                if not each(value):
                    raise self.error(f"{name}[{place}]", f"expected {expected}, got {short(value)}")
        return values

    def object(self, name: str, default: Any = REQUIRED) -> Any:
        """A JSON object inside this one, as Fields."""
        value = self.record.get(name)
        if value is None and default is not REQUIRED:
            return default
        if value is None:
            raise self.error(name, "is missing")
        return Fields(value, self.where, f"{self.prefix}{name}.")

    def refuse(self, name: str, accepted: Collection[Any] = (None,)) -> None:
        """Refuse a field whose value is not among ``accepted``: it asks for something that is not supported."""
        value = self.record.get(name)
        if value not in accepted:
            raise self.error(name, f"is not supported, got {short(value)}")

    def only(self, names: Iterable[str], what: str) -> None:
        """Refuse fields other than ``names``. ``what`` names the kind of file."""
        unknown = sorted(set(self.record) - set(names))
        if unknown:
            raise self.error(unknown[0], f"not a field of {what}")
