"""What each command of the command line does. Results go to stdout, progress to stderr."""

from __future__ import annotations

import importlib.util
import os
import platform

import torch
from rich.table import Table

import cna_kernels
from cna_kernels import backends
from cna_kernels.checks import InputError
from cna_kernels.circuit import Circuit

from ..prompts.files import PromptSet, read_prompts
from .attribution import run_discover, run_estimate, run_status
from .console import (
    cell,
    check_column,
    column_of,
    load_circuit,
    load_model,
    multipliers_of,
    print_json,
    show_circuit,
    stdout,
)
from .evaluation import run_compare, run_eval, run_lm_eval
from .export import run_export


def run_demo(args):
    from ..demo.story import tell

    tell(args.out, stdout())


def run_show(args):
    show_circuit(Circuit.load(args.circuit), as_json=args.json)


def run_run(args):
    texts = list(args.prompt or [])
    prompts = PromptSet.of(texts, "--prompt") if texts else None
    if args.prompts:
        check_column(args.column, args.prompts)
        prompts = read_prompts(args.prompts, column=column_of(args, args.prompts), limit=args.limit)
    if prompts is None or (texts and args.prompts):
        raise InputError("prompts", "give either -p TEXT or --prompts FILE")
    multipliers = multipliers_of(args.multiplier, "--multiplier")
    model = load_model(args)
    circuit = load_circuit(args.circuit, model, any_model=args.any_model) if args.circuit else None
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
        table.add_row(*[cell(text) for text in (result["prompt"], *(a["text"] for a in result["answers"]))])
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
    device = torch.device("cuda" if cuda else "meta")
    arch = launch.arch(device) if cuda else 90
    where = torch.cuda.get_device_name() if cuda else "an sm_90 device"
    for op in plan.PLANS:
        try:
            ranges = plan.by_tokens(op, 14336, 4096, torch.bfloat16, arch, n_sm=launch.n_multiprocessors(device))
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
    "eval": run_eval,
    "sweep": run_eval,
    "compare": run_compare,
    "export": run_export,
    "lm-eval": run_lm_eval,
    "doctor": run_doctor,
}


def _version(package):
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
