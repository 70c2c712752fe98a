"""Prompt files: one prompt a line, or .jsonl / .csv / .json with a column. Every prompt knows its file and line."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from cna_kernels.errors import InputError
from cna_kernels.files import FilePath, open_stream, parse_json, read_text, sha256

RECORD_FORMATS = (".jsonl", ".csv", ".json")
LONGEST_LINE = 16 << 20  # bytes


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
            require_text(text, f"{name}[{number}]")
        if not texts:
            raise InputError(name, "holds no prompt")
        return cls(texts, tuple(f"{name}[{number}]" for number in range(len(texts))))

    @property
    def sha256(self) -> str:
        """Of all texts in their order."""
        return sha256(*self.texts)

    def __len__(self):
        return len(self.texts)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return zip(self.texts, self.places, strict=True)


class BadLines:
    """What happens to a record that is no prompt: an error, or with ``skip`` one more in ``count``."""

    def __init__(self, *, skip: bool = False) -> None:
        self.skip, self.count = skip, 0
        self.first: str | None = None

    def add(self, error: InputError) -> None:
        """Count the error, or raise it."""
        if not self.skip:
            raise error
        self.count += 1
        self.first = self.first or str(error)


def read_prompts(path: FilePath, *, column: str | None = None, limit: int | None = None) -> PromptSet:
    """Read a prompt file into memory; the ending of its name says the format.

    Args:
        column: the field that holds the prompt in .jsonl, .csv and .json. Default: ``prompt``, or the only field.
        limit: keep the first so many.

    Raises:
        InputError: naming the file and the line, for an unreadable file, a missing column, or no prompt at all.
    """
    texts, places = zip(*iter_prompts(path, column=column, limit=limit), strict=True)
    return PromptSet(texts, places)


def iter_prompts(
    path: FilePath, *, column: str | None = None, limit: int | None = None, bad: BadLines | None = None
) -> Iterator[tuple[str, str]]:
    """As :func:`read_prompts`, one (text, place) after the other: files of any length need no memory."""
    bad = bad or BadLines()
    if column is not None and Path(path).suffix.lower() not in RECORD_FORMATS:
        raise InputError(path, "a column is for .jsonl, .csv and .json files")
    yield from accepted(path, lambda record, place: prompt_of(record, place, column), bad, limit)


def accepted(path: FilePath, parse: Callable, bad: BadLines, limit: int | None) -> Iterator:
    """What ``parse(record, place)`` makes of the first ``limit`` records that it does not refuse; at least one."""
    found = 0
    for record, place in iter_records(path, bad):
        try:
            value = parse(record, place)
        except InputError as error:
            bad.add(error)
            continue
        yield value
        found += 1
        if found == limit:
            break
    if not found:
        raise InputError(path, "holds no prompt" + (f"; {bad.first}" if bad.count else ""))


def iter_records(path: FilePath, bad: BadLines) -> Iterator[tuple[object, str]]:
    """Each record of a file with its place: text, or an object of fields. What cannot be read goes to ``bad``."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".json":
        yield from _json_records(path)
        return
    with open_stream(path) as file:
        if kind == ".csv":
            yield from _csv_records(path, file, bad)
            return
        for line, place in _lines(path, file, bad):
            if kind != ".jsonl":
                yield line.strip(), place
                continue
            try:
                record = parse_json(line, place)
            except InputError as error:
                bad.add(error)
                continue
            yield record, place


def neutral_prompts() -> PromptSet:
    """The built-in diverse prompts of the universal filter."""
    lines = (files(__package__) / "data" / "neutral_prompts.txt").read_text(encoding="utf-8").splitlines()
    return PromptSet.of([line for line in lines if line], "neutral_prompts")


def _lines(path, file, bad) -> Iterator[tuple[str, str]]:
    """Lines that are not blank; they end with a line feed, a carriage return, or both."""
    number = 0
    while whole := file.readline(LONGEST_LINE + 1):
        if len(whole) > LONGEST_LINE:
            raise InputError(f"{path}:{number + 1}", f"is longer than the {LONGEST_LINE} bytes accepted")
        if number == 0:
            whole = whole.removeprefix(b"\xef\xbb\xbf")
        for piece in whole.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
            number += 1
            place = f"{path}:{number}"
            try:
                line = piece.decode("utf-8")
            except UnicodeDecodeError as error:
                bad.add(InputError(place, f"is not UTF-8 text (byte {error.start} of the line)"))
                continue
            if line.strip():
                yield line, place


def _csv_records(path, file, bad):
    # Bytes that are not UTF-8 become half surrogate pairs, which no prompt may hold.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.DictReader(text, strict=True)
    while True:
        try:
            try:
                names = reader.fieldnames or []
            except csv.Error as error:
                raise InputError(f"{path}:1", error) from None
            if len(set(names)) != len(names):
                raise InputError(f"{path}:1", f"repeats the column {next(n for n in names if names.count(n) > 1)!r}")
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad.add(InputError(f"{path}:{reader.line_num}", error))
            continue
        if None in record:
            what = f"has more fields than the {len(names)} columns; a comma inside a field needs quotes around it"
            bad.add(InputError(f"{path}:{reader.line_num}", what))
            continue
        yield record, f"{path}:{reader.line_num}"


def _json_records(path):
    records = parse_json(read_text(path, may_stream=True), path)
    if not isinstance(records, list):
        raise InputError(path, "expected a JSON list of prompts")
    for number, record in enumerate(records):
        yield record, f"{path}[{number}]"


def prompt_of(record: object, place: str, column: str | None) -> tuple[str, str]:
    """The prompt in a record, and its place: the record's own, or its column's."""
    if isinstance(record, dict):
        name = column or ("prompt" if "prompt" in record or len(record) != 1 else next(iter(record)))
        if name not in record:
            names = ", ".join(str(key) for key in list(record)[:8])
            raise InputError(place, f"has no column {name!r} (it has {names}); name one with --column")
        place, record = f"{place}: {name}", record[name]
    return require_text(record, place), place


def require_text(text: object, place: str) -> str:
    """Return the text; raise InputError naming the place unless there is something in it."""
    if not isinstance(text, str) or not text.strip():
        raise InputError(place, f"expected a prompt, got {text!r}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(place, "holds half of a surrogate pair, which is not text")
    return text
