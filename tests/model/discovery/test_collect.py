"""Sums over many prompts against float64 hooks on transformers, one prompt at a time; options; refusals."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from cna_kernels import ActivationSums, InputError
from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from cna_kernels.model.discovery.collect import AUTO_TOKENS, collect, default_tokens, measure_tokens
from cna_kernels.model.discovery.packing import TokenPrompt
from tiny import SHAPE, ragged, write_checkpoint

pytest.importorskip("transformers")
L, N = SHAPE["num_hidden_layers"], SHAPE["intermediate_size"]
HEADER = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]


def load(directory):
    return load_transformer(directory, read_config(directory), open_checkpoint(directory))


@pytest.fixture(scope="module", params=["llama", "qwen3-tied", "mistral"])
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    theirs = write_checkpoint(request.param, directory)
    return load(directory), theirs.double()


def prompts_and_weights():
    """Prompts, some of which begin alike or count several tokens or all; and three columns, one with zeros."""
    ids = [*ragged(14, HEADER, seed=1), *ragged(9, seed=2), HEADER, [5]]
    counted = [min(1 + row % 4, len(own)) if row % 5 else len(own) for row, own in enumerate(ids)]
    prompts = [TokenPrompt(own, f"f:{row}", n) for row, (own, n) in enumerate(zip(ids, counted, strict=True))]
    weights = torch.rand(len(prompts), 3, generator=torch.Generator().manual_seed(3)) + 0.1
    weights[::3, 1] = 0
    return prompts, weights


def by_hooks(theirs, prompts, weights):
    """Sums and sums of squares, [L, C, N] float64: a prompt's weight is shared by its last n_counted tokens."""
    acts, total = [], torch.zeros(2, L, weights.shape[1], N, dtype=torch.float64)
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: acts.append(given[0][0]))
        for layer in theirs.model.layers
    ]
    for prompt, weight in zip(prompts, weights.double(), strict=True):
        acts.clear()
        with torch.no_grad():
            theirs(torch.tensor([prompt.ids]), use_cache=False)
        for layer, act in enumerate(acts):
            last = act[-prompt.n_counted :]
            for power in (1, 2):
                total[power - 1, layer] += weight[:, None] * (last**power).mean(0)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize(
    "options", [{}, {"batch": 1}, {"batch": 3}, {"max_tokens": 1}, {"max_tokens": 40}, {"batch": 2, "max_tokens": 30}],
    ids=str,
)  # fmt: skip
def test_sums_equal_hooks_however_the_prompts_are_cut(pair, options):
    ours, theirs = pair
    prompts, weights = prompts_and_weights()
    sums = ActivationSums(L, N, 3, squares=True)
    collect(ours, prompts, weights, sums, **options)
    expected = by_hooks(theirs, prompts, weights)
    for got, want in zip((sums.total, sums.total_sq), expected, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (sums.count - weights.double().sum(0)).abs().max() < 1e-5


def test_a_second_call_adds(pair):
    ours, _ = pair
    prompts, weights = prompts_and_weights()
    whole, halves = ActivationSums(L, N, 3), ActivationSums(L, N, 3)
    collect(ours, prompts, weights, whole)
    for part in (slice(0, 11), slice(11, None)):
        collect(ours, prompts[part], weights[part], halves)
    assert (whole.total - halves.total).abs().max() <= 1e-5 * whole.total.abs().max()
    assert (whole.count - halves.count).abs().max() < 1e-6


def test_a_prompt_that_weighs_nothing_in_a_column_adds_nothing_to_it(pair):
    ours, _ = pair
    prompts, weights = prompts_and_weights()
    kept = [row for row in range(len(prompts)) if weights[row, 1]]
    whole, some = ActivationSums(L, N, 3), ActivationSums(L, N, 3)
    collect(ours, prompts, weights, whole)
    collect(ours, [prompts[row] for row in kept], weights[kept], some)
    assert len(kept) < len(prompts)
    assert (whole.total[:, 1] - some.total[:, 1]).abs().max() <= 1e-5 * whole.total[:, 1].abs().max()


def test_progress_counts_every_prompt_and_token_once(pair):
    ours, _ = pair
    prompts, weights = prompts_and_weights()
    for batch in (None, 4):
        seen = []
        sums = ActivationSums(L, N, 3)
        collect(ours, prompts, weights, sums, batch=batch, progress=lambda *facts, seen=seen: seen.append(facts))
        assert sum(n for n, _ in seen) == len(prompts)
        assert sum(n for _, n in seen) == sum(len(prompt.ids) for prompt in prompts)
    assert max(n for n, _ in seen) <= 4


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (TokenPrompt([], "f:9"), "f:9: has no token"),
        (TokenPrompt([5, 6], "f:9", 0), "f:9: has no token that counts"),
        (TokenPrompt([5] * 65, "f:9"), "f:9: has 65 tokens, the model's context is 64"),
    ],
)
def test_prompts_that_cannot_be_summed_are_refused_before_any_is(pair, prompt, message):
    sums, (prompts, _) = ActivationSums(L, N, 1), prompts_and_weights()
    with pytest.raises(InputError, match=message):
        collect(pair[0], [*prompts, prompt], torch.ones(len(prompts) + 1, 1), sums)
    assert not sums.total.any() and not sums.count.any()


def test_the_prompt_that_is_not_finite_is_named(tmp_path):
    """The embedding of one token is NaN. Only the prompt f:2, in the middle of a pack, has this token."""
    write_checkpoint("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][90] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    prompts = [TokenPrompt([3, 4, 90 if row == 2 else 5, 6], f"f:{row}") for row in range(5)]
    sums = ActivationSums(L, N, 1)
    with pytest.raises(InputError, match="f:2: causes a non-finite activation in layer 0, neuron 0; nothing was"):
        collect(load(tmp_path), prompts, torch.ones(5, 1), sums)
    assert torch.isfinite(sums.total).all()


def test_measured_sizes(pair):
    """The result is the smallest size tried whose rate is within 3% of the best, with a rate for each size."""
    prompts, _ = prompts_and_weights()
    size, rates = measure_tokens(pair[0], prompts, 2, squares=True)
    assert tuple(rates) == AUTO_TOKENS["cpu"] and min(rates.values()) > 0
    assert size == min(tokens for tokens, rate in rates.items() if rate >= 0.97 * max(rates.values()))
    assert default_tokens(torch.device("cpu")) in rates and default_tokens(torch.device("meta")) == 512
