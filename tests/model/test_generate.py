"""Decoding: greedy tokens against whole forward passes, draws against brute force, and batches whose rows end."""

import dataclasses

import pytest
import torch

from cna_kernels import Circuit, InputError
from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.evaluation.directions import Direction, DirectionTable, RowEdit
from cna_kernels.model.generate import Sampling, choose, generate, pad
from cna_kernels.model.transformer import Edit, Steering
from cna_kernels.steering import SteeringTable
from tiny import random_prompts, write_checkpoint

pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=["llama", "qwen2-sliding", "qwen3-tied"])
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    theirs = write_checkpoint(request.param, directory, max_position_embeddings=24)
    return load_transformer(directory, read_config(directory), open_checkpoint(directory)), theirs


def brute_force(theirs, prompt, stop_ids, max_new_tokens, context):
    """Greedy tokens without cache or batch: a forward pass over the whole sequence for each token."""
    ids = list(prompt.ids)
    while len(ids) - len(prompt.ids) < max_new_tokens and len(ids) < context:
        with torch.no_grad():
            token = int(theirs(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt.ids) :]


def test_greedy_rows_equal_whole_forward_passes(pair):
    """Rows end at a stop id, at the number of tokens and at the context; half of them end before the others."""
    ours, theirs = pair
    context = ours.config.context_length
    prompts = [*random_prompts(7, 4), TokenPrompt(list(range(3, 3 + context - 2)), "long"), TokenPrompt([9], "short")]
    free = [brute_force(theirs, prompt, (), 12, context) for prompt in prompts]
    stops = frozenset(answer[2] for answer in free[:3])
    expected = [brute_force(theirs, prompt, stops, 12, context) for prompt in prompts]
    seen = [[] for _ in prompts]
    found = generate(
        ours, prompts, max_new_tokens=12, stop_ids=stops, on_token=lambda row, token: seen[row].append(token)
    )
    assert found == expected and seen == expected
    assert {len(answer) for answer in expected} >= {2, 12} and not any(stops & {*answer} for answer in found)


HEADER = [5, 17, 3, 40, 22, 9, 31, 8, 12]  # longer than _SHORTEST


@pytest.mark.parametrize("way", ["plain", "angles by length", "circuits", "directions", "edited in an unknown way"])
def test_a_shared_beginning_runs_once_for_each_way_of_steering(pair, way, monkeypatch):
    """Answers are those of each prompt alone, and the model runs the beginning once for each way."""
    ours, theirs = pair
    config = ours.config
    prompts = [TokenPrompt(HEADER + prompt.ids[:5], prompt.place) for prompt in random_prompts(6, 11)]
    prompts[2] = TokenPrompt(HEADER, "nothing but the beginning")  # its last token must run in a row of its own
    shape = config.num_hidden_layers, config.intermediate_size
    circuit = Circuit(tuple((layer, index, 1.0) for layer in (0, 1) for index in (1, 4, 6)), *shape)
    table = SteeringTable([circuit, circuit], [0.0, 3.0], *shape)
    vectors = torch.randn(shape[0], config.hidden_size, generator=torch.Generator().manual_seed(0))
    directions = DirectionTable([Direction("residual", vectors)], [4.0], shape[0], config.hidden_size)
    ways = {
        "plain": ([None] * 6, 1),
        "angles by length": ([None] * 6, None),
        "circuits": ([table.row_circuit([c]) for c in (0, 1, -1, 1, 0, -1)], 3),
        "directions": ([directions.row_direction([d]) for d in (0, -1, 0, 0, -1, 0)], 2),
        "edited in an unknown way": ([Edit() for _ in range(6)], None),
    }
    each, n_ways = ways[way]

    def steering(chosen):
        if way in ("plain", "angles by length"):
            return None
        if way == "circuits":
            return Steering(table, torch.cat(chosen))
        if way == "directions":
            return Steering(None, None, RowEdit(directions, torch.cat([edit.chosen for edit in chosen])))
        return Steering(None, None, chosen[0])

    settings = {"max_new_tokens": 6, "stop_ids": frozenset()}
    alone = [
        generate(ours, [prompt], steer=steering([one]), **settings)[0]
        for prompt, one in zip(prompts, each, strict=True)
    ]
    if way == "angles by length":
        rope = dataclasses.replace(config.rope, kind="dynamic")  # what decides; the angles stay
        monkeypatch.setattr(ours, "config", dataclasses.replace(config, rope=rope))
    calls, hidden = [], type(ours).hidden
    monkeypatch.setattr(
        type(ours), "hidden", lambda self, ids, **rest: calls.append(tuple(ids.shape)) or hidden(self, ids, **rest)
    )
    assert generate(ours, prompts, steer=steering(each), **settings) == alone
    longest = max(len(prompt.ids) for prompt in prompts)
    shared = len(HEADER) - 1
    assert calls[:2] == ([(n_ways, shared), (6, longest - shared)] if n_ways else [(6, longest), (6, 1)])
    if way == "circuits":
        assert len({*map(tuple, alone)}) > 3
    if way == "plain":
        assert alone == [brute_force(theirs, prompt, (), 6, config.context_length) for prompt in prompts]


def test_a_row_may_end_at_once(pair):
    ours, theirs = pair
    prompts = random_prompts(3, 5)
    first = [brute_force(theirs, prompt, (), 1, 24)[0] for prompt in prompts]
    found = generate(ours, prompts, max_new_tokens=3, stop_ids=frozenset(first))
    assert found == [[], [], []]


def kept(probabilities, top_k, top_p):
    """{token: probability} of the tokens that top_k and top_p keep, found one at a time."""
    ranked = sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token))
    ranked = ranked[: top_k or None]
    total, chosen, mass = sum(probabilities[t] for t in ranked), [], 0.0
    for token in ranked:
        if chosen and mass >= top_p:
            break
        chosen.append(token)
        mass += probabilities[token] / total
    whole = sum(probabilities[t] for t in chosen)
    return {token: probabilities[token] / whole for token in chosen}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7), (5, 0.6), (1, 1.0)])
def test_draws_have_the_frequencies_of_what_is_kept(temperature, top_k, top_p):
    n_draws = 8000
    logits = torch.randn(9, generator=torch.Generator().manual_seed(6)) * 1.5
    expected = kept((logits.double() / temperature).softmax(0).tolist(), top_k, top_p)
    generators = [torch.Generator().manual_seed(seed) for seed in range(n_draws)]
    drawn = choose(logits.expand(n_draws, 9), Sampling(temperature, top_k, top_p), generators)
    frequency = torch.bincount(drawn, minlength=9).double() / n_draws
    assert {token for token, share in expected.items() if share > 0.003} <= {*drawn.tolist()} <= {*expected}
    for token, share in expected.items():
        assert abs(frequency[token] - share) <= 5 * (share * (1 - share) / n_draws) ** 0.5 + 1e-9


def test_greedy_ties_go_to_the_lowest_id():
    logits = torch.tensor([[1.0, 4.0, 4.0, 0.0], [7.0, 7.0, 7.0, 7.0]])
    assert choose(logits, Sampling(), []).tolist() == [1, 0]
    assert choose(logits, Sampling(1.0, top_k=1), [torch.Generator()] * 2).tolist() == [1, 0]


def test_seeds_belong_to_rows(pair):
    """A seed draws the same answer in any batch; other seeds draw other answers."""
    ours, _ = pair
    prompts = random_prompts(4, 7)
    options = dict(max_new_tokens=8, stop_ids=frozenset(), sampling=Sampling(1.5))
    together = generate(ours, prompts, seeds=[1, 2, 3, 4], **options)
    alone = [generate(ours, [prompt], seeds=[n + 1], **options)[0] for n, prompt in enumerate(prompts)]
    assert together == alone
    same = generate(ours, [prompts[0]] * 3, seeds=[1, 1, 2], **options)
    assert same[0] == same[1] == together[0] != same[2]


def test_pad():
    input_ids, lengths = pad([[5, 6, 7], [8]], "cpu")
    assert input_ids.tolist() == [[5, 6, 7], [8, 0, 0]] and lengths.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens: expected at least 1, got 0"),
        (dict(prompts=[TokenPrompt([], "f:3")]), "f:3: has no token"),
        (dict(prompts=[TokenPrompt([5] * 500, "f:4")]), "f:4: has 500 tokens, the model's context is"),
        (dict(seeds=[2**64]), "seed: expected"),
        (dict(seeds=[-(2**63) - 1]), "seed: expected"),
    ],
)
def test_refusals(pair, changes, message):
    given = dict(prompts=random_prompts(1, 1), max_new_tokens=2, stop_ids=frozenset(), sampling=Sampling(1.0))
    with pytest.raises(InputError, match=message):
        generate(pair[0], **(given | changes))


@pytest.mark.parametrize(
    "values", [(-0.1, 0, 1.0), (float("inf"), 0, 1.0), (1.0, -1, 1.0), (1.0, 0, 0.0), (1.0, 0, 1.1)]
)
def test_samplings_that_are_none(values):
    with pytest.raises(InputError, match="expected"):
        Sampling(*values)
