"""Rows of ``down_proj`` on given activations, as ``attach`` calls it on some layers: plain, steered, from tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cna_kernels import Circuit, SteeringTable, ops
from gpu_device import down_work, elementwise_work, even, late, ours, relative
from gpu_rows import check, of_default


def pass_and_linear(act, token_weight, steering):
    """A competitor: sums and steering in a separate pass over act, then cuBLAS."""

    def run(layer):
        steered = ops.steer_act(act, token_weight=token_weight, act_sum=layer.act_sum, **steering, backend="triton")
        return F.linear(steered, layer.w_down)

    return run


def down(bench, model, T):
    """P7: down_proj on given activations, plain and with sums and steering."""
    H, N = bench.shape(model)
    yield from check(bench, model, T, "down_proj")
    act, layers = bench.random(T, N), bench.layers(model, T)
    token_weight, steering, many = bench.token_weight(T), bench.steering(T, N, 1), bench.steering(T, N, 1, size=late(N))
    runs = {"ours plain": ours(act, op="down_proj"), "linear": lambda layer: F.linear(act, layer.w_down)}
    runs["ours"] = ours(act, "", token_weight, steering, "down_proj")
    runs["ours, late layer"] = ours(act, "", token_weight, many, "down_proj")
    runs["pass and linear"] = pass_and_linear(act, token_weight, steering)
    times = bench.measure(runs, layers, down_work(T, N, H))
    more = of_default(bench, "down_proj", model, T, N, H)
    off = relative(runs["ours plain"](layers[0]), runs["linear"](layers[0]))
    yield times.row("P7", model, T, "ours plain", "linear", note=f"differs by {off:.1e}", **more)
    yield times.row("P7 steered", model, T, "ours", "pass and linear", **more)
    yield times.row("P7 cost", model, T, "ours", "ours plain", **more)
    yield times.row("P7 late", model, T, "ours, late layer", "ours plain", **more)


def table(bench, model, T):
    """down_proj with one layer of a live SteeringTable for 64 circuits, as ``attach`` makes it. Three cases: 14 neurons
    steered, 52 neurons steered (in an 8B model), and no circuit loaded, with every row at -1."""
    H, N = bench.shape(model)
    act, layers = bench.random(T, N), bench.layers(model, T)
    runs = {"plain": ours(act, op="down_proj"), "linear": lambda layer: F.linear(act, layer.w_down)}
    sizes = {"evenly": even(N), "late layer": late(N)}
    tables = {"nothing loaded": SteeringTable([], [], 1, N, bench.device, max_circuits=64)}
    for name, size in sizes.items():
        circuits = [Circuit(tuple((0, n, 1.0) for n in sorted(each)), 1, N) for each in bench.members(N, size, 4)]
        tables[name] = SteeringTable(circuits, [0.0] * 4, 1, N, bench.device, max_circuits=64, max_entries=64 * size)
    for name, live in tables.items():
        nobody = torch.full((T,), -1, dtype=torch.int32, device=bench.device)
        rows = nobody if name == "nothing loaded" else torch.zeros_like(nobody)
        runs[name] = ours(act, "", None, dict(scale=live.layer(0), row_circuit=rows), "down_proj")
    times = bench.measure(runs, layers, down_work(T, N, H))
    more = of_default(bench, "down_proj", model, T, N, H)
    yield times.row("table", model, T, "plain", "linear", **more)
    for name in tables:
        note = f"{sizes[name]} neurons" if name in sizes else ""
        yield times.row("table", model, T, name, "plain", note=note, **more)
    same = torch.equal(runs["nothing loaded"](layers[0]), runs["plain"](layers[0]))
    yield dict(row="table bits", model=model, T=T, ours="nothing loaded", theirs="plain", ok=same, op="down_proj")


def in_place(bench, model, T):
    """What sums and steering cost beside an activation that is computed anyway, as in vLLM: a pass in place after it,
    or ``swiglu`` in its place. The activation by itself is ``torch.compile``'s, as vLLM's default is."""
    _, N = bench.shape(model)
    sets = [bench.random(T, 2 * N) for _ in range(1 if bench.once or bench.mode == "dry" else 4)]
    token_weight, nobody = bench.token_weight(T), torch.full((T,), -1, dtype=torch.int32, device=bench.device)
    act_sum = bench.random(2, N, dtype=torch.float32)
    steering = bench.steering(T, N, 16)
    sums = dict(token_weight=token_weight, act_sum=act_sum)
    idle = dict(steering, row_circuit=nobody)
    torch._dynamo.reset()  # a function has a limit of shapes; without fullgraph it would run eagerly past it
    product = silu_and_mul if bench.mode == "dry" else torch.compile(silu_and_mul, dynamic=False, fullgraph=True)

    def after(extras):
        return lambda both: ops.steer_act_(product(both), **extras, backend="triton")

    def instead(extras):
        return lambda both: ops.swiglu(*both.chunk(2, dim=-1), **extras, backend="triton")

    runs = {"activation": product}
    for name, extras in (("idle", idle), ("16 circuits", steering), ("16 circuits, sums", sums | steering)):
        runs |= {f"in place, {name}": after(extras), f"swiglu, {name}": instead(extras)}
    times = bench.measure(runs, sets, elementwise_work(T, N))
    for name in list(runs)[1:]:
        yield times.row("A1", model, T, name, "activation", op=name.partition(",")[0])


def silu_and_mul(both):
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up
