"""Selection: the three scores, ties, exclusions, rounding of k, and refusals."""

import pytest
import torch

from cna_kernels import ActivationSums, InputError, select


def sums_from(positive, negative, *, squares=False):
    """Sums of activations [prompts, L, N] for each side."""
    n_layers, n_neurons = positive.shape[1:]
    sums = ActivationSums(n_layers, n_neurons, 2, squares=squares)
    for column, acts in ((select.POSITIVE, positive), (select.NEGATIVE, negative)):
        token_weight = torch.zeros(len(acts), 2)
        token_weight[:, column] = 1
        sums.act_sum[:, column] = acts.sum(0)
        if squares:
            sums.act_sumsq[:, column] = acts.square().sum(0)
        sums.fold(token_weight)
    return sums


def random_sums(seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randn(2, 9, 4, 25, generator=generator) * (0.5 + torch.rand(4, 25, generator=generator))
    return sums_from(acts[0] + 0.3, acts[1][:6], **options), (acts[0] + 0.3).double(), acts[1][:6].double()


# numbers of neurons as published: 0.001 of layers * intermediate_size
@pytest.mark.parametrize(
    ("n_layers", "n_neurons", "k"),
    [(16, 8192, 131), (28, 8192, 229), (32, 14336, 459), (80, 28672, 2294), (28, 8960, 251), (36, 11008, 396),
     (28, 18944, 530), (80, 29568, 2365)],
)  # fmt: skip
def test_k_of_the_published_models(n_layers, n_neurons, k):
    assert select.k_from_fraction(0.001, n_layers, n_neurons) == k


def test_k_rounds_halves_up_and_is_at_least_one():
    assert [select.k_from_fraction(f, 1, 10) for f in (0.25, 0.24, 0.05, 0.001, 1)] == [3, 2, 1, 1, 10]


@pytest.mark.parametrize("fraction", [0, -0.1, 1.001, float("nan"), float("inf")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(InputError, match="fraction: expected above 0 and at most 1"):
        select.k_from_fraction(fraction, 2, 10)


def test_scores_equal_their_formulas():
    sums, positive, negative = random_sums(squares=True)
    mean_p, mean_n = positive.mean(0), negative.mean(0)
    delta = select.contrast(sums)
    assert (delta - (mean_p - mean_n)).abs().max() < 1e-6
    assert torch.equal(select.scores("abs-delta", sums, delta), delta.abs())
    magnitude = select.scores("magnitude", sums, delta)
    assert (magnitude - (mean_p.abs() - mean_n.abs())).abs().max() < 1e-6
    assert (magnitude < 0).any(), "a neuron that fires more for the negative set scores below zero"
    pooled = ((8 * positive.var(0) + 5 * negative.var(0)) / 13).sqrt()
    assert (select.scores("cohen-d", sums, delta) - delta.abs() / pooled).abs().max() < 1e-4


def test_rounded_means():
    sums, positive, negative = random_sums()
    got = select.contrast(sums, rounded_to=torch.bfloat16)
    want = (positive.mean(0).bfloat16() - negative.mean(0).bfloat16()).double()
    assert torch.equal(got, want) and not torch.equal(got, select.contrast(sums))


def test_cohen_d_of_constant_activations_is_finite():
    positive, negative = torch.ones(4, 2, 5), torch.ones(4, 2, 5)
    positive[:, 1, 3] = 2
    sums = sums_from(positive, negative, squares=True)
    score = select.scores("cohen-d", sums, select.contrast(sums))
    assert torch.isfinite(score).all() and score.argmax() == 8 and (score > 0).sum() == 1


def test_cohen_d_of_differences_too_small_for_fp32_squares():
    acts = torch.zeros(4, 2, 5)
    acts[:, 0, 0] = 1e-24
    score_sums = sums_from(acts * 2, acts, squares=True)
    assert torch.equal(select.scores("cohen-d", score_sums, select.contrast(score_sums)), torch.zeros(2, 5).double())


def test_cohen_d_needs_two_prompts():
    sums = sums_from(torch.ones(1, 2, 5), torch.ones(4, 2, 5), squares=True)
    with pytest.raises(ValueError, match="needs a count above 1"):
        select.scores("cohen-d", sums, select.contrast(sums))


def test_ties_go_to_the_lowest_layer_then_index():
    score = torch.zeros(3, 1000, dtype=torch.float64)
    score[2, 7] = 2
    score[[0, 1, 1, 2], [900, 5, 3, 0]] = 1
    expected = [(2, 7), (0, 900), (1, 3), (1, 5), (2, 0), (0, 0), (0, 1)]
    assert select.top_neurons(score, 7) == expected


@pytest.mark.parametrize("k", [1, 7, 60, 90])
@pytest.mark.parametrize("distinct", [1, 5, 1000])
def test_ranking_equals_a_stable_sort_of_everything(distinct, k):
    generator = torch.Generator().manual_seed(k)
    score = torch.randint(0, distinct, (4, 25), generator=generator).double() - distinct // 2
    excluded = torch.rand(4, 25, generator=generator) < 0.05
    free = [(-score[place].item(), place) for place in ((i, j) for i in range(4) for j in range(25))]
    expected = [place for _, place in sorted(each for each in free if not excluded[each[1]])][:k]
    assert select.top_neurons(score, k, excluded) == expected


def test_excluded_neurons_are_filtered_before_k_is_taken():
    score = torch.arange(20.0).double().view(2, 10)
    excluded = torch.zeros(2, 10, dtype=torch.bool)
    excluded[1, 8:] = True
    assert select.top_neurons(score, 3, excluded) == [(1, 7), (1, 6), (1, 5)]
    assert len(select.top_neurons(-score, 18, excluded)) == 18
    with pytest.raises(InputError, match="top_k: expected 1 to 18, the neurons that may be chosen, got 19"):
        select.top_neurons(score, 19, excluded)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_ranking_refuses_what_is_not_finite(bad):
    score = torch.rand(2, 10).double()
    score[1, 1] = bad
    with pytest.raises(ValueError, match="score: not finite"):
        select.top_neurons(score, 3)


def test_count_top_counts_columns():
    magnitude = torch.zeros(2, 3, 5)
    magnitude[0, :, 1] = 9
    magnitude[1, 0, 4] = magnitude[1, 1, 2] = 5
    counts = select.count_top(magnitude, 2)
    assert counts.tolist() == [[1, 3, 0, 0, 0], [0, 0, 1, 0, 1]]


def test_unknown_score_and_layer():
    sums, _, _ = random_sums()
    with pytest.raises(InputError, match="score: expected one of abs-delta, magnitude, cohen-d, got 'best'"):
        select.scores("best", sums, select.contrast(sums))
    with pytest.raises(InputError, match="skip_layers: expected 0 to 1, got 2"):
        select.mask_layers(2, 5, [2])
    with pytest.raises(InputError, match="fraction: expected a number, or top_k"):
        select.Selection([5, 5], fraction=None)


# arguments of a selection -> what is said
REFUSED = [
    (dict(top_k=2.0), "top_k: expected a whole number, got 2.0"),
    (dict(top_k=True), "top_k: expected a whole number, got True"),
    (dict(top_k="3"), "top_k: expected a whole number, got '3'"),
    (dict(fraction="a"), "fraction: expected above 0 and at most 1, got a"),
    (dict(fraction=float("nan")), "fraction: expected above 0 and at most 1, got nan"),
    (dict(skip_layers=1), "skip_layers: expected a list, got 1"),
    (dict(skip_layers=[1.0]), "skip_layers: expected a whole number, got 1.0"),
    (dict(exclude=[0]), "exclude: expected (layer, index) pairs, got 0"),
    (dict(exclude=[(0, 1.5)]), "exclude: expected a whole number, got 1.5"),
    (dict(universal=[(0, 1)]), "universal: expected what Engine.universal returns, got [(0, 1)]"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=[str(given) for given, _ in REFUSED])
def test_refused(given, said):
    with pytest.raises(InputError) as caught:
        select.Selection([5, 5], **given)
    assert said in str(caught.value)


@pytest.mark.parametrize("n_columns", [1, 3])
def test_a_contrast_has_two_columns(n_columns):
    sums = ActivationSums(2, 5, n_columns)
    with pytest.raises(InputError, match=f"sums: expected two columns, positive and negative, got {n_columns}"):
        select.Selection([5, 5]).rank(sums)


def test_norm_weighted_and_a_ranking_from_elsewhere():
    sums, positive, negative = random_sums()
    norms = torch.rand(4, 25, generator=torch.Generator().manual_seed(1)).double() + 0.1
    delta = positive.mean(0) - negative.mean(0)
    found = select.Selection([25] * 4, top_k=7, score="norm-weighted", norms=norms).circuit(sums)
    best = (delta.abs() * norms).flatten().topk(7).indices.tolist()
    assert found.pairs == [divmod(place, 25) for place in best] and found.score == "norm-weighted"
    assert found.pairs != select.Selection([25] * 4, top_k=7).circuit(sums).pairs
    assert [value for *_, value in found.neurons] == pytest.approx(
        [delta[pair].item() for pair in found.pairs], abs=1e-6
    )
    with pytest.raises(InputError, match="score: norm-weighted needs the norms of the columns of down_proj"):
        select.Selection([25] * 4, top_k=7, score="norm-weighted").circuit(sums)
    given = select.Selection([25] * 4, top_k=3, score="relp", ranking=norms).circuit(sums)
    assert given.pairs == [divmod(place, 25) for place in norms.flatten().topk(3).indices.tolist()]
    assert given.score == "relp" and given.neurons[0][2] == pytest.approx(delta[given.pairs[0]].item(), abs=1e-6)


@pytest.mark.parametrize("score", ["abs-delta", "magnitude"])
@pytest.mark.parametrize("rounded_to", [None, torch.bfloat16])
def test_a_circuit_holds_the_means_of_its_neurons(score, rounded_to):
    """Over the positive prompts, in rank order; not rounded, even where the contrast is."""
    sums, positive, negative = random_sums()
    found = select.Selection([25] * 4, top_k=80, score=score, rounded_to=rounded_to).circuit(sums)
    assert found.mirrored is None and found.positive_mean == pytest.approx(
        [positive.mean(0)[pair].item() for pair in found.pairs], abs=1e-6
    )
    distance = [abs(positive.mean(0)[pair] - negative.mean(0)[pair]) for pair in found.pairs]
    assert max(distance) > 0.5, "sides without a difference would hide everything"
    assert 0 < len(found.aligned().mirrored) < 80
