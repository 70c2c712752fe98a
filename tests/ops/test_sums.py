"""ActivationSums: folding, merging, refusing what is not finite, and memory that does not grow."""

import pytest
import torch

from cna_kernels import ActivationSums, ops
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
