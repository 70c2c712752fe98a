"""Which model an engine serves: the hash that a circuit's file names, computed from the checkpoint's files."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

from ..circuit import Circuit, check_found_in
from ..errors import one_line, warn
from ..fields import short
from ..files import FilePath
from ..fingerprint import WIDE, decoder_sha256, in_threads, marks_sha256

_BASE = "model."  # in front of the names of a decoder's weights
_NO_WEIGHTS = ("rotary_emb.inv_freq", "masked_bias", ".attn.bias")  # what old checkpoints hold beside the weights


def check_model(circuit: Circuit, where: FilePath, model_config: Any) -> None:
    """Raise InputError if the circuit was found in another model than the one that is served.

    Compared are the hashes of all weights of the decoder. Where the checkpoint has none (it is quantised, or no
    directory of safetensors), a warning says that nothing was compared.
    """
    known = circuit.model or {}
    if not known:
        return
    here = {"model.name": Path(model_config.model).name}
    if "decoder_sha256" in known:
        found = _hash_of(str(model_config.model), getattr(model_config, "revision", None))
        if found is not None:
            check_found_in(circuit, here | {"model.decoder_sha256": found}, where)
            return
    names = f"found in {short(known.get('name'))}, this is {short(here['model.name'])}"
    warn(f"{where}: model: {names}: whether they are the same is not known, there is no hash to compare")


def identity_of(model_config: Any) -> dict[str, str]:
    """The model's name and, if the checkpoint has it, its decoder's hash."""
    found = _hash_of(str(model_config.model), getattr(model_config, "revision", None))
    name = {"name": one_line(Path(model_config.model).name)}  # no path of this machine in a file to share
    return name if found is None else name | {"decoder_sha256": found}


@functools.lru_cache(maxsize=4)
def _hash_of(model: str, revision: str | None) -> str | None:
    """The decoder's hash of a checkpoint in safetensors, in a directory or in the Hub's cache."""
    from safetensors import safe_open

    directory = model if os.path.isdir(model) else _in_cache(model, revision)
    if directory is None:
        return None
    files = sorted(Path(directory).glob("*.safetensors"))
    places: dict[str, Path] = {}
    for path in files:
        if path.name.startswith("consolidated"):  # Mistral's own form of the same weights
            continue
        with safe_open(path, "pt") as opened:
            places |= dict.fromkeys(opened.keys(), path)
    names = sorted(name for name in places if name.startswith(_BASE) and not name.endswith(_NO_WEIGHTS))

    def marked(name: str) -> str | None:
        with safe_open(places[name], "pt") as opened:
            weight: torch.Tensor = opened.get_tensor(name)
        return marks_sha256(weight) if weight.dtype in WIDE else None

    hashes = dict(zip((name.removeprefix(_BASE) for name in names), in_threads(marked, names), strict=True))
    if not hashes or None in hashes.values():
        return None
    return decoder_sha256({name: found for name, found in hashes.items() if found is not None})


def _in_cache(model: str, revision: str | None) -> str | None:
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns="*.safetensors"))
    except Exception:  # any of the hub's errors: the files are not here
        return None
