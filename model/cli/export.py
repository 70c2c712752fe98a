"""What `cna export` does."""

from __future__ import annotations

from pathlib import Path

from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError
from cna_kernels.files import check_directory, check_writable, parents_made

from ..checkpoint import export, lora
from ..checkpoint.gguf_file import is_gguf
from ..checkpoint.steered_gguf import to_gguf
from ..hub.find import circuit_path
from ..hub.names import cached_name
from ..language_model import load
from .arguments import check_output, directory_of, load_circuit, multipliers_of
from .console import stdout


def run_export(args):
    multipliers = multipliers_of(args.multiplier, "--multiplier")
    if len(multipliers) == 1:
        multipliers *= len(args.circuit)
    for name in ("max_rank", "split", "uniform_rank", "reader", "base_model"):
        if getattr(args, name) and args.to != "lora":
            flag = "--for" if name == "reader" else f"--{name.replace('_', '-')}"
            raise InputError(flag, "is for --to lora")
    with parents_made(args.output):
        export_to(args, multipliers)


def export_to(args, multipliers):
    if args.to == "ref-code":
        check_writable(args.output)
        check_output(args.output, *args.circuit)
    elif args.to == "lora":
        check_directory(args.output)
    directory = directory_of(args.model)
    model = load(directory, engine=args.engine, device="cpu", weights=False)  # only the headers are read
    if not args.any_model and "decoder_sha256" not in model.identity() and any(map(by_decoder_alone, args.circuit)):
        model = load(directory, engine=args.engine, device="cpu")  # its hash is that of the loaded model
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
    if args.to == "checkpoint" and is_gguf(directory):
        off = to_gguf(directory, of_neurons, args.output)
        how = f"to within {off:.1g} of themselves, as scales of blocks are fp16" if off else "exactly"
        stdout().print(f"wrote {args.output}: {n} rows of ffn_up scaled {how}", markup=False, soft_wrap=True)
        return
    if args.to == "checkpoint":
        export.to_checkpoint(directory, model.checkpoint, of_neurons, args.output, experts=model.config.experts)
        stdout().print(f"wrote {args.output}/: {n} columns scaled", markup=False)
        return
    base, revision, said = base_model_of(args.base_model, directory)
    names = ", ".join(f"{Path(path).name} at {m:g}" for path, m in zip(args.circuit, multipliers, strict=True))
    written = lora.to_lora(
        model.checkpoint, model.config, of_neurons, args.output, base_model=base, revision=revision,
        engine=args.reader, max_rank=args.max_rank, split=args.split, uniform=args.uniform_rank, dtype=args.dtype,
        about=f"Circuits: {names}.",
    )  # fmt: skip
    paths = ", ".join(f"{path}/" for path in written)
    largest = max(map(len, of_neurons.values()))
    wrote = f"wrote {paths}: {n} neurons in {len(of_neurons)} layers, at most {largest} in one"
    for sentence in (wrote, said, *notes(args, multipliers, largest)):  # commands to copy, which are not to be wrapped
        stdout().print(sentence, markup=False, soft_wrap=True)


def by_decoder_alone(path) -> bool:
    """Whether a circuit's file knows its model by the hash of the decoder alone, as those of ``attach`` do."""
    known = Circuit.load(circuit_path(path)).model or {}
    return "decoder_sha256" in known and "tensors_sha256" not in known


def base_model_of(given: str | None, directory) -> tuple[str, str | None, str]:
    """The base model that an adapter records, which PEFT's AutoPeftModel follows, its commit, and a sentence about it.

    A directory of the Hub's cache has the Hub's name; another one is a path. ``_name_or_path`` of config.json is no
    name: it often is that of the model which this one was trained from.
    """
    if given:
        return given, None, f"base model: {given}"
    cached = cached_name(directory)
    if cached is not None:
        file = f": {cached.file}, which PEFT cannot follow; --base-model names another" if is_gguf(directory) else ""
        return cached.repo, cached.revision, f"base model: {cached.repo}, at {cached.revision}{file}"
    if is_gguf(directory):
        name = Path(directory).resolve().name
        return name, None, f"base model: {name}, a file that PEFT cannot follow; --base-model names another"
    path = str(Path(directory).resolve())
    return path, None, f"base model: {path}; --base-model gives the adapter another name to share it under"


def notes(args, multipliers, largest: int):
    """What a user of the engine must know."""
    if args.reader == "vllm":
        needed = lora.vllm_rank(largest)
        yield f"vllm serve MODEL --enable-lora --max-lora-rank {needed} --lora-modules NAME={args.output}"
    if args.reader in lora.UNIFORM and not set(multipliers) <= {0.0, 2.0}:
        yield "it holds adapters in the model's dtype: for multipliers but 0 and 2 bf16 rounds the correction"
    if args.reader == "llama.cpp":
        yield f"python convert_lora_to_gguf.py {args.output} --base MODEL --outfile adapter.gguf"
