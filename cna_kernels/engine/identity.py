"""The name and the hash that tell an attached model from others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ..circuit_file import COMMIT, REPOSITORY
from ..errors import one_line
from ..fingerprint import WIDE, decoder_sha256, in_threads, marks_sha256
from .mlps import SteeredMLP


def identity_of(decoder: nn.Module, mlps: Sequence[SteeredMLP]) -> dict[str, str]:
    """The model's name and, if all its weights are in sight, a hash of all weights of the decoder, as they are now. Of
    a model from the Hub also the repository and the commit.

    ``load`` gives a checkpoint on file the same hash, so that a circuit found in one of the two is recognised in the
    other. The hash covers embeddings, attention, norms and MLPs, rounded to bf16; not the head behind the decoder.
    """
    config = getattr(decoder, "config", None)
    name = getattr(config, "_name_or_path", "") or type(decoder).__name__
    commit, local = getattr(config, "_commit_hash", None), Path(name).is_dir()
    name = Path(name).resolve().name if local else name  # no path of this machine in a file to share
    known = {"name": one_line(name)}  # a name may be no text
    if not local and REPOSITORY.fullmatch(name) and COMMIT.fullmatch(str(commit)):
        known |= {"repo": name, "revision": str(commit)}
    weights = _weights_in_sight(decoder, mlps)
    if weights is None:
        return known
    hashes = in_threads(marks_sha256, weights.values())
    return known | {"decoder_sha256": decoder_sha256(dict(zip(weights, hashes, strict=True)))}


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
