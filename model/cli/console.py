"""What commands share: arguments that mean the same everywhere, and how results are shown."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cna_kernels.checks import InputError, one_line
from cna_kernels.circuit import Circuit
from cna_kernels.steering import check_multiplier

from ..demo.checkpoint import demo_checkpoint
from ..language_model import LanguageModel, load
from ..prompts.files import RECORD_FORMATS


def load_model(args, **options) -> LanguageModel:
    return load(directory_of(args.model), device=device_of(args), dtype=args.dtype, **options)


def directory_of(model):
    """The directory of MODEL; demo:NAME is a bundled one."""
    if model.startswith("demo:") and not Path(model).exists():
        return demo_checkpoint(model.removeprefix("demo:"))
    return model


def device_of(args) -> str:
    """The device asked for; by default a GPU where there is one, under torchrun one for each worker."""
    if args.device is not None:
        return args.device
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def load_circuit(path, model: LanguageModel, *, any_model: bool) -> Circuit:
    """The circuit of a file, checked against the model in hand."""
    circuit = Circuit.load(path, n_layers=model.config.num_hidden_layers, n_neurons=model.config.intermediate_size)
    model.check_circuit(circuit, path, any_model=any_model)
    return circuit


def multipliers_of(text: str, flag: str) -> list[float]:
    """The numbers of "0,0.5,2"."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(flag, f"expected numbers such as 0,0.5,2, got {text!r}") from None
    for value in values:
        check_multiplier(value)
    return values


def show_circuit(circuit: Circuit, *, as_json: bool):
    """Print neurons per layer, the ten best, and what was filtered."""
    if as_json:
        print(circuit.to_json(), end="")
        return
    console = stdout()
    total = circuit.n_layers * circuit.n_neurons
    _print(console, f"{circuit.k} of {total} neurons ({100 * circuit.k / total:.3g}%), score {circuit.score}")
    per_layer = circuit.per_layer()
    table = Table("layer", "neurons", "share", title="neurons per layer", title_justify="left")
    for layer, count in enumerate(per_layer):
        if count:
            table.add_row(str(layer), str(count), f"{100 * count / circuit.k:.0f}%")
    console.print(table)
    table = Table("rank", "layer", "neuron", "contrast", title="top neurons", title_justify="left")
    for rank, (layer, index, value) in enumerate(circuit.neurons[:10], 1):
        table.add_row(str(rank), str(layer), str(index), f"{value:+.4f}")
    console.print(table)
    universal = circuit.universal
    if universal is None:
        _print(console, "universal filter: off")
    else:
        _print(
            console,
            f"universal filter: {len(universal['excluded'])} neurons left out, among the top "
            f"{100 * universal['fraction']:g}% on {100 * universal['threshold']:g}% or more of "
            f"{universal['prompts']} prompts",
        )
    if circuit.bootstrap:
        _print(
            console,
            f"bootstrap: {100 * circuit.bootstrap['overlap']:.0f}% of the neurons are selected again when the prompts "
            f"are drawn again ({circuit.bootstrap['replicates']} times)",
        )
    if circuit.folds:
        overlap, retained = (sum(circuit.folds[name]) / circuit.folds["n"] for name in ("overlap", "retained"))
        _print(
            console,
            f"{circuit.folds['n']} folds: {100 * overlap:.0f}% of the neurons are selected without a fold, and its "
            f"prompts show {100 * retained:.0f}% of the contrast",
        )
    if circuit.skipped_layers:
        _print(console, f"layers left out: {', '.join(map(str, circuit.skipped_layers))}")
    if circuit.model:
        _print(console, f"found in {circuit.model['name']!r}, {circuit.dtype}, position: {circuit.position}")
    if circuit.prompts:
        counts = ", ".join(f"{side['count']} {name}" for name, side in circuit.prompts.items())
        _print(console, f"prompts: {counts}; preset: {circuit.preset or 'none'}")


def _print(console, text):
    """Print text that may come from a file: no markup, no terminal escapes."""
    console.print(one_line(text), markup=False)


def stdout() -> Console:
    return Console(highlight=False, soft_wrap=False)


def print_json(value):
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def column_of(args, path):
    """--column is for the files that have columns; plain text beside them has none."""
    return args.column if Path(path).suffix.lower() in RECORD_FORMATS else None


def check_column(column, *paths):
    if column is not None and not any(path and Path(path).suffix.lower() in RECORD_FORMATS for path in paths):
        raise InputError("--column", f"is for {', '.join(RECORD_FORMATS)} files, and none is given")


def cell(text):
    """Model output as table text: no markup, no terminal escapes."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text))
