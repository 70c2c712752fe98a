"""Arguments that mean the same to every command: a model, a circuit, multipliers, a column."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError, InputWarning, one_line
from cna_kernels.steering import check_multiplier

from ..circuit_files import read_circuit
from ..engines import Chosen
from ..hub.find import find_model
from ..language_model import LanguageModel, load
from ..prompts.files import file_and_column
from ..prompts.formats import WITH_COLUMNS, format_of, is_pipe

MOST, LARGEST = 256, 1e6  # multipliers of a command, and the largest


def load_model(args, directory=None, **options) -> LanguageModel:
    """The model of a command, with what its flags say about chats."""
    directory = args.model if directory is None else directory
    if not options.get("stream_layers"):
        options["mesh"] = getattr(args, "lead", None)  # of --tensor-parallel
    return load(
        directory, device=args.device, dtype=args.dtype, **engine_options(args), **chat_options(args), **options
    )


def engine_options(args) -> dict[str, Any]:
    """The options of ``load`` that say what runs the model."""
    given = dict(args.model_arg)
    if len(given) < len(args.model_arg):
        raise InputError("--model-arg", f"gives an argument twice: {', '.join(key for key, _ in args.model_arg)}")
    return dict(engine=args.engine, device_map=args.device_map, model_args=given or None)


def engine_of(args, directory) -> str:
    """The engine that the flags of a command choose for a checkpoint: "own" or "transformers"."""
    given = engine_options(args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)  # the model that is then loaded says it
        for_hf = bool(given["device_map"] or given["model_args"])
        return Chosen(find_model(directory).path, given["engine"], hf_only=for_hf).engine


def chat_options(args) -> dict[str, Any]:
    """The options of ``load`` that say what a chat holds besides the prompt. Refuses them where there is no chat."""
    given = dict(args.template_arg)
    if len(given) < len(args.template_arg):
        raise InputError("--template-arg", f"gives a variable twice: {', '.join(key for key, _ in args.template_arg)}")
    if args.no_template and (given or args.system is not None):
        raise InputError("--template-arg" if given else "--system", "is for the chat template, not for --no-template")
    return dict(system=args.system, template_args=given)


def say_model(model: LanguageModel, args, *, hashed: bool = True) -> None:
    """Say on stderr which model, template and stop tokens the command uses."""
    chat = False if args.no_template else None
    print(one_line(f"cna {args.command}: {model.describe(chat, hashed=hashed)}"), file=sys.stderr)
    if (model.encoder.system is not None or model.encoder.template_args) and not model.encoder.uses_chat(chat):
        raise InputError(model.directory, "has no chat template, which --system and --template-arg are for")


def directory_of(model):
    """The directory or GGUF file of the argument MODEL; see :func:`find_model`."""
    return str(find_model(model).path)


def load_circuit(
    path,
    model: LanguageModel,
    *,
    any_model: bool,
    chat: bool | None = None,
    prompts: bool = True,
    sign: str | None = None,
) -> Circuit:
    """The circuit of a file, as :func:`read_circuit` reads it. ``sign``: a value of --sign, see :func:`signed`."""
    circuit = read_circuit(path, model, any_model=any_model, chat=chat, prompts=prompts)
    try:
        return signed(circuit, sign)
    except InputError as error:
        raise InputError(path, error) from None


def signed(circuit: Circuit, sign: str | None) -> Circuit:
    """The circuit that a value of --sign makes of a circuit: a half, or the aligned one. None leaves it as it is."""
    return circuit if sign is None else getattr(circuit, sign)()


def together(paths, circuits: Sequence[Circuit], multiplier: float) -> Circuit:
    """Several circuits that steer one model at the same multiplier, as one circuit.

    Raises:
        InputError: a neuron is in two circuits, and the multiplier changes it by another factor when applied twice.
    """
    if len(circuits) == 1:
        return circuits[0]
    neurons: dict[tuple[int, int], float] = {}
    factors: dict[tuple[int, int], float] = {}
    mirrored = {pair for circuit in circuits for pair in circuit.mirrored or ()}
    for path, circuit in zip(paths, circuits, strict=True):
        for (layer, index, contrast), factor in zip(circuit.neurons, circuit.multipliers(multiplier), strict=True):
            if (layer, index) in neurons and (factor not in (0, 1) or factors[layer, index] != factor):
                twice = f"{factor:g} would count twice" if factors[layer, index] == factor else "with 2 - m"
                what = f"neuron {index} of layer {layer} is in another circuit, too: {twice}"
                raise InputError(path, f"{what}; cna export multiplies the multipliers of such neurons")
            neurons.setdefault((layer, index), contrast)
            factors[layer, index] = factor
    found = tuple((*place, contrast) for place, contrast in neurons.items())
    plain = all(circuit.mirrored is None for circuit in circuits)
    return Circuit(
        found,
        circuits[0].n_layers,
        circuits[0].n_neurons,
        mirrored=None if plain else tuple(sorted(mirrored)),
        experts=next((circuit.experts for circuit in circuits if circuit.experts), None),
    )


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


def check_output(output, *inputs):
    """Refuse an output that is a file which the command reads."""
    for path in filter(None, inputs):
        path = file_and_column(path)[0]
        if os.path.exists(output) and os.path.exists(path) and os.path.samefile(output, path):
            raise InputError("--output", f"{str(output)!r} is a file that the command reads")


def column_of(args, path):
    """The value of --column for a file that has columns; None for a file of plain text, which has none."""
    return args.column if _has_columns(path) else None


def check_column(column, *paths):
    """Refuse --column where none of the files has columns."""
    if column is not None and not any(path and _has_columns(path) for path in paths):
        raise InputError("--column", f"is for {', '.join(WITH_COLUMNS)} files, and none is given")


def _has_columns(path) -> bool:
    path = file_and_column(path)[0]
    return is_pipe(path) or format_of(path) != "lines"  # what a pipe holds shows when it is read
