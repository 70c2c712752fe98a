"""The header of a GGUF file, the format of llama.cpp: metadata, and where each tensor lies.

The header is read here, not by the ``gguf`` package, whose reader makes an object of every token of the vocabulary and
of every merge, which takes seconds, and takes a damaged file at its word. What the bytes of a quantised tensor mean is
left to ``cna_kernels.blocks``.

The layout, all numbers little-endian: "GGUF", version u32, number of tensors u64, number of metadata pairs u64; the
pairs (key, type u32, value); the tensors (name, number of dimensions u32, dimensions u64 with the innermost first, type
u32, offset u64); padding to ``general.alignment``; the data. A text is its length u64 and UTF-8. Source:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from cna_kernels.blocks import FORMATS, BlockWeight
from cna_kernels.cpu import library
from cna_kernels.errors import InputError
from cna_kernels.fields import Fields, short
from cna_kernels.files import FilePath, open_regular
from cna_kernels.fingerprint import as_rows

from ..packages import require
from .safetensors_file import TensorEntry

SUFFIX = ".gguf"
# Type in the file -> name, elements of a block, bytes of a block.
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8)}
TYPES |= {number: (name, elements, n_bytes) for name, (number, elements, n_bytes) in FORMATS.items()}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_MAX_HEADER, _MAX_TENSORS, _MAX_DIMS = 256 << 20, 1 << 16, 4
_MAX_ITEMS = 1 << 22  # of all arrays together: 8 times the tokens and merges of the largest vocabularies
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class GgufEntry(TensorEntry):
    """One tensor of a GGUF file: ``dtype`` is that of its values, fp32 where ``stored`` is a block format.

    Attributes:
        heads: of a projection whose rows lie in pairs in the file, (0, D/2, 1, D/2 + 1, ...) of each head: the number
            of heads; 0 where rows lie in their order.
    """

    heads: int = 0

    @property
    def kind(self) -> str:
        return f"GGUF {self.stored}"

    def read(self) -> torch.Tensor:
        values = self._stored_rows(0, math.prod(self.shape) // self.shape[-1]).view(self.shape)
        return values if not self.heads else self._in_order(values)

    @property
    def is_in_blocks(self) -> bool:
        """Whether this is a matrix in a block format."""
        return self.stored in FORMATS and len(self.shape) == 2

    def in_blocks(self, files: dict[Path, np.ndarray]) -> BlockWeight:
        """The matrix as the blocks that the file holds, without a copy; rows that lie in another order are copied.

        ``files`` keeps the files that are mapped into memory.
        """
        n_rows, n_bytes = self.shape[0], self.row_bytes
        if self.heads:
            rows = torch.frombuffer(bytearray(self.content(0, n_rows)), dtype=torch.uint8).view(n_rows, n_bytes)
            return BlockWeight(self._in_order(rows), self.stored)
        if self.path not in files:
            open_regular(self.path).close()
            files[self.path] = np.memmap(self.path, dtype=np.uint8, mode="c")  # writable for PyTorch, never written to
        content = files[self.path][self.start : self.end]
        if len(content) != n_rows * n_bytes:
            raise InputError(f"{self.path}: {self.name!r}", "was truncated while it was read")
        return BlockWeight(torch.from_numpy(content).view(n_rows, n_bytes), self.stored)

    def read_rows(self, rows: Iterable[int], columns: range | None = None) -> torch.Tensor:
        if self.heads and len(self.shape) == 1:
            return self.read()[None, slice(None) if columns is None else slice(columns.start, columns.stop)]
        wanted = [self._place(row) if self.heads else row for row in rows]
        columns = range(self.shape[-1]) if columns is None else columns
        read = torch.empty(len(wanted), len(columns), dtype=self.dtype)
        for row, into in zip(wanted, read, strict=True):
            into.copy_(self._stored_rows(row, row + 1)[0, columns.start : columns.stop])
        return read

    def pieces(self, size: int) -> Iterator[tuple[bytes | memoryview, torch.Tensor]]:
        """See TensorEntry. Rows that are in another order come in one piece."""
        values = as_rows(self.read()) if self.heads else None
        width = self.shape[-1]
        n_rows, n_bytes = math.prod(self.shape) // width, self.row_bytes
        step = n_rows if self.heads else max(1, size // n_bytes)
        for first in range(0, n_rows, step):
            last = min(first + step, n_rows)
            content = self.content(first, last)
            yield content, self.values(content) if values is None else values

    def _in_order(self, values: torch.Tensor) -> torch.Tensor:
        """Rows that are stored in pairs, in the order of the heads' halves."""
        pairs = values.unflatten(0, (self.heads, -1, 2))
        return pairs.transpose(1, 2).reshape(values.shape)

    def _place(self, row: int) -> int:
        """The row in the file of a row of the tensor."""
        half = self.shape[0] // self.heads // 2
        head, within = divmod(row, 2 * half)
        side, number = divmod(within, half)
        return head * 2 * half + 2 * number + side

    @property
    def row_bytes(self) -> int:
        """Bytes of a row; a vector is one."""
        return (self.end - self.start) // (math.prod(self.shape) // self.shape[-1])

    def content(self, first: int, last: int) -> bytes:
        """The bytes of rows ``first:last`` of the file."""
        n_bytes = self.row_bytes
        with open_regular(self.path) as file:
            try:
                file.seek(self.start + first * n_bytes)
                content = file.read((last - first) * n_bytes)
            except OSError as error:
                raise InputError(f"{self.path}: {self.name!r}", error.strerror or error) from None
        if len(content) != (last - first) * n_bytes:
            raise InputError(f"{self.path}: {self.name!r}", "was truncated while it was read")
        return content

    def _stored_rows(self, first: int, last: int) -> torch.Tensor:
        return self.values(self.content(first, last))

    def values(self, content: bytes) -> torch.Tensor:
        """The numbers that rows of the file stand for, ``[rows, N]``."""
        if self.stored in PLAIN:
            return torch.frombuffer(bytearray(content), dtype=PLAIN[self.stored]).view(-1, self.shape[-1])
        if library.missing():
            require("gguf")
        blocks = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, self.row_bytes)
        return BlockWeight(blocks, self.stored).dense()


@dataclass(frozen=True)
class Gguf:
    """What the header of a file, or of all parts of a split file, says.

    Attributes:
        metadata: key -> value; arrays are lists.
        kinds: key -> its type in the file, and for an array that of its items.
        tensors: name -> where the tensor lies.
        parts: how many files there are.
    """

    path: Path
    metadata: Fields
    kinds: dict[str, tuple[int, int | None]]
    tensors: dict[str, GgufEntry]
    parts: int


def is_gguf(path: FilePath) -> bool:
    """Whether a checkpoint is a GGUF file, by its name."""
    return os.fspath(path).endswith(SUFFIX) and not os.path.isdir(path)


def read_gguf(path: FilePath) -> Gguf:
    """Read a file's header; of a split file, which any of its parts names, the headers of all parts.

    Raises:
        InputError: a file is missing, truncated or malformed, or a tensor is of a type that is not read here.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise InputError(path, getattr(error, "strerror", None) or error) from None
    return _read(Path(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.lru_cache(maxsize=1)  # config, tokenizer and tensors are read one after the other
def _read(path: Path, *stamp: int) -> Gguf:
    parts = [path]
    split = _SPLIT.search(path.name)
    if split is not None:
        start, number, last = path.name[: split.start()], int(split[1]), int(split[2])
        if not 1 <= number <= last:
            raise InputError(path, f"expected a part from 1 to {last} in its name, got {number}")
        parts = [path.with_name(f"{start}-{each:05}-of-{split[2]}.gguf") for each in range(1, min(last, 999) + 1)]
    metadata, kinds, tensors = _read_header(parts[0])
    n_parts = metadata.get("split.count", 1)
    if n_parts != len(parts):
        where = f"{parts[0]}: split.count"
        raise InputError(where, f"is {short(n_parts)}; parts of a split file are named NAME-00001-of-0000N.gguf")
    for part in parts[1:]:
        for name, entry in _read_header(part)[2].items():
            if name in tensors:
                raise InputError(f"{part}: {name!r}", f"is also in {tensors[name].path.name}")
            tensors[name] = entry
    return Gguf(path, Fields(metadata, path), kinds, tensors, len(parts))


class _Cursor:
    """Reads the header from front to back; whatever lies beyond the end of the file is an InputError."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.at, self.items = path, 0, 0
        self._file, self._end = file, min(size, _MAX_HEADER)

    def take(self, n: int, what: str) -> bytes:
        content = self._file.read(n) if n <= self._end - self.at else b""
        if len(content) != n:
            raise InputError(f"{self.path}: {what}", "is cut off: the file is truncated, or its header is damaged")
        self.at += n
        return content

    def number(self, code: str, what: str) -> Any:
        layout = struct.Struct(f"<{code}")
        return layout.unpack(self.take(layout.size, what))[0]

    def text(self, what: str) -> str:
        try:
            return str(self.take(self.number("Q", what), what), "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: {what}", "is not UTF-8 text") from None

    def value(self, kind: int, what: str) -> tuple[Any, int | None]:
        """A value, and for an array the type of its items."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what), None
        if kind == _TEXT:
            return self.text(what), None
        if kind != _ARRAY:
            raise InputError(f"{self.path}: {what}", f"is of type {kind}, which GGUF does not have")
        kind, n = self.number("I", what), self.number("Q", what)
        if kind not in _SCALARS and kind != _TEXT:
            raise InputError(f"{self.path}: {what}", f"is an array of {n} of type {kind}, which is not read")
        if n > self._end - self.at:  # an item takes a byte or more
            self.take(n, what)
        self.items += n
        if self.items > _MAX_ITEMS:
            raise InputError(f"{self.path}: {what}", f"is an array of {n}; all arrays hold at most {_MAX_ITEMS} items")
        if kind == _TEXT:
            return [self.text(what) for _ in range(n)], kind
        layout = struct.Struct(f"<{_SCALARS[kind]}")
        return [value for (value,) in layout.iter_unpack(self.take(n * layout.size, what))], kind


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, int | None]], dict[str, GgufEntry]]:
    """The metadata of one file, the types of its values, and its tensors."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        cursor = _Cursor(path, file, size)
        if size < 4 or cursor.take(4, "magic") != b"GGUF":
            raise InputError(path, "is not a GGUF file: it does not begin with GGUF")
        version = cursor.number("I", "version")
        if version not in (2, 3):
            what = "a big-endian file is not read" if version in (2 << 24, 3 << 24) else "versions 2 and 3 are read"
            raise InputError(f"{path}: version", f"is {version}; {what}")
        n_tensors, n_pairs = cursor.number("Q", "tensor_count"), cursor.number("Q", "metadata_kv_count")
        if max(n_tensors, n_pairs) > _MAX_TENSORS:
            what = f"holds {n_tensors} tensors and {n_pairs} fields, more than the {_MAX_TENSORS} accepted"
            raise InputError(path, what)
        metadata: dict[str, Any] = {}
        kinds: dict[str, tuple[int, int | None]] = {}
        for _ in range(n_pairs):
            name = cursor.text("the key of a field")
            if name in metadata:
                raise InputError(path, f"repeats the field {name!r}")
            kind = cursor.number("I", name)
            metadata[name], of_items = cursor.value(kind, name)
            kinds[name] = kind, of_items
        records = [_tensor_record(cursor) for _ in range(n_tensors)]
    alignment = Fields(metadata, path).integer("general.alignment", (1, 1 << 20), 32)
    start_of_data = -(-cursor.at // alignment) * alignment
    entries: dict[str, GgufEntry] = {}
    for name, shape, kind, offset in records:
        where = f"{path}: {name!r}"
        if name in entries:
            raise InputError(where, "is there twice")
        stored, elements, n_bytes = TYPES[kind]
        if not shape or not all(shape) or shape[-1] % elements:
            raise InputError(where, f"expected rows of whole blocks of {elements} {stored} numbers, got {list(shape)}")
        start, length = start_of_data + offset, math.prod(shape) // elements * n_bytes
        if offset % alignment or start + length > size:
            raise InputError(where, f"lies at bytes {start} to {start + length} of a file of {size}: it is truncated")
        dtype = PLAIN.get(stored, torch.float32)
        entries[name] = GgufEntry(name, path, stored, dtype, shape, start, start + length)
    _require_apart(entries)
    return metadata, kinds, entries


def _require_apart(entries: dict[str, GgufEntry]):
    """Refuse tensors that share bytes: llama.cpp takes none, and one of them would be made of the other's numbers."""
    in_order = sorted(entries.values(), key=lambda entry: entry.start)
    for first, second in itertools.pairwise(in_order):
        if second.start < first.end:
            what = f"lies at bytes {second.start} to {second.end}, over {first.name!r} at {first.start} to {first.end}"
            raise InputError(f"{second.path}: {second.name!r}", what)


def _tensor_record(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of the next tensor."""
    name = cursor.text("the name of a tensor")
    n_dims = cursor.number("I", name)
    if n_dims > _MAX_DIMS:
        raise InputError(f"{cursor.path}: {name!r}", f"expected at most {_MAX_DIMS} dimensions, got {n_dims}")
    shape = tuple(cursor.number("Q", name) for _ in range(n_dims))[::-1]
    if any(n >= 1 << 48 for n in shape):
        raise InputError(f"{cursor.path}: {name!r}", f"has the shape {list(shape)}")
    kind, offset = cursor.number("I", name), cursor.number("Q", name)
    if kind not in TYPES:
        what = f"is of type {kind}, expected {', '.join(stored for stored, _, _ in TYPES.values())}"
        raise InputError(f"{cursor.path}: {name!r}", what)
    return name, shape, kind, offset
