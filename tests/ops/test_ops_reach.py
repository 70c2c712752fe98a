"""The ops at widths, numbers of rows, magnitudes and layouts of real models, and their gradients."""

import pytest
import torch

from cna_kernels import ops
from op_cases import INPUTS, OPS, assert_close, assert_values, exact, make_case, torch_same_dtype, wide_case

KINDS = [torch.float32, torch.bfloat16]

# Widths of real models, one neuron beyond a multiple of a block of 1,024.


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("width", [11009, 14337])
@pytest.mark.parametrize("n_tokens", [1, 7, 70])
@pytest.mark.parametrize("op", OPS)
def test_widths(op, n_tokens, width, dtype):
    case = wide_case(width, n_tokens, dtype)
    extras = case.extras()
    assert_values(case, op, getattr(ops, op)(*case.inputs(op), **extras), extras)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_8192_rows(op, dtype):
    case = make_case(8192, 130, dtype)
    extras = case.extras()
    assert_values(case, op, getattr(ops, op)(*case.inputs(op), **extras), extras)


# Magnitudes: name -> (of x or act, of the weights). Neither scaled by the width, as a raw initialisation is.
MAGNITUDES = {"unscaled": (1.0, 1.0), "large inputs": (100.0, 1.0), "large weights": (1.0, 30.0), "small": (1e-3, 1e-3)}


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_tokens", [1, 33])
@pytest.mark.parametrize("op", ["gated_mlp", "swiglu", "down_proj"])
def test_magnitudes_in_half_precision(op, n_tokens, dtype, magnitude):
    """No infinity where the definition in PyTorch gives none, and errors by the same rule."""
    of_inputs, of_weights = MAGNITUDES[magnitude]
    case = make_case(n_tokens, 512, dtype, n_hidden=256)
    generator = torch.Generator().manual_seed(2)
    for name, of in (
        ("x", of_inputs),
        ("gate", of_inputs),
        ("up", of_inputs),
        ("act", of_inputs),
        ("w_gate_up", of_weights),
        ("w_down", of_weights),
    ):
        setattr(case, name, (torch.randn(getattr(case, name).shape, generator=generator) * of).to(dtype))
    y = getattr(ops, op)(*case.inputs(op))
    case.row_circuit = torch.full_like(case.row_circuit, -1)
    reference = getattr(ops, op)(*case.inputs(op), backend="reference")
    finite = torch.isfinite(reference)
    assert torch.isfinite(y[finite]).all()
    if dtype == torch.bfloat16 or magnitude == "small":
        assert finite.all()
        answer, plain = exact(case, op)[0], torch_same_dtype(case, op)[0]
        assert_close("y", y, plain, answer, slack=2, dtype=dtype)


# Gradients.


def definition(op, inputs, multipliers):
    gate, up = inputs[:2] if op == "swiglu" else (None, None)
    if op == "gated_mlp":
        gate, up = (inputs[0] @ inputs[1].T).chunk(2, dim=1)
    act = inputs[0] if gate is None else torch.nn.functional.silu(gate) * up
    act = act * multipliers.to(act.dtype)
    return act @ inputs[-1].T if "w_down" in INPUTS[op] else act


@pytest.mark.parametrize("steered", [False, True], ids=["plain", "steered"])
@pytest.mark.parametrize("dtype", [*KINDS, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_gradients_are_those_of_the_definition(op, dtype, steered):
    """Of every input: x, gate, up, act, and the weights of gate, up and down."""
    case = make_case(17, 40, dtype)
    if not steered:
        case.row_circuit = torch.full_like(case.row_circuit, -1)
    multipliers = torch.from_numpy(case.multipliers())
    generator = torch.Generator().manual_seed(4)
    shape = (17, 24) if "w_down" in INPUTS[op] else (17, 40)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)

    def gradients(run, kind):
        inputs = [x.to(kind).clone().requires_grad_() for x in case.inputs(op)]
        (run(inputs) * weight.to(kind)).sum().backward()
        return [x.grad.double() for x in inputs]

    def by_op(inputs):
        return getattr(ops, op)(*inputs, scale=case.scale, row_circuit=case.row_circuit)

    def by_definition(inputs):
        return definition(op, inputs, multipliers)

    answers = gradients(by_definition, torch.float64)
    for name, got, plain, answer in zip(
        INPUTS[op], gradients(by_op, dtype), gradients(by_definition, dtype), answers, strict=True
    ):
        assert_close(name, got, plain, answer, slack=2, dtype=dtype)
        assert answer.abs().max() > 0.1


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_gradients_of_a_pair_of_weights(dtype):
    case = make_case(17, 40, dtype)

    def gradients(pair):
        x, w = case.x.clone().requires_grad_(), [half.clone().requires_grad_() for half in case.w_gate_up.chunk(2)]
        joined = case.w_gate_up.clone().requires_grad_()
        ops.gated_mlp(x, tuple(w) if pair else joined, case.w_down).sum().backward()
        return x.grad, torch.cat([half.grad for half in w]) if pair else joined.grad

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert (one - other).abs().max() <= 4 * torch.finfo(dtype).eps * other.abs().max()


# Layouts: what is done to an input -> taken with the values of a plain copy, or refused with this text.


def by_columns(x):
    """The same values with neighbours along the first dimension."""
    return x.t().contiguous().t()


def every_other(x):
    wide = torch.full((x.shape[0], 2 * x.shape[1]), torch.nan, dtype=x.dtype)
    wide[:, ::2] = x
    return wide[:, ::2]


def with_padding(x):
    wide = torch.full((x.shape[0], x.shape[1] + 3), torch.nan, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


STRIDE = r"{name}: expected stride 1 in the last dim, got strides \[\d+, \d+\]; call .contiguous\(\)"
LAYOUTS = {
    "padded rows": (with_padding, None),
    "one row for all": (lambda x: x[:1].expand_as(x), None),
    "by columns": (by_columns, STRIDE),
    "every other": (every_other, STRIDE),
    "as a negative view": (lambda x: torch._neg_view(-x), None),
    "as a parameter": (lambda x: torch.nn.Parameter(x, requires_grad=False), None),
    "three dimensions": (lambda x: x[None], r"{name}: expected shape \[.*\], got \[1, \d+, \d+\]"),
    "one dimension": (lambda x: x[0], r"{name}: expected shape \[.*\], got \[\d+\]"),
    "another dtype": (lambda x: x.double(), "{name}: expected .*, got float64"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in INPUTS[op]])
def test_layouts(op, name, backend, layout):
    """Every input in every layout gives the values of a contiguous copy, or says what to call."""
    change, refused = LAYOUTS[layout]
    case = make_case(7, 40, torch.float32)
    given = dict(zip(INPUTS[op], case.inputs(op), strict=True))
    given[name] = change(given[name])
    if refused is not None:
        with pytest.raises(ValueError, match=refused.format(name=name)):
            getattr(ops, op)(**given, backend=backend)
        return
    plain = {each: x.detach().clone().contiguous() for each, x in given.items()}
    for extras in ({}, dict(scale=case.scale, row_circuit=case.row_circuit)):
        got = getattr(ops, op)(**given, **extras, backend=backend)
        torch.testing.assert_close(got, getattr(ops, op)(**plain, **extras, backend=backend))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_three_dimensions_are_flattened_by_their_caller(dtype):
    """As attach does: a view of all tokens as rows, and the result as a view again."""
    case = make_case(12, 40, dtype)
    x = case.x.view(3, 4, -1)
    y = ops.gated_mlp(x.flatten(0, -2), case.w_gate_up, case.w_down).view(*x.shape[:-1], -1)
    assert torch.equal(y.flatten(0, 1), ops.gated_mlp(case.x, case.w_gate_up, case.w_down))


def test_errors_are_those_of_pytorch():
    """Over many calls the root of the mean square error is at most twice PyTorch's, however few terms a product has.

    The largest error of one call with few results is chance: at H = 2 that of PyTorch's own MLP, with its neurons in
    another order, is more than twice PyTorch's in 1 to 7 of 100 calls.
    """
    for n_tokens, n_hidden, n_neurons in ((33, 2, 1024), (8, 2, 4096), (33, 64, 1024)):
        ours, theirs = 0.0, 0.0
        for seed in range(20):
            case = make_case(n_tokens, n_neurons, torch.float32, seed=seed, n_hidden=n_hidden)
            case.row_circuit = torch.full_like(case.row_circuit, -1)
            answer, plain = exact(case, "gated_mlp")[0], torch_same_dtype(case, "gated_mlp")[0]
            ours += (ops.gated_mlp(case.x, case.w_gate_up, case.w_down) - answer).square().sum().item()
            theirs += (plain - answer).square().sum().item()
        assert ours <= 4 * theirs
