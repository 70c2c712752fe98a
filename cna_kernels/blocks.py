"""Weights in GGUF's block formats: a matrix as the bytes that lie in the file, which the ops take in place of a tensor.

Products are those with the numbers that the blocks stand for; activations are never quantised. The CPU engine reads
the blocks themselves. The reference, and whatever looks into an op (autograd, tracers), gets the numbers in the dtype
of the activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Name -> number of the type in GGUF and in csrc/cna.h, numbers in a block, bytes of a block.
FORMATS = {
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210),
}  # fmt: skip


class BlockWeight:
    """A matrix ``[O, K]`` in blocks. It is never written to, so copies share it.

    It has what the ops ask of a tensor: shape, stride, dtype (the format's name), device.

    Attributes:
        blocks: ``[O, bytes of a row]`` uint8 on the CPU, rows any number of bytes apart.
        dtype: the name of the format, one of FORMATS.
        shape: (O, K).
    """

    device = torch.device("cpu")
    requires_grad = is_meta = False

    def __init__(self, blocks: Tensor, dtype: str):
        """
        Raises:
            ValueError: the format is unknown, or the rows are not whole blocks.
        """
        if dtype not in FORMATS:
            raise ValueError(f"dtype: expected one of {', '.join(FORMATS)}, got {dtype!r}")
        self.type, elements, n_bytes = FORMATS[dtype]
        if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.shape[1] % n_bytes or blocks.device.type != "cpu":
            what = f"expected rows of whole blocks of {n_bytes} bytes on the CPU"
            raise ValueError(f"blocks: {what}, got {blocks.dtype} {list(blocks.shape)} on {blocks.device}")
        self.blocks, self.dtype = blocks, dtype
        self.shape = torch.Size((blocks.shape[0], blocks.shape[1] // n_bytes * elements))

    def __repr__(self) -> str:
        return f"BlockWeight({self.dtype}, {list(self.shape)})"

    def __deepcopy__(self, memo: object) -> BlockWeight:
        return self

    def stride(self) -> tuple[int, int]:
        """Bytes from one row to the next, and 1."""
        return self.blocks.stride(0), 1

    def data_ptr(self) -> int:
        return self.blocks.data_ptr()

    def is_neg(self) -> bool:
        return False

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers ``[O, K]``, computed in fp32 and rounded once to bf16, fp16 or fp32."""
        from .cpu import library, typed

        if library.missing() is None:
            return typed.dequantize(self, dtype)
        return _by_gguf(self).to(dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows ``ids`` ``[...]``, as ``[..., K]``."""
        chosen = BlockWeight(self.blocks[ids.flatten()], self.dtype)
        return chosen.dense(dtype).view(*ids.shape, self.shape[1])

    def columns(self, ids: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """The columns ``ids``, ``[O, len(ids)]``. Only the blocks that hold them are read."""
        _, elements, n_bytes = FORMATS[self.dtype]
        places = torch.tensor(list(ids), dtype=torch.int64)
        blocks = self.blocks.unflatten(1, (-1, n_bytes))[:, places // elements]  # [O, ids, bytes]
        numbers = BlockWeight(blocks.flatten(0, 1), self.dtype).dense(dtype).view(*blocks.shape[:2], elements)
        return numbers.gather(2, (places % elements).expand(len(numbers), -1)[..., None])[..., 0]


Weight = Tensor | BlockWeight


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight's numbers as a tensor: its own where it is one."""
    return weight.dense(dtype) if isinstance(weight, BlockWeight) else weight


def _by_gguf(weight: BlockWeight) -> Tensor:
    """The numbers by the ``gguf`` package, where the CPU engine is not built."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # a block may hold an infinite scale
        numbers = dequantize(weight.blocks.contiguous().numpy(), GGMLQuantizationType[weight.dtype])
    return torch.from_numpy(numbers).view(weight.shape)
