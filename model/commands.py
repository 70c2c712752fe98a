"""What each command of the command line does. Results go to stdout, progress to stderr."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import signal
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile

import torch
from rich.console import Console
from rich.table import Table

import cna_kernels
from cna_kernels import backends
from cna_kernels.checks import InputError, one_line
from cna_kernels.circuit import Circuit
from cna_kernels.files import check_writable, make_directory
from cna_kernels.steering import check_multiplier

from .attribute import save_columns
from .corpus import (
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
from .demo.checkpoint import demo_checkpoint
from .discover import settings_from
from .job import Job
from .language_model import LanguageModel, load
from .memory import usable_device
from .meter import metered
from .prompts import RECORD_FORMATS, BadLines, PromptSet, iter_prompts, neutral_prompts, read_prompts
from .run_directory import RunDirectory


def run_demo(args):
    from .demo.story import tell

    tell(args.out, stdout())


def run_discover(args):
    many = args.contrasts is not None
    if args.output == "-":
        raise InputError("--output", "expected a file; --json prints the circuit on stdout")
    if args.batch is not None and args.batch_tokens is not None:
        raise InputError("--batch-tokens", "give it, or --batch")
    if args.spill is not None and not (args.stream_layers and Path(args.spill).is_dir()):
        raise InputError("--spill", "expected a directory, and --stream-layers")
    if many == bool(args.positive or args.negative) or bool(args.positive) != bool(args.negative):
        raise InputError("prompts", "give --positive and --negative, or --contrasts")
    if many:
        make_directory(args.output)
    check_writable(Path(args.output, "columns.safetensors") if many else args.output)
    settings = settings_from(
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
    _set_threads(args)
    rank, world = _worker(args)
    bad = BadLines(skip=args.skip_bad)
    with TemporaryFile() as file:
        if rank == 0 or args.tensor_parallel:
            names = Names()
            entries = _entries(args, settings, names, bad)
            corpus = Corpus(file, entries, names, unit=args.unit, streamed=args.stream_layers)
        else:
            corpus = RunDirectory.wait(args.run_dir).corpus()  # torchrun ends us if the first worker cannot start one
        found = contrasts_of(corpus.columns, args.contrasts or args.universal_contrasts)
        diverse = [contrast for contrast in found if contrast.name.startswith(UNIVERSAL)]
        contrasts = [contrast for contrast in found if contrast not in diverse] if many else [Contrast("circuit", 0, 1)]
        if not contrasts:
            raise InputError(args.contrasts, f"holds no pair of columns NAME{POSITIVE}, NAME{NEGATIVE}")
        if args.universal_contrasts and not diverse:
            raise InputError(args.universal_contrasts, f"holds no pair of columns NAME{POSITIVE}, NAME{NEGATIVE}")
        options = dict(stream_layers=args.stream_layers, spill=args.spill or args.run_dir)
        if args.tensor_parallel:
            from .parallel import open_mesh

            options = dict(mesh=open_mesh(usable_device(_device(args))))
        model = load_model(args, **options)
        batch, tokens = (None if args.batch == "auto" else args.batch), args.batch_tokens
        how = dict(chat=False if args.no_template else None, batch=batch, max_tokens=tokens)
        job = Job(model, corpus, contrasts, settings, diverse=diverse, squares=many or args.run_dir is not None, **how)
        if args.batch == "auto":
            _choose_batch(job, args)
        notes: dict = {}
        with metered(as_json=args.log_json, notes=notes, rank=rank) as meter:
            options = dict(skip_bad=args.skip_bad, progress=meter)
            if args.run_dir is None:
                totals = job.run_all(**options)
                if rank:
                    return
            else:
                signal.signal(signal.SIGTERM, _interrupt)
                options |= dict(rank=rank, world=world, adopt_batch=args.batch == "auto")
                run = job.run_in(args.run_dir, **options)
                if rank:
                    return
                totals = run.merged()
            notes["skipped"] = bad.count + totals.n_skipped
        circuits = job.circuits(totals)
    first_skipped = bad.first or next(iter(totals.skipped), None)
    if first_skipped:
        print(f"skipped {notes['skipped']}, the first: {one_line(first_skipped)}", file=sys.stderr)
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


def _universal_file(args):
    return args.universal_prompts or args.universal_contrasts


def _worker(args) -> tuple[int, int]:
    """Which of how many workers torchrun says this is."""
    try:
        world = int(os.environ.get("WORLD_SIZE", 1))
        rank = int(os.environ.get("RANK", 0)) if world > 1 else 0
    except ValueError:
        raise InputError("RANK, WORLD_SIZE", "expected numbers, as torchrun sets them") from None
    if args.tensor_parallel:
        if args.run_dir is not None or args.stream_layers or args.batch == "auto":
            raise InputError("--tensor-parallel", "is not for --run-dir, --stream-layers or --batch auto")
        if world < 2:
            raise InputError("--tensor-parallel", "is for the workers that torchrun starts, 2 or more")
    elif world > 1 and args.run_dir is None:
        raise InputError("--run-dir", "torchrun's workers need a run directory that all of them see")
    return rank, world


def _interrupt(*_):
    raise KeyboardInterrupt


def _choose_batch(job, args):
    """--batch auto: what a run was started with, else what is measured now."""
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
    """The manifest of the run that --run-dir already holds."""
    if args.run_dir is None or not (Path(args.run_dir) / "manifest.json").exists():
        return None
    return RunDirectory.open(args.run_dir).manifest


def _set_threads(args):
    """As many threads as asked for; who joins a run takes those that it was started with."""
    threads = args.threads
    started = _manifest(args)
    if threads is None and started is not None:
        threads = started.get("threads")
    if threads is not None:
        torch.set_num_threads(threads)


def _entries(args, settings, names, bad):
    """The corpus of `cna discover`, in the order of its options."""
    _check_column(args.column, args.positive, args.negative, args.universal_prompts)
    entries = _all_entries(args, settings, names, bad)
    return with_answers(entries, bad) if settings.position == "answer" else entries


def _all_entries(args, settings, names, bad):
    def prompts(path, limit=None):
        return iter_prompts(path, column=_column(args, path), limit=limit, bad=bad)

    if args.contrasts:
        yield from read_contrasts(args.contrasts, names, bad=bad, limit=args.limit)
    else:
        yield from two_sets(names, prompts(args.positive, args.limit), prompts(args.negative, args.limit))
    if not settings.universal:
        return
    if args.universal_contrasts:
        yield from read_contrasts(args.universal_contrasts, names, prefix=UNIVERSAL, bad=bad)
    else:
        yield from entries_of(prompts(args.universal_prompts) if args.universal_prompts else neutral_prompts())


def run_estimate(args):
    from .estimate import estimate

    _check_column(args.column, args.prompts)
    found = estimate(
        _directory(args.model),
        iter_prompts(args.prompts, column=_column(args, args.prompts), limit=args.limit),
        device=_device(args),
        dtype=args.dtype,
        stream_layers=args.stream_layers,
        chat=False if args.no_template else None,
        max_tokens=args.batch_tokens,
        n_columns=args.columns,
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


def run_status(args):
    status = RunDirectory.open(args.run).status()
    if args.json:
        print_json(status)
        return
    table = Table(show_header=False)
    for name in ("units", "prompts"):
        table.add_row(name, f"{status[f'{name}_done']:,} of {status[name]:,} done")
    table.add_row("model", _cell(status["model"]))
    table.add_row("parts", f"{status['part_bytes'] / 2**20:,.1f} MiB")
    for worker in status["workers"]:
        what = f"{worker['state']}, {worker['host']} process {worker['pid']}, last sign {worker['silent_s']:.0f} s ago"
        table.add_row(f"unit {worker['unit']}", _cell(what))
    stdout().print(table)


def run_show(args):
    show_circuit(Circuit.load(args.circuit), as_json=args.json)


def run_run(args):
    texts = list(args.prompt or [])
    prompts = PromptSet.of(texts, "--prompt") if texts else None
    if args.prompts:
        _check_column(args.column, args.prompts)
        prompts = read_prompts(args.prompts, column=_column(args, args.prompts), limit=args.limit)
    if prompts is None or (texts and args.prompts):
        raise InputError("prompts", "give either -p TEXT or --prompts FILE")
    multipliers = _multipliers(args.multiplier)
    model = load_model(args)
    circuit = None
    if args.circuit:
        shape = {"n_layers": model.config.num_hidden_layers, "n_neurons": model.config.intermediate_size}
        circuit = Circuit.load(args.circuit, **shape)
        model.check_circuit(circuit, args.circuit, any_model=args.any_model)
    # Every prompt once unsteered and once at each multiplier, all rows of the same batches.
    columns = [None] if circuit is None else [None, *multipliers]
    n_prompts = len(prompts)
    rows = PromptSet(prompts.texts * len(columns), prompts.places * len(columns))
    answers = model.generate(
        rows,
        circuit=None if circuit is None else [m if m is None else circuit for m in columns for _ in range(n_prompts)],
        multiplier=0.0 if circuit is None else [m or 0.0 for m in columns for _ in range(n_prompts)],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.sample_top_k,
        top_p=args.top_p,
        seed=[args.seed + number for _ in columns for number in range(n_prompts)],
        chat=False if args.no_template else None,
        batch=None if args.batch == "auto" else args.batch,
    )
    results = [
        {
            "prompt": text,
            "answers": [{"multiplier": m, "text": answers[c * n_prompts + n]} for c, m in enumerate(columns)],
        }
        for n, text in enumerate(prompts.texts)
    ]
    if args.json:
        print_json(results)
        return
    table = Table(show_lines=True)
    table.add_column("prompt")
    for m in columns:
        table.add_column("unsteered" if m is None else f"m = {m:g}")
    for result in results:
        table.add_row(*[_cell(text) for text in (result["prompt"], *(a["text"] for a in result["answers"]))])
    stdout().print(table)


def run_doctor(args):
    cuda = torch.cuda.is_available()
    facts = {
        "cna_kernels": cna_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "cuda": torch.cuda.get_device_name() if cuda else "not available",
        "CNA_BACKEND": os.environ.get("CNA_BACKEND") or "not set",
    }
    for name in ("triton", "safetensors", "tokenizers"):
        facts[name] = _version(name)
    devices = [torch.device(name) for name in (("cpu", "cuda") if cuda else ("cpu",))]
    for device in devices:
        try:
            facts[f"ops on {device}"] = backends.name_for(device)
        except InputError as error:
            facts[f"ops on {device}"] = str(error)
        for name in backends.KNOWN:
            reason = backends.missing(name, device)
            facts[f"backend {name} on {device}"] = "available" if reason is None else reason
    facts["CNA_PLAN"] = os.environ.get("CNA_PLAN") or "not set"
    facts.update(_cpu_engine())
    facts.update(_kernel_plans(cuda))
    if args.json:
        print_json(facts)
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    stdout().print(table)


def _cpu_engine():
    """The CPU engine's instruction sets, and what serves how many tokens."""
    from cna_kernels.cpu import library, plan

    facts = {"CNA_CPU_ISA": os.environ.get("CNA_CPU_ISA") or "not set"}
    if library.missing():
        return facts
    threads = "OpenMP" if library.load().cna_has_openmp() else "built without OpenMP: one thread"
    facts["CPU engine"] = f"{library.isa()} of {', '.join(library.levels())}; {threads}"
    for dtype in plan.DTYPES:
        short = str(dtype).removeprefix("torch.")
        try:
            ranges = {op: plan.by_tokens(op, dtype) for op in plan.OPS}
        except InputError as error:
            return facts | {"CPU plans": str(error)}
        for op, found in ranges.items():
            same = [other for other in plan.OPS if ranges[other] == found]
            for first, (name, reason) in found if op == same[0] else ():
                facts[f"{', '.join(same)} on cpu, {short}, T >= {first}"] = f"{name} ({reason})"
    return facts


def _kernel_plans(cuda):
    """Which Triton kernels serve how many tokens, for an 8B model's MLP in bf16."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from cna_kernels.triton import launch, plan

    facts = {}
    arch = launch.arch(torch.device("cuda")) if cuda else 90
    where = torch.cuda.get_device_name() if cuda else "an sm_90 device"
    for op in plan.PLANS:
        try:
            ranges = plan.by_tokens(op, 14336, 4096, torch.bfloat16, arch)
        except InputError as error:
            return facts | {"kernels": str(error)}
        for first, (name, reason) in ranges:
            facts[f"{op} on {where}, T >= {first}"] = f"{name}: {plan.PLANS[op][name]} ({reason})"
    return facts


COMMANDS = {
    "demo": run_demo,
    "discover": run_discover,
    "show": run_show,
    "run": run_run,
    "estimate": run_estimate,
    "status": run_status,
    "doctor": run_doctor,
}


def load_model(args, **options) -> LanguageModel:
    return load(_directory(args.model), device=_device(args), dtype=args.dtype, **options)


def _directory(model):
    """The directory of MODEL; demo:NAME is a bundled one."""
    if model.startswith("demo:") and not Path(model).exists():
        return demo_checkpoint(model.removeprefix("demo:"))
    return model


def _device(args) -> str:
    """The device asked for; by default a GPU where there is one, under torchrun one for each worker."""
    if args.device is not None:
        return args.device
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _show_circuits(circuits: dict[str, Circuit], *, as_json: bool):
    if as_json:
        print_json({name: json.loads(circuit.to_json()) for name, circuit in circuits.items()})
        return
    table = Table("contrast", "neurons", "top neuron", "stability")
    for name, circuit in circuits.items():
        layer, index, value = circuit.neurons[0]
        stability = f"{100 * circuit.bootstrap['overlap']:.0f}%" if circuit.bootstrap else "-"
        table.add_row(_cell(name), str(circuit.k), f"{layer}, {index}: {value:+.4f}", stability)
    stdout().print(table)


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


def _column(args, path):
    """--column is for the files that have columns; plain text beside them has none."""
    return args.column if Path(path).suffix.lower() in RECORD_FORMATS else None


def _check_column(column, *paths):
    if column is not None and not any(path and Path(path).suffix.lower() in RECORD_FORMATS for path in paths):
        raise InputError("--column", f"is for {', '.join(RECORD_FORMATS)} files, and none is given")


def _cell(text):
    """Model output as table text: no markup, no terminal escapes."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text))


def _layers(text):
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError("--skip-layers", f"expected layers such as 0,1, got {text!r}") from None


def _multipliers(text):
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError("--multiplier", f"expected numbers such as 0,0.5,2, got {text!r}") from None
    for value in values:
        check_multiplier(value)
    return values


def _version(package):
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
