"""The rows of ``bench/gpu.py``: competitors, and one function for each kind of row.

A job is ``kind/model/T`` (or ``tune/kernel/model/T``); ``run`` yields its rows as they are known.
"""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from importlib import import_module

import torch
import torch.nn.functional as F

from cna_kernels import ops, reference
from cna_kernels.triton import plan as plans
from cna_kernels.triton.cost import Cost
from gpu_timing import Bench, Layer, brief, ours, relative
from gpu_tune import tune

DECODE_ROWS = {1: "D1", 8: "D2", 16: "D2", 64: "D3"}


# Competitors: each returns a function of one Layer.


def eager_mlp(x, w_gate_up, w_down):
    w_gate, w_up = w_gate_up.chunk(2)
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def eager(x):
    """As Hugging Face writes it: three products and two elementwise passes."""
    return lambda layer: eager_mlp(x, layer.w_gate_up, layer.w_down)


def cublas(x):
    """One product for gate and up, our elementwise kernel without features, one product."""

    def run(layer):
        gate, up = F.linear(x, layer.w_gate_up).chunk(2, dim=-1)
        return F.linear(ops.swiglu(gate, up, backend="triton"), layer.w_down)

    return run


def hooks(x, weight, factor):
    """Eager with a hook before down_proj that adds up fp32 sums and multiplies. factor ``[N]`` or ``[T, N]``, bf16."""

    def run(layer):
        w_gate, w_up = layer.w_gate_up.chunk(2)
        act = F.silu(F.linear(x, w_gate)) * F.linear(x, w_up)
        layer.act_sum.addmm_(weight.t(), act.float())
        return F.linear(act * factor, layer.w_down)

    return run


def predicted(op, name, T, N, H, C=2):
    """Seconds that the plan's kernels should take by their ``cost``."""
    kernel = lambda module, *args, **named: import_module(f"cna_kernels.triton.{module}").cost(*args, **named)  # noqa: E731
    linear = lambda n, k: Cost(2 * (n * k + T * (n + k)), 2 * T * n * k, 0)  # noqa: E731
    shape = (T, N, H)
    parts = {
        "gemv": lambda: (kernel("gate_up_decode", *shape), kernel("down_decode", *shape, gemv=True)),
        "flat": lambda: (kernel("gate_up_decode", *shape), kernel("down_decode", *shape)),
        "gated": lambda: (linear(2 * N, H), kernel("down_decode", *shape)),
        "fused": lambda: (kernel("gate_up", *shape, C), linear(H, N)),
        "blas": lambda: (linear(2 * N, H), kernel("swiglu", T, N, C), linear(H, N)),
        "down_proj split": lambda: (kernel("down_decode", *shape),),
        "down_proj tma": lambda: (kernel("down_proj", *shape, C),),
        "down_proj blas": lambda: (linear(H, N),),
    }[name if op == "gated_mlp" else f"{op} {name}"]
    return sum(max(part.seconds().values()) for part in parts())


def plan_row(bench, times, op, model, T, name, theirs, label=None):
    """What one plan takes with sums and steering, beside what its kernels should take."""
    H, N = bench.models[model]
    expected = predicted(op, name, T, N, H) * 1e6
    default = plans.default(bench.call(op, model, T)).name == name
    row = times.row("plan", model, T, label or name, theirs, op=op, default=default, predicted_us=expected)
    note = row.get("note", f"{op}; predicted {expected:.1f} us{'; default' * default}")
    return dict(row, note=note)


# Rows. Each is a function of (bench, model, T) that yields dicts.


def check(bench, model, T, x):
    """N2 and N1, for every plan that can serve: error against fp64, and the same bits run after run."""
    H, N = bench.models[model]
    layer = bench.layers(model)[0]
    weight, steering = bench.weight(T), bench.steering(T, N, 2, torch.arange(T, device=bench.device) % 3 - 1)
    start = layer.act_sum.clone()
    names = bench.plans("gated_mlp", model, T)
    if bench.mode == "once":
        for name in names:
            ours(x, name, weight, steering)(layer)
        return
    some = torch.arange(0, T, max(1, T // 64), device=bench.device)
    rows = dict(scale=steering["scale"], row_circuit=steering["row_circuit"][some])
    exact = reference.gated_mlp(x[some].double(), layer.w_gate_up.double(), layer.w_down.double(), **rows)
    table = reference.dense_scale(steering["scale"], N).to(x.dtype)  # [K + 1, N], the last row all ones
    torch_y = hooks(x, weight, table[steering["row_circuit"]])(layer)[some]
    torch_error = relative(torch_y, exact)
    unit = torch.zeros_like(layer.w_down)  # its product is act[:, N - H:], bit for bit
    unit[torch.arange(H), torch.arange(N - H, N)] = 1
    for name in names:
        results = []
        for _ in range(2 if bench.mode == "dry" or T > 4096 else 20):
            fresh = layer._replace(act_sum=start.clone())
            results.append((ours(x, name, weight, steering)(fresh), fresh.act_sum))
        (y, act_sum), repeats = results[0], len(results)
        same = all(torch.equal(a, y) and torch.equal(b, act_sum) for a, b in results)
        yield dict(row="N1", model=model, T=T, ours=name, ok=same, note=f"{repeats} runs, y and S bit-equal: {same}")
        act = ours(x, name)(layer._replace(w_down=unit))  # [T, H]
        exact_sum = start[:, N - H :].double() + weight.t().double() @ act.double()
        error, sum_error = relative(y[some], exact), relative(act_sum[:, N - H :], exact_sum)
        yield dict(
            row="N2",
            model=model,
            T=T,
            ours=name,
            theirs="error of torch bf16",
            ratio=error / torch_error,
            ok=error <= min(4e-3, 1.1 * torch_error) and sum_error <= 1e-5,
            note=f"y {error:.2e} (torch {torch_error:.2e}), S {sum_error:.2e}",
        )


def decode(bench, model, T):
    H, N = bench.models[model]
    x, layers = bench.random(T, H), bench.layers(model, T)
    yield from check(bench, model, T, x)
    weight, steering = bench.weight(T), bench.steering(T, N, 1)
    names = bench.plans("gated_mlp", model, T)
    runs = {"ours": ours(x, "", weight, steering), "ours plain": ours(x), "eager": eager(x), "cublas": cublas(x)}
    times = bench.measure(runs | {name: ours(x, name, weight, steering) for name in names}, layers)
    for theirs in ("eager", "cublas"):
        yield times.row(DECODE_ROWS[T], model, T, "ours", theirs, best=True)
    yield times.row("D4", model, T, "ours", "ours plain")
    if "ours" in times.times and "read" in bench.ceilings:
        moved, seconds = 6 * N * H, times.median("ours")
        ratio = seconds * bench.ceilings["read"] / moved
        note = f"{moved / seconds / 1e9:.0f} GB/s of weights"
        yield dict(row="D5", model=model, T=T, ours="ours", theirs="read ceiling", ratio=ratio, note=note)
    for name in names:
        yield plan_row(bench, times, "gated_mlp", model, T, name, "ours")
    yield from down(bench, model, T)


def prefill(bench, model, T):
    H, N = bench.models[model]
    x, layers = bench.random(T, H), bench.layers(model, T)
    yield from check(bench, model, T, x)
    weight, steering = bench.weight(T), bench.steering(T, N, 1)
    factor = reference.dense_scale(steering["scale"], N)[0].to(x.dtype)
    names = bench.plans("gated_mlp", model, T)
    runs = {"ours": ours(x, "", weight), "eager": eager(x), "cublas": cublas(x), "hooks": hooks(x, weight, factor)}
    runs |= {"ours steered": ours(x, "", weight, steering), "fused plain": ours(x, "fused")}
    times = bench.measure(runs | {name: ours(x, name, weight, steering) for name in names}, layers)
    for theirs in ("eager", "cublas"):
        yield times.row("P1", model, T, "ours", theirs, best=True)
    yield times.row("P2", model, T, "ours", "eager")
    yield times.row("P3", model, T, "ours steered", "hooks")
    if "fused" in names:
        yield times.row("P6", model, T, "fused plain", "cublas")
    for name in names:
        yield plan_row(bench, times, "gated_mlp", model, T, name, "ours steered")
    yield from down(bench, model, T)


def down(bench, model, T):
    """P7, and every plan of down_proj with and without features."""
    _, N = bench.models[model]
    act, layers = bench.random(T, N), bench.layers(model, T)
    weight, steering = bench.weight(T), bench.steering(T, N, 1)
    names = bench.plans("down_proj", model, T)
    runs = {"linear": lambda layer: F.linear(act, layer.w_down)}
    runs |= {f"{name} plain": ours(act, name, op="down_proj") for name in names if name != "blas"}
    runs |= {name: ours(act, name, weight, steering, "down_proj") for name in names}
    times = bench.measure(runs, layers)
    for name in names:
        yield plan_row(bench, times, "down_proj", model, T, name, "linear")
        if name == "tma":
            off = relative(runs["tma plain"](layers[0]), runs["linear"](layers[0]))
            yield times.row("P7", model, T, "tma plain", "linear", note=f"differs by {off:.1e}")
        elif name != "blas":
            yield plan_row(bench, times, "down_proj", model, T, name, "linear", f"{name} plain")


def elementwise(bench, model, T):
    """P4: the sets are gate and up side by side, ``[T, 2N]``."""
    _, N = bench.models[model]
    sets = [bench.random(T, 2 * N) for _ in range(1 if bench.mode == "once" else 4)]
    weight, steering, act_sum = bench.weight(T), bench.steering(T, N, 1), bench.random(2, N, dtype=torch.float32)
    sums = dict(weight=weight, act_sum=act_sum)
    backend = "eager" if bench.mode == "dry" else "inductor"
    product = torch.compile(lambda gate, up: F.silu(gate) * up, backend=backend, dynamic=False, fullgraph=True)

    def swiglu(**extras):
        return lambda both: ops.swiglu(*both.chunk(2, dim=-1), **extras, backend="triton")

    runs = {"torch.compile": lambda both: product(*both.chunk(2, dim=-1)), "plain": swiglu(), "sums": swiglu(**sums)}
    times = bench.measure(runs | {"sums and scale": swiglu(**sums, **steering)}, sets)
    moved = 6 * T * N
    for name in runs | {"sums and scale": None}:
        if name not in times.times:
            yield dict(row="P4", model=model, T=T, ours=name, note=times.failures[name])
            continue
        rate = moved / times.median(name)
        if name != "torch.compile" and "torch.compile" in times.times:
            yield times.row("P4", model, T, name, "torch.compile")
        if "copy" in bench.ceilings:
            row = dict(row="P4 copy", model=model, T=T, ours=name, theirs="copy ceiling")
            row.update(ratio=bench.ceilings["copy"] / rate)
            yield dict(row, note=f"{rate / 1e9:.0f} GB/s")


def circuits(bench, model, T):
    """P5: K circuits, a different one for neighbouring tokens, against none; sums on in both."""
    H, N = bench.models[model]
    x, weight = bench.random(T, H), bench.weight(T)
    runs = {"K=0": ours(x, "", weight)}
    runs |= {f"K={K}": ours(x, "", weight, bench.steering(T, N, K)) for K in (1, 16, 256)}
    times = bench.measure(runs, bench.layers(model, T))
    for name in list(runs)[1:]:
        yield times.row("P5", model, T, name, "K=0")


def distinct(bench, model, T):
    """D6: a circuit for each token against one circuit for all."""
    H, N = bench.models[model]
    x, weight = bench.random(T, H), bench.weight(T)
    runs = {f"{K} circuits": ours(x, "", weight, bench.steering(T, N, K)) for K in (1, T)}
    times = bench.measure(runs, bench.layers(model, T))
    yield times.row("D6", model, T, f"{T} circuits", "1 circuits")


COMPILE_SECONDS = 60


def compiled(bench, model, T):
    """torch.compile as one more competitor of D1 to D3 and P1; given up for good once it fails or takes too long."""
    H, N = bench.models[model]
    x, layers, weight = bench.random(T, H), bench.layers(model, T), bench.weight(T)
    row = DECODE_ROWS.get(T, "P1")
    head = dict(row=row, model=model, T=T, ours="ours", theirs="torch.compile")
    if not bench.compiles:
        yield dict(head, note="skipped: torch.compile failed before")
        return
    how = dict(backend="eager") if bench.mode == "dry" else dict(mode="max-autotune-no-cudagraphs")
    product = torch.compile(eager_mlp, dynamic=False, fullgraph=True, **how)
    start = time.perf_counter()
    try:
        with alarm(COMPILE_SECONDS):
            product(x, layers[0].w_gate_up, layers[0].w_down)
    except Exception as error:
        traceback.print_exc()
        bench.compiles = False
        yield dict(head, note=brief(error))
        return
    note = f"compiled in {time.perf_counter() - start:.0f} s"
    steering = bench.steering(T, N, 1) if row != "P1" else None
    runs = {"ours": ours(x, "", weight, steering)}
    times = bench.measure(runs | {"torch.compile": lambda layer: product(x, layer.w_gate_up, layer.w_down)}, layers)
    yield times.row(row, model, T, "ours", "torch.compile", best=True, note=note)


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


def ceilings(bench):
    """What the device is, and bytes/s of a copy (read plus written) and of reading, FLOP/s of a bf16 product."""
    import platform

    import triton

    size = 64 if bench.mode == "dry" else 8192
    wide = [bench.random(size, 32 * size) for _ in range(2)]  # 4 GB each
    square = [bench.random(size, size) for _ in range(2)]
    n_bytes = 2 * wide[0].numel()
    runs = {
        "copy": (lambda _: wide[1].copy_(wide[0]), 2 * n_bytes),
        "read, sum": (lambda _: wide[0].sum(dtype=torch.float32), n_bytes),
        "read, row sums": (lambda _: wide[0].view(-1, size).sum(dim=1, dtype=torch.float32), n_bytes),
        "read, row maxima": (lambda _: wide[0].view(-1, size).amax(dim=1), n_bytes),
        "bf16 matmul": (lambda _: square[0] @ square[1], 2 * size**3),
    }
    times = bench.measure({name: run for name, (run, _) in runs.items()}, [None])
    rates = {name: amount / times.median(name) for name, (_, amount) in runs.items() if name in times.times}
    read = max((rate for name, rate in rates.items() if name != "bf16 matmul"), default=None)
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU, interpreted"
    yield dict(
        environment=dict(
            device=device,
            python=platform.python_version(),
            torch=torch.__version__,
            triton=triton.__version__,
            cuda=torch.version.cuda,
        ),
        ceilings=rates if read is None else rates | {"read": read},
    )
    for name, rate in rates.items():
        yield dict(row="ceiling", ours=name, ours_us=times.median(name) * 1e6, note=f"{rate / 1e12:.3f} T/s")


def every_plan(bench):
    """Each plan and the elementwise kernel once, with sums and steering, on small shapes with ragged tails."""
    for T, N, H in ((1, 1032, 72), (16, 1032, 72), (130, 264, 136)):
        layer = Layer(bench.random(2 * N, H), bench.random(H, N), bench.random(2, N, dtype=torch.float32))
        weight, steering = bench.weight(T), bench.steering(T, N, 2)
        x, both = bench.random(T, H), bench.random(T, 2 * N)
        sums = dict(weight=weight, act_sum=layer.act_sum)
        done = [ops.swiglu(*both.chunk(2, dim=-1), **sums, **steering, backend="triton")]
        for op, given in (("gated_mlp", x), ("down_proj", both[:, :N])):
            for name in plans.PLANS[op]:
                if plans.can_serve(plans.Call(op, T, N, H, torch.bfloat16, bench.arch, True), name):
                    done += [ours(given, name, *extras, op=op)(layer) for extras in ((), (weight, steering))]
        assert all(y.isfinite().all() for y in done), f"{T=} {N=} {H=}: not finite"
    yield dict(row="every plan", ok=True, note="ran once on small shapes")


KINDS = dict(decode=decode, prefill=prefill, elementwise=elementwise, circuits=circuits, distinct=distinct)
KINDS |= dict(compiled=compiled, ceilings=ceilings, tune=tune, every_plan=every_plan)


def run(job: str, bench: Bench):
    kind, *names = job.split("/")
    yield from KINDS[kind](bench, *(int(name) if name.isdigit() else name for name in names))
