"""The ops inside transforms of torch.func, and under counters of FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from cna_kernels import make_scale, ops

GENERATOR = torch.Generator().manual_seed(0)
X, GATE_UP, DOWN = (torch.randn(*shape, generator=GENERATOR) for shape in ((4, 3, 16), (64, 16), (16, 32)))
ROWS = torch.tensor([0, -1, 0], dtype=torch.int32)
STEER = dict(scale=make_scale([{3: 0.5, 31: -2.0}], 32), row_circuit=ROWS)
ACT = torch.randn(4, 3, 32, generator=GENERATOR)
OPS = {  # op: a function of one input and the extras, and four inputs
    "gated_mlp": (lambda x, **extras: ops.gated_mlp(x, GATE_UP, DOWN, **extras), X),
    "swiglu": (lambda x, **extras: ops.swiglu(x, x + 1, **extras), ACT),
    "down_proj": (lambda x, **extras: ops.down_proj(x, DOWN, **extras), ACT),
    "steer_act": (lambda x, **extras: ops.steer_act(x, **extras), ACT),
    "linear": (lambda x, **extras: ops.linear(x, DOWN), ACT),
}


def assert_near(got, expected):
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("extras", [{}, STEER], ids=["plain", "steered"])
@pytest.mark.parametrize("op", OPS)
def test_vmap_is_one_call_after_the_other(op, extras):
    function, inputs = OPS[op]
    expected = torch.stack([function(x, **extras) for x in inputs])
    assert_near(vmap(lambda x: function(x, **extras))(inputs), expected)
    given = inputs.clone().requires_grad_()
    expected = torch.stack([grad(lambda x: function(x, **extras).square().sum())(x) for x in inputs])
    for got in (
        vmap(grad(lambda x: function(x, **extras).square().sum()))(inputs),
        grad(lambda x: vmap(lambda x: function(x, **extras))(x).square().sum())(inputs),
        *torch.autograd.grad(vmap(lambda x: function(x, **extras))(given).square().sum(), given),
    ):
        assert_near(got, expected)
    assert expected.abs().max() > 0.1


def test_vmap_over_the_op_of_torch_library():
    op, nothing = torch.ops.cna_kernels.gated_mlp.default, (None,) * 5
    expected = torch.stack([ops.gated_mlp(x, GATE_UP, DOWN) for x in X])
    assert_near(vmap(lambda x: op(x, GATE_UP, None, DOWN, *nothing))(X), expected)
    weights = torch.stack([DOWN, 2 * DOWN])
    got = vmap(lambda x, w: op(x, GATE_UP, None, w, *nothing), in_dims=(None, 0))(X[0], weights)
    assert_near(got, torch.stack([expected[0], 2 * expected[0]]))


def test_sums_of_many_calls_have_no_one_tensor():
    act_sum, token_weight = torch.ones(2, 32), torch.ones(3, 2)
    sums = dict(token_weight=token_weight, act_sum=act_sum)
    op = torch.ops.cna_kernels.steer_act_sums.default
    for call in (
        lambda: vmap(lambda x: ops.gated_mlp(x, GATE_UP, DOWN, **sums))(X),
        lambda: vmap(lambda act: op(act, token_weight, act_sum, None, None, None, None, None, None))(ACT),
    ):
        with pytest.raises(ValueError, match=r"act_sum: torch\.vmap cannot add the sums of several calls to one"):
            call()
    assert torch.equal(act_sum, torch.ones(2, 32))


def test_flops_are_counted():
    def flops(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    def plain(x):
        gate, up = F.linear(x, GATE_UP).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, DOWN)

    assert flops(lambda: ops.gated_mlp(X[0], GATE_UP, DOWN, **STEER)) == flops(lambda: plain(X[0])) > 0
    assert flops(lambda: ops.down_proj(ACT[0], DOWN)) == flops(lambda: F.linear(ACT[0], DOWN))
