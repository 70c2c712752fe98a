"""Prompt files: one prompt a line, or .jsonl / .csv / .json with a column. Every prompt knows its file and line."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from cna_kernels.checks import InputError
from cna_kernels.files import parse_json, read_text, sha256

RECORD_FORMATS = (".jsonl", ".csv", ".json")


@dataclass(frozen=True)
class PromptSet:
    """Prompts and, for messages, the place of each: ``file:line``."""

    texts: tuple[str, ...]
    places: tuple[str, ...]

    @classmethod
    def of(cls, prompts: Sequence[str] | PromptSet, name: str) -> PromptSet:
        """Return the prompts as a set; a plain list is labelled ``name[0]``, ``name[1]``, ..."""
        if isinstance(prompts, PromptSet):
            return prompts
        if isinstance(prompts, str):
            raise InputError(name, "expected a list of prompts, got one string")
        texts = tuple(prompts)
        for number, text in enumerate(texts):
            _require_text(text, f"{name}[{number}]")
        if not texts:
            raise InputError(name, "holds no prompt")
        return cls(texts, tuple(f"{name}[{number}]" for number in range(len(texts))))

    @property
    def sha256(self) -> str:
        return sha256(*self.texts)

    def __len__(self):
        return len(self.texts)


def read_prompts(path, *, column: str | None = None, limit: int | None = None) -> PromptSet:
    """Read a prompt file; the ending of its name says the format.

    Args:
        column: the field that holds the prompt in .jsonl, .csv and .json. Default: ``prompt``, or the only field.
        limit: keep the first so many.

    Raises:
        InputError: naming the file and the line, for an unreadable file, a missing column, or no prompt at all.
    """
    path = Path(path)
    text = read_text(path, may_stream=True)
    kind = path.suffix.lower()
    if kind == ".csv":
        found = _from_records(path, column, _csv_records(path, text))
    elif kind == ".jsonl":
        found = _from_records(path, column, _jsonl_records(path, text))
    elif kind == ".json":
        found = _from_records(path, column, _json_records(path, text))
    else:
        if column is not None:
            raise InputError(path, "a column is for .jsonl, .csv and .json files")
        found = [(line.strip(), f"{path}:{n}") for n, line in enumerate(_lines(text), 1) if line.strip()]
    if limit is not None:
        found = found[:limit]
    if not found:
        raise InputError(path, "holds no prompt")
    texts, places = zip(*found, strict=True)
    return PromptSet(texts, places)


def neutral_prompts() -> PromptSet:
    """The built-in diverse prompts of the universal filter."""
    lines = (files(__package__) / "data" / "neutral_prompts.txt").read_text(encoding="utf-8").splitlines()
    return PromptSet.of([line for line in lines if line], "neutral_prompts")


def _lines(text):
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _csv_records(path, text):
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) != len(names):
            raise InputError(f"{path}:1", f"repeats the column {next(n for n in names if names.count(n) > 1)!r}")
        for record in reader:
            if None in record:
                what = f"has more fields than the {len(names)} columns; a comma inside a field needs quotes around it"
                raise InputError(f"{path}:{reader.line_num}", what)
            yield record, f"{path}:{reader.line_num}"
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}", error) from None


def _jsonl_records(path, text):
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            yield parse_json(line, f"{path}:{number}"), f"{path}:{number}"


def _json_records(path, text):
    records = parse_json(text, path)
    if not isinstance(records, list):
        raise InputError(path, "expected a JSON list of prompts")
    for number, record in enumerate(records):
        yield record, f"{path}[{number}]"


def _from_records(path, column, records):
    found = []
    for record, place in records:
        if isinstance(record, dict):
            name = column or ("prompt" if "prompt" in record or len(record) != 1 else next(iter(record)))
            if name not in record:
                names = ", ".join(str(key) for key in list(record)[:8])
                raise InputError(place, f"has no column {name!r} (it has {names}); name one with --column")
            place, record = f"{place}: {name}", record[name]
        _require_text(record, place)
        found.append((record, place))
    return found


def _require_text(text, place):
    if not isinstance(text, str) or not text.strip():
        raise InputError(place, f"expected a prompt, got {text!r}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(place, "holds half of a surrogate pair, which is not text")
