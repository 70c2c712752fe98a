"""Files of records, as people have them: format, encoding, delimiter and header are found, not assumed.

A format follows from the ending of the name, and for lines of JSON from the content. Text is UTF-8, or has a byte
order mark that says what it is, or is Western text of one byte a character, which is said in a warning. A file that is
none of these is refused: guessing would make prompts of something else.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cna_kernels.errors import InputError, InputWarning
from cna_kernels.fields import short
from cna_kernels.files import FilePath, open_regular, open_stream, parse_json

from ..packages import missing
from .hub_sets import hub_set, rows_of

LONGEST_LINE = 16 << 20  # bytes
_LARGEST_JSON = 1 << 30  # bytes of a file that is one JSON value
_HEAD = 1 << 16  # bytes that are looked at to find out what a file is
TABLES = {".csv": ",", ".tsv": "\t", ".tab": "\t"}  # ending -> delimiter, where the header does not show another
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
WITH_COLUMNS = (*JSON_LINES, ".json", *TABLES, ".parquet")
_DELIMITERS = (",", ";", "\t", "|")
_MARKS = {  # a byte order mark, and the encoding that it stands for; UTF-32 begins like UTF-16
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_OTHER = {  # how files begin that hold no lines of text
    b"PK\x03\x04": "a ZIP archive, as .xlsx and .docx are", b"\x1f\x8b": "compressed by gzip", b"%PDF": "PDF",
    b"BZh": "compressed by bzip2", b"\xfd7zXZ": "compressed by xz", b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"ARROW1": "an Arrow file", b"\x93NUMPY": "a NumPy file", b"\xd0\xcf\x11\xe0": "an old Office file",
    b"\x80\x02": "a pickle", b"\x80\x04": "a pickle", b"SQLite": "a database",
}  # fmt: skip
_OTHER_ENDINGS = (
    *(".xlsx", ".xls", ".ods", ".docx", ".pdf", ".gz", ".zip", ".bz2", ".xz", ".zst", ".arrow", ".feather"),
    *(".yaml", ".yml", ".toml", ".xml", ".html", ".htm", ".rtf", ".pkl", ".pickle", ".npy", ".npz", ".pt", ".bin"),
    *(".safetensors", ".gguf", ".sqlite", ".db"),
)
READ = f"text with a prompt a line, {', '.join(WITH_COLUMNS)}"


def format_of(path: FilePath) -> str:
    """Return what a file is: "lines", "jsonl", "json", "table" or "parquet"; "hub" for a data set on the Hub.

    Raises:
        InputError: the file is of another kind, by its ending or by how it begins.
    """
    if hub_set(path) is not None:
        return "hub"
    path = Path(path)
    ending = path.suffix.lower()
    if ending in _OTHER_ENDINGS:
        raise InputError(path, f"{ending} files are not read; read are {READ}")
    if ending == ".parquet":
        return "parquet"
    head = b""
    if not is_pipe(path):  # a pipe is opened once, by who reads it
        with open_stream(path) as file:
            head = _head(file)
    if head[:4] == b"PAR1":
        return "parquet"
    for start, what in _OTHER.items():
        if head.startswith(start):
            raise InputError(path, f"is {what}; read are {READ}")
    if ending in JSON_LINES:
        return "jsonl"
    if ending in TABLES:
        return "table"
    if ending == ".json":
        return "json"
    return "jsonl" if _begins_with_object(head, path) else "lines"


def records_of(path: FilePath, bad, columns: Sequence[str] = ()) -> Iterator[tuple[object, str]]:
    """Yield each record of a file with its place: text, or an object of fields.

    Args:
        bad: takes the errors of single records, see :class:`BadLines`. What makes the place of later records uncertain
            is raised.
        columns: names that the caller will look for.
    """
    if (on_hub := hub_set(path)) is not None:
        yield from rows_of(on_hub)
        return
    path, kind = Path(path), format_of(path)
    if kind == "parquet":
        yield from parquet_rows(path)
        return
    with open_stream(path) as opened:
        if kind == "lines" and is_pipe(path) and _begins_with_object(_head(opened), path):
            kind = "jsonl"
        if kind == "lines" and columns:
            raise InputError(path, f"has no columns; a column is for {', '.join(WITH_COLUMNS)} files")
        file = _utf8(path, opened)
        if kind == "json":
            yield from _json_records(path, file, bad)
        elif kind == "table":
            yield from _table_rows(path, file, bad, columns)
        else:
            lines = _lines(path, file, bad)
            named = path.suffix.lower() in JSON_LINES
            why = "" if named else "; a file whose first line begins an object is read as JSON"
            yield from _stripped(lines) if kind == "lines" else _parsed(lines, bad, why)


def _stripped(lines: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Lines of text without space around them. Said is where the first looks like a line of JSON."""
    for number, (line, place) in enumerate(lines):
        if number == 0 and _is_json(line.strip(), '"'):
            warnings.warn(
                f"{place}: is taken as text, with its quotes; .jsonl is read as JSON", InputWarning, stacklevel=5
            )
        yield line.strip(), place


def _parsed(lines: Iterable[tuple[str, str]], bad, why: str = "") -> Iterator[tuple[object, str]]:
    """The value of each line of JSON, with its place. ``why``: what errors say of the reason that it is read so."""
    for line, place in lines:
        try:
            record = parse_json(line, place)
        except InputError as error:
            bad.add(InputError(error.where, f"{error.what}{why}"))
            continue
        yield record, place


def parquet_rows(path: FilePath) -> Iterator[tuple[dict, str]]:
    """Yield the rows of a parquet file with their places. Raises InputError without pyarrow."""
    open_regular(path).close()  # the error of a missing file is the same as for other formats
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(path, f"is parquet, which takes pyarrow: {missing('pyarrow') or 'broken'}") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, path)
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield row, f"{path}: row {number}"
                    number += 1
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(path, f"is not parquet: {str(error).splitlines()[0]}") from None
    except (ValueError, OverflowError) as error:  # a text that is not UTF-8, a date that Python has not
        raise InputError(f"{path}: row {number} or after it", f"cannot be read: {str(error).splitlines()[0]}") from None


def _check_names(names: Sequence[str], where: FilePath) -> None:
    """Raise InputError where two columns have one name."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(where, f"repeats the column {twice!r}")


def _head(file: BinaryIO) -> bytes:
    """The beginning of a file, which is left unread. Of a pipe only what has come so far."""
    if file.seekable():
        head = file.read(_HEAD)
        file.seek(0)
        return head
    return file.peek(_HEAD)  # type: ignore[attr-defined]  # files that are opened for reading have it


def is_pipe(path: Path) -> bool:
    """Whether a file can be read once only, so that what it holds shows when it is read."""
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _utf8(path: Path, file: BinaryIO) -> BinaryIO:
    """The file's text in UTF-8: the file itself, or what transcodes it."""
    head = _head(file)
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if encoding is None and b"\0" in head[:64] and len(head) > 1:
        raise InputError(path, "holds NUL bytes where text should be; UTF-16 needs a byte order mark")
    if encoding is None and _is_western(head):
        encoding = "cp1252"
        warnings.warn(
            f"{path}: is not UTF-8; read as Western text of one byte a character (Latin-1)", InputWarning, stacklevel=4
        )
    if encoding is None:
        return file
    return io.BufferedReader(_Transcoded(path, file, encoding))


def _is_western(head: bytes) -> bool:
    """Whether bytes are no UTF-8, but letters and quotes of Western languages, one or two together."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return False
    except UnicodeDecodeError:
        pass
    western = rb"[\xc0-\xd6\xd8-\xf6\xf8-\xfe\x91-\x97\xa0\xab\xb0\xb4\xbb]{1,2}"
    return all(re.fullmatch(western, run) for run in re.findall(rb"[\x80-\xff]+", head))


class _Transcoded(io.RawIOBase):
    """The text of a file in UTF-8."""

    def __init__(self, path: Path, file: BinaryIO, encoding: str):
        self._path, self._file, self._encoding = path, file, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, into) -> int:
        while not self._ready:
            chunk = self._file.read(_HEAD)
            try:
                self._ready = self._decoder.decode(chunk, final=not chunk).encode("utf-8")
            except (UnicodeDecodeError, UnicodeEncodeError):
                raise InputError(self._path, f"is not {self._encoding} text, as it begins") from None
            if not chunk:
                break
        n = min(len(into), len(self._ready))
        into[:n], self._ready = self._ready[:n], self._ready[n:]
        return n


_LINE_ENDS = re.compile(r"\r\n|\n|\r")  # a JSON text may hold other characters that Unicode calls line ends


def _begins_with_object(head: bytes, path: Path) -> bool:
    """Whether the first line that is not blank is a JSON object, a faulty one too.

    Raises:
        InputError: the line begins JSON that goes on in the next lines, or is a list.
    """
    text = head.decode(next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8-sig"), "replace")
    line = next((line.strip() for line in _LINE_ENDS.split(text) if line.strip()), "")
    if line in ("{", "["):
        raise InputError(
            path, f"begins with {line!r}, as JSON over several lines does; a list is read from .json files"
        )
    if _is_json(line, "["):
        raise InputError(path, "begins with a JSON list; lists are read from .json files, records from .jsonl files")
    return re.match(r"\{\s*(\"|\}$)", line) is not None


def _is_json(line: str, start: str) -> bool:
    """Whether a line that begins with ``start`` is JSON."""
    try:
        return line.startswith(start) and bool(parse_json(line, ""))
    except InputError:
        return False


def _lines(path: Path, file: BinaryIO, bad) -> Iterator[tuple[str, str]]:
    """Lines that are not blank; they end with a line feed, a carriage return, or both."""
    number = 0
    while whole := file.readline(LONGEST_LINE + 1):
        if len(whole) > LONGEST_LINE:
            raise InputError(f"{path}:{number + 1}", f"is longer than the {LONGEST_LINE} bytes accepted")
        for piece in whole.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
            number += 1
            place = f"{path}:{number}"
            try:
                line = piece.decode("utf-8")
            except UnicodeDecodeError as error:
                bad.add(InputError(place, f"is not UTF-8 text (byte {error.start} of the line)"))
                continue
            if line.strip():
                yield line, place


def _json_records(path: Path, file: BinaryIO, bad) -> Iterator[tuple[object, str]]:
    """The records of a JSON list, or of lines of JSON, which ``Dataset.to_json`` writes under this ending, too."""
    content = file.read(_LARGEST_JSON + 1)
    if len(content) > _LARGEST_JSON:
        raise InputError(path, f"is larger than the {_LARGEST_JSON} bytes accepted")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(path, f"is not UTF-8 text (byte {error.start})") from None
    lines = [(line, f"{path}:{number}") for number, line in enumerate(_LINE_ENDS.split(text), 1) if line.strip()]
    if lines and all(line.strip()[0] == "{" and line.strip()[-1] == "}" for line, _ in lines):
        yield from _parsed(lines, bad)
        return
    records = parse_json(text, path)
    if not isinstance(records, list):
        raise InputError(path, "expected a JSON list of prompts, or a JSON object on each line")
    for number, record in enumerate(records):
        yield record, f"{path}[{number}]"


def _table_rows(path: Path, file: BinaryIO, bad, columns: Sequence[str]) -> Iterator[tuple[object, str]]:
    """The rows of a table as objects, or as texts where it has one column and no header."""
    # Bytes that are not UTF-8 become half surrogate pairs, which no prompt may hold.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    start: list[str] = []
    while (line := text.readline(LONGEST_LINE)) and not line.strip():
        start.append(line)
    delimiter = _delimiter(line, TABLES[path.suffix.lower()])
    lines = _bounded(itertools.chain([*start, line], text), path)
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    names: list[str] | None = None
    with _long_fields():
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # where the next row begins is not known any more
                raise InputError(f"{path}:{reader.line_num}", f"{error}: the rest of the file cannot be read") from None
            place = f"{path}:{reader.line_num}"
            if not row or (names is None and not "".join(row).strip()):
                continue
            if names is None:
                if len(row) == 1 and not _is_header(row[0], columns, place):
                    names = []
                else:
                    names = row
                    _check_names(names, place)
                    continue
            if not names:
                if len(row) > 1:
                    bad.add(
                        InputError(place, "has a delimiter; a comma inside a prompt needs quotes around the prompt")
                    )
                    continue
                yield row[0], place
            elif len(row) > len(names):
                what = f"has more fields than the {len(names)} columns; a comma inside a field needs quotes around it"
                bad.add(InputError(place, what))
            else:
                yield dict(zip(names, [*row, *[None] * (len(names) - len(row))], strict=True)), place


def _bounded(lines: Iterator[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise InputError(f"{path}:{number}", "holds a NUL character: the rest of the file cannot be read")
        yield line


def _delimiter(header: str, usual: str) -> str:
    """The delimiter that cuts a header into most columns; ``usual`` where none does better."""
    return max((usual, *_DELIMITERS), key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter), [])))


_NAMES = (  # of columns of prompts
    *("prompt", "prompts", "text", "texts", "goal", "question", "questions", "instruction", "instructions", "input"),
    *("inputs", "query", "request", "behavior", "behaviour", "content", "message", "sentence", "user"),
)


def _is_header(only: str, columns: Sequence[str], place: str) -> bool:
    """Whether the first field of a table of one column is a name: it was asked for, is usual, or is one word of ASCII.

    What the field is taken for is said, unless it is clear.
    """
    if only in columns or only.strip().casefold() in _NAMES:
        return True
    is_name = re.fullmatch(r"\s*[A-Za-z_][\w.-]*\s*", only, re.ASCII) is not None
    taken, other = ("the name of a column", "a prompt") if is_name else ("a prompt", "the name of a column")
    if only.rstrip()[-1:] not in tuple(".?!:;。？！؟।"):
        warnings.warn(f"{place}: {short(only)} is taken for {taken}, not for {other}", InputWarning, stacklevel=5)
    return is_name


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let fields of tables be as long as a line of other formats. The limit is the process's, and is put back."""
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, LONGEST_LINE))
    try:
        yield
    finally:
        csv.field_size_limit(before)
