"""A hash of a model's weights, the same for a checkpoint on file and for a model in memory.

Every row of a weight gets a mark. The row's bits, as words of 64 bits, are multiplied by odd numbers of their own
modulo 2**64; the upper half of each product is laid over its lower half (xor); the results are multiplied by other odd
numbers and summed modulo 2**64. One multiplication would not do: it takes the upper bits of a word, such as a sign,
only to the upper bits of the sum, where two changes of a row cancel. The hash is that of all marks. Marks are computed
on the device where the weight is, at the speed of its memory. A SHA-256 of all bytes would need a copy on the host, and
more time on a CPU (marks 3.7, SHA-256 1.8 GB/s on one thread of an AMD EPYC, 2026-11-27).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from .files import Digest

WIDE = (torch.bfloat16, torch.float32, torch.float64)  # dtypes in memory that hold every bf16 number
_WORD = 8 // torch.bfloat16.itemsize  # bf16 numbers of a word
_PIECE_CPU, _PIECE = 1 << 15, 1 << 23  # words at a time: on a CPU few enough that PyTorch starts no threads of its own
_ON_DEVICE = ("cpu", "cuda")  # where PyTorch multiplies words; elsewhere pieces are copied to the host

Item = TypeVar("Item")
Result = TypeVar("Result")


class Marks:
    """The marks of one weight, row by row, rounded to bf16."""

    def __init__(self) -> None:
        self._marks: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Add the next rows ``[n, N]`` of the weight, in any floating dtype."""
        rows = rows.detach()
        device = rows.device if rows.device.type in _ON_DEVICE else torch.device("cpu")
        step = max(1, (_PIECE_CPU if device.type == "cpu" else _PIECE) * _WORD // max(rows.shape[1], 1))
        words = -(-rows.shape[1] // _WORD)
        first, second = _odd_numbers(words, device)
        for piece in rows.split(step):
            bits = piece.to(device, torch.bfloat16).contiguous()
            if bits.shape[1] % _WORD or bits.storage_offset() % _WORD:
                bits = torch.nn.functional.pad(bits, (0, words * _WORD - bits.shape[1])).clone()
            products = bits.view(torch.int64) * first
            products ^= products >> 32
            self._marks.append(products.mul_(second).sum(1))

    def sha256(self, shape: Iterable[int]) -> str:
        """The hash of the marks of a weight of this shape."""
        digest = Digest()
        digest.add(repr(list(shape)))
        digest.add(b"".join(marks.cpu().numpy().tobytes() for marks in self._marks))
        return str(digest)


@functools.lru_cache(maxsize=64)
def _odd_numbers(n: int, device: torch.device) -> Tensor:
    """Two odd numbers for each of the first n words, ``[2, n]`` int64: the same everywhere, in every PyTorch."""
    stream = bytearray(hashlib.shake_256(b"cna_kernels.fingerprint").digest(16 * n))
    numbers = torch.frombuffer(stream, dtype=torch.int64) if n else torch.empty(0, dtype=torch.int64)
    return (numbers.view(n, 2).T.contiguous() | 1).to(device)


def marks_sha256(weight: Tensor) -> str:
    """The hash of one weight's marks. A vector is one row."""
    marks = Marks()
    marks.add(as_rows(weight))
    return marks.sha256(weight.shape)


def as_rows(weight: Tensor) -> Tensor:
    """A weight of any shape as ``[rows, N]``."""
    return weight.reshape(1, -1) if weight.dim() < 2 else weight.flatten(0, -2)


def decoder_sha256(hashes: dict[str, str]) -> str:
    """The hash of a decoder from those of its weights, by their names: ``layers.0.mlp.down_proj.weight``, and so on.

    A checkpoint has the same hash on file and loaded in bf16, fp32 or fp64. A model in memory in fp16 has none, because
    fp16 cannot hold every small bf16 number.
    """
    digest = Digest()
    for name, found in sorted(hashes.items()):
        digest.add(name)
        digest.add(found)
    return str(digest)


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``work`` of every item, in order, on as many threads as PyTorch uses."""
    with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), 16))) as threads:
        return list(threads.map(work, items))
