"""A circuit at a multiplier for other engines: a checkpoint with scaled columns, the public JSON; ``lora.py`` has LoRA.

Multiplying neuron j of a layer by m before ``down_proj`` equals multiplying column j of ``down_proj`` by m.

This module lies beside the checkpoint's reader because every export but the JSON reads the checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError
from cna_kernels.files import FilePath, check_writable, new_directory, write_text
from cna_kernels.renamed import renamed
from cna_kernels.steering import check_multiplier

from ..text.chat_template import FOLDER
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

# The names of the weights that hold a layer's columns, in files: of a dense MLP, and of one expert of a mixture.
_EMBEDDING = "embed_tokens.weight"
_DENSE = r"layers\.{layer}\.(\w+\.)?down_proj\.weight"
_EXPERT = r"layers\.{layer}\.(\w+\.)?experts\.{expert}\.(down_proj|w2)\.weight"


def columns_of(
    checkpoint: Checkpoint, multipliers: NeuronMultipliers, experts: Sequence[tuple[int, int]] | None = None
) -> dict[str, dict[int, float]]:
    """Return tensor name -> column -> multiplier: where the files hold the columns of these neurons.

    ``experts``: as ``Circuit.experts``.

    Raises:
        InputError: a weight is not there under a known name, or is stored quantised.
    """
    found: dict[str, dict[int, float]] = {}
    for layer, of_neurons in multipliers.items():
        n, own = (1, 0) if experts is None else experts[layer]
        for index, multiplier in of_neurons.items():
            expert, column = divmod(index, own) if n > 1 else (None, index)
            found.setdefault(_down_name(checkpoint, layer, expert), {})[column] = multiplier
    return found


def _down_name(checkpoint: Checkpoint, layer: int, expert: int | None) -> str:
    """The name of the tensor with the columns of a layer's neurons, or of one expert's."""
    name = DOWN.format(layer)
    if expert is not None or name not in checkpoint.entries:
        prefixes = [name.removesuffix(_EMBEDDING) for name in checkpoint.entries if name.endswith(_EMBEDDING)]
        front = re.escape(prefixes[0]) if len(prefixes) == 1 else r"(.*\.)?"
        pattern = re.compile(front + (_DENSE if expert is None else _EXPERT).format(layer=layer, expert=expert))
        names = [name for name in checkpoint.entries if pattern.fullmatch(name)]
        of = f"layer {layer}" if expert is None else f"expert {expert} of layer {layer}"
        if len(names) != 1:
            where = next(iter(checkpoint.entries.values())).path.parent
            raise InputError(where, f"expected one down_proj.weight of {of}, found {len(names)}")
        name = names[0]
    entry = checkpoint.entries[name]
    if entry.dtype is None:
        how = "scale the columns of the checkpoint that it was quantised from"
        raise InputError(f"{entry.path}: {name!r}", f"is quantised ({entry.stored}): {how}")
    return name


def require_finite(out: FilePath, name: str, tensor: torch.Tensor) -> None:
    """Raise InputError naming the file and the tensor ``[any, N]`` unless all its numbers are finite."""
    if not tensor.isfinite().all():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{out}: {name!r}", f"would hold infinities or NaN in {dtype}: a smaller multiplier is needed")


@renamed(factors="multipliers")
def to_checkpoint(
    directory: FilePath,
    checkpoint: Checkpoint,
    multipliers: NeuronMultipliers,
    out: FilePath,
    *,
    experts: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Write a copy of a checkpoint whose ``down_proj`` columns are scaled; all other tensors stay byte for byte.

    Files are copied one by one, and columns changed layer by layer. ``out`` appears only when the copy is complete.
    ``experts``: as ``Circuit.experts``.

    Raises:
        InputError: ``out`` exists already, or cannot be written; or a scaled column would hold infinities.
    """
    out = Path(out)
    if is_gguf(directory):
        raise InputError(directory, "is a GGUF file: steered_gguf.to_gguf writes a copy")
    if os.path.lexists(out):
        raise InputError(out, "is there already")
    columns = columns_of(checkpoint, multipliers, experts)
    for name, found in columns.items():  # before anything is written
        require_finite(out, name, _scaled(checkpoint, name, found))
    read = {entry.path.name for entry in checkpoint.entries.values()}
    _check_space(directory, read, out)
    with new_directory(out) as partial:
        for path in sorted(Path(directory).iterdir()):
            if _is_copied(path, read):
                shutil.copyfile(path, partial / path.name)
        if (Path(directory) / FOLDER).is_dir():  # of chat templates
            shutil.copytree(Path(directory) / FOLDER, partial / FOLDER)
        for name, found in columns.items():
            _scale_columns(checkpoint, name, partial, found)


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
