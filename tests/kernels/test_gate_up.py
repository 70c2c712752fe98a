"""gate_up's host side without its Gluon kernel: what the kernel sums, what a separate pass sums, what is steered.

The kernel itself is tested on a GPU (``gated_mlp-fused`` in test_triton.py) and compiled by the compile gate.
"""

import pytest
import torch

from cna_kernels import reference
from cna_kernels.triton import gate_up, launch, plan
from cna_kernels.triton import ops as triton_ops
from op_cases import exact_case

pytestmark = pytest.mark.interpreted


def product(launches):
    """Stands for a launch of the kernel: writes act, and each group's part of the sums."""

    def run(
        kernel,
        grid,
        x,
        w_gate,
        w_up,
        act,
        token_weight,
        part,
        T,
        up_row,
        stride_token_weight_t,
        *,
        N,
        C,
        SUM,
        SUMSQ,
        **rest,
    ):
        launches.append((grid, C))
        given = x.base, torch.cat([w_gate.base[:N], w_up.base[up_row : up_row + N]])
        act.base.copy_(reference.swiglu(*torch.nn.functional.linear(*given).chunk(2, dim=1)))
        if part is None:
            return
        part.fill_(0)
        for first in range(0, T, 64):
            rows = act.base[first : first + 64].float()
            for c in range(C):
                weighted = token_weight[first : first + 64, c, None] * rows
                if SUM:
                    part[first // 64, c] = weighted.sum(dim=0)
                if SUMSQ:
                    part[first // 64, c + SUM * C] = (weighted * rows).sum(dim=0)

    return run


@pytest.mark.parametrize("apart", [False, True], ids=["one weight", "two weights"])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_sums_and_steering_around_the_kernel(monkeypatch, columns, apart):
    case, launches = exact_case((130, 264, 72)), []
    true_launch, stand_in = launch.launch, product(launches)

    def launched(kernel, grid, *args, **options):
        return (stand_in if kernel is gate_up._gate_up_kernel else true_launch)(kernel, grid, *args, **options)

    monkeypatch.setattr(launch, "launch", launched)
    generator = torch.Generator().manual_seed(columns)
    token_weight = torch.rand(130, columns, generator=generator)
    token_weight[::3] = 0
    sums = [torch.rand(columns, 264, generator=generator) for _ in range(2)]  # not zero: a set instead of an add shows
    before = [part.double() for part in sums]
    extras = dict(
        token_weight=token_weight, act_sum=sums[0], act_sumsq=sums[1], scale=case.scale, row_circuit=case.row_circuit
    )
    x, w_gate_up, _ = case.inputs("gated_mlp")
    weights = (w_gate_up[:264].clone(), w_gate_up[264:].clone()) if apart else w_gate_up
    act = gate_up.gate_up(x, weights, **extras)
    assert launches == [((6,), columns if columns <= 2 else 0)]

    plain = reference.swiglu(*torch.nn.functional.linear(x, w_gate_up).chunk(2, dim=1)).double()
    for got, start, values in zip(sums, before, (plain, plain**2), strict=True):
        assert torch.allclose(got.double(), start + token_weight.double().T @ values, rtol=1e-5, atol=1e-5)
    multipliers = torch.from_numpy(case.multipliers())
    assert torch.equal(act, (plain * multipliers).to(act.dtype)) and (multipliers != 1).sum() > 50


def test_the_plan_is_for_hopper_and_for_tiles_that_fill_it(monkeypatch):
    def call(T, arch=90, tma=True):
        return plan.Call("gated_mlp", T, 14336, 4096, torch.bfloat16, arch, tma)

    assert not plan.can_serve(call(1024), "fused"), "Gluon has no interpreter"
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert plan.default(call(1024)).name == plan.default(call(4096)).name == "fused"
    assert plan.default(call(512)).name == plan.default(call(1536)).name == "blas"
    assert {plan.default(call(4096, arch)).name for arch in (80, 100)} == {"blas"}
    assert plan.default(call(4096, tma=False)).name == "blas"
    assert plan.default(call(64)).name == "flat"
    assert plan.default(call(769)).name == "blas", "a tile of one token is as long as one of 128"
    monkeypatch.setattr(plan, "gate_up", None)  # a Triton without Gluon
    assert plan.default(call(4096)).name == "blas"


@pytest.mark.parametrize("N", [14336, 14340])
@pytest.mark.parametrize("apart", [False, True], ids=["one weight", "two weights"])
def test_rows_of_act_must_suit_tma_as_well(N, apart):
    x, w_down = torch.empty(1024, 64, dtype=torch.bfloat16), torch.empty(64, N, dtype=torch.bfloat16)
    gate = torch.empty(N, 64, dtype=torch.bfloat16)
    weights = (gate, torch.empty_like(gate)) if apart else (torch.empty(2 * N, 64, dtype=torch.bfloat16), None)
    assert triton_ops.call_of("gated_mlp", (x, *weights, w_down)).tma == (N % 8 == 0)
