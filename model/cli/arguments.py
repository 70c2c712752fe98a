"""Arguments that mean the same to every command: a model, a circuit, multipliers, a column."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError
from cna_kernels.steering import check_multiplier

from ..demo.checkpoint import demo_checkpoint
from ..language_model import LanguageModel, load
from ..prompts.files import RECORD_FORMATS


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


def multipliers_of(text: str, flag: str) -> list[float]:
    """The multipliers in a list such as "0,0.5,2"."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(flag, f"expected numbers such as 0,0.5,2, got {text!r}") from None
    for value in values:
        check_multiplier(value)
    return values


def column_of(args, path):
    """The value of --column for a file that has columns; None for a file of plain text, which has none."""
    return args.column if Path(path).suffix.lower() in RECORD_FORMATS else None


def check_column(column, *paths):
    if column is not None and not any(path and Path(path).suffix.lower() in RECORD_FORMATS for path in paths):
        raise InputError("--column", f"is for {', '.join(RECORD_FORMATS)} files, and none is given")
