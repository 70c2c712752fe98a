"""Files of records, as people have them: format, encoding, delimiter and header are found, not assumed.

A format follows from the ending of the name, and for lines of JSON from the content. Text is UTF-8, or has a byte
order mark that says what it is, or is Western text of one byte a character, which is said in a warning. A file that is
none of these is refused: guessing would make prompts of something else.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cna_kernels.errors import InputError, InputWarning
from cna_kernels.fields import short
from cna_kernels.files import FilePath, open_regular, open_stream, parse_json

from ..packages import missing

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
    """Return what a file is: "lines", "jsonl", "json", "table" or "parquet".

    Raises:
        InputError: the file is of another kind, by its ending or by how it begins.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending in _OTHER_ENDINGS:
        raise InputError(path, f"{ending} files are not read; read are {READ}")
    if ending == ".parquet":
        return "parquet"
    head = b""
    if not _is_pipe(path):  # a pipe is opened once, by who reads it
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
    path, kind = Path(path), format_of(path)
    if kind == "parquet":
        yield from parquet_rows(path)
        return
    with open_stream(path) as opened:
        if kind == "lines" and _is_pipe(path) and _begins_with_object(_head(opened), path):
            kind = "jsonl"
        file = _utf8(path, opened)
        if kind == "json":
            yield from _json_records(path, file, bad)
        elif kind == "table":
            yield from _table_rows(path, file, bad, columns)
        else:
            for line, place in _lines(path, file, bad):
                if kind == "lines":
                    yield line.strip(), place
                    continue
                try:
                    record = parse_json(line, place)
                except InputError as error:
                    bad.add(error)
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
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield row, f"{path}: row {number}"
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(path, f"is not parquet: {str(error).splitlines()[0]}") from None


def _head(file: BinaryIO) -> bytes:
    """The beginning of a file, which is left unread. Of a pipe only what has come so far."""
    if file.seekable():
        head = file.read(_HEAD)
        file.seek(0)
        return head
    return file.peek(_HEAD)  # type: ignore[attr-defined]  # files that are opened for reading have it


def _is_pipe(path: Path) -> bool:
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


def _begins_with_object(head: bytes, path: Path) -> bool:
    """Whether the first line that is not blank is a JSON object."""
    text = head.decode(next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8-sig"), "replace")
    line = next((line for line in text.splitlines() if line.strip()), "")
    if not line.lstrip().startswith("{"):
        return False
    if len(head) == _HEAD and "\n" not in text:
        return line.lstrip()[:2] == '{"'  # a first line longer than the head
    try:
        return isinstance(parse_json(line, path), dict)
    except InputError:
        return False


def _lines(path: Path, file: BinaryIO, bad) -> Iterator[tuple[str, str]]:
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


def _json_records(path: Path, file: BinaryIO, bad) -> Iterator[tuple[object, str]]:
    """The records of a JSON list, or of lines of JSON, which ``Dataset.to_json`` writes under this ending, too."""
    content = file.read(_LARGEST_JSON + 1)
    if len(content) > _LARGEST_JSON:
        raise InputError(path, f"is larger than the {_LARGEST_JSON} bytes accepted")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(path, f"is not UTF-8 text (byte {error.start})") from None
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if len(lines) > 1 and all(line.strip()[0] == "{" and line.strip()[-1] == "}" for _, line in lines):
        for number, line in lines:
            place = f"{path}:{number}"
            try:
                record = parse_json(line, place)
            except InputError as error:
                bad.add(error)
                continue
            yield record, place
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
    first = text.readline(LONGEST_LINE)
    delimiter = _delimiter(first, TABLES[path.suffix.lower()])
    lines = _bounded(_chain(first, text), path)
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
            if not row:
                continue
            if names is None:
                if len(row) == 1 and not _is_header(row[0], columns, place):
                    names = []
                else:
                    names = row
                    if len(set(names)) != len(names):
                        twice = next(name for name in names if names.count(name) > 1)
                        raise InputError(place, f"repeats the column {twice!r}")
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


def _chain(first: str, rest: io.TextIOWrapper) -> Iterator[str]:
    if first:
        yield first
    yield from rest


def _bounded(lines: Iterator[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise InputError(f"{path}:{number}", "holds a NUL character: the rest of the file cannot be read")
        yield line


def _delimiter(header: str, usual: str) -> str:
    """The delimiter that cuts a header into most columns; ``usual`` where none does better."""
    return max((usual, *_DELIMITERS), key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter), [])))


def _is_header(only: str, columns: Sequence[str], place: str) -> bool:
    """Whether the first field of a table of one column is a name. A name is one word, or was asked for."""
    if only in columns:
        return True
    words = only.split()
    if len(words) in (2, 3):
        warnings.warn(
            f"{place}: {short(only)} is taken for a prompt, not for the name of a column", InputWarning, stacklevel=5
        )
    return len(words) == 1


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let fields of tables be as long as a line of other formats. The limit is the process's, and is put back."""
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, LONGEST_LINE))
    try:
        yield
    finally:
        csv.field_size_limit(before)
