"""What `cna discover` and `cna estimate` do: attribution over many prompts, and its cost beforehand."""

from __future__ import annotations

import json
import os
import signal
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError, one_line
from cna_kernels.files import check_directory, check_writable, make_directory

from ..discovery.job import Job
from ..discovery.parts import merged
from ..discovery.ranks import Ranks
from ..discovery.run_directory import PATIENCE, RunDirectory
from ..discovery.settings import Settings, settings_from
from ..discovery.units import save_columns
from ..prompts.corpus import (
    NEGATIVE,
    POSITIVE,
    UNIVERSAL,
    Contrast,
    Corpus,
    Names,
    contrasts_of,
    entries_of,
    read_contrasts,
    two_sets,
    with_answers,
)
from ..prompts.files import BadLines, iter_prompts, neutral_prompts
from .arguments import (
    chat_options,
    check_column,
    check_output,
    column_of,
    directory_of,
    load_model,
    say_model,
)
from .console import Table, cell, print_json, show_circuit, stdout
from .flags import MOST_THREADS
from .progress import metered


def run_discover(args):
    many = args.contrasts is not None
    if args.output == "-":
        raise InputError("--output", "expected a file; --json prints the circuit on stdout")
    if args.batch is not None and args.batch_tokens is not None:
        raise InputError("--batch-tokens", "give it, or --batch")
    if args.spill is not None and not (args.stream_layers and os.path.isdir(args.spill)):
        raise InputError("--spill", f"expected a directory, and --stream-layers, got {args.spill!r}")
    sides = bool(args.positive), bool(args.negative)
    if args.label is not None and sides != (True, False):
        raise InputError("--label", "is for one file that holds both sides: give it as --positive, and no --negative")
    if many == any(sides) or (args.label is None and sides[0] != sides[1]):
        raise InputError("prompts", "give --positive and --negative, or --positive with --label, or --contrasts")
    for flag in ("contrasts", "run_dir", "stream_layers"):  # and --ray, which needs --run-dir
        if args.score == "relp" and getattr(args, flag):
            what = "relp needs gradients of one contrast in one process"
            raise InputError("--score", f"{what}: it is not for --{flag.replace('_', '-')}")
    read = (args.positive, args.negative, args.universal_prompts, args.universal_contrasts, args.contrasts)
    check_output(args.output, *read)
    if many:
        make_directory(args.output)
    check_writable(Path(args.output, "columns.safetensors") if many else args.output)
    if args.run_dir is not None:
        check_directory(args.run_dir)
    settings = _settings(args)
    threads = _threads(args)
    if threads is not None:
        torch.set_num_threads(threads)
    rank, ranks = _ranks(args)
    bad = BadLines(skip=args.skip_bad)
    with TemporaryFile() as file:
        if rank == 0 or ranks is None:  # ranks None: this process runs all prompts, alone or sharing the layers
            names = Names()
            entries = _entries(args, settings, names, bad)
            corpus = Corpus(file, entries, names, unit=args.unit, streamed=args.stream_layers)
        else:
            ranks.wait_for_start()  # torchrun ends this process if rank 0 cannot start the run
            corpus = RunDirectory.open(args.run_dir, PATIENCE).corpus()
        job = _job(args, corpus, on_ray=args.ray is not None)
        if not rank:
            say_model(job.model, args)
            for note in job.notes:
                print(one_line(f"cna discover: {note}"), file=sys.stderr)
        if args.batch == "auto":
            _choose_batch(job, args)
        notes: dict = {}
        with metered(as_json=args.log_json, notes=notes, rank=rank) as meter:
            options = dict(skip_bad=args.skip_bad, progress=meter)
            if args.run_dir is not None:
                signal.signal(signal.SIGTERM, _interrupt)
            if args.ray:
                run = _run_on_ray(args, corpus, threads, options)
            elif args.run_dir is not None:
                run = job.run_in(args.run_dir, ranks=ranks, **options)
            else:
                totals = job.run_all(**options)
            if rank:
                return
            if args.run_dir is not None:
                totals = merged(run, PATIENCE if ranks or args.ray else 0.0)
            notes["skipped"] = bad.count + totals.n_skipped
        circuits = job.circuits(totals)
    first_skipped = bad.first or next(iter(totals.skipped), None)
    if first_skipped:
        print(f"skipped {notes['skipped']}, the first: {one_line(first_skipped)}", file=sys.stderr)
    marked = job.model.encoder.n_marked
    if marked > 1:  # the first was said when it came
        print(f"{marked} prompts held special tokens", file=sys.stderr)
    if not many:
        circuits["circuit"].save(args.output)
        show_circuit(circuits["circuit"], as_json=args.json)
        print(f"wrote {args.output}", file=sys.stderr)
        return
    for name, circuit in circuits.items():
        circuit.save(Path(args.output, f"{name}.json"))
    save_columns(Path(args.output, "columns.safetensors"), corpus.columns, totals, variance=settings.position == "last")
    _show_circuits(circuits, as_json=args.json)
    print(f"wrote {len(circuits)} circuits and columns.safetensors to {args.output}", file=sys.stderr)


def _settings(args) -> Settings:
    return settings_from(
        args.preset,
        fraction=args.fraction,
        top_k=args.top_k,
        score=args.score,
        universal=False if args.no_universal else True if _universal_file(args) else None,
        skip_layers=_layers(args.skip_layers),
        position=args.position,
        bootstrap=args.bootstrap,
        folds=args.folds,
        seed=args.seed,
    )


def _job(args, corpus: Corpus, *, on_ray: bool = False) -> Job:
    """The job that the options describe. With ``on_ray`` no weights are loaded: selecting circuits needs none."""
    many = args.contrasts is not None
    found = contrasts_of(corpus.columns, args.contrasts or args.universal_contrasts)
    diverse = [contrast for contrast in found if contrast.name.startswith(UNIVERSAL)]
    contrasts = [contrast for contrast in found if contrast not in diverse] if many else [Contrast("circuit", 0, 1)]
    if not contrasts:
        raise InputError(args.contrasts, f"holds no pair of columns NAME{POSITIVE}, NAME{NEGATIVE}")
    if args.universal_contrasts and not diverse:
        raise InputError(args.universal_contrasts, f"holds no pair of columns NAME{POSITIVE}, NAME{NEGATIVE}")
    options: dict[str, Any] = dict(stream_layers=args.stream_layers, spill=args.spill or args.run_dir)
    if on_ray:
        args = Namespace(**vars(args) | {"device": None})  # this machine need not have the workers' device
        options["weights"] = False
    model = load_model(args, **options)
    started = _manifest(args)
    if started is not None and isinstance(started.get("chat"), dict):
        model.encoder.set_day(started["chat"].get("day"))  # a run that goes on sees the day on which it began
    return Job(
        model, corpus, contrasts, _settings(args), diverse=diverse, chat=False if args.no_template else None,
        batch=None if args.batch == "auto" else args.batch, max_tokens=args.batch_tokens,
        squares=many or args.run_dir is not None,
    )  # fmt: skip


def _universal_file(args):
    return args.universal_prompts or args.universal_contrasts


def _ranks(args) -> tuple[int, Ranks | None]:
    """The rank of this process among torchrun's workers, and the Ranks by which they share a run directory's units.

    Ranks are None where the workers do not share the units: one process alone, or rank 0 of tensor parallelism.
    """
    try:
        world = int(os.environ.get("WORLD_SIZE", 1))
        rank = int(os.environ.get("RANK", 0)) if world > 1 else 0
    except ValueError:
        raise InputError("RANK, WORLD_SIZE", "expected numbers, as torchrun sets them") from None
    if args.tensor_parallel:
        return 0, None
    if world > 1 and args.run_dir is None:
        raise InputError("--run-dir", "torchrun's workers need a run directory that all of them see")
    if args.ray and (world > 1 or args.run_dir is None):
        raise InputError("--ray", "needs a run directory that all workers see, and no torchrun")
    if args.ray and args.batch == "auto":
        raise InputError("--batch", "auto measures a model of this process; with --ray give --batch-tokens")
    if args.ray and args.device not in (None, "cpu", "cuda"):
        raise InputError(
            "--device", f"with --ray, which hands the devices out, expected cpu or cuda, got {args.device}"
        )
    if args.workers is not None and not args.ray:
        raise InputError("--workers", "is for --ray")
    return rank, Ranks(rank, world) if world > 1 else None


def _run_on_ray(args, corpus, threads, options) -> RunDirectory:
    """Let Ray's workers do the run. Each makes the job from the same options, so their paths are made absolute."""
    from ..discovery.on_ray import run_on_ray

    paths = {name: os.path.abspath(path) for name, path in vars(args).items() if name in ("run_dir", "spill") and path}
    model = os.path.abspath(args.model) if os.path.exists(args.model) else args.model
    theirs = Namespace(**vars(args) | paths | {"model": model})
    return run_on_ray(
        args.ray,
        paths["run_dir"],
        corpus,
        partial(_job, theirs),
        workers=args.workers,
        threads=threads or 1,
        use_gpus=args.device != "cpu",
        **options,
    )


def _interrupt(*_):
    raise KeyboardInterrupt


def _choose_batch(job, args):
    """--batch auto: take the batch that --run-dir was started with, or measure one where no run was started."""
    if args.stream_layers:
        raise InputError("--batch", "auto measures a model in memory; with --stream-layers give --batch-tokens")
    started = _manifest(args)
    if started is not None:
        job.how = replace(job.how, batch=started.get("batch"), max_tokens=started.get("batch_tokens"))
        return
    size, rates = job.choose_batch()
    measured = ", ".join(f"{tokens}: {rate:,.0f}" for tokens, rate in rates.items())
    print(
        f"batch: {size} tokens a forward pass, as --batch-tokens {size} (tokens/s by size: {measured})", file=sys.stderr
    )


def _manifest(args) -> dict | None:
    """The manifest of the run that --run-dir already holds; None where it holds no run."""
    if args.run_dir is None or not (Path(args.run_dir) / "manifest.json").exists():
        return None
    return RunDirectory.open(args.run_dir).manifest


def _threads(args) -> int | None:
    """The number of threads: --threads, or else the number that the run in --run-dir was started with."""
    started = _manifest(args) if args.threads is None else None
    threads = args.threads if started is None else started.get("threads")
    if threads is not None and threads > MOST_THREADS:
        what = f"expected at most {MOST_THREADS} on this machine, got {threads}; --threads gives another number"
        raise InputError(Path(args.run_dir, "manifest.json: threads"), what)
    return threads


def _entries(args, settings, names, bad):
    """The entries of the corpus of `cna discover`, in the order of its options."""
    check_column(args.column, args.positive, args.negative, args.universal_prompts)
    entries = _all_entries(args, settings, names, bad)
    return with_answers(entries, bad) if settings.position == "answer" else entries


def _all_entries(args, settings, names, bad):
    def prompts(path, limit=None, label=None):
        return iter_prompts(path, column=column_of(args, path), limit=limit, bad=bad, label=label)

    if args.contrasts:
        yield from read_contrasts(args.contrasts, names, bad=bad, limit=args.limit)
    elif args.label is not None:
        label, others = args.label, args.label.others
        both = prompts(args.positive, args.limit, label), prompts(args.positive, args.limit, others)
        yield from two_sets(names, *both)
    else:
        yield from two_sets(names, prompts(args.positive, args.limit), prompts(args.negative, args.limit))
    if not settings.universal:
        return
    if args.universal_contrasts:
        yield from read_contrasts(args.universal_contrasts, names, prefix=UNIVERSAL, bad=bad)
    else:
        yield from entries_of(prompts(args.universal_prompts) if args.universal_prompts else neutral_prompts())


def run_estimate(args):
    from ..discovery.estimate import estimate

    check_column(args.column, args.prompts)
    found = estimate(
        directory_of(args.model),
        iter_prompts(args.prompts, column=column_of(args, args.prompts), limit=args.limit),
        engine=args.engine,
        device=args.device,
        dtype=args.dtype,
        stream_layers=args.stream_layers,
        chat=False if args.no_template else None,
        max_tokens=args.batch_tokens,
        n_columns=args.columns,
        **chat_options(args),
    )
    if args.json:
        print_json(found)
        return
    table = Table(show_header=False)
    prefix = f", {found['tokens_run']:,} to run: the rest is shared" if found["tokens_run"] < found["tokens"] else ""
    table.add_row("prompts", f"{found['prompts']:,}, about {found['tokens']:,} tokens{prefix}")
    for name, size in found["memory_bytes"].items():
        table.add_row(f"memory: {name.replace('_', ' ')}", _bytes(size))
    if found["spilled_bytes"]:
        table.add_row("hidden states on disk", _bytes(found["spilled_bytes"]))
    table.add_row("read from the checkpoint", _bytes(found["read_bytes"]))
    table.add_row(f"parts of {found['units']:,} units, with --run-dir", f"at most {_bytes(found['part_bytes'])}")
    for name, seconds in found["seconds"].items():
        table.add_row(f"time: {name}", f"{seconds:,.1f} s")
    stdout().print(table)


def _bytes(size) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _show_circuits(circuits: dict[str, Circuit], *, as_json: bool):
    if as_json:
        print_json({name: json.loads(circuit.to_json()) for name, circuit in circuits.items()})
        return
    table = Table("contrast", "neurons", "top neuron", "stability")
    for name, circuit in circuits.items():
        layer, index, value = circuit.neurons[0]
        stability = f"{100 * circuit.bootstrap['overlap']:.0f}%" if circuit.bootstrap else "-"
        table.add_row(cell(name), str(circuit.k), f"{layer}, {index}: {value:+.4f}", stability)
    stdout().print(table)


def _layers(text):
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError("--skip-layers", f"expected layers such as 0,1, got {text!r}") from None
