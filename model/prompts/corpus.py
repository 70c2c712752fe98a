"""Corpus: the prompts of a run in a fixed order, cut into units of work. Kept in a file, so that any number fits."""

from __future__ import annotations

import heapq
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from cna_kernels.errors import InputError
from cna_kernels.fields import REQUIRED, Fields
from cna_kernels.files import Digest, open_regular, replaced, sha256

from .files import BadLines, ChatText, TokenText, accepted, prompt_of, require_text

UNIT_PROMPTS, UNIT_BYTES, UNIT_UNIVERSAL = 1024, 4 << 20, 32  # what a unit holds at most: prompts, and their text
STREAMED_UNITS = 64  # times as much where every unit reads the whole checkpoint
MOST_COLUMNS, LONGEST_NAME = 4096, 200
SKETCH = 1024  # hashes of a column's sketch
LONGEST_LINE = 1 << 30  # bytes of a prompt with what belongs to it
POSITIVE, NEGATIVE = ".positive", ".negative"  # endings of the two columns of a contrast
UNIVERSAL = "universal/"  # beginning of the columns that the universal filter looks at


class Entry(NamedTuple):
    """One prompt of a corpus.

    Attributes:
        place: names it in messages, ``file:line``.
        columns: (column, weight, turn) of every sum that counts it; it is the ``turn``-th prompt of that column.
        universal: whether it is a prompt of the universal filter, which looks at each of its prompts alone.
        answer: text that follows the prompt, for position "answer".
        kind: "text", or what the text is the JSON of: a "chat" or token "ids"; see ``files.py``.
    """

    text: str
    place: str
    columns: tuple[tuple[int, float, int], ...] = ()
    universal: bool = False
    answer: str | None = None
    kind: str = "text"

    @property
    def prompt(self) -> str:
        """The text, or the chat or ids that it stands for."""
        of_kind = {"chat": ChatText, "ids": TokenText}.get(self.kind)
        return self.text if of_kind is None else of_kind(json.loads(self.text))


class Unit(NamedTuple):
    """Neighbouring entries: from number ``first`` on, ``n_prompts`` of them, at byte ``offset`` of the file."""

    first: int
    n_prompts: int
    offset: int
    sha256: str  # of its lines


class Contrast(NamedTuple):
    """The mean of one column minus the mean of another."""

    name: str
    positive: int
    negative: int


class Names:
    """Column names, numbered as they appear."""

    def __init__(self):
        self.number: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        return self.number.setdefault(name, len(self.number))


class _Sketch:
    """The smallest of many different hashes."""

    def __init__(self):
        self._heap: list[int] = []  # of the negative of each
        self._held: set[int] = set()

    def add(self, value: int) -> None:
        if value in self._held or (len(self._heap) == SKETCH and value >= -self._heap[0]):
            return
        self._held.add(value)
        heapq.heappush(self._heap, -value)
        if len(self._heap) > SKETCH:
            self._held.discard(-heapq.heappop(self._heap))

    def smallest(self) -> list[int]:
        return sorted(self._held)


class Corpus:
    """Prompts on file.

    Attributes:
        columns: the names of all columns.
        units: the units of work.
        count, weight, digests: for every column, and under UNIVERSAL for the universal filter, the number of prompts,
            the sum of their weights, and the hash of their texts.
        sketches: for every column the SKETCH smallest hashes of its prompts' texts, sorted: two columns with the same
            prompts have the same sketch, in whatever order they hold them.
        sha256: of everything but the places.
    """

    def __init__(
        self,
        file: BinaryIO,
        entries: Iterable[Entry],
        names: Names,
        *,
        unit: int | None = None,
        streamed: bool = False,
    ):
        """Write the entries, one line of JSON each, to ``file``, open for reading and writing.

        Args:
            names: the columns, complete when the entries are.
            unit: prompts of a unit; None takes UNIT_PROMPTS, and fewer where their text is long.
            streamed: make units larger, for models whose layers are streamed.
        """
        larger = STREAMED_UNITS if streamed else 1
        unit_bytes = UNIT_BYTES * larger if unit is None else math.inf
        unit = unit or UNIT_PROMPTS * larger
        self._file, self._where = file, "the file of the prompts"
        self.units: list[Unit] = []
        self.count: dict[str, int] = {}
        self.weight: dict[str, float] = {}
        everything, lines = Digest(), Digest()
        digests: dict[str, Digest] = {}
        sketches: dict[str, _Sketch] = {}
        first = n_prompts = n_universal = start = position = 0

        def close():
            self.units.append(Unit(first, n_prompts, start, str(lines)))

        for entry in entries:
            columns = tuple((column, weight, self.count.get(str(column), 0)) for column, weight, _ in entry.columns)
            hashed = int(sha256(entry.text)[:13], 16) if columns else 0  # 52 bits, which JSON holds exactly
            for column, _, _ in columns:
                sketches.setdefault(str(column), _Sketch()).add(hashed)
            for key, weight in [(UNIVERSAL, 1.0)] if entry.universal else [(str(c), w) for c, w, _ in columns]:
                self.count[key] = self.count.get(key, 0) + 1
                self.weight[key] = self.weight.get(key, 0.0) + weight
                digests.setdefault(key, Digest()).add(entry.text)
            text = json.dumps(entry._replace(columns=columns), ensure_ascii=False)
            line = text.encode("utf-8", "backslashreplace") + b"\n"  # a place may name a file whose name is no text
            full = n_prompts >= unit or n_universal + entry.universal > UNIT_UNIVERSAL
            if n_prompts and (full or position - start + len(line) > unit_bytes):
                close()
                first, n_prompts, n_universal, start, lines = first + n_prompts, 0, 0, position, Digest()
            _write(file, line)
            lines.add(line)
            everything.add(repr(entry._replace(place="", columns=columns)))
            n_prompts, n_universal, position = n_prompts + 1, n_universal + entry.universal, position + len(line)
        if n_prompts:
            close()
        _write(file, b"")
        self.n_prompts = first + n_prompts
        self.columns = tuple(names.number)
        self.digests = {key: str(digest) for key, digest in digests.items()}
        self.sketches = {key: sketch.smallest() for key, sketch in sketches.items()}
        self.sha256 = sha256(str(everything), *self.columns, repr([unit.n_prompts for unit in self.units]))

    @classmethod
    def open(cls, path, record: dict) -> Corpus:
        """Open a corpus that :meth:`copy_to` has written; ``record`` is what :meth:`record` gave then."""
        corpus = cls.__new__(cls)
        corpus._file, corpus._where = open_regular(path), path
        corpus.units = [Unit(*unit) for unit in record["units"]]
        corpus.columns, corpus.n_prompts, corpus.sha256 = (
            tuple(record["columns"]),
            record["n_prompts"],
            record["sha256"],
        )
        corpus.count, corpus.weight, corpus.digests = record["count"], record["weight"], record["digests"]
        corpus.sketches = {}  # only the process that has read the prompts looks at them
        return corpus

    def record(self) -> dict:
        """What :meth:`open` needs besides the file, as JSON values."""
        return {
            "sha256": self.sha256,
            "n_prompts": self.n_prompts,
            "columns": list(self.columns),
            "count": self.count,
            "weight": self.weight,
            "digests": self.digests,
            "units": [list(unit) for unit in self.units],
        }

    def copy_to(self, path):
        """Write the file of the corpus, whole or not at all."""
        self._file.seek(0)
        with replaced(path) as file:
            shutil.copyfileobj(self._file, file, 1 << 20)

    def read(self, number: int) -> list[Entry]:
        """Return the entries of a unit. Raises InputError for a file that is not as it was written."""
        unit = self.units[number]
        self._file.seek(unit.offset)
        entries, lines = [], Digest()
        for _ in range(unit.n_prompts):
            line = self._file.readline(LONGEST_LINE)
            if not line.endswith(b"\n"):
                break  # cut off; a manifest may say that there are more lines than time to read them
            lines.add(line)
            entries.append(line)
        if str(lines) != unit.sha256:
            raise InputError(self._where, f"is damaged: unit {number} is not as written")
        try:
            return [_read_entry(line) for line in entries]
        except (ValueError, TypeError, RecursionError):
            raise InputError(self._where, f"is damaged: unit {number} holds lines that are no prompts") from None


def _read_entry(line) -> Entry:
    text, place, columns, universal, answer, kind = json.loads(line)
    counted = tuple((column, weight, turn) for column, weight, turn in columns)
    return Entry(text, place, counted, universal, answer, kind)


def _write(file, line):
    try:
        file.write(line)
        if not line:
            file.flush()
    except OSError as error:
        raise InputError(tempfile.gettempdir(), f"cannot hold the prompts: {error.strerror}") from None


def entries_of(prompts: Iterable[tuple[str, str]], *columns: int) -> Iterator[Entry]:
    """Entries from (text, place), each counted once in these columns; in none: for the universal filter."""
    for text, place in prompts:
        counted = tuple((column, 1.0, 0) for column in columns)
        answer = text.answer if isinstance(text, ChatText) and columns else None
        yield Entry(str(text), place, counted, universal=not columns, answer=answer, kind=_kind(text))


def _kind(text: str) -> str:
    return "chat" if isinstance(text, ChatText) else "ids" if isinstance(text, TokenText) else "text"


def two_sets(names: Names, positive, negative, neutral=()) -> Iterator[Entry]:
    """The entries of one contrast between two sets of (text, place), and of the universal filter's prompts."""
    yield from entries_of(positive, names("positive"))
    yield from entries_of(negative, names("negative"))
    yield from entries_of(neutral)


def read_contrasts(
    path, names: Names, *, prefix: str = "", bad: BadLines | None = None, limit: int | None = None
) -> Iterator[Entry]:
    """Entries of a contrast file: JSON lines, each with a prompt and the columns that count it.

    A line is ``{"prompt": TEXT, "columns": {NAME: WEIGHT, ...}}``, or ``"columns": [NAME, ...]`` for weights of 1;
    ``"answer": TEXT`` may follow the prompt. ``NAME.positive`` and ``NAME.negative`` together are the contrast NAME.

    Args:
        names: gets the columns as they appear, with ``prefix`` in front.

    Raises:
        InputError: naming the line and the field.
    """
    yield from accepted(path, lambda record, place: _entry(record, place, names, prefix), bad or BadLines(), limit)


def _entry(record, place, names, prefix) -> Entry:
    fields = Fields(record, place)
    fields.only({"prompt", "columns", "answer"}, "a contrast file")
    text, text_place = prompt_of(record, place, "prompt")
    columns = fields.read("columns", REQUIRED, "names, or an object of names and weights", _are_columns)
    weights = Fields(dict.fromkeys(columns, 1) if isinstance(columns, list) else columns, place, "columns.")
    for name in columns:
        if not name.strip(".") or not name.isprintable() or set(name) & set("/\\"):  # names of files follow from it
            raise InputError(f"{place}: columns", f"expected printable names without slashes, got {name!r}")
        if name in (POSITIVE, NEGATIVE) or len(name.encode("utf-8")) > LONGEST_NAME:
            raise InputError(f"{place}: columns", f"expected names of 1 to {LONGEST_NAME} bytes, got {name[:60]!r}")
        weights.number(name, (1e-6, 1e6))
    if len(names.number.keys() | {prefix + name for name in columns}) > MOST_COLUMNS:
        raise InputError(f"{place}: columns", f"the file names more than the {MOST_COLUMNS} columns accepted")
    answer = record.get("answer", text.answer if isinstance(text, ChatText) else None)
    if answer is not None:
        require_text(answer, f"{place}: answer")
    weighted = tuple((names(prefix + name), float(weight), 0) for name, weight in weights.record.items())
    return Entry(str(text), text_place, weighted, False, answer, _kind(text))


def _are_columns(value: object) -> bool:
    names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return bool(value) and (names or isinstance(value, dict))


def with_answers(entries: Iterable[Entry], bad: BadLines) -> Iterator[Entry]:
    """The entries, where position "answer" asks for an answer in each but those of the universal filter."""
    for entry in entries:
        if entry.answer is None and not entry.universal:
            bad.add(InputError(entry.place, "has no answer, which position 'answer' counts"))
        else:
            yield entry


def contrasts_of(columns: Iterable[str], where) -> list[Contrast]:
    """The pairs ``NAME.positive``, ``NAME.negative`` among the columns. A half without its other half is an error."""
    number = {name: column for column, name in enumerate(columns)}
    found = []
    for name in number:
        for ending, other in ((POSITIVE, NEGATIVE), (NEGATIVE, POSITIVE)):
            stem = name.removesuffix(ending)
            if stem != name and stem + other not in number:
                raise InputError(f"{where}: {name}", f"no prompt is in {stem + other!r}")
        stem = name.removesuffix(POSITIVE)
        if stem != name:
            found.append(Contrast(stem, number[name], number[stem + NEGATIVE]))
    return found
