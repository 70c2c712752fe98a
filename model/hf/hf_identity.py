"""What tells a checkpoint that transformers runs from others: the hashes that our own checkpoints have."""

from __future__ import annotations

import json
from pathlib import Path

from cna_kernels.files import sha256
from cna_kernels.fingerprint import decoder_sha256

from ..checkpoint.identity import Hashes, hashes_of, named
from ..checkpoint.safetensors_file import Checkpoint
from .hf_config import HfConfig
from .hf_load import QUANTISE
from .hf_transformer import HfShape, HfTransformer

_EMBEDDING = "embed_tokens.weight"


def hf_identity(
    directory: Path, checkpoint: Checkpoint, config: HfConfig, transformer: HfTransformer | HfShape
) -> dict[str, str]:
    """As ``checkpoint.identity.identity_of``; of all tensors of the files, and all fields of config.json that count.

    ``decoder_sha256``, by which a circuit of an attached model knows its model, is that of the files where they have
    the decoder's own names. Where transformers joins tensors while it loads, as those of experts, it is that of the
    loaded model. A quantised model has none.
    """
    given = transformer.model_args
    quantised = {QUANTISE: given[QUANTISE]} if QUANTISE in given else {}
    hashes = hashes_of(list(checkpoint.entries.values()))
    parts: list[str] = []
    for name, entry in sorted(checkpoint.entries.items()):
        parts += [name, entry.stored, repr(list(entry.shape)), hashes[entry.name][0]]
    found = {
        **named(directory),
        "settings_sha256": sha256(json.dumps({**config.settings, **quantised}, sort_keys=True)),
        "tensors_sha256": sha256(*parts),
    }
    of_decoder = None if quantised else _on_file(checkpoint, config, hashes)
    if of_decoder is None and isinstance(transformer, HfTransformer):
        of_decoder = transformer.engine.identity().get("decoder_sha256")
    return found if of_decoder is None else {**found, "decoder_sha256": of_decoder}


def _on_file(checkpoint: Checkpoint, config: HfConfig, hashes: dict[str, Hashes]) -> str | None:
    """The hash of the decoder from its weights in the files; None where they have other names, or are quantised."""
    prefixes = [name.removesuffix(_EMBEDDING) for name in checkpoint.entries if name.endswith(_EMBEDDING)]
    if len(prefixes) != 1:
        return None
    entries = {name: checkpoint.entries.get(prefixes[0] + name) for name in config.decoder_names}
    marks = {name: hashes[entry.name][1] for name, entry in entries.items() if entry is not None and entry.dtype}
    return decoder_sha256(marks) if len(marks) == len(entries) else None
