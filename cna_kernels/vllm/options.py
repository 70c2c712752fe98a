"""What the plug-in is told when an engine starts: ``additional_config={"cna": {...}}``."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..fields import short

KEY = "cna"  # in ``additional_config``
STAMP = "stamp"  # within: what the engine's start writes for vLLM's compile cache
WHERE = 'additional_config["cna"]'
_FIELDS = ("circuits", "columns", "max_neurons", "any_model", "any_version", STAMP)


@dataclass(frozen=True)
class Options:
    """The options of one engine.

    Attributes:
        circuits: the circuit files by name; or a directory, whose files ``NAME.json`` may come, change and go while
            the engine runs.
        columns: the columns that requests may be summed in; 0: no request is.
        max_neurons: the most neurons that the circuits of one request may have together; None: 1% of the model's.
        any_model: whether circuits of other models are taken where their shape fits.
        any_version: whether a version of vLLM that the plug-in was not tested with is taken.
        stamp: a hash of the plug-in's code.
    """

    circuits: dict[str, str] | str
    columns: int = 0
    max_neurons: int | None = None
    any_model: bool = False
    any_version: bool = False
    stamp: str = ""


def options_of(config: Any) -> Options | None:
    """The options in a ``VllmConfig``, or None where the engine was started without. Raises InputError."""
    given = getattr(config, "additional_config", None)
    return read(given[KEY]) if isinstance(given, dict) and given.get(KEY) is not None else None


def read(given: Any) -> Options:
    """The options in a JSON object. Raises InputError naming the field."""
    if not isinstance(given, dict):
        raise InputError(WHERE, f"expected an object, got {short(given)}")
    if unknown := sorted(set(given) - set(_FIELDS)):
        known = ", ".join(name for name in _FIELDS if name != STAMP)
        raise InputError(f"{WHERE}: {unknown[0]}", f"is unknown; known are {known}")
    circuits = given.get("circuits", {})
    if isinstance(circuits, Path):
        circuits = str(circuits)
    of_names = isinstance(circuits, dict) and all(isinstance(x, str) for pair in circuits.items() for x in pair)
    if not of_names and not isinstance(circuits, str):
        raise InputError(f"{WHERE}: circuits", f"expected a directory, or files by name, got {short(circuits)}")
    for name, least in (("columns", 0), ("max_neurons", 1)):
        value = given.get(name)
        if value is not None and (type(value) is not int or value < least):
            raise InputError(f"{WHERE}: {name}", f"expected a whole number from {least} on, got {short(value)}")
    for name in ("any_model", "any_version"):
        if type(given.get(name, False)) is not bool:
            raise InputError(f"{WHERE}: {name}", f"expected true or false, got {short(given[name])}")
    return Options(
        circuits, given.get("columns") or 0, given.get("max_neurons"), given.get("any_model", False),
        given.get("any_version", False), str(given.get(STAMP, "")),
    )  # fmt: skip


def stamp() -> str:
    """A hash of the plug-in's code: vLLM's compile cache does not see what a plug-in changes in a model."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def with_stamp(given: dict[str, Any]) -> dict[str, Any]:
    """An ``additional_config`` whose settings name the code. Options without a meaning for JSON are refused."""
    try:
        return {**given, KEY: {**json.loads(json.dumps(given[KEY], default=str)), STAMP: stamp()}}
    except (TypeError, ValueError) as error:
        raise InputError(WHERE, f"expected what JSON can hold: {error}") from None
