"""The name and the hash that tell an attached model from others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ..errors import one_line
from ..fingerprint import WIDE, decoder_sha256, in_threads, marks_sha256
from .mlps import SteeredMLP


def identity_of(decoder: nn.Module, mlps: Sequence[SteeredMLP]) -> dict[str, str]:
    """The model's name and, if all its weights are in sight, a hash of all weights of the decoder, as they are now.

    ``load`` gives a checkpoint on file the same hash, so that a circuit found in one of the two is recognised in the
    other. The hash covers embeddings, attention, norms and MLPs, rounded to bf16; not the head behind the decoder.
    """
    name = getattr(getattr(decoder, "config", None), "_name_or_path", "") or type(decoder).__name__
    name = Path(name).resolve().name if Path(name).is_dir() else name  # no path of this machine in a file to share
    name = one_line(name)  # a name may be no text
    weights = _weights_in_sight(decoder, mlps)
    if weights is None:
        return {"name": name}
    hashes = in_threads(marks_sha256, weights.values())
    return {"name": name, "decoder_sha256": decoder_sha256(dict(zip(weights, hashes, strict=True)))}


def _weights_in_sight(decoder: nn.Module, mlps: Sequence[SteeredMLP]) -> dict[str, Tensor] | None:
    """All weights of the decoder by name; None where one is quantised, adapted, offloaded or in fp16."""
    if any(mlp.plain_down() is None for mlp in mlps):
        return None
    if any(hasattr(module, "base_layer") for module in decoder.modules()):  # PEFT
        return None
    weights = {name.replace("_orig_mod.", ""): weight for name, weight in decoder.state_dict(keep_vars=True).items()}
    for weight in weights.values():
        kinds = (nn.Parameter, Tensor)  # a subclass may keep its numbers elsewhere
        if type(weight) not in kinds or weight.is_meta or weight.is_sparse or weight.dtype not in WIDE:
            return None
    return weights
