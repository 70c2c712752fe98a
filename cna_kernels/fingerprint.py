"""A hash that tells one model's neurons from another's, the same for a checkpoint on file and a model in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .files import Digest

ROWS = 4  # how many rows of each layer's down_proj are hashed


def sampled_rows(n_rows: int) -> list[int]:
    """The rows of a layer's ``w_down`` ``[H, N]``, or ``[E * H, N]``, that are hashed: evenly spaced."""
    n = min(ROWS, n_rows)
    return [number * (n_rows - 1) // max(n - 1, 1) for number in range(n)]


def neurons_sha256(layers: Iterable[Iterable[Tensor]]) -> str:
    """Hash the sampled rows ``[N]`` of every layer, rounded to bf16.

    A checkpoint has the same hash on file and loaded in bf16, fp32 or fp64. A model in memory in fp16 gets no hash,
    because fp16 cannot hold every small bf16 number.
    """
    digest = Digest()
    for rows in layers:
        for row in rows:
            digest.add(row.detach().to("cpu", torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return str(digest)
