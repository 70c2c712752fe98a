"""A GGUF file with a circuit at a multiplier in its weights: a copy whose columns of ``ffn_down`` are scaled.

All bytes of the metadata stay, and those of every other tensor. Column j of a matrix in blocks is one number of a block
in each row. At m = 0 Q8_0, Q4_0 and Q5_0 can hold it: their blocks have a number for 0. Otherwise the layer's matrix
becomes F32, which holds all numbers of all blocks exactly, so that only the steered columns are rounded, once.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import numpy as np
import torch

from cna_kernels.errors import InputError
from cna_kernels.files import FilePath, open_regular, replaced

from .export import NeuronMultipliers, require_finite
from .gguf_file import PLAIN, TYPES, GgufEntry, read_gguf
from .quantize import check_output, check_space

_NAME = "blk.{}.ffn_down.weight"
_NUMBER = {name: number for number, (name, _, _) in TYPES.items()}
_WITH_ZERO = {"Q8_0": 34, "Q4_0": 18, "Q5_0": 22}  # bytes of a block of 32; the scale comes first, 2 bytes
_PIECE = 16 << 20  # bytes at a time


def to_gguf(model: FilePath, multipliers: NeuronMultipliers, out: FilePath) -> tuple[int, int]:
    """Write a copy of a GGUF file whose ``down_proj`` columns are scaled.

    Returns:
        how many layers' matrices became F32, and by how many bytes the file is larger than the first.

    Raises:
        InputError: the model is divided into several files; a scaled column would hold infinities; ``out`` exists
            already, or cannot be written.
    """
    source = read_gguf(model)
    if source.parts > 1:
        raise InputError(model, "is divided into several files; llama-gguf-split --merge makes one of them")
    if not multipliers:
        raise InputError("multiplier", "changes nothing: there is nothing to export")
    check_output(out)
    scaled = {_NAME.format(layer): found for layer, found in multipliers.items()}
    kinds = {name: _kind(entry, scaled.get(name)) for name, entry in source.tensors.items()}
    for name, found in scaled.items():  # before anything is written
        entry = source.tensors[name]
        for rows in _pieces(entry):
            require_finite(out, name, _times(entry.read_rows(rows), found, entry, kinds[name])[:, list(found)])
    sizes = {name: _size(entry, kinds[name]) for name, entry in source.tensors.items()}
    check_space(out, sum(sizes.values()))
    alignment = source.metadata.integer("general.alignment", (1, 1 << 20), 32)
    with open_regular(source.path) as file, replaced(out) as into:
        into.write(file.read(source.pairs_end))
        into.write(_records(source.tensors, kinds, sizes, alignment))
        for name, entry in source.tensors.items():
            into.write(bytes(-into.tell() % alignment))
            for content in _content(entry, scaled.get(name), kinds[name]):
                into.write(content)
        into.write(bytes(-into.tell() % alignment))
    n_wide = sum(kinds[name] != entry.stored for name, entry in source.tensors.items())
    return n_wide, os.path.getsize(out) - os.path.getsize(source.path)


def _kind(entry: GgufEntry, found: dict[int, float] | None) -> str:
    """The type that a tensor gets."""
    keeps = found is None or entry.stored in PLAIN or (entry.stored in _WITH_ZERO and not any(found.values()))
    return entry.stored if keeps else "F32"


def _size(entry: GgufEntry, kind: str) -> int:
    return entry.end - entry.start if kind == entry.stored else 4 * int(np.prod(entry.shape))


def _records(tensors: dict[str, GgufEntry], kinds: dict[str, str], sizes: dict[str, int], alignment: int) -> bytes:
    """The records of all tensors, in the order of the file."""
    parts, at = [], 0
    for name, entry in tensors.items():
        text, shape = name.encode(), entry.shape[::-1]
        parts.append(struct.pack(f"<Q{len(text)}sI{len(shape)}Q", len(text), text, len(shape), *shape))
        parts.append(struct.pack("<IQ", _NUMBER[kinds[name]], at))
        at += -(-sizes[name] // alignment) * alignment
    return b"".join(parts)


def _pieces(entry: GgufEntry) -> Iterator[range]:
    """The rows of a matrix, some at a time."""
    step = max(1, _PIECE // (4 * entry.shape[-1]))
    for first in range(0, entry.shape[0], step):
        yield range(first, min(first + step, entry.shape[0]))


def _content(entry: GgufEntry, found: dict[int, float] | None, kind: str) -> Iterator[bytes]:
    """The bytes of a tensor, ``found`` being what its columns are multiplied by."""
    if found is None:
        with open_regular(entry.path) as file:
            file.seek(entry.start)
            left = entry.end - entry.start
            while left:
                content = file.read(min(left, _PIECE))
                if not content:
                    raise InputError(f"{entry.path}: {entry.name!r}", "was truncated while it was read")
                left -= len(content)
                yield content
        return
    for rows in _pieces(entry):
        if kind == entry.stored in _WITH_ZERO:
            yield _without(entry._bytes(rows.start, rows.stop), entry, sorted(found))
        else:
            values = _times(entry.read_rows(rows), found, entry, kind)
            yield values.contiguous().view(torch.uint8).numpy().tobytes()


def _times(values: torch.Tensor, found: dict[int, float], entry: GgufEntry, kind: str) -> torch.Tensor:
    """Rows ``[n, N]`` with scaled columns, each rounded once to the type of the file."""
    values = values.to(PLAIN.get(kind, torch.float32))
    columns = values[:, list(found)].double() * torch.tensor(list(found.values()), dtype=torch.float64)
    values[:, list(found)] = columns.to(values.dtype)
    return values


def _without(content: bytes, entry: GgufEntry, columns: list[int]) -> bytes:
    """The blocks of some rows with the number for 0 in some columns."""
    size = _WITH_ZERO[entry.stored]
    blocks = np.frombuffer(bytearray(content), np.uint8).reshape(-1, entry.shape[-1] // 32, size)
    for column in columns:
        block, place = divmod(column, 32)
        if entry.stored == "Q8_0":
            blocks[:, block, 2 + place] = 0
            continue
        byte, shift = size - 16 + place % 16, 4 * (place // 16)
        kept = blocks[:, block, byte] & (0xF0 >> shift)
        if entry.stored == "Q4_0":  # a number q stands for q - 8
            blocks[:, block, byte] = kept | (8 << shift)
        else:  # q - 16, whose fifth bit lies before the others
            blocks[:, block, byte] = kept
            blocks[:, block, 2 + place // 8] |= 1 << place % 8
    return blocks.tobytes()
