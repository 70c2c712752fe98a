"""The CPU engine's MLP against PyTorch's, on the shapes of real models.

Rows and targets: C1 one token, C2 a few, C3 many, C4 fp32, C5 sums and steering on against off, C6 the share of memory
bandwidth, C7 fp16. bench_cpu_model.py measures a whole model. Each comparison first checks that both sides agree, then
times them A B A B in one process. Weights rotate through copies that together exceed the last-level cache.

``make bench`` runs this file and bench_cpu_model.py twice. The first setting is the machine as it is, named AMX where
it has that. The second limits both sides to AVX-512 without bf16 products (CNA_CPU_ISA=avx512,
ONEDNN_MAX_CPU_ISA=AVX512_CORE), which is what Skylake, Cascade Lake and Ice Lake servers have.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from cna_kernels import make_scale, ops
from cna_kernels.cpu import library
from interleave import compare
from results import last_level_cache
from shapes import MODELS

if reason := library.missing():
    pytest.skip(f"the CPU engine {reason}", allow_module_level=True)

SHAPES = ["Llama-3.2-1B", "Qwen2.5-7B"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


class Weights:
    """Copies of an MLP's weights, a different one for each call."""

    def __init__(self, model, dtype):
        self.H, self.N = MODELS[model]
        self.bytes = 3 * self.H * self.N * dtype.itemsize
        generator = torch.Generator().manual_seed(0)
        self.copies, self.turn = [], 0
        for _ in range(max(2, -(-2 * last_level_cache() // self.bytes))):
            gate_up = torch.empty(2 * self.N, self.H).normal_(0, self.H**-0.5, generator=generator).to(dtype)
            down = torch.empty(self.H, self.N).normal_(0, self.N**-0.5, generator=generator).to(dtype)
            self.copies.append((gate_up, down))

    def next(self):
        self.turn = (self.turn + 1) % len(self.copies)
        return self.copies[self.turn]

    def tokens(self, m, dtype):
        return torch.randn(m, self.H, generator=torch.Generator().manual_seed(1)).to(dtype)


_weights = {}


def weights_of(model, dtype):
    """The Weights of a model and dtype. Those of the last call are kept, all others dropped, to save memory."""
    if (model, dtype) not in _weights:
        _weights.clear()
        _weights[model, dtype] = Weights(model, dtype)
    return _weights[model, dtype]


def plain(x, gate_up, down):
    """The MLP by PyTorch's own operations."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def features(m, n_neurons):
    """Two columns of sums, and two circuits of 0.1% of the neurons. Every token uses one of the circuits."""
    token_weight = torch.rand(m, 2, generator=torch.Generator().manual_seed(2))
    neurons = torch.randperm(n_neurons, generator=torch.Generator().manual_seed(3))[
        : max(1, n_neurons // 1000)
    ].tolist()
    scale = make_scale([dict.fromkeys(neurons, 0.0), dict.fromkeys(neurons, 2.0)], n_neurons)
    row_circuit = (torch.arange(m) % 2).int()
    return dict(token_weight=token_weight, act_sum=torch.zeros(2, n_neurons), scale=scale, row_circuit=row_circuit)


def assert_agree(ours, theirs):
    """Our result and PyTorch's differ by at most 5% of the largest value: both sides do the same computation."""
    ours, theirs = ours.double(), theirs.double()
    assert (ours - theirs).abs().max() <= 0.05 * theirs.abs().max(), "ours and theirs are not the same computation"


def rounds_for(m):
    return 25 if m <= 4 else 15 if m <= 16 else 9 if m <= 64 else 5


def record(benchmark, row, ours):
    benchmark.extra_info.update(row)
    benchmark.pedantic(ours, rounds=3)


# id, our dtype, PyTorch's dtype, target ratios by number of tokens m
AGAINST_TORCH = [
    ("C1", BF16, BF16, {1: 0.60}),
    ("C2", BF16, BF16, {2: 0.30, 4: 0.30, 8: 0.30, 16: 0.30}),
    ("C3", BF16, BF16, {64: 0.35, 256: 0.30}),
    ("C3", BF16, FP32, {64: 1.10, 256: 1.10}),
    ("C4", FP32, FP32, {1: 1.00, 16: None, 64: None, 256: None}),
    ("C7", FP16, FP16, {1: None, 16: None, 64: None}),
]
CASES = [(id, model, m, *rest) for model in SHAPES for id, *rest, targets in AGAINST_TORCH for m in targets]
TARGETS = {(id, theirs, m): t for id, _, theirs, targets in AGAINST_TORCH for m, t in targets.items()}


@pytest.mark.parametrize(("id", "model", "m", "dtype", "theirs"), CASES)
def test_against_torch(results, benchmark, id, model, m, dtype, theirs):
    mine, extras = weights_of(model, dtype), features(m, MODELS[model][1])
    x = mine.tokens(m, dtype)

    def ours():
        return ops.gated_mlp(x, *mine.next(), **extras)

    if theirs == dtype:
        assert_agree(ops.gated_mlp(x, *mine.copies[0]), plain(x, *mine.copies[0]))
        result = compare(ours, lambda: plain(x, *mine.next()), rounds=rounds_for(m))
    else:
        wide, gate_up, down = (part.to(theirs) for part in (x, *mine.copies[0]))
        result = compare(ours, lambda: plain(wide, gate_up, down), rounds=rounds_for(m))
    name = str(theirs).removeprefix("torch.")
    row = results.add(
        id,
        shape=model,
        m=m,
        dtype=str(dtype).removeprefix("torch."),
        competitor=f"torch {name}",
        result=result,
        target=TARGETS[id, theirs, m],
    )
    record(benchmark, row, ours)


@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize("model", SHAPES)
def test_features_cost_nothing(results, benchmark, model, m):
    mine, extras = weights_of(model, BF16), features(m, MODELS[model][1])
    x = mine.tokens(m, BF16)

    def ours():
        return ops.gated_mlp(x, *mine.next(), **extras)

    result = compare(ours, lambda: ops.gated_mlp(x, *mine.next()), rounds=3 * rounds_for(m))
    row = results.add(
        "C5", shape=model, m=m, dtype="bfloat16", competitor="ours without features", result=result, target=1.02
    )
    record(benchmark, row, ours)


@pytest.mark.parametrize("model", SHAPES)
def test_share_of_memory_bandwidth(results, benchmark, model):
    mine, extras = weights_of(model, BF16), features(1, MODELS[model][1])
    x = mine.tokens(1, BF16)
    same_bytes = itertools.cycle([torch.ones(mine.bytes // 4) for _ in mine.copies])

    def ours():
        return ops.gated_mlp(x, *mine.next(), **extras)

    result = compare(ours, lambda: next(same_bytes).sum(), rounds=2 * rounds_for(1))
    read = mine.bytes / result["theirs"] / 1e9
    row = results.add(
        "C6",
        shape=model,
        m=1,
        dtype="bfloat16",
        competitor="torch.sum over as many bytes",
        result=result,
        target=round(1 / 0.85, 4),
        share_of_bandwidth=round(1 / result["ratio"], 3),
        read_gb_per_s=round(read, 1),
    )
    record(benchmark, row, ours)
