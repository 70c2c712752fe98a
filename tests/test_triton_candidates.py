"""Kernels that no plan runs yet, each called by its launcher, against the definition: on a GPU or interpreted."""

import pytest
import torch

from cna_kernels import make_scale
from cna_kernels.triton import whole_rows
from op_cases import (
    DTYPES,
    FEATURES,
    assert_nothing_outside,
    assert_values,
    exact_case,
    make_case,
    wider,
    with_feature,
)
from test_triton import DEVICE, WHERE, on_device


def names(values):
    return [f"{WHERE}-{'-'.join(map(str, value))}".replace("torch.", "") for value in values]


# (N, H) of the pair: one neuron, fewer than a program's rows, no multiple of them
ROWS = [(1, 5), (6, 48), (130, 72)]


def pair(case, extras):
    x, w_gate_up, w_down = (part.to(DEVICE) for part in case.inputs("gated_mlp"))
    return whole_rows.down_rows(whole_rows.gate_up_rows(x, w_gate_up, **extras), w_down)


def assert_pair(N, H, dtype, feature):
    case = make_case(1, N, dtype, n_hidden=H)
    case.weight.fill_(0.7)  # make_case gives every third token, the first of them this one, weights of 0
    extras = with_feature(case, feature)
    if extras["weight"] is not None:
        case.weight = extras["weight"] = torch.rand_like(extras["weight"])
    extras = on_device(extras)
    y = pair(case, extras)
    assert_values(case, "gated_mlp", y, extras)
    assert y.dtype == dtype and y.shape == (1, H)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "H"), ROWS, ids=names(ROWS))
def test_pair(N, H, dtype, feature):
    assert_pair(N, H, dtype, feature)


# more than one load a thread, the last one ragged: of gate and up, of down; and a second block of a circuit's neurons
LONG = [(40, 520, torch.float32, "plain"), (520, 24, torch.float32, "plain"), (1032, 24, torch.bfloat16, "circuits")]


@pytest.mark.parametrize(("N", "H", "dtype", "feature"), LONG, ids=names(LONG))
def test_pair_with_long_rows(N, H, dtype, feature):
    assert_pair(N, H, dtype, feature)


def test_pair_with_gate_and_up_apart():
    case = exact_case((1, 130, 72))
    together, apart = on_device(case.extras()), on_device(case.extras())
    x, w_gate_up, _ = (part.to(DEVICE) for part in case.inputs("gated_mlp"))
    act = whole_rows.gate_up_rows(x, w_gate_up, **together)
    halves = w_gate_up[:130].clone(), w_gate_up[130:].clone()
    assert torch.equal(whole_rows.gate_up_rows(x, halves, **apart), act)
    assert torch.equal(apart["act_sum"], together["act_sum"])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, about the planted NaN
def test_pair_writes_zero_over_what_is_not_finite():
    case = exact_case((1, 130, 72))
    chosen = [0, 5, 129]
    case.scale = make_scale([dict.fromkeys(chosen, 0.0)], 130)
    case.row_circuit.zero_()
    extras = on_device(dict(scale=case.scale, row_circuit=case.row_circuit))
    expected = pair(case, extras)
    case.w_gate_up[[n + 130 for n in chosen]] = torch.tensor([torch.inf, torch.nan, -torch.inf]).bfloat16()[:, None]
    act = whole_rows.gate_up_rows(case.x.to(DEVICE), case.w_gate_up.to(DEVICE), **extras)
    assert (act[0, chosen] == 0).all()
    assert torch.equal(pair(case, extras), expected)


def test_pair_does_not_read_a_token_that_counts_nowhere():
    case = exact_case((1, 130, 72))
    assert (case.weight == 0).all()
    extras = on_device(case.extras())
    case.x[:] = torch.nan
    pair(case, extras)
    assert torch.equal(extras["act_sum"].cpu(), case.act_sum) and torch.equal(extras["act_sumsq"].cpu(), case.act_sumsq)


def test_pair_keeps_to_its_rows():
    """Any row stride, nothing written outside, the same bits again."""
    case = exact_case((1, 136, 72))
    case.weight.fill_(0.5)
    compact = on_device(case.extras())
    expected = pair(case, compact)
    case.x, case.w_gate_up, case.w_down = (wider(part) for part in (case.x, case.w_gate_up, case.w_down))
    extras = on_device(case.extras())
    extras["act_sum"], extras["act_sumsq"] = wider(extras["act_sum"]), wider(extras["act_sumsq"])
    x, w_gate_up, w_down = (wider(part.to(DEVICE)) for part in case.inputs("gated_mlp"))
    y = whole_rows.down_rows(whole_rows.gate_up_rows(x, w_gate_up, **extras), w_down)
    assert torch.equal(y, expected)
    for part in ("act_sum", "act_sumsq"):
        assert torch.equal(extras[part], compact[part])
        assert_nothing_outside(part, extras[part])


def test_pair_fits_the_models():
    for H, N in ((2048, 8192), (4096, 14336), (3584, 18944), (8192, 29568)):
        assert whole_rows.fits(1, N, H, 2)
        assert not whole_rows.fits(2, N, H, 2)
    assert not whole_rows.fits(1, 32769, 4096, 2) and not whole_rows.fits(1, 14336, 8193, 4)
