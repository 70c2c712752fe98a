"""Packs without padding and shared prefixes: the plan of packs, and sums equal to those of one prompt at a time."""

import random

import pytest
import torch

from cna_kernels import ActivationSums, ops
from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from cna_kernels.model.discovery import collect, packed
from cna_kernels.model.discovery.packing import GROUP_COST, Span, TokenPrompt, group_by_prefix, plan_packs, spans_of
from cna_kernels.model.transformer import Tap
from tiny import VARIANTS, ragged, write_checkpoint

pytest.importorskip("transformers")
VOCABULARY = 97


def load(variant, directory):
    write_checkpoint(variant, directory)
    config = read_config(directory)
    return load_transformer(directory, config, open_checkpoint(directory))


def saved(ids, groups):
    return sum((len(group.prompts) - 1) * group.prefix for group in groups)


def test_groups_share_what_is_worth_sharing():
    header = list(range(30))
    assert group_by_prefix(ragged(50, header)) == [(30, list(range(50)))]
    one, other = [1, 2, 3] + [7] * 40, [1, 2, 3] + [8] * 60
    ids = [[*(one, other)[row % 2], 10 + row, *range(row % 5)] for row in range(20)]
    groups = group_by_prefix([*ids, [1, 2, 9], [5, 5]])
    assert [(group.prefix, len(group.prompts)) for group in groups] == [(43, 10), (63, 10), (0, 2)]
    assert group_by_prefix([[4]]) == [(0, [0])] and group_by_prefix([]) == []
    assert group_by_prefix([[1, 2], [1, 3]]) == [(0, [0, 1])], "two tokens are not worth a pass"


def test_a_short_prompt_does_not_keep_the_others_from_sharing():
    header = list(range(30))
    ids = [*ragged(50, header), header[:2], header[:20]]
    assert group_by_prefix(ids)[0] == (30, list(range(50)))


@pytest.mark.parametrize("seed", range(20))
def test_every_prompt_is_in_one_group_and_keeps_a_token(seed):
    draw = random.Random(seed)
    headers = [[draw.randrange(5) for _ in range(draw.randint(0, 60))] for _ in range(4)]
    ids = [[*draw.choice(headers), *row] for row in ragged(60, seed=seed, longest=6)]
    groups = group_by_prefix(ids)
    assert sorted(row for group in groups for row in group.prompts) == list(range(60))
    for prefix, rows in groups:
        assert {tuple(ids[row][:prefix]) for row in rows} == {tuple(ids[rows[0]][:prefix])}
        assert all(len(ids[row]) > prefix for row in rows)
        assert prefix == 0 or (len(rows) - 1) * prefix > GROUP_COST


def test_packs_hold_every_prompt_once():
    lengths, counted = [5, 900, 17, 17, 3, 40, 1, 1, 1, 64], [1, 2, 1, 2, 1, 1, 1, 1, 1, 1]
    for batch, tokens in ((None, 64), (None, 1), (3, 1), (1, 1), (100, 1)):
        packs = plan_packs(lengths, counted, max_prompts=batch, max_tokens=tokens)
        assert sorted(row for rows in packs for row in rows) == list(range(10))
        for rows in packs:
            assert [lengths[row] for row in rows] == sorted(lengths[row] for row in rows)
            assert len(rows) == 1 or (len(rows) <= batch if batch else sum(lengths[row] for row in rows) <= tokens)
    assert len(plan_packs(lengths, counted, max_prompts=100, max_tokens=1)) == 1
    assert [len(rows) for rows in plan_packs(lengths, counted, max_prompts=None, max_tokens=64)] == [7, 1, 1, 1]


def test_spans():
    assert spans_of([2, 2, 3, 3], [1, 1, 1, 3]) == [Span(0, 2, 2, 1), Span(4, 1, 3, 1), Span(7, 1, 3, 3)]


def one_at_a_time(transformer, prompts, weights):
    """The plain forward pass of every prompt by itself: sums in fp64, [L, C, N]."""
    total = 0
    for prompt, weight in zip(prompts, weights, strict=True):
        counted = torch.zeros(len(prompt.ids), 1)
        counted[-prompt.n_counted :] = 1 / prompt.n_counted
        alone = ActivationSums(3, 48, 1)
        with torch.inference_mode():
            transformer.hidden(torch.tensor([prompt.ids]), tap=Tap(alone, counted))
        alone.fold(counted)
        total = total + weight.double()[None, :, None] * alone.total
    return total


CASES = {
    "last token": dict(header=0, counted=lambda ids: 1),
    "shared header": dict(header=12, counted=lambda ids: 1),
    "all tokens": dict(header=12, counted=lambda ids: len(ids) - 1),
    "some tokens": dict(header=12, counted=lambda ids: min(len(ids), 14)),
}


# Every day: all cases of one variant, and for each other variant the case that covers most.
PACKED = [
    pytest.param(variant, case, marks=() if variant == "llama" or case == "some tokens" else pytest.mark.exhaustive)
    for variant in VARIANTS
    for case in CASES
]


@pytest.mark.parametrize(("variant", "case"), PACKED)
def test_packs_equal_one_prompt_at_a_time(variant, case, tmp_path):
    transformer = load(variant, tmp_path)
    header = list(range(5, 5 + CASES[case]["header"]))
    prompts = [TokenPrompt(ids, f"p{row}", CASES[case]["counted"](ids)) for row, ids in enumerate(ragged(17, header))]
    prompts += [TokenPrompt([7, 8, 9], "short")]
    weights = torch.rand(18, 3, generator=torch.Generator().manual_seed(1))
    weights[::4, 0] = 0
    expected = one_at_a_time(transformer, prompts, weights)
    found = []
    for limits in (dict(max_tokens=64), dict(max_tokens=10_000), dict(batch=1), dict(batch=5)):
        sums = ActivationSums(3, 48, 3, squares=True)
        sums.total += 1.0  # sums from before the call must stay
        collect.collect(transformer, prompts, weights, sums, **limits)
        found.append(sums.total - 1)
        assert (sums.count - weights.double().sum(0)).abs().max() < 1e-6
    for total in found:
        assert (total - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_prefix_is_computed_once(tmp_path, monkeypatch):
    transformer = load("llama", tmp_path)
    prompts = [TokenPrompt(ids, "p") for ids in ragged(30, list(range(5, 25)))]
    tokens = []
    whole = collect.forward

    def count(transformer, packed, *rest, **options):
        tokens.append(packed.n_tokens)
        return whole(transformer, packed, *rest, **options)

    monkeypatch.setattr(collect, "forward", count)
    collect.collect(transformer, prompts, torch.ones(30, 1), ActivationSums(3, 48, 1))
    assert sum(tokens) == 20 + sum(len(prompt.ids) - 20 for prompt in prompts)


def test_a_long_prefix_is_copied_for_a_few_prompts_at_a_time(tmp_path, monkeypatch):
    transformer = load("llama", tmp_path)
    prompts = [TokenPrompt(ids, "p") for ids in ragged(30, list(range(5, 25)), longest=2)]
    found, sizes = [], []
    whole = torch.nn.functional.scaled_dot_product_attention

    def count(query, key, *rest, **options):
        sizes.append(key.numel() * 2 * key.element_size())
        return whole(query, key, *rest, **options)

    monkeypatch.setattr(packed.F, "scaled_dot_product_attention", count)
    for limit in (32 << 20, 20_000):
        monkeypatch.setattr(packed, "KEY_BYTES", limit)
        sums = ActivationSums(3, 48, 1)
        sizes.clear()
        collect.collect(transformer, prompts, torch.ones(30, 1), sums)
        assert max(sizes) <= limit
        found.append(sums.total)
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[0].abs().max()


def test_only_counted_tokens_go_through_the_last_layer(tmp_path, monkeypatch):
    transformer = load("llama", tmp_path)
    prompts = [TokenPrompt(ids, "p") for ids in ragged(30)]
    rows = []
    whole = ops.gated_mlp
    monkeypatch.setattr(ops, "gated_mlp", lambda x, *a, **k: rows.append(len(x)) or whole(x, *a, **k))
    collect.collect(transformer, prompts, torch.ones(30, 1), ActivationSums(3, 48, 1))
    n_tokens = sum(len(prompt.ids) for prompt in prompts)
    assert rows == [n_tokens, n_tokens, 30]


def test_dynamic_rope_beyond_its_context_shares_nothing(tmp_path):
    """Beyond the context, the keys of a prefix depend on the length of its prompt."""
    transformer = load("llama-rope-dynamic", tmp_path)
    short = [TokenPrompt(ids, "p") for ids in ragged(30, list(range(5, 12)), longest=5)]
    assert [prefix for prefix, _ in collect.shared_prefixes(transformer, short)] == [7]
    assert [prefix for prefix, _ in collect.shared_prefixes(transformer, [*short, TokenPrompt([4] * 20, "p")])] == [0]


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa):
    """What torch.nn.attention.varlen.varlen_attn computes on a GPU, by its documentation."""
    found = torch.full_like(query, torch.nan)
    assert enable_gqa and window_size[1] == 0 and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    for a, b, c, d in zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False):
        assert b - a <= max_q and d - c <= max_k
        column, row = torch.arange(d - c), torch.arange(d - c - (b - a), d - c)[:, None]
        mask = (column <= row) & ((window_size[0] < 0) | (column >= row - window_size[0]))
        parts = [x[i:j].transpose(0, 1)[None] for x, i, j in ((query, a, b), (key, c, d), (value, c, d))]
        y = torch.nn.functional.scaled_dot_product_attention(*parts, mask, enable_gqa=True)
        found[a:b] = y[0].transpose(0, 1)
    return found


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2-sliding", "llama-mha"])
@pytest.mark.parametrize("n_counted", [1, 2])
def test_attention_of_varying_lengths_equals_spans(variant, n_counted, tmp_path, monkeypatch):
    transformer = load(variant, tmp_path)
    prompts = [TokenPrompt(ids, "p", n_counted) for ids in ragged(30, list(range(5, 17)))]
    weights = torch.rand(30, 2, generator=torch.Generator().manual_seed(1))
    found = []
    for has_varlen in (False, True):
        monkeypatch.setattr(packed, "_has_varlen", lambda _, has=has_varlen: has)
        monkeypatch.setattr(packed, "_varlen", lambda: (varlen_attn, None))
        sums = ActivationSums(3, 48, 2)
        collect.collect(transformer, prompts, weights, sums, max_tokens=60)
        found.append(sums.total)
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[0].abs().max()
