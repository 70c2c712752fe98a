"""What only a device can show, as functions that ``tests/kernels/test_cuda.py`` and ``bench/gpu/gpu.py`` share.

``dependent_stress``: the second kernel of a pair is launched before the first has ended, and waits for the first
(programmatic dependent launch). PyTorch's NaN fill of new memory, which other tests use, can put a kernel between the
two, and then the second need not wait. So this test fills nothing. Its inputs change from call to call: reused memory
holds the activations of the call before, which would look right if the inputs were the same. The expected results come
from the same kernels, each launched when the one before has ended.

``replays_follow``: after inputs and multipliers were changed in place, a captured graph gives the same bits as the op
called again. ``capture`` stands for ``torch.cuda.graph``, so that the logic runs on a CPU, too.
"""

from __future__ import annotations

import contextlib

import torch
import triton

from cna_kernels import make_scale, ops, reference

INPUTS = {"gated_mlp": ("x", "w_gate_up", "w_down"), "down_proj": ("act", "w_down"), "swiglu": ("gate", "up")}


@contextlib.contextmanager
def memory_fill(on: bool):
    """In the block PyTorch fills new memory with NaN if ``on``, else leaves it as it is."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextlib.contextmanager
def one_kernel_at_a_time():
    """In the block every launch waits until the device is idle, so that kernels never overlap.

    A launch hook does the waiting: with a hook set, ops launch through Triton as in their first call.
    """
    hooks = triton.knobs.runtime.launch_enter_hook

    def wait(*_):
        torch.cuda.synchronize()

    hooks.add(wait)
    try:
        yield
    finally:
        hooks.remove(wait)


def make_inputs(op, T, N, H, device, seed=0) -> tuple[list, dict]:
    """Random bf16 inputs of an op, and its sums and steering: three circuits, and some tokens without a circuit."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, spread=1.0, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, spread, generator=generator)

    made = dict(x=lambda: normal(T, H), act=lambda: normal(T, N), gate=lambda: normal(T, N), up=lambda: normal(T, N))
    made["w_gate_up"] = lambda: normal(2 * N, H, spread=H**-0.5)
    made["w_down"] = lambda: normal(H, N, spread=N**-0.5)
    size = max(2, N // 500)
    members = [torch.randperm(N, generator=torch.Generator().manual_seed(k))[:size].tolist() for k in range(3)]
    extras = dict(
        token_weight=normal(T, 2, dtype=torch.float32).abs_() + 0.1,
        act_sum=normal(2, N, dtype=torch.float32),  # not zero, so that setting instead of adding shows
        act_sumsq=normal(2, N, dtype=torch.float32).abs_(),
        scale=make_scale([{n: 0.25 * (n % 7) for n in each} for each in members], N, device),
        row_circuit=(torch.arange(T, device=device) % 4).int() - int(T > 1),  # some tokens have none
    )
    return [made[name]() for name in INPUTS[op]], extras


def through_triton(op):
    return lambda *inputs, **extras: getattr(ops, op)(*inputs, **extras, backend="triton")


def assert_same_bits(what, got, expected):
    if torch.equal(got, expected):
        return
    differs = ~((got == expected) | (got.isnan() & expected.isnan()))
    place = tuple(int(i) for i in differs.nonzero()[0])
    values = f"{got[place].item()} instead of {expected[place].item()}"
    raise AssertionError(f"{what} at {list(place)}: {values}; {int(differs.sum())} elements differ")


@torch.no_grad()
def dependent_stress(T, N, H, device, repeats=200, call=None) -> str:
    """Run the decode pair ``repeats`` times, with nothing between its kernels, on three inputs in turn. Its outputs and
    sums must always have the same bits, else AssertionError. Returns a note."""
    call = call or through_triton("gated_mlp")
    (x, *weights), extras = make_inputs("gated_mlp", T, N, H, device)
    inputs = [x, *(make_inputs("gated_mlp", T, N, H, device, seed)[0][0] for seed in (1, 2))]
    start = extras.pop("act_sum"), extras.pop("act_sumsq")

    def run(x):
        sums = [part.clone() for part in start]
        return (call(x, *weights, **extras, act_sum=sums[0], act_sumsq=sums[1]), *sums)

    with memory_fill(True), one_kernel_at_a_time():
        expected = [tuple(part.clone() for part in run(x)) for x in inputs]
    some = slice(0, T, max(1, T // 8))
    for x, (y, *_) in zip(inputs, expected, strict=True):
        rows = dict(scale=extras["scale"], row_circuit=extras["row_circuit"][some])
        exact = reference.gated_mlp(x[some].double(), *(w.double() for w in weights), **rows)
        error = ((y[some].double() - exact).norm() / exact.norm()).item()
        assert error < 1e-2, f"T={T}: the calls to compare with are off by {error:.1e}"
    with memory_fill(False):
        results = [run(inputs[i % 3]) for i in range(repeats)]  # all calls are queued before any result is read
    for i, result in enumerate(results):
        for name, got, wanted in zip(("y", "act_sum", "act_sumsq"), result, expected[i % 3], strict=True):
            assert_same_bits(f"T={T}, call {i}: {name}", got, wanted)
    return f"T={T}: {repeats} calls, y and sums bit-equal"


def capture_cuda(run):
    """(a function that replays ``run``, the tensor that each replay writes)"""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles and warms up
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    return graph.replay, y


@torch.no_grad()
def replays_follow(op, T, N, H, device, capture=capture_cuda, call=None) -> str:
    """Compare a captured call, replayed after each change in place, with the op called again. Raises AssertionError."""
    call = call or through_triton(op)
    inputs, extras = make_inputs(op, T, N, H, device)
    start = extras["act_sum"].clone(), extras["act_sumsq"].clone()

    def again():
        extras["act_sum"].copy_(start[0])
        extras["act_sumsq"].copy_(start[1])

    with memory_fill(False):
        replay, y = capture(lambda: call(*inputs, **extras))
        seen = []
        for step, multiplier in enumerate((0.0, 1.0, 3.0)):
            extras["scale"].value.fill_(multiplier)
            extras["row_circuit"].copy_(torch.roll(extras["row_circuit"], step))
            inputs[0].normal_()
            again()
            y.fill_(torch.nan)
            replay()
            replayed = y.clone(), extras["act_sum"].clone(), extras["act_sumsq"].clone()
            again()
            eager = call(*inputs, **extras)
            called = eager, extras["act_sum"], extras["act_sumsq"]
            for name, got, wanted in zip(("y", "act_sum", "act_sumsq"), replayed, called, strict=True):
                assert_same_bits(f"{op} T={T}, multiplier {multiplier}: {name}", got, wanted)
            seen.append(replayed[0])
        assert not torch.equal(seen[0], seen[2]), f"{op} T={T}: nothing changed from replay to replay"
    return f"{op} T={T}: 3 replays bit-equal to calls"


def capture_by_copy(run):
    """Stands for ``capture_cuda`` on a CPU: a replay is ``run`` again, its result copied into the same memory."""
    y = run().clone()
    return lambda: y.copy_(run()), y
