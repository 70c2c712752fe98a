"""What the functions of the compiled library with a ``cna_weight`` take, and the numbers that blocks stand for."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from . import library

SUFFIX = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}  # cna_type
threads = torch.get_num_threads
_WEIGHT = struct.Struct("@3q")


class InBlocks(Protocol):
    """What is asked of a BlockWeight."""

    type: int
    shape: torch.Size

    def stride(self) -> tuple[int, int]: ...
    def data_ptr(self) -> int: ...


def describer(like: Tensor | InBlocks) -> Callable[[Tensor | InBlocks], bytes]:
    """A function of weights like this one that returns their ``cna_weight``. It holds an address: keep the weight."""
    if isinstance(like, Tensor):
        kind, row_bytes = TYPES[like.dtype], like.stride(0) * like.element_size()
    else:
        kind, row_bytes = like.type, like.stride()[0]
    pack = _WEIGHT.pack
    return lambda weight: pack(weight.data_ptr(), kind, row_bytes)


def function(op: str, dtype: torch.dtype) -> tuple[str, Callable[..., int]]:
    name = f"cna_{op}_{SUFFIX[dtype]}"
    return name, getattr(library.load(), name)


def dequantize(weight: InBlocks, dtype: torch.dtype) -> Tensor:
    """The numbers of a weight ``[O, K]``, rounded once from fp32."""
    name, run = function("dequantize", dtype)
    out = torch.empty(weight.shape, dtype=dtype)
    status = run(out.data_ptr(), describer(weight)(weight), *weight.shape, weight.shape[1], threads())
    library.check(name, status)
    return out
