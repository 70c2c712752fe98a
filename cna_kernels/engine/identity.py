"""The name and the hash that tell an attached model from others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..fingerprint import neurons_sha256, sampled_rows
from .mlps import SteeredMLP


def identity_of(decoder: nn.Module, mlps: Sequence[SteeredMLP]) -> dict[str, str]:
    """The model's name and, if every ``down_proj`` has a plain weight that is not fp16, a hash of 4 rows of each.

    ``load`` gives a checkpoint on file the same hash, so that a circuit found in one of the two is recognised in the
    other. Tuning the attention alone does not change the hash.
    """
    name = getattr(getattr(decoder, "config", None), "_name_or_path", "") or type(decoder).__name__
    name = Path(name).resolve().name if Path(name).is_dir() else name  # no path of this machine in a file to share
    weights = [weight for mlp in mlps if (weight := mlp.plain_down()) is not None]
    if len(weights) < len(mlps):
        return {"name": name}
    rows = ([weight.flatten(0, -2)[row] for row in sampled_rows(weight.shape[:-1].numel())] for weight in weights)
    return {"name": name, "neurons_sha256": neurons_sha256(rows)}
