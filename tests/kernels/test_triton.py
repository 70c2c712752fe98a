"""Every Triton kernel against the definition: on the GPU where there is one, else in Triton's interpreter.

The interpreter runs the kernels' source with numpy, one program after the other. It finds wrong formulas, masks,
offsets and strides, but not races or faults of the compiler; ``bench/gate/compile_gate.py`` reads the machine code.
"""

import dataclasses

import numpy as np
import pytest
import torch

from cna_kernels import make_scale, ops, plans
from cna_kernels.triton import plan
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
    wide_case,
    wider,
    with_feature,
)
from tiny import assert_model_agrees_with_reference
from triton_cases import DEVICE, WHERE, on_device, servable

pytestmark = pytest.mark.interpreted

# (T, N, H). Decode, one neuron, no multiple of any tile, all multiples, two blocks of neurons and a tail with several
# blocks of tokens. N and H that are multiples of 8 are the ones TMA can address.
SHAPES = [(1, 48, 24), (3, 1, 5), (16, 136, 200), (63, 130, 72), (64, 128, 128), (130, 1032, 72)]


PLANS = [("swiglu", "-"), ("steer_act", "-")] + [(op, name) for op, names in plan.PLANS.items() for name in names]
CASES = [
    ((op, name), shape, dtype, feature)
    for op, name in PLANS
    for shape in SHAPES
    for dtype in DTYPES
    for feature in FEATURES
    if (op not in plan.PLANS or servable(op, name, shape, dtype)) and (op != "steer_act" or shape in SHAPES[1::2])
]  # steer_act runs swiglu's kernel, as does down_proj by "blas"
IDS = [f"{WHERE}-{op}-{name}-{'x'.join(map(str, s))}-{str(d)[6:]}-{f}" for (op, name), s, d, f in CASES]


def features(case, feature, kernel):
    """The case's optional arguments on DEVICE; more columns than a program takes where matrix units add them up."""
    return on_device(with_feature(case, feature, n_columns=70 if kernel in ("-", "blas") else 9))


def run(monkeypatch, op, name, case, extras):
    """The op through the Triton backend with this plan."""
    plans.use(f"{op}={name}" if op in plan.PLANS else None)
    return getattr(ops, op)(*(part.to(DEVICE) for part in case.inputs(op)), **extras, backend="triton")


def is_quick(case):
    """Circuits at the largest shape take the interpreter up to 10 seconds: one kernel's cases are enough."""
    (op, _), shape, _, feature = case
    return not (shape == SHAPES[-1] and "circuit" in feature) or (op, feature) == ("swiglu", "circuits")


@pytest.mark.parametrize(("kernel", "shape", "dtype", "feature"), parameters(CASES, IDS, everyday=is_quick))
def test_values(monkeypatch, kernel, shape, dtype, feature):
    (op, name), (T, N, H) = kernel, shape
    case = make_case(T, N, dtype, n_hidden=H)
    extras = features(case, feature, name)
    y = run(monkeypatch, op, name, case, extras)
    assert_values(case, op, y, extras)
    assert y.dtype == dtype and y.is_contiguous()


# The interpreter takes 10 seconds for each, and minutes for "gemv" with its many programs.
WIDE = [(op, name, *case) for op, name in PLANS for case in ((1, 11009), (3, 14337)) if name != "fused"]
WIDE = [each for each in WIDE if each[:3] not in (("gated_mlp", "flat", 1), ("gated_mlp", "gemv", 1))]
WIDE = [each for each in WIDE if each[0] not in plan.PLANS or servable(*each[:2], (*each[2:], 16), torch.bfloat16)]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("op", "name", "n_tokens", "width"), WIDE, ids=["-".join(map(str, each)) for each in WIDE])
def test_widths_of_real_models(monkeypatch, op, name, n_tokens, width):
    """One neuron beyond blocks of 1,024, with circuits that have neurons in every block, its first and last."""
    case = wide_case(width, n_tokens, torch.bfloat16)
    extras = on_device(case.extras())
    y = run(monkeypatch, op, name, case, extras)
    assert_values(case, op, y, extras)


SHAPES_FP64 = ((1, 48, 24), (63, 130, 72), (150, 72, 24))  # the sums of 150 tokens come in 3 runs
FP64 = [(op, name, shape) for op, name in PLANS for shape in SHAPES_FP64 if name != "fused"]
FP64 = [each for each in FP64 if each[0] not in plan.PLANS or servable(*each, torch.bfloat16)]


def how_often(op, name, shape):
    """Three plans sum tokens in kernels of their own; the others share those, so one shape is enough."""
    needed = shape != SHAPES_FP64[1] or (op, name) in (("swiglu", "-"), ("gated_mlp", "flat"), ("down_proj", "split"))
    return () if needed else pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("op", "name", "shape"),
    [pytest.param(*each, marks=how_often(*each)) for each in FP64],
    ids=[f"{WHERE}-{op}-{name}-{s[0]}" for op, name, s in FP64],
)
def test_sums_in_fp64(monkeypatch, op, name, shape):
    """What variances need: nothing is lost beside the rounding of act, whichever plan computes and steers it."""
    case = make_case(shape[0], shape[1], torch.bfloat16, n_hidden=shape[2])
    case.act_sum, case.act_sumsq = case.act_sum.double(), case.act_sumsq.double()
    extras = features(case, "columns" if shape[0] > 1 else "both", "")
    sums = {key: extras[key] for key in ("act_sum", "act_sumsq")}
    for key, x in sums.items():
        extras[key] = sums[key] = x.double()
    y = run(monkeypatch, op, name, case, extras)
    assert_values(case, op, y, extras)
    if "act" in INPUTS[op]:  # summed as it was given
        _, *answers = exact(case, op)
        for got, answer in zip(sums.values(), answers, strict=True):
            assert (got.cpu() - answer).abs().max() <= 1e-13 * answer.abs().max()
    plain = run(monkeypatch, op, name, case, {k: extras[k] for k in ("scale", "row_circuit")})
    assert_close("y", y.cpu(), plain.cpu(), exact(case, op)[0], slack=2, dtype=torch.bfloat16)


# One case for each plan, with sums, scaling, several tokens and a ragged tail.
EXACT = [  # sizes give few programs: the interpreter takes 20 ms for each
    ("swiglu", "-", (130, 1032, 72)),
    ("gated_mlp", "gemv", (1, 136, 200)),
    ("gated_mlp", "flat", (50, 1032, 72)),
    ("gated_mlp", "fused", (130, 264, 200)),
    ("gated_mlp", "blas", (50, 130, 72)),
    ("steer_act", "-", (130, 1032, 72)),
    ("down_proj", "split", (70, 1032, 72)),
    ("down_proj", "tma", (130, 1032, 72)),
    ("down_proj", "blas", (70, 130, 72)),
]
EXACT = [each for each in EXACT if each[0] not in plan.PLANS or servable(*each, torch.bfloat16)]  # fused: on a GPU
# Run every day: the plan for few tokens, which is two passes, and the plans for many. The others take minutes in the
# interpreter. "blas" also runs the kernels of swiglu and steer_act, and "flat" that of "split".
EVERYDAY = ("gated_mlp", "flat"), ("gated_mlp", "blas"), ("down_proj", "blas")
each_plan = pytest.mark.parametrize(
    ("op", "name", "shape"),
    [
        pytest.param(op, name, shape, marks=() if (op, name) in EVERYDAY else pytest.mark.exhaustive)
        for op, name, shape in EXACT
    ],
    ids=[f"{WHERE}-{op}-{name}" for op, name, _ in EXACT],
)


@pytest.mark.exhaustive
def test_gemv_in_a_second_block_of_neurons(monkeypatch):
    case = exact_case((1, 1032, 24))
    case.scale = make_scale([{3: 0.5, 1025: 2.0, 1031: 0.0}], 1032)
    case.row_circuit.zero_()
    y = run(monkeypatch, "gated_mlp", "gemv", case, on_device(dict(scale=case.scale, row_circuit=case.row_circuit)))
    answer, plain = exact(case, "gated_mlp")[0], torch_same_dtype(case, "gated_mlp")[0]
    assert_close("y", y.cpu(), plain, answer, slack=2, dtype=torch.bfloat16)


@each_plan
def test_multiplier_one_and_no_circuit_are_bit_identical(monkeypatch, op, name, shape):
    case = exact_case(shape)
    plain = run(monkeypatch, op, name, case, {})
    ones = case.scale._replace(value=torch.ones_like(case.scale.value))
    nobody = torch.full_like(case.row_circuit, -1)
    empty = make_scale([{}], shape[1])
    for scale, rows in ((ones, case.row_circuit), (case.scale, nobody), (empty, torch.zeros_like(nobody))):
        got = run(monkeypatch, op, name, case, on_device(dict(scale=scale, row_circuit=rows)))
        assert torch.equal(got, plain)
    sums = on_device({k: v for k, v in case.extras().items() if k not in ("scale", "row_circuit")})
    assert torch.equal(run(monkeypatch, op, name, case, sums), plain), "sums change nothing"
    steered = run(monkeypatch, op, name, case, on_device(dict(scale=case.scale, row_circuit=case.row_circuit)))
    free = (case.row_circuit < 0) | (case.row_circuit >= case.scale.offsets.shape[0])
    assert torch.equal(steered[free], plain[free]) and not torch.equal(steered, plain)


@pytest.mark.exhaustive
def test_zero_writes_zero_and_nothing_else_changes(monkeypatch):
    case = exact_case((130, 1032, 72))
    plain = run(monkeypatch, "swiglu", "-", case, {})
    hit = torch.from_numpy(case.multipliers() != 1).to(DEVICE)
    for multiplier in (0.0, 2.0, -1.0, 0.3):
        case.scale.value.fill_(multiplier)
        hit |= torch.from_numpy(case.multipliers() != 1).to(DEVICE)
        act = run(monkeypatch, "swiglu", "-", case, on_device(dict(scale=case.scale, row_circuit=case.row_circuit)))
        assert torch.equal(act[~hit], plain[~hit])
        expected = torch.zeros_like(plain) if multiplier == 0 else (plain.float() * multiplier).to(plain.dtype)
        assert torch.equal(act[hit], expected[hit])
    assert hit.sum() > 100, "the case must steer something"


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy warns of the planted NaN
@each_plan
def test_zero_scale_hides_non_finite_activations(monkeypatch, op, name, shape):
    case = exact_case(shape)
    chosen = [0, 5, shape[1] - 1]
    rows = case.row_circuit = torch.zeros_like(case.row_circuit)
    case.scale = make_scale([dict.fromkeys(chosen, 0.0)], shape[1])
    extras = on_device(dict(scale=case.scale, row_circuit=rows))
    expected = run(monkeypatch, op, name, case, extras)
    for part in (case.gate, case.act):
        part[:, chosen] = torch.tensor([torch.inf, torch.nan, -torch.inf], dtype=part.dtype)
    case.w_gate_up[[n + shape[1] for n in chosen]] = torch.inf
    assert torch.equal(run(monkeypatch, op, name, case, extras), expected)


@each_plan
def test_uncounted_tokens_are_never_read(monkeypatch, op, name, shape):
    case = exact_case(shape)
    clean, poisoned = (on_device(case.extras()) for _ in range(2))
    run(monkeypatch, op, name, case, clean)
    assert (case.token_weight[::3] == 0).all()
    for part in (case.x, case.gate, case.act):
        part[::3] = torch.nan
    run(monkeypatch, op, name, case, poisoned)
    assert torch.equal(clean["act_sum"], poisoned["act_sum"])
    assert torch.equal(clean["act_sumsq"], poisoned["act_sumsq"])


@each_plan
def test_sums_come_before_scaling(monkeypatch, op, name, shape):
    case = exact_case(shape)
    steered, plain = (on_device(case.extras()) for _ in range(2))
    plain.update(scale=None, row_circuit=None)
    run(monkeypatch, op, name, case, steered)
    run(monkeypatch, op, name, case, plain)
    assert torch.equal(steered["act_sum"], plain["act_sum"])
    assert torch.equal(steered["act_sumsq"], plain["act_sumsq"])


@each_plan
def test_run_to_run_bitwise(monkeypatch, op, name, shape):
    case, results = exact_case(shape), set()
    for _ in range(20 if DEVICE == "cuda" else 2):
        extras = on_device(case.extras())
        y = run(monkeypatch, op, name, case, extras)
        results.add(tuple(part.cpu().view(torch.uint8).numpy().tobytes() for part in (y, extras["act_sum"])))
    assert len(results) == 1


@each_plan
def test_any_row_stride_and_nothing_written_outside(monkeypatch, op, name, shape):
    case = exact_case(shape)
    compact = on_device(case.extras())
    expected = run(monkeypatch, op, name, case, compact)
    for part in ("x", "w_gate_up", "w_down", "gate", "up", "act"):
        setattr(case, part, wider(getattr(case, part)))
    extras = on_device(case.extras())
    extras["token_weight"] = wider(extras["token_weight"])
    extras["act_sum"], extras["act_sumsq"] = wider(extras["act_sum"]), wider(extras["act_sumsq"])
    plans.use(f"{op}={name}" if op in plan.PLANS else None)
    inputs = [wider(part.to(DEVICE)) for part in case.inputs(op)]
    assert torch.equal(getattr(ops, op)(*inputs, **extras, backend="triton"), expected)
    for part in ("act_sum", "act_sumsq"):
        assert torch.equal(extras[part], compact[part])
        assert_nothing_outside(part, extras[part])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("op", OPS)
def test_offsets_beyond_int32(monkeypatch, tmp_path, op, dtype):
    """Rows 2**30 elements apart: an int32 offset would wrap at the third row."""
    stride, case = 2**30 + 8, exact_case((3, 48, 24), dtype)
    extras = on_device(case.extras())
    answer, plain = exact(case, op)[0], torch_same_dtype(case, op)[0]
    if DEVICE == "cpu":  # a sparse file; and the interpreter raises where an int32 offset wraps
        from triton.runtime.interpreter import interpreter_builder

        strict = dataclasses.replace(interpreter_builder.options, debug=True)
        monkeypatch.setattr(interpreter_builder, "options", strict)
        file = np.memmap(tmp_path / "sparse", dtype=np.int8, mode="w+", shape=(2 * stride + 64) * dtype.itemsize)
        space = torch.from_numpy(file).view(dtype)
    else:
        space = torch.empty(2 * stride + 64, dtype=dtype, device=DEVICE)
    name = INPUTS[op][0]
    part = getattr(case, name)
    setattr(case, name, space.as_strided(part.shape, (stride, 1)).copy_(part))
    for chosen in plan.PLANS.get(op, ["-"]):
        if op not in plan.PLANS or servable(op, chosen, (3, 48, 24), dtype):
            got = run(monkeypatch, op, chosen, case, extras)
            assert_close("y", got.cpu(), plain, answer, slack=2, dtype=dtype)


@pytest.mark.parametrize(("name", "T"), [("gemv", 1), ("flat", 50), ("fused", 130), ("blas", 50)])
def test_gate_and_up_apart(monkeypatch, name, T):
    """Two separate weights give the result of one joined weight, to the bit where one kernel reads both."""
    if not servable("gated_mlp", name, (T, 136, 72), torch.bfloat16):
        pytest.skip("needs a GPU")
    case = exact_case((T, 136, 72))
    together, apart = on_device(case.extras()), on_device(case.extras())
    plans.use(f"gated_mlp={name}")
    x, w_gate_up, w_down = (part.to(DEVICE) for part in case.inputs("gated_mlp"))
    expected = ops.gated_mlp(x, w_gate_up, w_down, **together, backend="triton")
    pair = w_gate_up[:136].clone(), w_gate_up[136:].clone()
    got = ops.gated_mlp(x, pair, w_down, **apart, backend="triton")
    assert_values(case, "gated_mlp", got, apart)
    if name != "blas":
        assert torch.equal(got, expected) and torch.equal(apart["act_sum"], together["act_sum"])


@pytest.mark.parametrize("op", OPS)
def test_compile_fullgraph(op):
    case = exact_case((7, 48, 24))
    call = getattr(ops, op)
    compiled = torch.compile(
        lambda inputs, extras: call(*inputs, **extras, backend="triton") + 1, fullgraph=True, backend="aot_eager"
    )
    inputs = [part.to(DEVICE) for part in case.inputs(op)]
    for multiplier in (0.0, 2.0):  # the second call changes a buffer, not the graph
        case.scale.value.fill_(multiplier)
        eager, traced = (on_device(case.extras()) for _ in range(2))
        with torch.compiler.set_stance("default" if multiplier == 0.0 else "fail_on_recompile"):
            got = compiled(inputs, traced)
        assert torch.equal(got, call(*inputs, **eager, backend="triton") + 1)
        assert torch.equal(traced["act_sum"], eager["act_sum"])


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    case = exact_case((7, 48, 24), torch.float32)
    extras = on_device(case.extras())
    sums = [extras[name] for name in ("token_weight", "act_sum", "act_sumsq")]
    inputs = [part.to(DEVICE) for part in case.inputs(op)]
    if op == "gated_mlp":
        inputs.insert(2, None)
    arguments = (*inputs, *sums, *extras["scale"], extras["row_circuit"], "triton")
    result = torch.library.opcheck(getattr(torch.ops.cna_kernels, f"{op}_sums").default, arguments)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.exhaustive
def test_a_model_gives_the_same_circuit_and_answers(monkeypatch, tmp_path):
    assert_model_agrees_with_reference("triton", monkeypatch, tmp_path, device=DEVICE)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@each_plan
def test_cuda_graph_follows_its_buffers(monkeypatch, op, name, shape):
    case = exact_case(shape)
    extras = on_device(case.extras())
    inputs = [part.to(DEVICE) for part in case.inputs(op)]
    plans.use(f"{op}={name}" if op in plan.PLANS else None)
    call = getattr(ops, op)
    call(*inputs, **extras, backend="triton")  # compiles the kernels before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(*inputs, **extras, backend="triton")
    for multiplier in (0.0, 1.0, 3.0):
        extras["scale"].value.fill_(multiplier)
        for part in ("act_sum", "act_sumsq"):
            extras[part].fill_(1.0)
        inputs[0].normal_()
        y.fill_(torch.nan)
        graph.replay()
        replayed = y.clone(), extras["act_sum"].clone()
        extras["act_sum"].fill_(1.0)
        assert torch.equal(call(*inputs, **extras, backend="triton"), replayed[0])
        assert torch.equal(extras["act_sum"], replayed[1])
