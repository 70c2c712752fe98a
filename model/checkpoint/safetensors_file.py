"""The tensors of a safetensors checkpoint: where each tensor lies, from the headers alone, and its contents."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cna_kernels.errors import InputError
from cna_kernels.fields import REQUIRED, Fields, is_whole
from cna_kernels.files import open_regular, parse_json, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPE_NAMES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_MAX_HEADER, _MAX_TENSORS, _MAX_DIMS = 100 << 20, 1 << 16, 8
_WHOLE = 1 << 20  # numbers compared at a time


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, dtype, shape, and its byte range in the file."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    def read_rows(self, rows: Iterable[int], columns: range | None = None) -> torch.Tensor:
        """Read ``rows`` of a matrix, and of each row the consecutive ``columns`` (None: all). A vector is a single row.

        The rows are read one by one: ``get_slice`` of safetensors 0.8 reads the whole tensor unless it maps the file.
        """
        rows, width = list(rows), self.shape[-1]
        columns = range(width) if columns is None else columns
        read = torch.empty(len(rows), len(columns), dtype=self.dtype)
        try:
            with open(self.path, "rb", buffering=0) as file:
                for row, into in zip(rows, read.view(torch.uint8).numpy(), strict=True):
                    start = self.start + (row * width + columns.start) * self.dtype.itemsize
                    file.seek(start)
                    if file.readinto(into) != len(into):
                        raise InputError(f"{self.path}: {self.name!r}", "was truncated while it was read")
        except OSError as error:
            raise InputError(f"{self.path}: {self.name!r}", error.strerror) from None
        return read


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint directory, read from the headers only.

    Attributes:
        entries: tensor name -> where the tensor lies.
    """

    entries: dict[str, TensorEntry]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into its own memory. A mapped file that is truncated later would kill the process."""
        path = self.entries[name].path
        try:
            with safe_open(path, framework="pt", device="cpu", backend="pread") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: {name!r}", error) from None

    def same_values(self, name: str, other: str) -> bool:
        """Whether two tensors are equal. They are compared in pieces, because they may be larger than memory."""
        one, two = self.entries[name], self.entries[other]
        if one.shape != two.shape:
            return False
        with open(one.path, "rb") as first, open(two.path, "rb") as second:
            for start in range(0, math.prod(one.shape), _WHOLE):
                n = min(_WHOLE, math.prod(one.shape) - start)
                pieces = []
                for file, entry in ((first, one), (second, two)):
                    file.seek(entry.start + start * entry.dtype.itemsize)
                    pieces.append(torch.frombuffer(bytearray(file.read(n * entry.dtype.itemsize)), dtype=entry.dtype))
                if not torch.equal(pieces[0], pieces[1].to(one.dtype)):
                    return False
        return True


def open_checkpoint(directory) -> Checkpoint:
    """Read the headers of a single or sharded checkpoint.

    Raises:
        InputError: a file is missing, truncated or malformed, or the index does not describe the shards.
    """
    directory = Path(directory)
    if os.path.lexists(directory / INDEX):
        weight_map, shards = _read_index(directory / INDEX)
    else:
        weight_map, shards = None, [SINGLE]
        if not os.path.lexists(directory / SINGLE):
            raise InputError(directory, f"holds neither {SINGLE} nor {INDEX}")
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in _read_header(directory / shard).items():
            if name in entries:
                raise InputError(f"{directory / shard}: {name!r}", f"is also in {entries[name].path.name}")
            if weight_map is not None and weight_map.get(name) != shard:
                raise InputError(f"{directory / shard}: {name!r}", f"{INDEX} does not place it in this file")
            entries[name] = entry
    if weight_map is not None:
        absent = sorted(set(weight_map) - set(entries))
        if absent:
            raise InputError(
                f"{directory / weight_map[absent[0]]}: {absent[0]!r}", f"is missing, though {INDEX} lists it"
            )
    return Checkpoint(entries)


def _read_index(path) -> tuple[dict[str, str], list[str]]:
    """Return tensor name -> shard name, and the shards. Only plain file names beside the index are accepted."""
    fields = Fields(read_json(path), path)
    expected = "an object of tensor name to file name"
    weight_map = fields.read("weight_map", REQUIRED, expected, lambda x: isinstance(x, dict) and len(x) > 0)
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not set("/\\\0") & set(shard)
        if not plain:
            raise InputError(f"{path}: weight_map[{name!r}]", f"expected a .safetensors file beside it, got {shard!r}")
    return weight_map, sorted(set(weight_map.values()))


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one file, after checking that the file holds what it declares."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise InputError(path, f"is not a complete safetensors file: {size} bytes, header of {length}")
        raw = file.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(path, "is not a safetensors file: its header is not UTF-8") from None
    header = parse_json(text, path)
    if not isinstance(header, dict):
        raise InputError(path, "is not a safetensors file: its header is not a JSON object")
    if len(header) > _MAX_TENSORS:
        raise InputError(path, f"holds {len(header)} tensors, more than the {_MAX_TENSORS} accepted")
    entries = {}
    start_of_data = 8 + length
    for name, record in header.items():
        if name == "__metadata__":
            continue
        entries[name] = _tensor_entry(record, path, name, start_of_data)
    end_of_data = max((entry.end for entry in entries.values()), default=start_of_data)
    if end_of_data != size:
        raise InputError(path, f"is truncated or has extra bytes: expected {end_of_data}, got {size}")
    return entries


def _tensor_entry(record, path, name, start_of_data) -> TensorEntry:
    where = f"{path}: {name!r}"
    try:
        dtype, shape, (start, end) = record["dtype"], tuple(record["shape"]), record["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise InputError(where, "expected dtype, shape and data_offsets") from None
    if not all(is_whole(n) and 0 <= n < 1 << 48 for n in (*shape, start, end)):
        raise InputError(where, "expected whole numbers in shape and data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_NAMES:
        raise InputError(where, f"expected dtype {', '.join(_DTYPE_NAMES)}, got {dtype!r}")
    if len(shape) > _MAX_DIMS:
        raise InputError(where, f"expected at most {_MAX_DIMS} dimensions, got {len(shape)}")
    count = math.prod(shape)
    if end - start != count * _DTYPE_NAMES[dtype].itemsize:
        raise InputError(where, f"data_offsets span {end - start} bytes, which is not {dtype} {list(shape)}")
    return TensorEntry(name, path, _DTYPE_NAMES[dtype], shape, start_of_data + start, start_of_data + end)
