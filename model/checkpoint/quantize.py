"""A GGUF file with block-quantised weights: what `cna quantize` writes.

The package gguf does the arithmetic (``gguf.quants.quantize``) and writes the header; it has no K blocks. What is
quantised follows llama.cpp's ``llama-quantize``: matrices, but no norm, bias or factor of the rotary embedding, which
are F32. Rows that are no whole blocks are F16. With 4 or 5 bits the output projection, or the embedding where both are
one, is Q8_0; llama.cpp takes Q6_K for it. Source:
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp
"""

from __future__ import annotations

import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cna_kernels.errors import InputError, warn
from cna_kernels.files import FilePath, check_writable, replaced
from cna_kernels.fingerprint import in_threads

from ..packages import require
from ..text.gguf_fields import HOW
from .gguf_file import PLAIN, SUFFIX, TYPES, is_gguf
from .gguf_source import Source, SourceTensor, source_of

# What --to takes -> the type of the blocks, and the number of general.file_type.
TARGETS = {"q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2), "q4_1": ("Q4_1", 3), "q5_0": ("Q5_0", 8)}
_ONLY_LLAMA_CPP = re.compile(r"(q\d_k(_\w+)?|iq\d\w*|tq\d\w*|mxfp4\w*|nvfp4\w*)")
_SIZES = {name: (elements, n_bytes) for name, elements, n_bytes in TYPES.values()}
_ALIGNMENT = 32
_PIECE, _SHARE = 16 << 20, 1 << 18  # bytes that are read at a time; numbers that a thread quantises at a time
_LARGEST = 65504.0  # of fp16, which scales and F16 weights are


@dataclass(frozen=True)
class Written:
    """What was written: the file's size in bytes, and how many bits of its tensors stand for a weight."""

    size: int
    bits_per_weight: float


@dataclass(frozen=True)
class _Planned:
    """A tensor and the type that it gets."""

    tensor: SourceTensor
    kind: str

    @property
    def row_bytes(self) -> int:
        elements, n_bytes = _SIZES[self.kind]
        return self.tensor.shape[-1] // elements * n_bytes

    @property
    def size(self) -> int:
        return math.prod(self.tensor.shape[:-1]) * self.row_bytes


def quantize(model: FilePath, to: str, out: FilePath) -> Written:
    """Write a checkpoint as a GGUF file with quantised weights. One tensor at a time is in memory.

    Args:
        model: a GGUF file, whose fields are copied, or a directory in Hugging Face layout, where GGUF has a place for
            all that its config.json and tokenizer say.
        to: one of TARGETS.
        out: the file to make; it appears only when it is complete.

    Raises:
        InputError: ``to`` is none of these; the checkpoint cannot be used, or not written exactly; a weight is beyond
            fp16; ``out`` exists already, or cannot be written.
    """
    kind, file_type = _target(to)
    require("gguf")
    check_output(out)
    source = source_of(model)
    planned = [_Planned(tensor, _kind_of(tensor, kind, source.tied)) for tensor in source.tensors]
    _say_what_loses_twice(model, planned)
    check_space(out, sum(each.size for each in planned))
    with replaced(out) as file:
        _write(file.name, model, source, planned, file_type)
        size = os.stat(file.name).st_size
    n_weights = sum(math.prod(each.tensor.shape) for each in planned)
    return Written(size, 8 * sum(each.size for each in planned) / n_weights)


def _target(to: str) -> tuple[str, int]:
    if to in TARGETS:
        return TARGETS[to]
    if _ONLY_LLAMA_CPP.fullmatch(to.lower()):
        what = f"{to}: the package gguf does not write such blocks; llama.cpp's llama-quantize does, from a GGUF file"
        raise InputError("--to", what)
    raise InputError("--to", f"expected one of {', '.join(TARGETS)}, got {to!r}")


def check_output(out: FilePath) -> None:
    """Refuse a name that is no GGUF file's, or that is taken, or that cannot be written."""
    if not os.fspath(out).endswith(SUFFIX):
        raise InputError(out, f"expected a name that ends in {SUFFIX}, by which the format is known")
    if os.path.lexists(out):
        raise InputError(out, "is there already")
    check_writable(out)


def check_space(out: FilePath, needed: int) -> None:
    """Refuse a file of so many bytes for which the disk has no room."""
    free = shutil.disk_usage(Path(os.path.realpath(out)).parent).free
    if needed > free:
        raise InputError(out, f"cannot be written: needs {needed / 2**30:.2f} GiB, the disk has {free / 2**30:.2f}")


def _kind_of(tensor: SourceTensor, kind: str, tied: bool) -> str:
    """The type of a tensor in the file."""
    stem, _, end = tensor.name.rpartition(".")
    if len(tensor.shape) != 2 or end != "weight" or stem.endswith("_norm"):
        return "F32"
    if stem == ("token_embd" if tied else "output"):
        kind = "Q8_0"
    return kind if tensor.shape[-1] % _SIZES[kind][0] == 0 else "F16"


def _say_what_loses_twice(model: FilePath, planned: list[_Planned]) -> None:
    changed = [each.tensor.stored for each in planned if each.kind != each.tensor.stored not in PLAIN]
    if is_gguf(model) and changed:
        kinds = ", ".join(f"{changed.count(name)} {name}" for name in sorted(set(changed)))
        what = f"has quantised weights already ({kinds}), which lose a second time; an F16 or F32 file loses once"
        warn(f"{model}: {what}")


def _write(path: str, model: FilePath, source: Source, planned: list[_Planned], file_type: int) -> None:
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, source.arch)
    try:
        for name, (value, kind, of_items) in source.fields.items():
            item = None if of_items is None else GGUFValueType(of_items)
            writer.add_key_value(name, value, GGUFValueType(kind), item)
        writer.add_file_type(file_type)
        writer.add_quantization_version(2)
        for each in planned:
            shape, raw = each.tensor.shape, GGMLQuantizationType[each.kind]
            writer.add_tensor_info(each.tensor.name, shape, np.dtype(np.float32), each.size, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, each in enumerate(planned):
            writer.write_tensor_data(_quantised(each, model))
            if number == 0:  # what the header says is known to be right before the work begins
                writer.flush()
                end = os.stat(path).st_size
                os.truncate(path, end + sum(-(-later.size // _ALIGNMENT) * _ALIGNMENT for later in planned[1:]))
                _check(source, path, model)
    finally:
        writer.close()


def _check(source: Source, path: str, model: FilePath) -> None:
    try:
        source.check(path)
    except InputError as error:
        if not error.where.startswith(path):
            raise
        what = f"would be read wrongly from GGUF: {error.where.removeprefix(path).lstrip(': ')} {error.what}"
        raise InputError(model, f"{what}; {HOW}") from None


def _quantised(planned: _Planned, model: FilePath) -> np.ndarray:
    """The bytes of a tensor as the file holds them, ``[rows, bytes of a row]`` uint8."""
    tensor, kind = planned.tensor, planned.kind
    n_rows, at = math.prod(tensor.shape[:-1]), 0
    blocks = np.empty((n_rows, planned.row_bytes), dtype=np.uint8)
    for content, values in tensor.pieces(_PIECE):
        into = blocks[at : at + len(values)]
        at += len(values)
        if kind == tensor.stored and kind not in PLAIN:  # as they are: quantised again they might change
            into[:] = np.frombuffer(content, dtype=np.uint8).reshape(into.shape)
            continue
        numbers = values.float().numpy()
        if kind != "F32" and not np.abs(numbers).max(initial=0) <= _LARGEST:
            raise InputError(f"{model}: {tensor.name!r}", f"holds numbers that are not finite in fp16, as {kind} needs")
        _fill(into, numbers, kind)
    if tensor.heads:
        rows = blocks.reshape(tensor.heads, 2, tensor.shape[0] // tensor.heads // 2, -1)
        blocks = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(blocks.shape)
    return blocks


def _fill(blocks: np.ndarray, numbers: np.ndarray, kind: str) -> None:
    """Put the bytes that stand for ``numbers[rows, N]`` into ``blocks``."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize as blocks_of

    step = max(1, _SHARE // numbers.shape[1])

    def fill(first: int) -> Any:
        rows = numbers[first : first + step]
        with np.errstate(all="ignore"):  # a block of zeros, or of numbers whose scale is beyond fp16's smallest
            blocks[first : first + step] = blocks_of(rows, GGMLQuantizationType[kind]).view(np.uint8)

    in_threads(fill, range(0, len(numbers), step))
