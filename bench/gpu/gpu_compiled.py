"""torch.compile as a rival for ``gpu.py``. It compiles slowly, so its jobs come after our own, with a time limit."""

from __future__ import annotations

import contextlib
import signal
import time
import traceback

import torch
import torch.nn.functional as F

from gpu_device import brief, mlp_work, ours
from gpu_rows import eager_mlp, elementwise, mlp_row, of_default

COMPILE_SECONDS = 45


def compiled(bench, model, T):
    """One more competitor for the rows D1 to D3 and P1. For few tokens its mode is ``max-autotune``, because there
    Inductor's own reductions beat cuBLAS; for many it is the default mode: cuBLAS and one elementwise kernel."""
    H, N = bench.shape(model)
    x, layers, token_weight = bench.random(T, H), bench.layers(model, T), bench.token_weight(T)
    few = T <= 64
    row, mode = mlp_row(T), "max-autotune-no-cudagraphs" if few else "default"
    how = dict(backend="eager") if bench.mode == "dry" else dict(mode=mode)
    head = dict(row=row, model=model, T=T, ours="ours", theirs="torch.compile")
    product, note = compile_within(bench, eager_mlp, how, (x, layers[0].w_gate_up, layers[0].w_down))
    if product is None:
        yield dict(head, note=note)
        return
    steering = bench.steering(T, N, 1) if few else None
    runs = {"ours": ours(x, "", token_weight, steering)}
    runs["torch.compile"] = lambda layer: product(x, layer.w_gate_up, layer.w_down)
    times = bench.measure(runs, layers, mlp_work(T, N, H))
    yield times.row(
        row,
        model,
        T,
        "ours",
        "torch.compile",
        best=True,
        note=f"{mode}, {note}",
        **of_default(bench, "gated_mlp", model, T, N, H),
    )


def compiled_swiglu(bench, model, T):
    """P4: the elementwise kernel against what Inductor makes of silu(gate) * up."""
    how = dict(backend="eager" if bench.mode == "dry" else "inductor")
    halves = bench.random(T, 2 * bench.shape(model)[1]).chunk(2, dim=-1)
    product, note = compile_within(bench, lambda gate, up: F.silu(gate) * up, how, halves)
    if product is None:
        yield dict(row="P4", model=model, T=T, ours="sums and steering", theirs="torch.compile", note=note)
        return
    yield from elementwise(bench, model, T, ("torch.compile", product))


def compile_within(bench, function, how, inputs):
    """(the compiled function or None, a note)"""
    product = torch.compile(function, dynamic=False, fullgraph=True, **how)
    start = time.perf_counter()
    try:
        with alarm(COMPILE_SECONDS), choices_forgotten(bench.once):
            product(*inputs)
            bench.synchronize()
    except Exception as error:
        traceback.print_exc()
        return None, brief(error)
    return product, f"compiled in {time.perf_counter() - start:.0f} s"


def choices_forgotten(once):
    """While other processes use the device (``once``), Inductor's measurements are wrong: keep the kernels that it
    compiles, but not the choice that it makes by these measurements."""
    if not once:
        return contextlib.nullcontext()
    from torch._inductor import config

    return config.patch(autotune_local_cache=False, fx_graph_cache=False)


@contextlib.contextmanager
def alarm(seconds):
    def stop(*_):
        raise TimeoutError(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
