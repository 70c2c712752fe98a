"""The tensors of a safetensors checkpoint: where each tensor lies, from the headers alone, and its contents."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cna_kernels.errors import InputError
from cna_kernels.fields import REQUIRED, Fields, is_whole
from cna_kernels.files import open_regular, parse_json, read_json

SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
# Bits of an element, by the name of the dtype. A model's own tensors have one of the floating dtypes below them; other
# tensors may lie beside.
_BITS = dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8) | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16) | dict.fromkeys(("I32", "U32", "F32"), 32)
_BITS |= dict.fromkeys(("I64", "U64", "F64", "C64"), 64)
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_OF_BASE = ("embed_tokens.", "layers.", "norm.")  # beginnings of names in a file of the model without its head
_MAX_HEADER, _MAX_TENSORS, _MAX_DIMS = 100 << 20, 1 << 16, 8
_WHOLE = 1 << 20  # numbers compared at a time


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, its name there, dtype, shape, and its byte range in the file.

    ``dtype`` is None for the name of a dtype that no model's own tensor has, ``stored`` this name.
    """

    name: str
    path: Path
    stored: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def kind(self) -> str:
        """How the numbers are stored, for a hash."""
        return str(self.dtype)

    def read(self) -> torch.Tensor:
        """Read the tensor into its own memory. A mapped file that is truncated later would kill the process."""
        try:
            with safe_open(self.path, framework="pt", device="cpu", backend="pread") as file:
                return file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path}: {self.name!r}", error) from None

    def pieces(self, size: int) -> Iterator[tuple[bytes | memoryview, torch.Tensor]]:
        """Yield the tensor's bytes in their order, about ``size`` at a time, each with the rows that they stand for.

        A vector is a single row. Of a tensor of a dtype that no model's own tensor has, every byte is a row.
        """
        n_bytes, dtype = self.end - self.start, self.dtype or torch.uint8
        width = self.shape[-1] if len(self.shape) > 1 else max(1, n_bytes // dtype.itemsize)
        width = 1 if self.dtype is None else width
        n_rows = n_bytes // max(1, width * dtype.itemsize)
        step = max(1, size // max(1, width * dtype.itemsize))
        with open_regular(self.path) as file:
            file.seek(self.start)
            for first in range(0, n_rows, step):
                rows = torch.empty(min(step, n_rows - first), width, dtype=dtype)
                content = rows.view(torch.uint8).numpy().reshape(-1)
                if file.readinto(content) != content.nbytes:  # type: ignore[attr-defined]
                    raise InputError(f"{self.path}: {self.name!r}", "was truncated while it was read")
                yield content.data, rows

    def read_rows(self, rows: Iterable[int], columns: range | None = None) -> torch.Tensor:
        """Read ``rows`` of a matrix, and of each row the consecutive ``columns`` (None: all). A vector is a single row.

        The rows are read one by one: ``get_slice`` of safetensors 0.8 reads the whole tensor unless it maps the file.
        """
        assert self.dtype is not None, "check_entries has refused other tensors"
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
        entries: tensor name, as of the model with its head, -> where the tensor lies.
    """

    entries: dict[str, TensorEntry]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into its own memory."""
        return self.entries[name].read()

    def same_values(self, name: str, other: str) -> bool:
        """Whether two tensors are equal. They are compared in pieces, because they may be larger than memory."""
        one, two = self.entries[name], self.entries[other]
        if one.shape != two.shape or one.dtype is None or two.dtype is None:
            return False
        with open(one.path, "rb") as first, open(two.path, "rb") as second:
            for start in range(0, math.prod(one.shape), _WHOLE):
                n = min(_WHOLE, math.prod(one.shape) - start)
                pieces = []
                for file, entry, dtype in ((first, one, one.dtype), (second, two, two.dtype)):
                    file.seek(entry.start + start * dtype.itemsize)
                    pieces.append(torch.frombuffer(bytearray(file.read(n * dtype.itemsize)), dtype=dtype))
                if not torch.equal(pieces[0], pieces[1].to(one.dtype)):
                    return False
        return True


def open_checkpoint(directory) -> Checkpoint:
    """Read the headers of a single or sharded checkpoint, those files that transformers reads.

    ``model.safetensors`` goes before an index beside it. All tensors of the files that an index names are read, whether
    the index lists them or not.

    Raises:
        InputError: a file is missing, truncated or malformed, two files hold a tensor of the same name, or an adapter
            lies beside them.
    """
    directory = Path(directory)
    if os.path.lexists(directory / ADAPTER):
        how = "merge the two (peft: merge_and_unload), or move the file away to read the weights beside it"
        raise InputError(directory / ADAPTER, f"transformers with peft loads an adapter and its base model; {how}")
    if os.path.lexists(directory / SINGLE):
        shards = [SINGLE]
    elif os.path.lexists(directory / INDEX):
        shards = index_files(directory / INDEX)
    else:
        files = sorted(path.name for path in directory.glob("*.gguf"))
        hint = f"; name the file itself to read {files[0]}" if files else ""
        raise InputError(directory, f"holds neither {SINGLE} nor {INDEX}{hint}")
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in _read_header(directory / shard).items():
            if name in entries:
                raise InputError(f"{directory / shard}: {name!r}", f"is also in {entries[name].path.name}")
            entries[name] = entry
    if "embed_tokens.weight" in entries and "model.embed_tokens.weight" not in entries:
        entries = {f"model.{name}" if name.startswith(_OF_BASE) else name: entry for name, entry in entries.items()}
    return Checkpoint(entries)


def index_files(path) -> list[str]:
    """Return the files that an index names. Only plain file names beside the index are accepted."""
    fields = Fields(read_json(path), path)
    expected = "an object of tensor name to file name"
    weight_map = fields.read("weight_map", REQUIRED, expected, lambda x: isinstance(x, dict) and len(x) > 0)
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not set("/\\\0") & set(shard)
        if not plain:
            raise InputError(f"{path}: weight_map[{name!r}]", f"expected a .safetensors file beside it, got {shard!r}")
    return sorted(set(weight_map.values()))


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
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise InputError(where, f"expected dtype {', '.join(_BITS)}, got {dtype!r}")
    if len(shape) > _MAX_DIMS:
        raise InputError(where, f"expected at most {_MAX_DIMS} dimensions, got {len(shape)}")
    if 8 * (end - start) != math.prod(shape) * _BITS[dtype]:
        raise InputError(where, f"data_offsets span {end - start} bytes, which is not {dtype} {list(shape)}")
    return TensorEntry(name, path, dtype, _DTYPES.get(dtype), shape, start_of_data + start, start_of_data + end)
