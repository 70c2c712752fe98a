"""The CPU engine against the definition, at every instruction-set level that this machine has; see levels.py."""

import contextlib
import itertools
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from levels import EMULATED, LEVELS

from cna_kernels import make_scale, ops
from cna_kernels.cpu import library
from covering import parameters
from op_cases import (
    DTYPES,
    FEATURES,
    INPUTS,
    OPS,
    assert_close,
    assert_nothing_outside,
    assert_values,
    exact,
    exact_case,
    make_case,
    torch_same_dtype,
    wider,
    with_feature,
)
from tiny import assert_model_agrees_with_reference

if reason := library.missing():
    pytest.skip(f"the CPU engine {reason}", allow_module_level=True)

# (T, N, H): decode with a short and a long token, one neuron, one block of fewer tokens than half a vector, several
# passes of few tokens, panels with ragged tokens and several blocks of k, two blocks of neurons, and more tokens than
# go through the MLP together.
SHAPES = [
    (1, 48, 24), (1, 40, 4200), (3, 1, 5), (6, 32, 40), (16, 136, 200), (63, 130, 72), (130, 1032, 72), (270, 70, 1100)
]  # fmt: skip


def run(op, case, extras):
    return getattr(ops, op)(*case.inputs(op), **extras, backend="cpu")


def name_of(value):
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.")


# steer_act shares swiglu's code, except for a copy
VALUES = [
    (level, op, shape, dtype, feature)
    for level, op, shape, dtype, feature in itertools.product(LEVELS, OPS, SHAPES, DTYPES, FEATURES)
    if op != "steer_act" or shape in SHAPES[2::2]
]
IDS = ["-".join(map(name_of, case)) for case in VALUES]


@pytest.mark.parametrize(
    ("level", "op", "shape", "dtype", "feature"),
    parameters(VALUES, IDS, strength=3, everyday=lambda case: case[0] != EMULATED),
    indirect=["level"],
)
def test_values(level, op, shape, dtype, feature):
    T, N, H = shape
    case = make_case(T, N, dtype, n_hidden=H)
    extras = with_feature(case, feature)
    y = run(op, case, extras)
    assert_values(case, op, y, extras)
    assert y.dtype == dtype and y.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 71, 4200), (5, 33, 40), (50, 70, 1100), (300, 31, 33)], ids=name_of)
def test_linear(level, shape, dtype):
    T, O, H = shape  # noqa: E741
    generator = torch.Generator().manual_seed(4)
    x, w, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((T, H), (O, H), (O,)))
    w = (w.float() * H**-0.5).to(dtype)
    for b in (None, bias):
        answer = F.linear(x.double(), w.double(), None if b is None else b.double())
        assert_close("y", ops.linear(x, w, b, backend="cpu"), F.linear(x, w, b), answer, slack=2, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_edges_of_tiles(level, dtype):
    """Exact for every rest of tokens, outputs and inputs; what lies behind a row of weights, and behind all, is NaN."""
    generator = torch.Generator().manual_seed(5)
    for T, O, K in itertools.product((1, 2, 16, 17, 33, 49), (1, 15, 17, 31, 48), (1, 31, 33, 64, 512, 545)):  # noqa: E741
        x = torch.randint(-1, 2, (T, K), generator=generator).to(dtype)
        room = torch.full((O + 3, K + 40), float("nan"), dtype=dtype)
        w = room[:O, :K]
        w.copy_(torch.randint(-1, 2, (O, K), generator=generator))
        answer = F.linear(x.double(), w.double())
        assert torch.equal(ops.linear(x, w, backend="cpu").double(), answer.to(dtype).double()), (T, O, K)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(1, 40, 24), (3, 40, 24), (17, 136, 72), (70, 40, 1100)], ids=name_of)
def test_exact_on_small_integers(level, shape, dtype):
    """Integers that every format holds: no rounding anywhere, so every bit must agree."""
    T, N, H = shape
    case = make_case(T, N, dtype, n_hidden=H)
    generator = torch.Generator().manual_seed(3)

    def integers(low, high, part):
        return torch.randint(low, high, part.shape, generator=generator).to(part.dtype)

    case.act, case.token_weight = integers(-2, 3, case.act), integers(0, 3, case.token_weight)
    case.w_down = integers(-1, 2, case.w_down) * (torch.rand(H, N, generator=generator) < 0.5).to(dtype)
    case.act_sum, case.act_sumsq = case.act_sum.round(), case.act_sumsq.round()
    case.scale = case.scale._replace(value=torch.tensor([0.0, 2.0, -1.0] * 4)[: len(case.scale.value)])
    extras = case.extras()
    y = run("down_proj", case, extras)
    assert exact(case, "down_proj")[0].abs().max() < 256, "bf16 holds integers up to 256"
    for got, want in zip((y, extras["act_sum"], extras["act_sumsq"]), exact(case, "down_proj"), strict=True):
        assert torch.equal(got.double(), want)
    w = integers(-1, 2, torch.empty(N, H))
    x = integers(-1, 2, torch.empty(T, H))
    answer = F.linear(x.double(), w.double())
    assert answer.abs().max() < 256
    assert torch.equal(ops.linear(x.to(dtype), w.to(dtype), backend="cpu").double(), answer)


# Few tokens and many, both with two blocks of neurons and ragged in every dimension.
EXACT = [(op, shape) for op in OPS for shape in ((4, 1032, 72), (70, 1032, 200))]
each_path = pytest.mark.parametrize(("op", "shape"), EXACT, ids=[f"{op}-{shape[0]}" for op, shape in EXACT])


@each_path
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_multiplier_one_and_no_circuit_are_bit_identical(level, op, shape, dtype):
    case = exact_case(shape, dtype)
    plain = run(op, case, {})
    ones = case.scale._replace(value=torch.ones_like(case.scale.value))
    nobody = torch.full_like(case.row_circuit, -1)
    empty = make_scale([{}], shape[1])
    for scale, rows in ((ones, case.row_circuit), (case.scale, nobody), (empty, torch.zeros_like(nobody))):
        assert torch.equal(run(op, case, dict(scale=scale, row_circuit=rows)), plain)
    sums = {k: v for k, v in case.extras().items() if k not in ("scale", "row_circuit")}
    assert torch.equal(run(op, case, sums), plain), "sums change nothing"
    steered = run(op, case, dict(scale=case.scale, row_circuit=case.row_circuit))
    free = (case.row_circuit < 0) | (case.row_circuit >= case.scale.offsets.shape[0])
    assert torch.equal(steered[free], plain[free]) and not torch.equal(steered, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_zero_writes_zero_and_nothing_else_changes(level, dtype):
    case = exact_case((70, 1032, 24), dtype)
    plain = run("swiglu", case, {})
    hit = torch.from_numpy(case.multipliers() != 1)
    for multiplier in (0.0, 2.0, -1.0, 0.3):
        case.scale.value.fill_(multiplier)
        hit |= torch.from_numpy(case.multipliers() != 1)
        act = run("swiglu", case, dict(scale=case.scale, row_circuit=case.row_circuit))
        assert torch.equal(act[~hit], plain[~hit])
        expected = torch.zeros_like(plain) if multiplier == 0 else (plain.float() * multiplier).to(dtype)
        assert torch.equal(act[hit], expected[hit])
    assert hit.sum() > 100, "the case must steer something"


@each_path
def test_zero_scale_hides_non_finite_activations(level, op, shape):
    case = exact_case(shape)
    chosen = [0, 5, shape[1] - 1]
    case.row_circuit = torch.zeros_like(case.row_circuit)
    case.scale = make_scale([dict.fromkeys(chosen, 0.0)], shape[1])
    extras = dict(scale=case.scale, row_circuit=case.row_circuit)
    expected = run(op, case, extras)
    for part in (case.gate, case.act):
        part[:, chosen] = torch.tensor([torch.inf, torch.nan, -torch.inf], dtype=part.dtype)
    case.w_gate_up[[n + shape[1] for n in chosen]] = torch.inf
    assert torch.equal(run(op, case, extras), expected)


@each_path
def test_uncounted_tokens_are_never_read(level, op, shape):
    case = exact_case(shape)
    clean, poisoned = case.extras(), case.extras()
    run(op, case, clean)
    assert (case.token_weight[::3] == 0).all()
    for part in (case.x, case.gate, case.act):
        part[::3] = torch.nan
    run(op, case, poisoned)
    assert torch.equal(clean["act_sum"], poisoned["act_sum"])
    assert torch.equal(clean["act_sumsq"], poisoned["act_sumsq"])


@each_path
def test_sums_come_before_scaling(level, op, shape):
    case = exact_case(shape)
    steered, plain = case.extras(), case.extras()
    plain.update(scale=None, row_circuit=None)
    run(op, case, steered)
    run(op, case, plain)
    assert torch.equal(steered["act_sum"], plain["act_sum"])
    assert torch.equal(steered["act_sumsq"], plain["act_sumsq"])


@contextlib.contextmanager
def torch_threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


# 15 tokens: blocks of 7 and 8, each prepared by another thread, and shorter than half a vector of AVX-512.
PATHS = [*EXACT, ("gated_mlp", (15, 2400, 2400)), ("down_proj", (15, 9000, 40))]
THREADED = list(itertools.product(LEVELS, DTYPES, PATHS))
THREADED_IDS = ["-".join(map(name_of, (level, dtype, *path))) for level, dtype, path in THREADED]


@pytest.mark.parametrize(
    ("level", "dtype", "path"),
    parameters(THREADED, THREADED_IDS, everyday=lambda case: case[0] != EMULATED),
    indirect=["level"],
)
def test_any_number_of_threads_gives_the_same_bits(level, dtype, path):
    op, shape = path
    case, results = exact_case(shape, dtype), set()
    for n_threads in (1, 2, 4, 2, 4, 2, 4, 2, 3):
        extras = case.extras()
        with torch_threads(n_threads):
            y = run(op, case, extras)
        parts = (y, extras["act_sum"], extras["act_sumsq"])
        results.add(tuple(part.view(torch.uint8).numpy().tobytes() for part in parts))
    assert len(results) == 1


@each_path
def test_a_row_does_not_depend_on_its_neighbours(level, op, shape):
    """A row in another batch has the same bits, as long as both batches have few tokens, or both have many."""
    case = exact_case(shape)
    whole, T = run(op, case, {}), shape[0]
    part = T - T // 4  # 3 of 4 tokens, 53 of 70
    for name in ("x", "gate", "up", "act"):
        setattr(case, name, getattr(case, name)[-part:])
    assert torch.equal(run(op, case, {}), whole[-part:])


@each_path
def test_any_row_stride_and_nothing_written_outside(level, op, shape):
    case = exact_case(shape)
    compact = case.extras()
    expected = run(op, case, compact)
    for part in ("x", "w_gate_up", "w_down", "gate", "up", "act"):
        setattr(case, part, wider(getattr(case, part)))
    extras = case.extras()
    extras["token_weight"] = wider(extras["token_weight"])
    extras["act_sum"], extras["act_sumsq"] = wider(extras["act_sum"]), wider(extras["act_sumsq"])
    assert torch.equal(run(op, case, extras), expected)
    for part in ("act_sum", "act_sumsq"):
        assert torch.equal(extras[part], compact[part])
        assert_nothing_outside(part, extras[part])


def test_rows_on_top_of_each_other(level):
    case = exact_case((6, 48, 24), torch.float32)
    for name in ("x", "gate", "up", "act"):
        setattr(case, name, getattr(case, name)[:1].expand(6, -1))
    for op in OPS:
        y = run(op, case, {})
        assert torch.equal(y, y[:1].expand(6, -1)) and torch.isfinite(y).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("op", OPS)
def test_offsets_beyond_int32(level, tmp_path, op, dtype):
    """Rows 2**30 elements apart, in a sparse file: an int32 offset would wrap at the third row."""
    stride, case = 2**30 + 8, exact_case((3, 48, 24), dtype)
    extras = case.extras()
    file = np.memmap(tmp_path / "sparse", dtype=np.int8, mode="w+", shape=(2 * stride + 64) * dtype.itemsize)
    space = torch.from_numpy(file).view(dtype)
    name = INPUTS[op][0]
    part = getattr(case, name)
    setattr(case, name, space.as_strided(part.shape, (stride, 1)).copy_(part))
    y = run(op, case, extras)
    assert_close("y", y, torch_same_dtype(case, op)[0], exact(case, op)[0], slack=2, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_silu_of_extreme_values(level, dtype):
    largest = torch.finfo(dtype).max
    values = [0.0, -0.0, 1e-8, -1e-8, 20.0, -20.0, 87.0, -87.0, 88.5, -88.5, 103.0, -103.0, 1e4, -1e4]
    gate = torch.tensor([[*values, largest, -largest, torch.inf, -torch.inf, torch.nan]]).to(dtype)
    act = ops.swiglu(gate, torch.ones_like(gate), backend="cpu")
    expected = F.silu(gate.float()).to(dtype)
    assert torch.equal(act.isnan(), expected.isnan())
    known = ~expected.isnan()
    torch.testing.assert_close(act[known], expected[known], rtol=4 * torch.finfo(dtype).eps, atol=1e-36)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_rounding_is_pytorchs(level, dtype):
    """swiglu with a large gate is gate * up: products around every representable value, ties and overflow included."""
    generator = torch.Generator().manual_seed(6)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    up = bits.view(dtype).reshape(64, 1024)
    up = up.nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)
    gate = 32 + 32 * torch.rand(64, 1024, generator=generator)
    gate = gate.to(dtype)
    assert torch.equal(F.silu(gate.float()), gate.float()), "the sigmoid of these is 1"
    # avx512_bf16 and amx treat nothing here as zero: products and rounding of swiglu are fp32 at every level
    expected = (gate.float() * up.float()).to(dtype)
    assert torch.equal(ops.swiglu(gate, up, backend="cpu"), expected)


def test_calls_from_eight_threads_at_once(level):
    cases = [(op, exact_case(shape, dtype)) for op, shape in EXACT for dtype in DTYPES]
    alone = []
    for op, case in cases:
        extras = case.extras()
        alone.append((run(op, case, extras), extras["act_sum"]))
    wrong = []

    def work(start):
        for i in range(start, start + 2 * len(cases)):
            op, case = cases[i % len(cases)]
            extras = case.extras()
            y = run(op, case, extras)
            expected_y, expected_sum = alone[i % len(cases)]
            if not (torch.equal(y, expected_y) and torch.equal(extras["act_sum"], expected_sum)):
                wrong.append((start, i, op))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_model_gives_the_same_circuit_and_answers(level, monkeypatch, tmp_path):
    assert_model_agrees_with_reference("cpu", monkeypatch, tmp_path)
