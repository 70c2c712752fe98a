"""A process of ``bench/gpu/gpu.py`` that measures. It reads jobs from standard input, and writes rows to stdout.

The first line that it reads is an order, ``{"mode": ..., "once": ..., "ceilings": ...}``; every further line names a
job. Its answers are lines of JSON: ``ready`` once, then rows, and ``done`` after each job.

    python bench/gpu/gpu_worker.py --every-plan defaults|candidates     small shapes, for compute-sanitizer
    python bench/gpu/gpu_worker.py --profile                            the kernels that ncu looks at
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback

import torch

import gpu_checks
import gpu_device
from cna_kernels import ops
from cna_kernels.triton import plan as plans
from gpu_compiled import compiled, compiled_swiglu
from gpu_device import Bench, Layer, brief, make_call, ours
from gpu_down import down, in_place, table
from gpu_model import generate
from gpu_rows import candidate, check, decode, elementwise, host, prefill
from gpu_tune import tune


def measure_ceilings(bench):
    """Bytes/s of a copy (read plus written) and of reading, FLOP/s of a bf16 product; and the Times behind them."""
    size = 64 if bench.mode == "dry" else 8192
    wide = [bench.random(size, 32 * size) for _ in range(2)]  # 4 GB each
    part = [each[: size // 8] for each in wide]  # 0.5 GB
    square = [bench.random(size, size) for _ in range(2)]
    n_bytes, n_part = 2 * wide[0].numel(), 2 * part[0].numel()
    runs = {
        "copy, 4 GB": (lambda _: wide[1].copy_(wide[0]), 2 * n_bytes),
        "copy, 0.5 GB": (lambda _: part[1].copy_(part[0]), 2 * n_part),
        "read, sum": (lambda _: wide[0].sum(dtype=torch.float32), n_bytes),
        "read, sum of 0.5 GB": (lambda _: part[0].sum(dtype=torch.float32), n_part),
        "read, row sums": (lambda _: wide[0].view(-1, size).sum(dim=1, dtype=torch.float32), n_bytes),
        "bf16 matmul": (lambda _: square[0] @ square[1], 2 * size**3),
    }
    times = bench.measure({name: run for name, (run, _) in runs.items()}, [None])
    rates = {name: amount / times.median(name) for name, (_, amount) in runs.items() if name in times.times}
    for kind, names in (("copy", ("copy",)), ("read", ("copy", "read"))):
        if found := [rate for name, rate in rates.items() if name.startswith(names)]:
            rates[kind] = max(found)
    return rates, times


def ceilings(bench):
    """The facts about the device, and rows with its ceilings."""
    import platform

    import triton

    rates, times = measure_ceilings(bench)
    bench.ceilings = rates
    bench.forget()
    _, assumed = gpu_device.device_of(bench.name, rates, bench.n_sm)
    versions = dict(python=platform.python_version(), torch=torch.__version__, triton=triton.__version__)
    versions |= dict(cuda=torch.version.cuda, multiprocessors=bench.n_sm)
    yield dict(environment=dict(device=bench.name, **versions), ceilings=rates)
    for name, rate in rates.items():
        row = dict(row="ceiling", ours=name, note=f"{rate / 1e12:.3f} T{'FLOP' if 'matmul' in name else 'B'}/s")
        yield row | (dict(ours_us=times.median(name) * 1e6) if name in times.times else {})
    if not assumed.endswith(": "):
        yield dict(row="ceiling", ours="assumed", note=assumed)


def catalogue(bench):
    yield dict(catalogue=gpu_device.catalogue(bench.arch, bench.n_sm))


def dependent(bench, model):
    """Rows PDL: the decode pair with nothing between its kernels; see ``gpu_checks``."""
    H, N = bench.shape(model)
    repeats = 3 if bench.mode == "dry" else 200
    for T in (1, 16, 64):
        T = bench.tokens(T) if bench.mode != "dry" else min(T, 2)
        yield verdict("PDL", model, T, lambda T=T: gpu_checks.dependent_stress(T, N, H, bench.device, repeats))


def replay(bench, model):
    """Rows "graph": captured graphs against calls, bit for bit, for every op at few and at many tokens."""
    H, N = bench.shape(model)
    capture = {} if bench.mode != "dry" else dict(capture=gpu_checks.capture_by_copy)
    for op in gpu_checks.INPUTS:
        for T in (1, 64, 128) if bench.mode != "dry" else (2,):
            body = lambda op=op, T=T: gpu_checks.replays_follow(op, T, N, H, bench.device, **capture)  # noqa: E731
            yield verdict("graph", model, T, body, ours=op)


def verdict(row, model, T, body, **more):
    head = dict(row=row, model=model, T=T, **more)
    try:
        return dict(head, ok=True, note=body())
    except AssertionError as error:
        return dict(head, ok=False, note=str(error)[:300])


def every_plan(bench, which):
    """Run plans once, with and without sums and steering, on small shapes with ragged tails. which: "defaults", the
    default plans and the elementwise kernel, or "candidates", all other plans."""
    for T, N, H in ((1, 1032, 72), (16, 1032, 72), (130, 264, 136)):
        layer = Layer(bench.random(2 * N, H), bench.random(H, N), bench.random(2, N, dtype=torch.float32))
        token_weight, steering = bench.token_weight(T), bench.steering(T, N, 2)
        x, both = bench.random(T, H), bench.random(T, 2 * N)
        sums, done = dict(token_weight=token_weight, act_sum=layer.act_sum), []
        if which == "defaults":
            done.append(ops.swiglu(*both.chunk(2, dim=-1), **sums, **steering, backend="triton"))
            done.append(ops.steer_act(both[:, :N], **sums, **steering, backend="triton"))
        for op, given in (("gated_mlp", x), ("down_proj", both[:, :N])):
            call = make_call(op, T, N, H, bench.arch, bench.n_sm)
            default = plans.default(call).name
            names = [n for n in plans.PLANS[op] if n != default and plans.can_serve(call, n)]
            if which == "defaults":
                names = [default, *(n for n in names if n == "fused" and T > 64)]  # the default for more tokens
            for name in names:
                print(f"{op} {name} T={T}", file=sys.stderr, flush=True)
                done += [ours(given, name, *extras, op=op)(layer) for extras in ((), (token_weight, steering))]
        bench.synchronize()
        assert all(y.isfinite().all() for y in done), f"{T=} {N=} {H=}: not finite"


def profile(bench, model="Llama-3.1-8B"):
    """The calls that ncu profiles, on 8B shapes, each twice: gate/up and down for one token, down for 16 tokens, the
    elementwise kernel and down_proj for 4096 tokens."""
    H, N = bench.shape(model)
    layer = Layer(
        bench.random(2 * N, H, deviation=H**-0.5), bench.random(H, N, deviation=N**-0.5),
        bench.random(2, N, dtype=torch.float32),
    )  # fmt: skip
    for T, op, width in ((1, "gated_mlp", H), (16, "down_proj", N), (4096, "swiglu", N), (4096, "down_proj", N)):
        T = bench.tokens(T)
        x, token_weight, steering = bench.random(T, width), bench.token_weight(T), bench.steering(T, N, 1)
        sums = dict(token_weight=token_weight, act_sum=layer.act_sum)
        for _ in range(2):
            if op == "swiglu":
                ops.swiglu(x, bench.random(T, N), **sums, **steering, backend="triton")
            else:
                ours(x, "", token_weight, steering, op)(layer)
    bench.synchronize()


KINDS = dict(ceilings=ceilings, catalogue=catalogue, check=check, decode=decode, prefill=prefill, down=down)
KINDS |= dict(table=table, elementwise=elementwise, host=host, candidate=candidate, generate=generate, tune=tune)
KINDS |= dict(compiled=compiled, compiled_swiglu=compiled_swiglu, dependent=dependent, replay=replay)
KINDS |= dict(every_plan=every_plan, profile=profile, in_place=in_place)


def run(job: str, bench: Bench):
    kind, *names = job.split("/")
    if kind == "tune" and len(names) == 4:
        names[3:] = [f"part {names[3]}"]
    given = [bench.tokens(int(name)) if name.isdigit() else name for name in names]
    if kind == "tune" and len(given) == 4:
        given[3] = int(given[3].removeprefix("part "))
    yield from KINDS[kind](bench, *given) or ()


def main():
    if "--every-plan" in sys.argv or "--profile" in sys.argv:
        bench = Bench("dry" if not torch.cuda.is_available() else "time", {}, once=True)
        with torch.no_grad():
            profile(bench) if "--profile" in sys.argv else every_plan(bench, sys.argv[-1])
        return
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # all other output of this process goes to the log
    order = json.loads(sys.stdin.readline())
    bench = Bench(order["mode"], order["ceilings"], order["once"])
    print(json.dumps(dict(ready=True)), file=channel)
    for line in sys.stdin:
        job, start = json.loads(line)["job"], time.time()
        try:
            with torch.no_grad():
                for row in run(job, bench):
                    print(json.dumps(row), file=channel)
        except Exception as error:
            traceback.print_exc()
            print(json.dumps(dict(row="failed", ours=job, note=f"{job}: {brief(error)}")), file=channel)
        bench.synchronize()  # if this raises, the process has lost the device, and the parent starts another worker
        print(f"{job}: {time.time() - start:.1f} s", file=sys.stderr)
        print(json.dumps(dict(done=job)), file=channel)


if __name__ == "__main__":
    main()
