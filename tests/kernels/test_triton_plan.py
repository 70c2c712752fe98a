"""The choice of kernels: a pure function, which a plan's name overrides, and which sums or steering do not change."""

import pytest
import torch

from cna_kernels import InputError, ops, plans
from cna_kernels.triton import cost, down_decode, down_proj, gate_up, gate_up_decode, plan, swiglu
from op_cases import make_case

BF16, FP32 = torch.bfloat16, torch.float32


def call(op="gated_mlp", T=1, dtype=BF16, arch=90, tma=True):
    return plan.Call(op, T, 14336, 4096, dtype, arch, tma and dtype.itemsize == 2)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (call(T=1), "gemv"),
        (call(T=2), "flat"),
        (call(T=64), "flat"),
        (call(T=65), "blas"),
        (call(T=4, dtype=FP32), "gemv"),
        (call(T=5, dtype=FP32), "blas"),
        (call(T=1, arch=0), "blas"),
        (call("down_proj", T=64), "split"),
        (call("down_proj", T=65), "blas"),
        (call("down_proj", T=512), "blas"),
        (call("down_proj", T=512, tma=False), "blas"),
        (call("down_proj", T=512, arch=80), "blas"),
        (call("down_proj", T=16, dtype=FP32), "split"),
        (call("down_proj", T=17, dtype=FP32), "blas"),
    ],
)
def test_default(monkeypatch, wanted, expected):
    monkeypatch.delenv("CNA_PLAN", raising=False)
    chosen = plan.choose(wanted)
    assert chosen.name == expected and plan.can_serve(wanted, expected)
    assert "unmeasured" in chosen.reason or "measured" in chosen.reason


def test_every_default_can_serve(monkeypatch):
    monkeypatch.delenv("CNA_PLAN", raising=False)
    for op in plan.PLANS:
        for T in (1, 2, 3, 4, 5, 16, 17, 64, 65, 5000, 3_000_000):
            for dtype in (BF16, torch.float16, FP32):
                for arch in (0, 80, 90, 100):
                    for tma in (False, True):
                        one = call(op, T, dtype, arch, tma)
                        assert plan.can_serve(one, plan.default(one).name), one


def test_every_plan_can_be_asked_for():
    for op in plan.PLANS:
        assert set(plan.PLANS[op]) | {"csrc", "torch"} == set(plans.NAMES[op])


def test_override_serves_what_it_can(monkeypatch):
    monkeypatch.setenv("CNA_PLAN", "gated_mlp=flat,down_proj=blas")
    assert plan.choose(call(T=1)) == ("flat", "CNA_PLAN")
    assert plan.choose(call(T=65)).name == "blas", "flat ends at 64 tokens"
    assert plan.choose(call("down_proj", T=1)).name == "blas"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fused", "CNA_PLAN: expected one of gated_mlp, down_proj, linear, decode before '=', got 'fused'"),
        (
            "gated_mlp=fast",
            "CNA_PLAN: gated_mlp: expected one of gemv, flat, fused, blas, csrc, torch, got 'fast'",
        ),
    ],
)
def test_bad_override_is_named(monkeypatch, text, message):
    monkeypatch.setenv("CNA_PLAN", text)
    case = make_case(3, 48, FP32)
    with pytest.raises(InputError) as caught:
        ops.gated_mlp(case.x, case.w_gate_up, case.w_down, backend="triton")
    assert str(caught.value) == message


def test_ranges(monkeypatch):
    monkeypatch.delenv("CNA_PLAN", raising=False)
    ranges = plan.by_tokens("gated_mlp", 14336, 4096, BF16, 90)
    assert [(first, chosen.name) for first, chosen in ranges] == [(1, "gemv"), (2, "flat"), (65, "blas")]
    ranges = plan.by_tokens("down_proj", 14336, 4096, BF16, 90)
    assert [(first, chosen.name) for first, chosen in ranges] == [(1, "split"), (65, "blas")]


def test_predictions_are_near_the_floors():
    """An 8B model on an H200: what cost() predicts against the arithmetic of the floors, in seconds."""
    N, H, slower = 14336, 4096, lambda c: max(c.seconds(cost.H200).values())
    decode = slower(gate_up_decode.cost(1, N, H)) + slower(down_decode.cost(1, N, H, gemv=True))
    assert decode == pytest.approx(82e-6, rel=0.02)
    assert slower(swiglu.cost(4096, N, 2)) == pytest.approx(82e-6, rel=0.02)
    assert slower(down_proj.cost(4096, N, H)) == pytest.approx(609e-6, rel=0.05)
    assert slower(gate_up.cost(4096, N, H)) == pytest.approx(2 * 609e-6, rel=0.05)


def test_launch_tables_cover_every_size():
    for T in (1, 3, 64, 65, 4096, 3_000_000):
        for N in (1, 130, 14336, 29568):
            for columns in (0, 1, 4, 5, 100, 1000):
                config = swiglu._launch_config(T, N, columns, 132, 90)
                assert config.rows % config.BLOCK_T == 0
                assert config.rows * -(-T // config.rows) >= T
                if columns:
                    assert -(-T // config.rows) <= 2 * 132, "parts grow with the device, not with the tokens"
            for itemsize in (2, 4):
                config = down_decode._split_config(min(T, 4096), N, 4096, itemsize, 132)
                assert config.SPLIT_N % 1024 == 0 and config.SPLIT_N > 0
