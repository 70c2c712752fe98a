"""What `cna doctor` does: show versions, devices, backends, and which kernels serve how many tokens; or how a
checkpoint is read."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
from collections import Counter

import torch

import cna_kernels
from cna_kernels import backends
from cna_kernels.errors import InputError

from ..checkpoint.config import ModelConfig
from ..checkpoint.gguf_file import is_gguf
from ..checkpoint.load import dtype_of
from ..demo.checkpoint import demo_checkpoint
from ..language_model import load
from ..packages import EXTRA_OF, missing
from .arguments import directory_of
from .console import Table, print_json, stdout


def run_doctor(args):
    facts = _machine() if args.model is None else _checkpoint(directory_of(args.model))
    if args.json:
        print_json(facts)
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    stdout().print(table)


def _checkpoint(path) -> dict[str, str]:
    """How a checkpoint is read: format, shape, how its tensors are stored, tokenizer, template, stop ids, hashes."""
    model = load(path, device="cpu", weights=False)
    config, tokenizer = model.config, model.tokenizer
    stored: Counter[str] = Counter(entry.stored for entry in model.checkpoint.entries.values())
    kinds = ", ".join(f"{n} {name}" for name, n in stored.most_common())
    n_layers, widths, template = config.num_hidden_layers, sorted(set(config.widths)), tokenizer.template
    of_each = f"{widths[0]} per layer" if len(widths) == 1 else f"{widths[0]} to {widths[-1]} per layer"
    of_experts = "" if config.experts is None else f", in up to {max(n for n, _ in config.experts)} experts"
    heads, rope = "", ""
    if isinstance(config, ModelConfig):
        heads = f", {config.num_attention_heads} heads of {config.head_dim}"
        heads += f" ({config.num_key_value_heads} of keys and values)"
        rope = f", rotary embedding {config.rope.kind}, theta {config.rope.theta:g}"
    return {
        "checkpoint": str(path),
        "format": "GGUF" if is_gguf(path) else "Hugging Face layout",
        "engine": model.engine,
        "model": f"{config.model_type}: {n_layers} layers, hidden size {config.hidden_size}{heads}",
        "neurons": f"{of_each}{of_experts}, {sum(config.widths)} in all",
        "tensors": kinds,
        "loaded as": str(dtype_of(config, model.checkpoint)).removeprefix("torch."),
        "context": f"{config.context_length} tokens{rope}",
        "tokenizer": "none" if tokenizer.sha256 is None else f"{tokenizer.sha256[:8]}, {_bos(tokenizer)}",
        "chat template": "none" if template is None else f"{template.name!r} {str(tokenizer.template_sha256)[:8]}",
        "an answer ends at": ", ".join(f"{n} {tokenizer.token(n)!r}" for n in sorted(model.stop_ids)) or "no token",
        **{name: value for name, value in model.identity().items() if name != "name"},
        **({"notes": "; ".join(tokenizer.notes)} if tokenizer.notes else {}),
    }


def _bos(tokenizer):
    return "BOS in front of plain text" if tokenizer.adds_bos else "no BOS in front of plain text"


def _machine() -> dict[str, str]:
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
    return facts


def _cpu_engine():
    """The CPU engine's instruction sets, and which of its kernels serve how many tokens."""
    from cna_kernels.cpu import library, plan

    from ..decode import is_planned

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
    few = ", ".join(
        f"{plan.few_blocks(library.isa(), dtype)} ({str(dtype).removeprefix('torch.')})" for dtype in plan.DTYPES
    )
    facts["weights in GGUF's blocks on cpu"] = (
        f"csrc: straight from the blocks up to {few} tokens, as rows of that dtype for more"
    )
    planned = is_planned()
    facts["decoding on cpu"] = "csrc: all layers of a token in one call" if planned else "op by op (CNA_PLAN)"
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
