"""What `cna doctor` does: show versions, devices, backends, and which kernels serve how many tokens."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform

import torch

import cna_kernels
from cna_kernels import backends
from cna_kernels.errors import InputError

from ..demo.checkpoint import demo_checkpoint
from ..packages import EXTRA_OF, missing
from .console import Table, print_json, stdout


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
    for name in ("numpy", "safetensors", "triton"):
        facts[name] = _version(name)
    for name in EXTRA_OF:
        facts[name] = missing(name) or _version(name)
    with contextlib.suppress(InputError):
        facts["cna-kernels-demo"] = str(demo_checkpoint().parent)
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
    """The CPU engine's instruction sets, and which of its kernels serve how many tokens."""
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

    facts: dict[str, str] = {}
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


def _version(package):
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
