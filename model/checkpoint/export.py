"""A circuit at a multiplier for other engines: a LoRA adapter, a checkpoint with scaled columns, the public JSON.

Multiplying neuron j of a layer by m before ``down_proj`` equals adding ``(m - 1) W_down[:, j] act[j]`` to the output of
``down_proj``. A LoRA adapter on ``down_proj`` does exactly this: its A picks the neurons (rows of the identity), its B
holds ``(m - 1) W_down[:, neurons]``, and its rank is the number of the circuit's neurons in the layer. Source of the
LoRA form: E. Hu et al., arXiv 2106.09685.

This module lies beside the checkpoint's reader because every export but the JSON reads the checkpoint.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError
from cna_kernels.files import FilePath, check_writable, make_directory, write_bytes, write_text
from cna_kernels.renamed import renamed
from cna_kernels.steering import check_multiplier

from ..text.chat_template import FOLDER
from .config import DTYPES, ModelConfig
from .gguf_file import is_gguf
from .load import DOWN
from .safetensors_file import INDEX, SINGLE, Checkpoint

NeuronMultipliers = dict[int, dict[int, float]]  # layer -> neuron -> what its activation is multiplied by


def neuron_multipliers(circuits: Sequence[Circuit], multipliers: Sequence[float]) -> NeuronMultipliers:
    """Merge circuits, each at its multiplier. A neuron in several circuits gets the product of their multipliers.

    A circuit's neurons get what :meth:`Circuit.multipliers` says: mirrored ones 2 - m.
    """
    if len(circuits) != len(multipliers):
        raise InputError("multiplier", f"expected {len(circuits)}, one for each circuit, got {len(multipliers)}")
    merged: NeuronMultipliers = {}
    for circuit, multiplier in zip(circuits, multipliers, strict=True):
        each = circuit.multipliers(check_multiplier(multiplier))
        for (layer, index), factor in zip(circuit.pairs, each, strict=True):
            neurons = merged.setdefault(layer, {})
            neurons[index] = neurons.get(index, 1.0) * factor
    changed = {layer: {index: m for index, m in sorted(found.items()) if m != 1} for layer, found in merged.items()}
    return {layer: found for layer, found in sorted(changed.items()) if found}


factors_of = neuron_multipliers  # the name before 0.2


@renamed(factors="multipliers")
def to_lora(
    checkpoint: Checkpoint,
    config: ModelConfig,
    multipliers: NeuronMultipliers,
    out: FilePath,
    *,
    base_model: str = "",
    max_rank: int | None = None,
    split: bool = False,
    uniform: bool = False,
    dtype: str = "float32",
) -> list[Path]:
    """Write a PEFT adapter directory, or several where ``split`` allows several. Return the directories written.

    Args:
        multipliers: see :func:`neuron_multipliers`.
        out: the directory to make. Several adapters go to ``out/1``, ``out/2``, ...: all adapters together are the
            circuit.
        base_model: the name of the base model that the adapter records.
        max_rank: the largest rank allowed. A layer with more neurons is refused, or with ``split`` divided.
        uniform: give all layers of the model the same rank, padded with zeros, for engines that take no other adapter.
        dtype: of A and B. A is exact in every dtype. B is exact in "float32"; for m = 0 and m = 2 also in the
            checkpoint's own dtype.

    Raises:
        InputError: no neuron is scaled, or a layer needs a larger rank than ``max_rank``; names such layers.
    """
    if dtype not in DTYPES:
        raise InputError("dtype", f"expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if not multipliers:
        raise InputError("multiplier", "changes nothing: there is nothing to export")
    largest = max(map(len, multipliers.values()))
    if max_rank is not None and largest > max_rank and not split:
        wide = ", ".join(f"{layer} ({len(found)})" for layer, found in multipliers.items() if len(found) > max_rank)
        raise InputError(
            "max_rank", f"layers with more than {max_rank} neurons: {wide}; --split writes several adapters"
        )
    step = largest if max_rank is None else max_rank
    parts = [
        {layer: pairs for layer, found in multipliers.items() if (pairs := list(found.items())[start : start + step])}
        for start in range(0, largest, step)
    ]
    for part in parts:  # before anything is written
        for name, tensor in _adapter(checkpoint, config, part, uniform, DTYPES[dtype]).items():
            _require_finite(out, name, tensor)
    places = [Path(out, str(number)) for number in range(1, len(parts) + 1)] if len(parts) > 1 else [Path(out)]
    for config_file in (*Path(out).glob("adapter_config.json"), *Path(out).glob("*/adapter_config.json")):
        if config_file.parent not in places:
            raise InputError(config_file.parent, "holds an adapter that would stay beside the new one; remove it first")
    make_directory(out)
    for place, part in zip(places, parts, strict=True):
        make_directory(place)
        tensors = _adapter(checkpoint, config, part, uniform, DTYPES[dtype])
        write_bytes(place / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
        record = _adapter_config(part, base_model, uniform)
        write_text(place / "adapter_config.json", json.dumps(record, indent=2) + "\n")
    return places


def _require_finite(out: FilePath, name: str, tensor: torch.Tensor):
    if not tensor.isfinite().all():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{out}: {name!r}", f"would hold infinities or NaN in {dtype}: a smaller multiplier is needed")


def _adapter(checkpoint, config, part, uniform, dtype) -> dict[str, torch.Tensor]:
    """The tensors of one adapter. ``part`` is layer -> [(neuron, multiplier)]."""
    largest = max(map(len, part.values()))
    layers = range(config.num_hidden_layers) if uniform else part
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        pairs = part.get(layer, [])
        rank = largest if uniform else len(pairs)
        a = torch.zeros(rank, config.intermediate_size, dtype=torch.float32)
        b = torch.zeros(config.hidden_size, rank, dtype=torch.float32)
        if pairs:
            neurons, scales = zip(*pairs, strict=True)
            a[range(len(pairs)), neurons] = 1
            columns = checkpoint.read(DOWN.format(layer))[:, list(neurons)]
            b[:, : len(pairs)] = (columns.double() * (torch.tensor(scales, dtype=torch.float64) - 1)).float()
        name = f"base_model.model.{DOWN.format(layer).removesuffix('.weight')}"
        tensors |= {f"{name}.lora_A.weight": a.to(dtype), f"{name}.lora_B.weight": b.to(dtype)}
    return tensors


def _adapter_config(part, base_model, uniform) -> dict:
    """The content of an adapter's adapter_config.json."""
    ranks = {layer: len(pairs) for layer, pairs in part.items()}
    largest = max(ranks.values())
    own = {f"layers.{layer}.mlp.down_proj": rank for layer, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": largest,
        "lora_alpha": largest,  # alpha / r = 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": ["down_proj"] if uniform else [f"layers.{layer}.mlp.down_proj" for layer in part],
        "rank_pattern": {} if uniform else own,
        "alpha_pattern": {} if uniform else own,
    }


@renamed(factors="multipliers")
def to_checkpoint(directory: FilePath, checkpoint: Checkpoint, multipliers: NeuronMultipliers, out: FilePath) -> None:
    """Write a copy of a checkpoint whose ``down_proj`` columns are scaled; all other tensors stay byte for byte.

    Files are copied one by one, and columns changed layer by layer. ``out`` appears only when the copy is complete.

    Raises:
        InputError: ``out`` exists already, or cannot be written; or a scaled column would hold infinities.
    """
    out = Path(out)
    if is_gguf(directory):
        raise InputError(directory, "is a GGUF file, whose columns are not scaled; export a LoRA adapter (--to lora)")
    if os.path.lexists(out):
        raise InputError(out, "is there already")
    for layer, found in multipliers.items():  # before anything is written
        name = DOWN.format(layer)
        _require_finite(out, name, _scaled(checkpoint, name, found))
    read = {entry.path.name for entry in checkpoint.entries.values()}
    _check_space(directory, read, out)
    partial = out.parent / f".{out.name}-{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir()
        try:
            for path in sorted(Path(directory).iterdir()):
                if _is_copied(path, read):
                    shutil.copyfile(path, partial / path.name)
            if (Path(directory) / FOLDER).is_dir():  # of chat templates
                shutil.copytree(Path(directory) / FOLDER, partial / FOLDER)
            for layer, found in multipliers.items():
                _scale_columns(checkpoint, DOWN.format(layer), partial, found)
            os.rename(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise InputError(out, f"cannot be written: {error.strerror or error}") from None


def _is_copied(path: Path, read: set[str]) -> bool:
    """Whether a file belongs to the copy: not where another loader might take unscaled weights from it instead of from
    ``read``, or be led to them."""
    endings = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
    name = path.name
    other_weights = name.endswith(endings) and name not in read and not (name == INDEX and SINGLE not in read)
    return path.is_file() and not other_weights


def _check_space(directory: FilePath, read: set[str], out: Path):
    """Refuse a copy for which the disk has no room, before it starts."""
    check_writable(out)
    needed = sum(path.stat().st_size for path in Path(directory).iterdir() if _is_copied(path, read))
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise InputError(out, f"cannot be written: needs {needed / 2**30:.2f} GiB, the disk has {free / 2**30:.2f}")


def _scaled(checkpoint: Checkpoint, name: str, found: dict[int, float]) -> torch.Tensor:
    """The scaled columns of a tensor, in its dtype; ``found`` is neuron -> multiplier."""
    columns = checkpoint.read(name)[:, list(found)].double()
    return (columns * torch.tensor(list(found.values()), dtype=torch.float64)).to(checkpoint.entries[name].dtype)


def _scale_columns(checkpoint: Checkpoint, name: str, directory: Path, found: dict[int, float]):
    """Scale columns of one tensor in the copied file."""
    entry, weight = checkpoint.entries[name], checkpoint.read(name)
    weight[:, list(found)] = _scaled(checkpoint, name, found)
    with open(directory / entry.path.name, "r+b") as file:
        file.seek(entry.start)
        file.write(weight.contiguous().view(torch.uint8).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())


def to_ref_code(circuit: Circuit, out: FilePath) -> None:
    """Write the JSON of the public CNA code: "layer,position,index" with position -1, the last prompt token.

    Raises:
        InputError: neurons of the circuit are mirrored, which that JSON cannot say; or ``out`` cannot be written.
    """
    if circuit.mirrored is not None:
        raise InputError("circuit", "is aligned: the public code's JSON has no place for the neurons that get 2 - m")
    record = {
        "neurons": {f"{layer},-1,{index}": contrast for layer, index, contrast in circuit.neurons},
        "prompt": "",
        "target_token": "",
        "total_logit_diff": 0.0,
    }
    write_text(out, json.dumps(record, indent=1, allow_nan=False) + "\n")
