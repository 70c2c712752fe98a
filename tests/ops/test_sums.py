"""ActivationSums: folding, merging, refusing what is not finite, and memory that does not grow."""

import pytest
import torch

from cna_kernels import ActivationSums, InputError, ops, select
from cna_kernels.sums import NonFiniteActivation

L, C, N = 3, 2, 10


def feed(sums, batches, seed=0):
    """Run act batches through the op for every layer; return all (token_weight, act[L]) that went in."""
    generator = torch.Generator().manual_seed(seed)
    fed = []
    for n_tokens in batches:
        token_weight = torch.rand(n_tokens, C, generator=generator)
        acts = torch.randn(L, n_tokens, N, generator=generator)
        for layer in range(L):
            ops.down_proj(acts[layer], torch.ones(4, N), token_weight=token_weight, **sums.layer(layer))
        sums.fold(token_weight)
        fed.append((token_weight, acts))
    return fed


def test_mean_and_variance_equal_numpy():
    sums = ActivationSums(L, N, C, squares=True)
    fed = feed(sums, [5, 1, 8])
    token_weight = torch.cat([w for w, _ in fed]).double()  # [T, C]
    acts = torch.cat([a for _, a in fed], dim=1).double()  # [L, T, N]
    for column in range(C):
        w = token_weight[:, column]
        mean = (w[None, :, None] * acts).sum(1) / w.sum()
        assert (sums.mean(column) - mean).abs().max() < 1e-6
        biased = (w[None, :, None] * acts**2).sum(1) / w.sum() - mean**2
        assert (sums.variance(column) - biased * w.sum() / (w.sum() - 1)).abs().max() < 1e-5
    assert (sums.count - token_weight.sum(0)).abs().max() < 1e-5


def test_merge_in_any_grouping_gives_the_same():
    parts = []
    for seed in range(4):
        part = ActivationSums(L, N, C)
        feed(part, [6], seed=seed)
        parts.append(part)

    def merged(*groups):
        outer = ActivationSums(L, N, C)
        for group in groups:
            inner = ActivationSums(L, N, C)
            for number in group:
                inner.merge(parts[number])
            outer.merge(inner)
        return outer

    first = merged([0, 1, 2, 3])
    assert first.total.abs().min() > 0
    for groups in ([[3, 2], [1, 0]], [[0], [1], [2], [3]], [[2], [0, 3, 1]]):
        other = merged(*groups)
        assert (other.total - first.total).abs().max() <= 1e-12 * first.total.abs().max()
        assert torch.allclose(other.count, first.count, rtol=1e-12)


def test_one_call_equals_two():
    whole, halves = ActivationSums(1, N, C), ActivationSums(1, N, C)
    token_weight, act = torch.rand(8, C), torch.randn(8, N)
    ops.down_proj(act, torch.ones(4, N), token_weight=token_weight, **whole.layer(0))
    whole.fold(token_weight)
    for part in (slice(0, 3), slice(3, 8)):
        ops.down_proj(act[part], torch.ones(4, N), token_weight=token_weight[part], **halves.layer(0))
        halves.fold(token_weight[part])
    assert (whole.total - halves.total).abs().max() <= 1e-6 * whole.total.abs().max()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_is_refused_and_leaves_the_totals(bad):
    sums = ActivationSums(L, N, C)
    feed(sums, [5])
    before, count = sums.total.clone(), sums.count.clone()
    sums.act_sum[1, 0, 7] = bad
    with pytest.raises(NonFiniteActivation, match="layer 1, neuron 7"):
        sums.fold(torch.ones(1, C))
    assert torch.equal(sums.total, before) and torch.equal(sums.count, count)
    feed(sums, [2], seed=1)  # the buffers were emptied, so the sums can still be used
    assert torch.isfinite(sums.total).all() and not torch.equal(sums.total, before)


def test_non_finite_squares_are_refused_before_the_sums_are_kept():
    sums = ActivationSums(L, N, C, squares=True)
    feed(sums, [5])
    before = sums.total.clone()
    sums.act_sum += 1
    sums.act_sumsq[2, 1, 3] = torch.inf
    with pytest.raises(NonFiniteActivation, match="layer 2, neuron 3"):
        sums.fold(torch.ones(1, C))
    assert torch.equal(sums.total, before)


def test_refusals():
    sums = ActivationSums(L, N, C)
    with pytest.raises(ValueError, match="column 0: no token was counted"):
        sums.mean(0)
    feed(sums, [3])
    with pytest.raises(ValueError, match="made without squares"):
        sums.variance(0)
    with pytest.raises(ValueError, match="one of the two runs kept squares"):
        sums.merge(ActivationSums(L, N, C, squares=True))
    with pytest.raises(ValueError, match=r"other.total: expected shape \[3, 2, 10\]"):
        sums.merge(ActivationSums(L, N, 5))


# Variances of neurons that are nearly constant: (mean, spread). fp32 numbers near 10,000 are 0.001 apart.
SPREADS = [
    (0.0, 1.0), (10.0, 0.1), (100.0, 0.05), (-1000.0, 0.5), (3000.0, 1.0), (10000.0, 1.0), (-1e4, 1.0), (1e30, 1e27),
    (1e5, 2.0), (1e-20, 1e-24), (16384.0, 0.25),
]  # fmt: skip


def limit(mean, spread):
    """The relative error of a variance from sums in fp64: rounding of the squares, which the spread is a part of."""
    return 1e-6 + 2.0**-46 * (mean / spread) ** 2


def normal(mean, spread, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (mean + spread * torch.randn(n, 1, generator=generator, dtype=torch.float64)).float()


def summed(*groups, batch=8, backend=None, op="steer_act"):
    """ActivationSums with a column for each group of activations ``[T, N]``, added in calls of ``batch`` tokens."""
    n_neurons = groups[0].shape[1]
    sums = ActivationSums(1, n_neurons, len(groups), squares=True)
    for column, group in enumerate(groups):
        for part in group.split(batch):
            token_weight = torch.zeros(len(part), len(groups))
            token_weight[:, column] = 1
            inputs = (part,) if op == "steer_act" else (part, torch.ones(2, n_neurons))
            getattr(ops, op)(*inputs, token_weight=token_weight, **sums.layer(0), backend=backend)
            sums.fold(token_weight)
    return sums


@pytest.mark.parametrize("batch", [1, 8, 400])
@pytest.mark.parametrize("op", ["steer_act", "down_proj"])
@pytest.mark.parametrize("backend", ["reference", None])
def test_variances_of_nearly_constant_neurons(backend, op, batch):
    """All spreads at once, as neurons: the two-pass variance of the same numbers, however they are cut."""
    act = torch.cat([normal(mean, spread, 400) for mean, spread in SPREADS], 1)
    sums = summed(act, batch=batch, backend=backend, op=op)
    exact = act.double().var(0)
    for found, answer, (mean, spread) in zip(sums.variance(0)[0], exact, SPREADS, strict=True):
        assert abs(found - answer) <= limit(mean, spread) * answer, f"mean {mean}, spread {spread}"
    assert (sums.mean(0)[0] - act.double().mean(0)).abs().max() <= 1e-12 * act.abs().max()


def test_variances_merge_and_split():
    """Parts of a run, merged in any grouping, and a fold that is left out."""
    act = torch.cat([normal(mean, spread, 400) for mean, spread in SPREADS], 1)
    parts = [summed(part) for part in act.split([100, 7, 293])]
    whole = ActivationSums(1, len(SPREADS), 1, squares=True)
    for part in parts[::-1]:
        whole.merge(part)
    for kept, rows in ((whole, act), (parts[2], act[107:])):
        exact = rows.double().var(0)
        limits = torch.tensor([limit(*each) for each in SPREADS], dtype=torch.float64)
        assert ((kept.variance(0)[0] - exact).abs() <= limits * exact).all()


@pytest.mark.parametrize("score", select.SCORES)
def test_scores_of_nearly_constant_neurons(score):
    """Neuron 0 has mean 10,000, spread 1 and differs by 2.5 spreads; it ranks where numpy's numbers put it."""
    positive = torch.cat([normal(10002.5, 1.0, 200), normal(0.8, 1.0, 200, 1), normal(-3e4, 3.0, 200, 2)], 1)
    negative = torch.cat([normal(10000.0, 1.0, 200, 3), normal(0.0, 1.0, 200, 4), normal(-3e4, 3.0, 200, 5)], 1)
    sums = summed(positive, negative)
    got = select.scores(score, sums, select.contrast(sums))[0]
    wide, other = positive.double(), negative.double()
    delta = wide.mean(0) - other.mean(0)
    expected = {
        "abs-delta": delta.abs(),
        "magnitude": wide.mean(0).abs() - other.mean(0).abs(),
        "cohen-d": delta.abs() / ((wide.var(0) + other.var(0)) / 2).sqrt(),
    }[score]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
    assert got.argmax() == 0


def test_no_spread_is_rounding():
    """A constant neuron's deviation is the last bit of fp32, not 0, and never the root of a negative number."""
    sums = summed(torch.tensor([[3.0, 0.1, 1e4, 0.0]]).expand(50, -1).contiguous())
    deviation = sums.variance(0)[0].sqrt()
    assert torch.isfinite(deviation).all() and (deviation <= torch.tensor([3.0, 0.1, 1e4, 0.0]) * 1.3e-7).all()


def test_squares_are_kept_in_fp64():
    sums = ActivationSums(L, N, C, squares=True)
    assert {x.dtype for x in (sums.act_sum, sums.act_sumsq, sums.total, sums.total_sq)} == {torch.float64}
    assert ActivationSums(L, N, C).act_sum.dtype == torch.float32
    with pytest.raises(InputError, match="squares: need fp64, which mps has not"):
        ActivationSums(L, N, C, squares=True, device="mps")


@pytest.mark.parametrize("layer", [-1, 2, slice(1, 3), slice(-1, None), None])
def test_folding_some_layers(layer):
    sums = ActivationSums(L, N, C)
    sums.act_sum += 1.0
    sums.fold(torch.ones(1, C), layer=layer)
    chosen = [False] * L
    for number in [range(L)[layer]] if isinstance(layer, int) else range(L)[slice(None) if layer is None else layer]:
        chosen[number] = True
    assert (sums.total[:, 0, 0] == 1).tolist() == chosen and (sums.act_sum[:, 0, 0] == 0).tolist() == chosen
    sums.act_sum[-1, 0, 3] = torch.nan
    with pytest.raises(NonFiniteActivation, match=f"layer {L - 1}, neuron 3"):
        sums.fold(torch.ones(1, C), layer=-1)


# act_sum whose rows share memory, and sums that share an array.
APART = {
    "overlapping": (lambda kind: torch.zeros(64, dtype=kind).as_strided((3, 16), (8, 1)), "act_sum"),
    "expanded": (lambda kind: torch.zeros(1, 16, dtype=kind).expand(3, 16), "act_sum"),
    "off by one": (lambda kind: torch.zeros(64, dtype=kind).as_strided((3, 16), (15, 1)), "act_sum"),
    "half of a wider one": (lambda kind: torch.zeros(3, 32, dtype=kind)[:, 16:], None),
    "one row": (lambda kind: torch.zeros(16, dtype=kind).as_strided((1, 16), (0, 1)), None),
}


@pytest.mark.parametrize("name", ["act_sum", "act_sumsq"])
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", APART)
def test_rows_of_sums_lie_apart(how, kind, backend, name):
    make, refused = APART[how]
    sums, act = make(kind), torch.randn(7, 16)
    token_weight = torch.rand(7, len(sums))
    given = {"token_weight": token_weight, name: sums, "backend": backend}
    if refused:
        with pytest.raises(ValueError, match=f"^{name}: expected rows apart from each other"):
            ops.steer_act(act, **given)
    else:
        ops.steer_act(act, **given)
        expected = token_weight.T @ (act if name == "act_sum" else act.square())
        torch.testing.assert_close(sums.float(), expected)


def test_sums_of_two_dtypes_are_refused():
    act, token_weight = torch.randn(7, 16), torch.ones(7, 2)
    with pytest.raises(ValueError, match="act_sumsq: expected float64, got float32"):
        sums = torch.zeros(2, 16, dtype=torch.float64), torch.zeros(2, 16)
        ops.steer_act(act, token_weight=token_weight, act_sum=sums[0], act_sumsq=sums[1])
    with pytest.raises(ValueError, match="act_sum: expected float32 or float64, got bfloat16"):
        ops.steer_act(act, token_weight=token_weight, act_sum=torch.zeros(2, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("squares", [False, True])
def test_folding_in_parts_changes_no_bit(monkeypatch, squares):
    """One layer at a time, as large sums are folded, against all at once."""
    found = []
    for part in (1, 2 * C * N, 1 << 22):
        monkeypatch.setattr("cna_kernels.sums.PART", part)
        sums = ActivationSums(L, N, C, squares=squares)
        sums.total += 1 / 3
        feed(sums, [5, 1, 8])
        sums.act_sum[1:] += 0.7
        sums.fold(torch.ones(1, C), layer=slice(1, None))
        sums.act_sum[2, 1, 4] = float("inf")
        with pytest.raises(NonFiniteActivation, match="layer 2, neuron 4"):
            sums.fold(torch.ones(1, C))
        found.append(sums)
    for sums in found[1:]:
        assert sums.total.equal(found[0].total) and sums.count.equal(found[0].count) and not sums.act_sum.any()
        assert not squares or sums.total_sq.equal(found[0].total_sq)
    assert found[0].total[1].sub(found[0].total[0]).abs().min() > 0
