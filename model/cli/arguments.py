"""Arguments that mean the same to every command: a model, a circuit, multipliers, a column."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError
from cna_kernels.steering import check_multiplier

from ..demo.checkpoint import demo_checkpoint
from ..language_model import LanguageModel, load
from ..prompts.files import RECORD_FORMATS

MOST, LARGEST = 256, 1e6  # multipliers of a command, and the largest


def load_model(args, **options) -> LanguageModel:
    return load(directory_of(args.model), device=device_of(args), dtype=args.dtype, **options)


def directory_of(model):
    """The directory of the argument MODEL; demo:NAME stands for a bundled checkpoint."""
    if model.startswith("demo:") and not Path(model).exists():
        return demo_checkpoint(model.removeprefix("demo:"))
    return model


def device_of(args) -> str:
    """The value of --device. Its default is a GPU where there is one, under torchrun another GPU for each worker."""
    if args.device is not None:
        return args.device
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def load_circuit(path, model: LanguageModel, *, any_model: bool, chat: bool | None = None) -> Circuit:
    """The circuit of a file, checked against the loaded model. ``chat``: whether prompts go through its template."""
    circuit = Circuit.load(path, n_layers=model.config.num_hidden_layers, n_neurons=model.config.intermediate_size)
    model.check_circuit(circuit, path, any_model=any_model, chat=chat)
    return circuit


def together(paths, circuits: Sequence[Circuit], multiplier: float) -> Circuit:
    """Several circuits that steer one model at the same multiplier, as one circuit.

    Raises:
        InputError: a neuron is in two circuits, and the multiplier changes it by another factor when applied twice.
    """
    if len(circuits) == 1:
        return circuits[0]
    neurons: dict[tuple[int, int], float] = {}
    for path, circuit in zip(paths, circuits, strict=True):
        for layer, index, contrast in circuit.neurons:
            if (layer, index) in neurons and multiplier not in (0, 1):
                what = f"neuron {index} of layer {layer} is in another circuit, too: {multiplier:g} would count twice"
                raise InputError(path, f"{what}; cna export multiplies the multipliers of such neurons")
            neurons.setdefault((layer, index), contrast)
    found = tuple((*place, contrast) for place, contrast in neurons.items())
    return Circuit(found, circuits[0].n_layers, circuits[0].n_neurons)


def multipliers_of(text: str, flag: str) -> list[float]:
    """The multipliers in a list such as "0,0.5,2": at most MOST, each from -LARGEST to LARGEST."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(flag, f"expected numbers such as 0,0.5,2, got {text!r}") from None
    if len(values) > MOST:
        raise InputError(flag, f"expected at most {MOST} numbers, got {len(values)}")
    for value in values:
        if abs(check_multiplier(value)) > LARGEST:
            raise InputError(flag, f"expected numbers from {-LARGEST:g} to {LARGEST:g}, got {value:g}")
    return values


def column_of(args, path):
    """The value of --column for a file that has columns; None for a file of plain text, which has none."""
    return args.column if Path(path).suffix.lower() in RECORD_FORMATS else None


def check_column(column, *paths):
    if column is not None and not any(path and Path(path).suffix.lower() in RECORD_FORMATS for path in paths):
        raise InputError("--column", f"is for {', '.join(RECORD_FORMATS)} files, and none is given")
