"""The ops: values, exactness, refusals, and how they behave in torch.library and torch.compile."""

import pytest
import torch

from cna_kernels import ActivationSums, InputError, backends, make_scale, ops, plans, reference
from op_cases import DTYPES, OPS, SHAPES, assert_close, assert_nothing_outside, assert_values, exact, make_case, wider

CASES = [(op, shape, dtype) for op in OPS for shape in SHAPES for dtype in DTYPES]
IDS = [f"{op}-{t}x{n}-{str(dtype)[6:]}" for op, (t, n), dtype in CASES]


@pytest.mark.parametrize(("op", "shape", "dtype"), CASES, ids=IDS)
def test_values(op, shape, dtype):
    case = make_case(*shape, dtype)
    extras = case.extras()
    y = getattr(ops, op)(*case.inputs(op), **extras)
    assert_values(case, op, y, extras)
    assert y.dtype == dtype and y.is_contiguous()


# what an in-place call may be asked for; nothing at all among it
IN_PLACE = {
    "plain": (), "sums": ("token_weight", "act_sum", "act_sumsq"), "scale": ("scale", "row_circuit"),
    "both": ("token_weight", "act_sum", "act_sumsq", "scale", "row_circuit"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", None, pytest.param("triton", marks=pytest.mark.interpreted)])
@pytest.mark.parametrize("features", IN_PLACE)
@pytest.mark.parametrize(("shape", "dtype"), [(shape, dtype) for shape in SHAPES for dtype in DTYPES])
def test_in_place_has_the_bits_of_the_copy(shape, dtype, features, backend):
    """``steer_act_`` on rows with gaps and without: steered neurons are written, and nothing else."""
    if backend == "triton" and (dtype != torch.bfloat16 or backends.missing("triton", torch.device("cpu"))):
        pytest.skip("one dtype, where kernels can be interpreted")
    case = make_case(*shape, dtype)
    for made in (wider, torch.clone):
        copy, own = case.extras(), case.extras()
        expected = ops.steer_act(case.act, **{name: copy[name] for name in IN_PLACE[features]}, backend=backend)
        act = made(case.act)
        got = ops.steer_act_(act, **{name: own[name] for name in IN_PLACE[features]}, backend=backend)
        assert got is act and torch.equal(act, expected)
        assert all(torch.equal(own[name], copy[name]) for name in ("act_sum", "act_sumsq"))
        if made is wider:
            assert_nothing_outside("act", act)
    if features == "both" and shape[0] > 1 and shape[1] > 16:
        assert not torch.equal(expected, case.act) and not torch.equal(own["act_sum"], case.act_sum)


def test_in_place_under_a_tracer():
    case = make_case(5, 48, torch.float32)
    expected = ops.steer_act(case.act, scale=case.scale, row_circuit=case.row_circuit)

    def steer(act):
        return ops.steer_act_(act, scale=case.scale, row_circuit=case.row_circuit)

    act = case.act.clone()
    torch.compile(steer, fullgraph=True, backend="aot_eager")(act)
    assert torch.equal(act, expected) and not torch.equal(act, case.act)


@pytest.mark.parametrize("op", OPS)
def test_exact_on_small_integers(op):
    case = make_case(17, 40, torch.float32)
    generator = torch.Generator().manual_seed(3)
    for name in ("act", "w_down"):
        values = torch.randint(-3, 4, getattr(case, name).shape, generator=generator)
        setattr(case, name, values.float())
    case.token_weight = torch.randint(0, 3, case.token_weight.shape, generator=generator).float()
    case.act_sum, case.act_sumsq = case.act_sum.round(), case.act_sumsq.round()
    if op != "down_proj":
        # silu is not exact on integers, but act_sum of act must be: take act from the op itself
        case.act = ops.swiglu(case.gate, case.up).mul(8).round()
    extras = case.extras()
    y = ops.down_proj(case.act, case.w_down, **extras)
    answer = exact(case, "down_proj")
    for got, want in zip((y, extras["act_sum"], extras["act_sumsq"]), answer, strict=True):
        assert torch.equal(got.double(), want)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gate_and_up_apart(backend):
    """The two weights given as a pair, wherever they lie, give the result of the joined weight."""
    case = make_case(17, 40, torch.float32)
    w_gate, w_up = case.w_gate_up.chunk(2)
    wide = torch.full((40, 32), torch.nan)
    wide[:, :24] = w_up
    for pair in [(w_gate, w_up), (w_gate.clone(), w_up.clone()), (w_gate, wide[:, :24])]:
        extras = case.extras()
        y = ops.gated_mlp(case.x, pair, case.w_down, **extras, backend=backend)
        assert_values(case, "gated_mlp", y, extras)
    x = case.x.clone().requires_grad_()
    ops.gated_mlp(x, pair, case.w_down).sum().backward()
    assert x.grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"w_up: expected shape \[40, 24\], got \[39, 24\]"):
        ops.gated_mlp(case.x, (w_gate, w_up[1:]), case.w_down)


@pytest.mark.parametrize("op", OPS)
def test_circuits_in_any_order_with_gaps(op):
    """Circuits as a live table leaves them after changes: the entries in the gaps belong to no circuit."""
    case = make_case(63, 130, torch.float32)
    offsets, index, value = case.scale
    moved = torch.full_like(offsets, 17)
    lengths = offsets - offsets[:, :1]
    new_index, new_value = torch.zeros(60, dtype=torch.int32), torch.full((60,), torch.nan)
    for circuit, start in zip(range(4), (40, 12, 30, 3), strict=True):
        n = int(lengths[circuit, -1])
        old = int(offsets[circuit, 0])
        new_index[start : start + n], new_value[start : start + n] = index[old : old + n], value[old : old + n]
        moved[circuit] = start + lengths[circuit]
    expected = getattr(ops, op)(*case.inputs(op), scale=case.scale, row_circuit=case.row_circuit)
    for backend in ("reference", "cpu"):
        case.scale = type(case.scale)(moved, new_index, new_value)
        got = getattr(ops, op)(*case.inputs(op), scale=case.scale, row_circuit=case.row_circuit, backend=backend)
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(got, getattr(ops, op)(*case.inputs(op)))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_multiplier_one_and_no_circuit_are_bit_identical(op, dtype):
    case = make_case(63, 130, dtype)
    run = getattr(ops, op)
    plain = run(*case.inputs(op))
    ones = case.scale._replace(value=torch.ones_like(case.scale.value))
    assert torch.equal(run(*case.inputs(op), scale=ones, row_circuit=case.row_circuit), plain)
    nobody = torch.full_like(case.row_circuit, -1)
    assert torch.equal(run(*case.inputs(op), scale=case.scale, row_circuit=nobody), plain)
    empty = make_scale([{}], 130)
    assert torch.equal(run(*case.inputs(op), scale=empty, row_circuit=torch.zeros_like(nobody)), plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_writes_zero_and_nothing_else_changes(dtype):
    case = make_case(63, 130, dtype)
    plain = ops.swiglu(case.gate, case.up)
    for multiplier in (0.0, 2.0, -1.0, 0.3):
        scale = case.scale._replace(value=torch.full_like(case.scale.value, multiplier))
        act = ops.swiglu(case.gate, case.up, scale=scale, row_circuit=case.row_circuit)
        steered = torch.from_numpy(make_case(63, 130, dtype).multipliers() != 1)
        steered |= torch.from_numpy(_membership(case))
        assert torch.equal(act[~steered], plain[~steered])
        expected = torch.zeros(()) if multiplier == 0 else (plain[steered].float() * multiplier).to(dtype)
        assert torch.equal(act[steered], expected.to(dtype).expand_as(act[steered]))
    assert steered.sum() > 50, "the case must steer something"


def _membership(case):
    members = case.scale._replace(value=torch.full_like(case.scale.value, 7.0))
    changed = make_case(63, 130, case.gate.dtype)
    changed.scale = members
    return changed.multipliers() != 1


def test_zero_scale_hides_non_finite_activations():
    gate, up = torch.full((2, 4), torch.inf), torch.ones(2, 4)
    gate[1] = torch.nan
    scale = make_scale([dict.fromkeys(range(4), 0.0)], 4)
    act = ops.swiglu(gate, up, scale=scale, row_circuit=torch.zeros(2, dtype=torch.int32))
    assert torch.equal(act, torch.zeros(2, 4))


def test_uncounted_tokens_are_never_read():
    case = make_case(63, 130, torch.float32)
    clean, poisoned = case.extras(), case.extras()
    ops.swiglu(case.gate, case.up, **clean)
    case.gate[::3] = torch.nan  # exactly the tokens whose weights are all zero
    ops.swiglu(case.gate, case.up, **poisoned)
    assert torch.equal(clean["act_sum"], poisoned["act_sum"])
    assert torch.equal(clean["act_sumsq"], poisoned["act_sumsq"])


@pytest.mark.parametrize("op", OPS)
def test_sums_do_not_depend_on_steering(op):
    case = make_case(63, 130, torch.bfloat16)
    steered, plain = case.extras(), case.extras()
    plain["scale"] = plain["row_circuit"] = None
    getattr(ops, op)(*case.inputs(op), **steered)
    getattr(ops, op)(*case.inputs(op), **plain)
    assert torch.equal(steered["act_sum"], plain["act_sum"])


@pytest.mark.parametrize("op", OPS)
def test_run_to_run_bitwise(op):
    case = make_case(63, 130, torch.float32)
    results = set()
    for _ in range(20):
        extras = case.extras()
        y = getattr(ops, op)(*case.inputs(op), **extras)
        results.add((y.numpy().tobytes(), extras["act_sum"].numpy().tobytes()))
    assert len(results) == 1


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("features", ["plain", "sums", "steering", "both"])
def test_opcheck(op, features):
    case = make_case(7, 20, torch.float32)
    extras = case.extras()
    sums = [extras[n] for n in ("token_weight", "act_sum", "act_sumsq")] if features in ("sums", "both") else []
    steer = [*case.scale, case.row_circuit] if features in ("steering", "both") else [None] * 4
    inputs = case.inputs(op)
    if op == "gated_mlp":
        inputs.insert(2, None)
    name = f"{op}_sums" if sums else op
    result = torch.library.opcheck(getattr(torch.ops.cna_kernels, name).default, (*inputs, *sums, *steer, None))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", OPS)
def test_compile_fullgraph_with_sums_and_steering(op):
    case = make_case(7, 20, torch.float32)
    run = getattr(ops, op)
    compiled = torch.compile(lambda inputs, extras: run(*inputs, **extras) + 1, fullgraph=True, backend="aot_eager")
    for multiplier in (0.0, 2.0):  # the second call changes a buffer, not the graph
        case.scale.value.fill_(multiplier)
        eager, traced = case.extras(), case.extras()
        with torch.compiler.set_stance("default" if multiplier == 0.0 else "fail_on_recompile"):
            got = compiled(case.inputs(op), traced)
        assert torch.equal(got, run(*case.inputs(op), **eager) + 1)
        assert torch.equal(traced["act_sum"], eager["act_sum"])
        assert not torch.equal(traced["act_sum"], case.act_sum)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("features", ["plain", "sum", "steering", "both"])
def test_inductor(op, features):
    """The default backend of torch.compile, which tells an op that may change arguments from one that does."""
    case = make_case(7, 20, torch.float32)
    eager, traced = case.extras(), case.extras()
    for extras in (eager, traced):
        extras["act_sumsq"] = None
        if features in ("plain", "steering"):
            extras["token_weight"] = extras["act_sum"] = None
        if features in ("plain", "sum"):
            extras["scale"] = extras["row_circuit"] = None
    run = getattr(ops, op)
    torch._dynamo.reset()
    got = torch.compile(lambda: run(*case.inputs(op), **traced) + 1, fullgraph=True)()
    assert torch.equal(got, run(*case.inputs(op), **eager) + 1)
    if features in ("sum", "both"):
        assert torch.equal(traced["act_sum"], eager["act_sum"]) and not torch.equal(eager["act_sum"], case.act_sum)


def test_gradients_flow_through_the_reference():
    case = make_case(5, 12, torch.float32)
    x = case.x.clone().requires_grad_()
    y = ops.gated_mlp(x, case.w_gate_up, case.w_down, **case.extras())
    y.sum().backward()
    assert x.grad.abs().max() > 0
    with pytest.raises(ValueError, match="'triton' has no gradient"):
        ops.gated_mlp(x, case.w_gate_up, case.w_down, backend="triton")


def test_gradients_of_bias_and_multipliers():
    case = make_case(5, 12, torch.float32)
    bias = torch.zeros(24, requires_grad=True)
    ops.linear(case.x, torch.ones(24, 24), bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((24,), 5.0))
    with pytest.raises(ValueError, match="'cpu' has no gradient"):
        ops.linear(case.x, torch.ones(24, 24), bias, backend="cpu")
    value = case.scale.value.clone().requires_grad_()
    case.row_circuit.zero_()
    act = ops.swiglu(case.gate, case.up, scale=case.scale._replace(value=value), row_circuit=case.row_circuit)
    act.sum().backward()
    assert value.grad.abs().sum() > 0


def test_forward_mode_ad_looks_through():
    case = make_case(5, 12, torch.float32)
    _, tangent = torch.func.jvp(lambda x: ops.gated_mlp(x, case.w_gate_up, case.w_down), (case.x,), (case.x,))
    assert tangent.abs().max() > 0


@pytest.mark.parametrize("op", OPS)
def test_a_changed_sum_is_noticed_by_autograd(op):
    case = make_case(5, 12, torch.float32)
    extras = case.extras()
    loss = (extras["act_sum"] * torch.ones(3, 12, requires_grad=True)).sum()  # saves act_sum for its backward
    getattr(ops, op)(*case.inputs(op), **extras)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing_where_gradients_flow(op):
    case = make_case(63, 130, torch.float32)
    plain, under = case.extras(), case.extras()
    inputs = [part.detach().clone().requires_grad_() for part in case.inputs(op)]
    expected = getattr(ops, op)(*inputs, **plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = getattr(ops, op)(*inputs, **under)
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    assert torch.equal(under["act_sum"], plain["act_sum"])


@pytest.mark.parametrize("op", OPS)
def test_expanded_weights_and_offsets(op):
    """Expanded tensors: one row of weights for all tokens, and one circuit's offsets for all circuits."""
    case = make_case(7, 20, torch.float32)
    case.token_weight = torch.tensor([[0.5, 2.0, 0.0]]).expand(7, -1)
    case.scale = make_scale([{3: 0.0, 8: 2.0}], 20)
    case.scale = case.scale._replace(offsets=case.scale.offsets.expand(4, -1))
    extras = case.extras()
    y = getattr(ops, op)(*case.inputs(op), **extras)
    assert_values(case, op, y, extras)


@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(op):
    case = make_case(63, 130, torch.float32)
    plain, under = case.extras(), case.extras()
    expected = getattr(ops, op)(*case.inputs(op), **plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = getattr(ops, op)(*case.inputs(op), **under)
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    assert torch.equal(under["act_sum"], plain["act_sum"])


REFUSALS = {
    "x: expected shape [any, any], got [2, 3, 4]": lambda c: ops.gated_mlp(torch.ones(2, 3, 4), c.w_gate_up, c.w_down),
    "w_gate_up: expected shape [40, 24], got [20, 24]": lambda c: ops.gated_mlp(c.x, c.w_gate_up[:20], c.w_down),
    "w_down: expected float32, got bfloat16": lambda c: ops.gated_mlp(c.x, c.w_gate_up, c.w_down.bfloat16()),
    "gate: expected bfloat16 or float16 or float32, got float64": lambda c: ops.swiglu(c.gate.double(), c.up.double()),
    "up: expected stride 1 in the last dim, got strides [1, 7]; call .contiguous()": lambda c: ops.swiglu(
        c.gate, c.up.T.contiguous().T
    ),
    "token_weight: expected together with act_sum or act_sumsq, got one without the other": lambda c: ops.swiglu(
        c.gate, c.up, act_sum=c.act_sum
    ),
    "act_sumsq: expected a tensor of its own, got act_sum": lambda c: [
        ops.swiglu(
            c.gate, c.up, token_weight=c.token_weight, act_sum=c.act_sum, act_sumsq=sums
        )  # the second looks like the first
        for sums in (c.act_sumsq, c.act_sum)
    ],
    "act_sum: expected shape [3, 20], got [2, 20]": lambda c: ops.swiglu(
        c.gate, c.up, token_weight=c.token_weight, act_sum=c.act_sum[:2]
    ),
    "token_weight: expected float32, got float64": lambda c: ops.swiglu(
        c.gate, c.up, token_weight=c.token_weight.double(), act_sum=c.act_sum
    ),
    "scale: expected together with row_circuit, got one without the other": lambda c: ops.swiglu(
        c.gate, c.up, scale=c.scale
    ),
    "row_circuit: expected int32, got int64": lambda c: ops.swiglu(
        c.gate, c.up, scale=c.scale, row_circuit=c.row_circuit.long()
    ),
    "scale.value: expected shape [11], got [10]": lambda c: ops.swiglu(
        c.gate, c.up, scale=c.scale._replace(value=c.scale.value[:10]), row_circuit=c.row_circuit
    ),
    "backend: expected one of reference, cpu, triton, got 'cuda'": lambda c: ops.swiglu(c.gate, c.up, backend="cuda"),
    "w_down: expected device cpu, got meta": lambda c: ops.down_proj(c.act, c.w_down.to("meta")),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals_name_the_tensor(message):
    with pytest.raises(ValueError) as caught:
        REFUSALS[message](make_case(7, 20, torch.float32))
    assert str(caught.value) == message


# Calls that the public ops never make, but that torch.ops and the reference can get.
HALF_GIVEN = {
    "torch.ops, a scale without index": lambda c: torch.ops.cna_kernels.steer_act(
        c.act, c.scale.offsets, None, c.scale.value, c.row_circuit, None
    ),
    "torch.ops, a scale without value": lambda c: torch.ops.cna_kernels.steer_act(
        c.act, c.scale.offsets, c.scale.index, None, c.row_circuit, None
    ),
    "the reference, a scale without rows": lambda c: reference.steer_act(c.act, scale=c.scale),
    "the reference, sums without token_weight": lambda c: reference.steer_act(c.act, act_sum=c.act_sum),
}


@pytest.mark.parametrize("call", HALF_GIVEN.values(), ids=HALF_GIVEN)
def test_half_of_an_argument_is_refused(call):
    with pytest.raises(ValueError, match=r"expected together with .*, got one without the other"):
        call(make_case(7, 20, torch.float32))


def test_absent_backend_by_name_never_falls_through(monkeypatch):
    case = make_case(7, 20, torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(backends.BackendUnavailable, match=r"^backend: 'triton' runs on CUDA devices"):
        ops.swiglu(case.gate, case.up, backend="triton")
    monkeypatch.setenv("CNA_BACKEND", "fast")
    plans.forget()
    with pytest.raises(InputError, match="CNA_BACKEND: expected one of"):
        ops.swiglu(case.gate, case.up)


# Calls that look alike are checked and prepared once. These must not be kept, or must see every call.


class Doubled(torch.Tensor):
    """A tensor subclass that doubles the result of the op steer_act."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        y = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * y.as_subclass(torch.Tensor) if function is torch.ops.cna_kernels.steer_act.default else y


def test_a_subclass_sees_every_call():
    act = make_case(5, 48, torch.float32).act.contiguous()
    for _ in range(3):
        assert torch.equal(ops.steer_act(act.as_subclass(Doubled)), 2 * act)
        assert torch.equal(ops.steer_act(act), act)


@pytest.mark.parametrize("op", OPS)
def test_views_of_the_negative(op):
    """Negative views share memory with the tensor that they negate, as `z.conj().imag` does with z."""
    inputs = list(make_case(5, 48, torch.float32).inputs(op))
    expected = getattr(ops, op)(*inputs)
    inputs[0] = torch._neg_view(-inputs[0])
    for _ in range(2):
        assert torch.equal(getattr(ops, op)(*inputs), expected)
    column, w_down = torch.randn(5, 1, dtype=torch.complex64).conj().imag, torch.randn(3, 1)
    assert torch.equal(ops.down_proj(column, w_down), ops.down_proj(column.clone(), w_down))


def test_calls_of_torch_ops_are_checked_too():
    case = make_case(3, 48, torch.float32)
    wrong = torch.zeros(2, dtype=torch.int32)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"row_circuit: expected shape \[3\], got \[2\]"):
            torch.ops.cna_kernels.steer_act(case.act, *case.scale, wrong, None)
        with pytest.raises(ValueError, match=r"row_circuit: expected shape \[3\], got \[2\]"):
            ops.steer_act(case.act, scale=case.scale, row_circuit=wrong)


def test_fake_tensors_outside_their_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    act, w_down = (mode.from_tensor(x) for x in (torch.randn(5, 48), torch.randn(24, 48)))
    assert ops.down_proj(act, w_down).shape == (5, 24)


def test_function_modes_see_every_call():
    from torch.overrides import TorchFunctionMode

    seen = []

    class Look(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    act = torch.randn(5, 48)
    ops.steer_act(act)
    with Look():
        ops.steer_act(act)
    assert any("cna_kernels.steer_act" in name for name in seen)


@pytest.mark.parametrize("name", ["act_sumsq", "act_sum"])
def test_sums_that_are_leaves_with_a_gradient(name):
    case = make_case(5, 48, torch.float32)
    sums = {"token_weight": case.token_weight, name: case.act_sum.clone().requires_grad_()}
    with pytest.raises(ValueError, match=f"^{name}: a leaf that requires grad cannot be added to"):
        ops.steer_act(case.act, **sums)
    with torch.no_grad():
        ops.steer_act(case.act, **sums)


@pytest.mark.parametrize("wide", [False, True], ids=["fp32", "fp64"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_flow_through_sums(op, wide):
    """A loss that uses the sums: the gradients of the definition, of every input and of the tokens' weights."""
    case = make_case(7, 12, torch.float32)
    kind = torch.float64 if wide else torch.float32

    def gradients(run, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in case.inputs(op)]
        weights = case.token_weight.to(dtype).requires_grad_()
        sums = [x.to(kind if run is not by_torch else dtype) for x in (case.act_sum.clone(), case.act_sumsq.clone())]
        y, total, squares = run(inputs, weights, sums)
        (y.sum() + (0.3 * total.square()).sum() + squares.sin().sum()).backward()
        return [x.grad.double() for x in (*inputs, weights)]

    def by_op(inputs, weights, sums):
        y = getattr(ops, op)(*inputs, token_weight=weights, act_sum=sums[0], act_sumsq=sums[1])
        assert all(x.requires_grad for x in sums)
        return y, *sums

    def by_torch(inputs, weights, sums):
        gate, up = inputs[:2] if op == "swiglu" else (None, None)
        if op == "gated_mlp":
            gate, up = (inputs[0] @ inputs[1].T).chunk(2, dim=1)
        act = inputs[0] if gate is None else torch.nn.functional.silu(gate) * up
        y = act @ inputs[-1].T if op in ("gated_mlp", "down_proj") else act
        counted = torch.where((weights != 0).any(1, keepdim=True), act, 0)
        return y, sums[0] + weights.T @ counted, sums[1] + weights.T @ counted.square()

    exact_ones = gradients(by_torch, torch.float64)
    for got, plain, answer in zip(
        gradients(by_op, torch.float32), gradients(by_torch, torch.float32), exact_ones, strict=True
    ):
        assert_close("gradient", got, plain, answer, slack=4, dtype=torch.float32)
        assert answer.abs().max() > 0


def test_activation_sums_keep_no_graph():
    """Sums of training passes by hand: each fold leaves totals and buffers without a graph."""
    sums, w = ActivationSums(1, 12, 2, squares=True), torch.randn(12, 12, requires_grad=True)
    for _ in range(3):
        act = torch.randn(5, 12) @ w
        ops.steer_act(act, token_weight=torch.ones(5, 2), **sums.layer(0)).sum().backward()
        sums.fold(torch.ones(5, 2))
        assert not any(x.requires_grad for x in (sums.total, sums.total_sq, sums.act_sum, sums.act_sumsq))
    assert sums.count.tolist() == [15, 15] and sums.total.abs().min() > 0


def test_what_was_decided_before_a_change_is_not_kept(monkeypatch):
    act, prepare, prepared = torch.randn(5, 48), backends.prepare, []

    def slow(*given):
        prepared.append(given)
        plans.forget()  # as another thread may meanwhile
        return prepare(*given)

    monkeypatch.setattr(backends, "prepare", slow)
    for _ in range(2):
        ops.steer_act(act)
    assert len(prepared) == 2
