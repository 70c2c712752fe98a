"""Launch tables for the sweeps of ``bench/gpu/gpu.py``: the changes to try, and the job that tries them."""

from __future__ import annotations

import itertools
from importlib import import_module

import torch

from cna_kernels import ops, plans
from gpu_device import brief, ours, relative
from gpu_jobs import TUNE_PARTS

# Kernel -> module, launch table, op, plan that runs the kernel, and groups of changes to an entry. All products of the
# values within a group are tried, one group after the other.
LAUNCH_TABLES = {
    "gate_up_gemv": ("gate_up_decode", "_launch_config", "gated_mlp", "gemv", [
        dict(BLOCK_N=(2, 4), BLOCK_K=(512, 1024, 2048), num_stages=(2, 3, 4)), dict(BLOCK_N=(8,), BLOCK_K=(512,)),
        dict(num_warps=(8,), BLOCK_N=(4, 8)), dict(num_warps=(2,), BLOCK_N=(2, 4), BLOCK_K=(512,)),
    ]),
    "down_gemv": ("down_decode", "_gemv_config", "gated_mlp", "gemv", [
        dict(BLOCK_H=(2, 4, 8, 16), BLOCK_N=(512, 1024, 2048)), dict(num_warps=(2, 8), BLOCK_N=(1024, 2048)),
    ]),
    "gate_up_flat": ("gate_up_decode", "_launch_config", "gated_mlp", "flat", [
        dict(BLOCK_N=(32, 64), BLOCK_K=(64, 128), num_stages=(3, 4, 5)), dict(num_warps=(8,), BLOCK_N=(64, 128)),
        dict(BLOCK_K=(256,), num_stages=(2, 3)), dict(BLOCK_K=(64,), num_stages=(6, 8)), dict(num_stages=(2,)),
        dict(BLOCK_N=(16,), BLOCK_K=(128, 256), num_stages=(3, 4, 5)),  # 32 rows: matrix units without wgmma
    ]),
    "down_split": ("down_decode", "_split_config", "down_proj", "split", [
        dict(BLOCK_H=(64, 128), BLOCK_N=(64, 128), num_stages=(3, 4, 5)), dict(SPLIT_N=(1024, 2048, 4096, 8192, 16384)),
        dict(num_warps=(8,), BLOCK_H=(128,)), dict(BLOCK_N=(256,), num_stages=(2, 3)),
    ]),
    "down_proj": ("down_proj", "_launch_config", "down_proj", "tma", [
        dict(BLOCK_T=(128,), BLOCK_H=(128, 256), GROUP_T=(4, 8, 16), num_stages=(3, 4)),
        dict(BLOCK_T=(64,), BLOCK_H=(256,)), dict(BLOCK_H=(128,), num_warps=(4,), num_stages=(4,)),
    ]),
    "swiglu": ("swiglu", "_launch_config", "swiglu", "", [
        dict(BLOCK_T=(2, 4, 8), stages=(1, 2, 3, 4)), dict(rows=(8, 16, 32, 64, 128, 256, 512)),
        dict(BLOCK_N=(512,), BLOCK_T=(4, 8), rows=(64, 128, 256), num_warps=(2, 4)),
        dict(BLOCK_N=(2048,), BLOCK_T=(2, 4), num_warps=(8,)), dict(num_warps=(8,), BLOCK_T=(4, 8), stages=(2, 3)),
        dict(BLOCK_N=(128, 256), BLOCK_T=(4, 8), rows=(16, 32, 64, 128), num_warps=(2, 4)),
        dict(BLOCK_N=(64,), BLOCK_T=(8, 16), rows=(32, 64, 128), num_warps=(1, 2)),
        dict(BLOCK_N=(512,), BLOCK_T=(2, 4), rows=(8, 16, 32), num_warps=(2, 4)),
    ]),
    "swiglu_plain": ("swiglu", "_launch_config", "swiglu", "", [
        dict(BLOCK_T=(1, 2, 4, 8), rows=(1, 2, 4, 8, 16)), dict(BLOCK_N=(512, 2048), BLOCK_T=(1, 2), rows=(2, 4)),
        dict(num_warps=(8,), BLOCK_T=(2, 4), rows=(4,)), dict(rows=(32, 64), stages=(2, 3)),
    ]),
    "sum_fp64": ("sums_fp64", "_launch_config", "swiglu", "", [
        dict(BLOCK_T=(4, 8), num_warps=(1, 2), max_runs=(4, 8)), dict(BLOCK_T=(4,), num_warps=(1,), GROUP=(128,)),
        dict(BLOCK_T=(16,), num_warps=(4, 8), max_runs=(4, 8, 16)), dict(BLOCK_T=(2,), BLOCK_N=(128,), num_warps=(1,)),
    ]),
}  # fmt: skip


def changes(groups):
    for group in groups:
        for values in itertools.product(*group.values()):
            yield dict(zip(group, values, strict=True))


def tune(bench, kernel, model, T, part=None):
    """Time every change of one launch table against its present entry, through the op that runs the kernel.

    part: only every TUNE_PARTS-th change from number ``part`` on, so that several processes share the compiling."""
    module, function, op, name, groups = LAUNCH_TABLES[kernel]
    module = import_module(f"cna_kernels.triton.{module}")
    present = getattr(module, function)
    H, N = bench.shape(model)
    token_weight, steering, layers = bench.token_weight(T), bench.steering(T, N, 1), bench.layers(model, T)
    if op == "swiglu":
        layers = [bench.random(T, 2 * N) for _ in layers]
        sums = dict(token_weight=token_weight, act_sum=bench.random(2, N, dtype=torch.float32), **steering)
        if kernel == "sum_fp64":
            sums = dict(token_weight=token_weight)
            sums |= {name: bench.random(2, N, dtype=torch.float64) for name in ("act_sum", "act_sumsq")}
        sums = {} if kernel.endswith("plain") else sums
        call = lambda both: ops.swiglu(*both.chunk(2, dim=-1), **sums, backend="triton")  # noqa: E731
    else:
        x = bench.random(T, H if op == "gated_mlp" else N)
        call = ours(x, name, token_weight, steering, op)
    entry = []

    def with_table(table):
        def run(layer):
            setattr(module, function, table)
            plans.forget()  # launch configurations are kept by shape
            try:
                return call(layer)
            finally:
                setattr(module, function, present)
                plans.forget()

        return run

    def changed(change):
        return with_table(lambda *given, **named: present(*given, **named)._replace(**change))

    expected = with_table(lambda *given, **named: entry.append(present(*given, **named)) or entry[-1])(layers[0])
    assert entry, f"{kernel}: the op did not read {function}"
    runs, failures = {"default": call}, {}
    tried = list(changes(groups))[: 3 if bench.mode == "dry" else None]
    for each in tried if part is None else tried[part::TUNE_PARTS]:
        change = {field: value for field, value in each.items() if getattr(entry[0], field, None) != value}
        if each.get("rows", 0) % max(1, each.get("BLOCK_T", getattr(entry[0], "BLOCK_T", 1))):
            continue  # a program walks whole tiles
        label = ", ".join(f"{field}={value}" for field, value in change.items())
        if not change or label in runs or label in failures:
            continue
        try:
            off = relative(changed(change)(layers[0]), expected)
            if off < 1e-2:
                runs[label] = changed(change)
            else:
                failures[label] = f"differs by {off:.1e}"
        except Exception as error:
            failures[label] = brief(error)
            bench.synchronize()
    times = bench.measure(runs, layers)
    medians = {label: times.median(label) for label in times.times}
    best = min(medians, key=medians.get)
    all_ratios = {label: times.row("", model, T, label, "default")["ratio"] for label in medians}
    row = times.row(
        "tune", model, T, best, "default", kernel=kernel, all=all_ratios, failures=failures | times.failures
    )
    yield dict(row, entry=str(entry[0]), note=f"{kernel} {entry[0]}; {len(medians)} tried, {len(failures)} failed")
