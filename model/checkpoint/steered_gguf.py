"""A GGUF file in which a circuit is at a fixed multiplier, for llama.cpp without a LoRA adapter.

An activation is ``silu(gate_j) * up_j``, so a neuron at m is one whose row of ``ffn_up``, and bias if there is one, is
m times as large. A column of ``ffn_down`` would do the same, but lies across the blocks of all rows, which hold other
neurons' numbers, too. A row of ``ffn_up`` consists of whole blocks, and every number of a block is its fp16 scale, or
scale and minimum, times whole numbers: these are multiplied. The file keeps its size, its types and all other bytes.

This is exact for m = 0, and for powers of two unless a scale leaves the range of fp16. Other multipliers round scales
to fp16: a relative 2^-11, and more where they are below 2^-14, as the scales of K blocks often are.
"""

from __future__ import annotations

import os
import shutil

import torch

from cna_kernels.blocks import FORMATS
from cna_kernels.errors import InputError
from cna_kernels.files import FilePath, open_regular, replaced

from .export import NeuronMultipliers, require_finite
from .gguf_file import PLAIN, GgufEntry, read_gguf
from .quantize import check_output, check_space

# Where the fp16 numbers of a block lie that all its numbers are proportional to.
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,),
}  # fmt: skip
_PIECE = 16 << 20  # bytes copied at a time


def to_gguf(model: FilePath, multipliers: NeuronMultipliers, out: FilePath) -> float:
    """Write a copy of a GGUF file in which neurons are scaled. ``out`` appears only when the copy is complete.

    Returns:
        The largest distance, over the neurons, of the row that is written from m times the row that was there, relative
        to that row.

    Raises:
        InputError: the model is divided into several files; a number would be infinite; ``out`` exists already, or
            cannot be written.
    """
    gguf = read_gguf(model)
    if gguf.parts > 1:
        raise InputError(model, "is divided into several files; llama-gguf-split --merge makes one of them")
    if not multipliers:
        raise InputError("multiplier", "changes nothing: there is nothing to export")
    check_output(out)
    changes: list[tuple[int, bytes]] = []
    furthest = 0.0
    for layer, found in multipliers.items():  # before anything is written
        name = f"blk.{layer}.ffn_up"
        if f"{name}.weight" not in gguf.tensors:
            raise InputError(f"{model}: '{name}.weight'", "is missing from the checkpoint")
        for entry in filter(None, map(gguf.tensors.get, (f"{name}.weight", f"{name}.bias"))):
            for neuron, m in found.items():
                start, content, distance = _scaled(entry, neuron, m, out)
                changes.append((start, content))
                furthest = max(furthest, distance)
    check_space(out, os.path.getsize(model))
    with open_regular(model) as source, replaced(out) as file:
        shutil.copyfileobj(source, file, _PIECE)
        for start, content in changes:
            file.seek(start)
            file.write(content)
    return furthest


def _scaled(entry: GgufEntry, neuron: int, m: float, out: FilePath) -> tuple[int, bytes, float]:
    """Where the numbers of a neuron lie in the file, what they become, and how far this is from m times as large."""
    n_neurons = entry.shape[0]
    if not 0 <= neuron < n_neurons or (len(entry.shape) == 1 and entry.stored not in PLAIN):
        what = f"expected neuron {neuron} among its rows, got {entry.stored} {list(entry.shape)}"
        raise InputError(f"{entry.path}: {entry.name!r}", what)
    if len(entry.shape) == 1:
        size = entry.row_bytes // n_neurons
        before = entry.content(0, 1)[neuron * size : (neuron + 1) * size]
    else:
        size = entry.row_bytes
        before = entry.content(neuron, neuron + 1)
    after = torch.frombuffer(bytearray(before), dtype=torch.uint8)
    if entry.stored in PLAIN:
        numbers = after.view(PLAIN[entry.stored])
        old = numbers.clone()
        new = numbers.copy_(_times(numbers, m))
    else:
        old = entry.values(before)
        blocks = after.view(-1, FORMATS[entry.stored][2])
        for place in SCALES[entry.stored]:
            scales = blocks[:, place : place + 2].contiguous().view(torch.float16)
            blocks[:, place : place + 2] = _times(scales, m).view(torch.uint8)
        new = entry.values(after.numpy().tobytes())
    require_finite(out, entry.name, new)
    length = old.double().norm()
    distance = float((new.double() - old.double() * m).norm() / length) if length > 0 else 0.0
    return entry.start + neuron * size, after.numpy().tobytes(), distance


def _times(numbers: torch.Tensor, m: float) -> torch.Tensor:
    return (numbers.double() * m).to(numbers.dtype)
