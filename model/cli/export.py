"""What `cna export` does."""

from __future__ import annotations

from pathlib import Path

from cna_kernels.errors import InputError
from cna_kernels.files import check_directory, check_writable

from ..checkpoint import export
from ..language_model import load
from .arguments import check_output, directory_of, load_circuit, multipliers_of
from .console import stdout


def run_export(args):
    multipliers = multipliers_of(args.multiplier, "--multiplier")
    if len(multipliers) == 1:
        multipliers *= len(args.circuit)
    for flag, given in (("--max-rank", args.max_rank), ("--split", args.split), ("--uniform-rank", args.uniform_rank)):
        if given and args.to != "lora":
            raise InputError(flag, "is for --to lora")
    if args.to == "ref-code":
        check_writable(args.output)
        check_output(args.output, *args.circuit)
    elif args.to == "lora":
        check_directory(args.output)
    directory = directory_of(args.model)
    model = load(directory, stream_layers=True)  # stream_layers: only the headers are read
    circuits = [
        load_circuit(path, model, any_model=args.any_model, sign=args.sign, prompts=False) for path in args.circuit
    ]
    if args.to == "ref-code":
        if len(circuits) > 1:
            raise InputError("--circuit", "the public code's JSON holds one circuit")
        export.to_ref_code(circuits[0], args.output)
        stdout().print(f"wrote {args.output}", markup=False)
        return
    of_neurons = export.neuron_multipliers(circuits, multipliers)
    n = sum(map(len, of_neurons.values()))
    if args.to == "checkpoint":
        export.to_checkpoint(directory, model.checkpoint, of_neurons, args.output)
        stdout().print(f"wrote {args.output}/: {n} columns scaled", markup=False)
        return
    written = export.to_lora(
        model.checkpoint, model.config, of_neurons, args.output, base_model=str(Path(directory).resolve().name),
        max_rank=args.max_rank, split=args.split, uniform=args.uniform_rank, dtype=args.dtype,
    )  # fmt: skip
    names = ", ".join(f"{path}/" for path in written)
    ranks = f"{n} neurons in {len(of_neurons)} layers, at most {max(map(len, of_neurons.values()))} in one"
    stdout().print(f"wrote {names}: {ranks}", markup=False)
