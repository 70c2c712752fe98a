"""How results are shown. This module imports nothing heavy, so that ``cna show`` answers at once."""

from __future__ import annotations

import json
import unicodedata

from cna_kernels.circuit import Circuit
from cna_kernels.errors import one_line

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError:
    from .plain import SIMPLE_HEAD as SIMPLE_HEAD  # type: ignore[assignment]
    from .plain import Console, Table, Text  # type: ignore[assignment]


def show_circuit(circuit: Circuit, *, as_json: bool, imported: bool = False):
    """Print a circuit: its neurons per layer, the ten best neurons, filters, stability and provenance.

    ``imported``: the circuit's file holds neither the model's shape nor how the neurons were chosen.
    """
    if as_json:
        print(circuit.to_json(), end="")
        return
    console = stdout()
    total = circuit.n_all
    of_all = "neurons" if imported else f"of {total} neurons ({100 * circuit.k / total:.3g}%)"
    print_line(console, f"{circuit.k} {of_all}, score {circuit.score}")
    per_layer = circuit.per_layer()
    table = Table("layer", "neurons", "share", title="neurons per layer", title_justify="left")
    for layer, count in enumerate(per_layer):
        if count:
            table.add_row(str(layer), str(count), f"{100 * count / circuit.k:.0f}%")
    console.print(table)
    expert = [] if circuit.experts is None else ["expert"]
    table = Table("rank", "layer", *expert, "neuron", "contrast", title="top neurons", title_justify="left")
    for rank, (layer, index, value) in enumerate(circuit.neurons[:10], 1):
        place = circuit.expert_of(layer, index)[1 - len(expert) :]
        table.add_row(str(rank), str(layer), *map(str, place), f"{value:+.4f}")
    console.print(table)
    if circuit.mirrored is not None:
        print_line(console, f"aligned: {len(circuit.mirrored)} of the neurons get 2 - m where the others get m")
    elif circuit.positive_mean is not None:
        n = len(circuit.aligned().mirrored or ())
        print_line(console, f"contrast against the mean on positive prompts: {n} neurons, which --sign aligned mirrors")
    universal = circuit.universal
    if circuit.made_from is not None:
        print_line(console, f"{circuit.made_from['operation']} of {len(circuit.made_from['circuits'])} circuits")
    if imported or (universal is None and circuit.made_from is not None):
        print_line(console, "universal filter: not known")
    elif universal is None:
        print_line(console, "universal filter: off")
    else:
        print_line(
            console,
            f"universal filter: {len(universal['excluded'])} neurons left out, among the top "
            f"{100 * universal['fraction']:g}% on {100 * universal['threshold']:g}% or more of "
            f"{universal['prompts']} prompts",
        )
    if circuit.bootstrap:
        print_line(
            console,
            f"bootstrap: {100 * circuit.bootstrap['overlap']:.0f}% of the neurons are selected again when the prompts "
            f"are drawn again ({circuit.bootstrap['replicates']} times)",
        )
    if circuit.folds:
        overlap, retained = (sum(circuit.folds[name]) / circuit.folds["n"] for name in ("overlap", "retained"))
        print_line(
            console,
            f"{circuit.folds['n']} folds: {100 * overlap:.0f}% of the neurons are selected without a fold, and its "
            f"prompts show {100 * retained:.0f}% of the contrast",
        )
    if circuit.skipped_layers:
        print_line(console, f"layers left out: {', '.join(map(str, circuit.skipped_layers))}")
    if circuit.model:
        dtype, position = circuit.dtype or "dtype unknown", circuit.position or "unknown"
        print_line(console, f"found in {circuit.model['name']!r}, {dtype}, position: {position}")
        if circuit.model.get("repo"):
            commit = circuit.model.get("revision") or "not known"
            print_line(console, f"on the Hugging Face Hub: {circuit.model['repo']}, commit {commit}")
    if circuit.prompts:
        counts = ", ".join(f"{side['count']} {name}" for name, side in circuit.prompts.items())
        print_line(console, f"prompts: {counts}; preset: {circuit.preset or 'none'}")


def print_line(console, text):
    """Print text that may come from a file: no markup, no terminal escapes."""
    console.print(one_line(text), markup=False)


def stdout() -> Console:
    return Console(highlight=False, soft_wrap=False)


def print_json(value):
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def cell(text):
    """Model output as table text: no markup, no terminal escapes."""
    return Text("".join(c if c.isprintable() or _is_harmless(c) else "\ufffd" for c in text.expandtabs(4)))


def _is_harmless(character):
    """Whether a character that Python does not call printable may go to a terminal: ends of lines, spaces, joiners."""
    return character in "\n\u200c\u200d" or unicodedata.category(character) == "Zs"
