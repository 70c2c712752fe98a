"""The rows of one MLP: the default plan against its competitors, and another plan against the default.

Most are functions of (bench, model, T) that yield rows, which are dicts, as soon as each is known.
"""

from __future__ import annotations

import time
from importlib import import_module

import torch
import torch.nn.functional as F

from cna_kernels import ops, reference
from cna_kernels.plans import use as use_plans
from cna_kernels.scale import dense_scale
from cna_kernels.triton.cost import Cost
from gpu_device import down_work, elementwise_work, late, mlp_work, ours, relative

HOST_ROUNDS, HOST_CALLS = 21, 40  # the queue of launches has room for HOST_CALLS calls


def mlp_row(T):
    """The name of the rows that time a whole MLP on T tokens."""
    return "D1" if T == 1 else "D2" if T < 64 else "D3" if T == 64 else "P1"


# Competitors: each returns a function of one Layer.


def eager_mlp(x, w_gate_up, w_down):
    w_gate, w_up = w_gate_up.chunk(2)
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def eager(x):
    """The MLP as transformers writes it: three products and two elementwise passes."""
    return lambda layer: eager_mlp(x, layer.w_gate_up, layer.w_down)


def cublas(x):
    """One product for gate and up, our elementwise kernel without features, one product."""

    def run(layer):
        gate, up = F.linear(x, layer.w_gate_up).chunk(2, dim=-1)
        return F.linear(ops.swiglu(gate, up, backend="triton"), layer.w_down)

    return run


def hooks(x, token_weight, multiplier):
    """Eager with a hook before down_proj that adds up fp32 sums and multiplies, by ``[N]`` or ``[T, N]`` bf16."""

    def run(layer):
        w_gate, w_up = layer.w_gate_up.chunk(2)
        act = F.silu(F.linear(x, w_gate)) * F.linear(x, w_up)
        layer.act_sum.addmm_(token_weight.t(), act.float())
        return F.linear(act * multiplier, layer.w_down)

    return run


def predicted_us(bench, op, name, T, N, H, C=2) -> dict:
    """The time that the plan's kernels should take, by their ``cost`` and this run's ceilings; empty for a plan whose
    kernels have no cost."""
    kernel = lambda module, *args, **named: import_module(f"cna_kernels.triton.{module}").cost(*args, **named)  # noqa: E731
    linear = lambda n, k: Cost(2 * (n * k + T * (n + k)), 2 * T * n * k, 0)  # noqa: E731
    shape = (T, N, H)
    parts = {
        "gated_mlp gemv": lambda: (kernel("gate_up_decode", *shape), kernel("down_decode", *shape, gemv=True)),
        "gated_mlp flat": lambda: (kernel("gate_up_decode", *shape), kernel("down_decode", *shape)),
        "gated_mlp fused": lambda: (kernel("gate_up", *shape, C), linear(H, N)),
        "gated_mlp blas": lambda: (linear(2 * N, H), kernel("swiglu", T, N, C), linear(H, N)),
        "down_proj split": lambda: (kernel("down_decode", *shape),),
        "down_proj tma": lambda: (kernel("down_proj", *shape, C),),
        "down_proj blas": lambda: (linear(H, N),),
    }.get(f"{op} {name}")
    if parts is None:
        return {}
    return dict(predicted_us=1e6 * sum(max(part.seconds(bench.target).values()) for part in parts()))


# Correctness.


def check(bench, model, T, op="gated_mlp", name=None):
    """Rows N1 and N2 of a plan, by default the default plan: same bits run after run, and the error against fp64."""
    H, N = bench.shape(model)
    layer, default = bench.layers(model)[0], name is None
    name = name or bench.default(op, model, T)
    x = bench.random(T, H if op == "gated_mlp" else N)
    token_weight, steering = (
        bench.token_weight(T),
        bench.steering(T, N, 2, torch.arange(T, device=bench.device) % 3 - 1),
    )
    start = layer.act_sum.clone()
    plan = "" if default else name
    if bench.once:
        ours(x, plan, token_weight, steering, op)(layer)
        ours(x, plan, op=op)(layer)
        return
    some = torch.arange(0, T, max(1, T // 64), device=bench.device)
    rows = dict(scale=steering["scale"], row_circuit=steering["row_circuit"][some])
    table = dense_scale(steering["scale"], N).to(x.dtype)[steering["row_circuit"]]  # [T, N]
    if op == "gated_mlp":
        exact = reference.gated_mlp(x[some].double(), layer.w_gate_up.double(), layer.w_down.double(), **rows)
        torch_y = hooks(x, token_weight, table)(layer)[some]
        unit = torch.zeros_like(layer.w_down)  # its product is act[:, N - H:], bit for bit
        unit[torch.arange(H), torch.arange(N - H, N)] = 1
        act = ours(x, plan)(layer._replace(w_down=unit))  # [T, H]
    else:
        exact = reference.down_proj(x[some].double(), layer.w_down.double(), **rows)
        torch_y = F.linear(x * table, layer.w_down)[some]
        act = x[:, N - H :]
    results = []
    for _ in range(2 if bench.mode == "dry" else 20):
        fresh = layer._replace(act_sum=start.clone())
        results.append((ours(x, plan, token_weight, steering, op)(fresh), fresh.act_sum))
    (y, act_sum), repeats = results[0], len(results)
    same = all(torch.equal(a, y) and torch.equal(b, act_sum) for a, b in results)
    head = dict(model=model, T=T, ours=name, op=op, plan=f"{op}={name}", default=default)
    yield dict(row="N1", ok=same, note=f"{op}, {repeats} runs, y and S bit-equal: {same}", **head)
    exact_sum = start[:, N - H :].double() + token_weight.t().double() @ act.double()
    torch_error, error, sum_error = (
        relative(torch_y, exact),
        relative(y[some], exact),
        relative(act_sum[:, N - H :], exact_sum),
    )
    yield dict(
        row="N2",
        theirs="error of torch bf16",
        ratio=error / torch_error,
        ok=error <= min(4e-3, 1.1 * torch_error) and sum_error <= 1e-5,
        note=f"{op}, y {error:.2e} (torch {torch_error:.2e}), S {sum_error:.2e}",
        **head,
    )


# Time.


def decode(bench, model, T):
    """D1 to D5: the whole MLP of few tokens."""
    H, N = bench.shape(model)
    x, layers = bench.random(T, H), bench.layers(model, T)
    token_weight, steering, many = bench.token_weight(T), bench.steering(T, N, 1), bench.steering(T, N, 1, size=late(N))
    runs = {"ours": ours(x, "", token_weight, steering), "ours plain": ours(x), "eager": eager(x), "cublas": cublas(x)}
    runs |= {"ours, sums": ours(x, "", token_weight), "ours, steered": ours(x, "", None, steering)}
    times = bench.measure(runs | {"ours, late layer": ours(x, "", token_weight, many)}, layers, mlp_work(T, N, H))
    more = of_default(bench, "gated_mlp", model, T, N, H)
    for theirs in ("eager", "cublas"):
        yield times.row(mlp_row(T), model, T, "ours", theirs, best=True, **more)
    yield times.row("D4", model, T, "ours", "ours plain", **more)
    yield times.row("D4 sums", model, T, "ours, sums", "ours plain", **more)
    yield times.row("D4 steered", model, T, "ours, steered", "ours plain", **more)
    yield times.row("D4 late", model, T, "ours, late layer", "ours plain", **more)
    if "ours" in times.times:
        moved, seconds = 6 * N * H, times.median("ours")
        ratio = seconds * bench.target.bytes_per_s / moved
        note = f"{moved / seconds / 1e9:.0f} GB/s of weights"
        row = dict(row="D5", model=model, T=T, ours="ours", theirs="read ceiling", ratio=ratio, note=note)
        yield row | dict(ours_us=seconds * 1e6, **times.share("ours"))


def prefill(bench, model, T):
    """P1 to P3: the whole MLP of many tokens."""
    H, N = bench.shape(model)
    x, layers = bench.random(T, H), bench.layers(model, T)
    token_weight, steering, many = bench.token_weight(T), bench.steering(T, N, 1), bench.steering(T, N, 1, size=late(N))
    multiplier = dense_scale(steering["scale"], N)[0].to(x.dtype)
    runs = {
        "ours": ours(x, "", token_weight),
        "eager": eager(x),
        "cublas": cublas(x),
        "hooks": hooks(x, token_weight, multiplier),
    }
    runs |= {"ours steered": ours(x, "", token_weight, steering), "ours, late layer": ours(x, "", token_weight, many)}
    last = torch.zeros_like(token_weight)  # discovery: the last tokens of 8 prompts, 4 to a column
    ends = torch.arange(T // 8 - 1, T, T // 8)
    last[ends, torch.arange(len(ends)) % 2] = 1
    runs |= {"ours, fp64": summed_in_fp64(bench, x, token_weight, N), "ours, last": ours(x, "", last)}
    runs["ours, last, fp64"] = summed_in_fp64(bench, x, last, N)
    times = bench.measure(runs, layers, mlp_work(T, N, H))
    more = of_default(bench, "gated_mlp", model, T, N, H)
    for theirs in ("eager", "cublas"):
        yield times.row("P1", model, T, "ours", theirs, best=True, **more)
    yield times.row("P2", model, T, "ours", "eager", **more)
    yield times.row("P3", model, T, "ours steered", "hooks", **more)
    yield times.row("P3 late", model, T, "ours, late layer", "ours", **more)
    yield times.row("P1 fp64", model, T, "ours, fp64", "ours", **more)
    yield times.row("P1 fp64 last", model, T, "ours, last, fp64", "ours, last", **more)


def summed_in_fp64(bench, x, token_weight, N):
    """A function of one Layer: the MLP with sums of act and of its squares in fp64, as variances need them."""
    sums = {name: bench.random(2, N, dtype=torch.float64) for name in ("act_sum", "act_sumsq")}

    def run(layer):
        use_plans("")
        weights = layer.w_gate_up, layer.w_down
        return ops.gated_mlp(x, *weights, token_weight=token_weight, **sums, backend="triton")

    return run


def of_default(bench, op, model, T, N, H):
    """The fields that a row of the default plan has about this plan."""
    name = bench.default(op, model, T)
    return dict(op=op, plan=f"{op}={name}", default=True, **predicted_us(bench, op, name, T, N, H))


def elementwise(bench, model, T, rival=None):
    """P4, the elementwise kernel, on sets of gate and up side by side, ``[T, 2N]``. rival: (name, function of both)."""
    _, N = bench.shape(model)
    sets = [bench.random(T, 2 * N) for _ in range(1 if bench.once or bench.mode == "dry" else 4)]
    token_weight, steering, act_sum = (
        bench.token_weight(T),
        bench.steering(T, N, 1),
        bench.random(2, N, dtype=torch.float32),
    )
    sums = dict(token_weight=token_weight, act_sum=act_sum)
    name, product = rival or ("eager", lambda gate, up: F.silu(gate) * up)

    def swiglu(**extras):
        return lambda both: ops.swiglu(*both.chunk(2, dim=-1), **extras, backend="triton")

    runs = {name: lambda both: product(*both.chunk(2, dim=-1)), "plain": swiglu(), "sums": swiglu(**sums)}
    runs["sums and steering"] = swiglu(**sums, **steering)
    times = bench.measure(runs, sets, elementwise_work(T, N))
    predicted = {}
    if bench.mode != "dry":
        cost = import_module("cna_kernels.triton.swiglu").cost(T, N, 2)
        predicted = dict(predicted_us=1e6 * max(cost.seconds(bench.target).values()))
    for ours_name in list(runs)[1:]:
        yield times.row(
            "P4" if rival else "P4 eager", model, T, ours_name, name, op="swiglu", plan="swiglu", **predicted
        )
        if "copy" in bench.ceilings and ours_name in times.times:
            rate = elementwise_work(T, N).bytes / times.median(ours_name)
            row = dict(row="P4 copy", model=model, T=T, ours=ours_name, theirs="copy ceiling", op="swiglu")
            yield row | dict(ratio=bench.ceilings["copy"] / rate, note=f"{rate / 1e9:.0f} GB/s")


def host(bench, model, T):
    """Host time of one call: what Python takes until the launches are queued. The timed part never waits."""
    H, N = bench.shape(model)
    x, layer = bench.random(T, H), bench.layers(model, T)[0]
    sums = dict(token_weight=bench.token_weight(T), act_sum=layer.act_sum)
    both = sums | bench.steering(T, N, 1)
    weights = layer.w_gate_up, layer.w_down
    use_plans("")
    calls = {
        "plain": lambda: ops.gated_mlp(x, *weights, backend="triton"),
        "sums and steering": lambda: ops.gated_mlp(x, *weights, **both, backend="triton"),
        "eager": lambda: eager_mlp(x, *weights),
    }
    rounds, repeats = (1, 1) if bench.mode == "dry" else (HOST_ROUNDS, HOST_CALLS)
    took = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            bench.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            took[name].append((time.perf_counter() - start) / repeats)
            bench.synchronize()
    medians = {name: sorted(each)[rounds // 2] * 1e6 for name, each in took.items()}
    for name in ("plain", "sums and steering"):
        row = dict(row="host", model=model, T=T, ours=name, theirs="eager", ratio=medians[name] / medians["eager"])
        yield row | dict(ours_us=medians[name], theirs_us=medians["eager"], op="gated_mlp")


# Candidates.


def candidate(bench, op, name, model, T):
    """A plan that is not the default: its correctness, and its time against the default's, with sums and steering."""
    if not bench.can_serve(op, name, model, T):
        yield dict(row="plan", model=model, T=T, ours=name, op=op, note="cannot serve this shape")
        return
    H, N = bench.shape(model)
    yield from check(bench, model, T, op, name)
    x, layers = bench.random(T, H if op == "gated_mlp" else N), bench.layers(model, T)
    token_weight, steering = bench.token_weight(T), bench.steering(T, N, 1)
    runs = {"default": ours(x, "", token_weight, steering, op), name: ours(x, name, token_weight, steering, op)}
    times = bench.measure(runs, layers, (mlp_work if op == "gated_mlp" else down_work)(T, N, H))
    more = dict(op=op, plan=f"{op}={name}", **predicted_us(bench, op, name, T, N, H))
    yield times.row("plan", model, T, name, "default", note=f"default {bench.default(op, model, T)}", **more)
