"""Attribution over many prompts: a random Llama-shaped checkpoint of about 100 million parameters, in fp32.

A1, A2 against transformers with hooks, one prompt at a time and in padded batches; A3 what the sums cost; A4 many
columns; A5 bootstrap replicates. Prompts: 1,000 of 8 to 64 tokens after a header of 30 that all share. The competitors
run every tenth of them, of all lengths; times are per prompt. The circuits are compared first.
CNA_BENCH_PROMPTS=100 makes it short, to try the file out.
"""

import os
import random

import pytest
import torch

from cna_kernels import ActivationSums, select
from cna_kernels.cpu import library
from cna_kernels.model.collect import collect
from cna_kernels.model.columns import Columns
from cna_kernels.model.config import read_config
from cna_kernels.model.corpus import Contrast, Entry
from cna_kernels.model.packing import TokenPrompt
from cna_kernels.model.weights import load_transformer, open_checkpoint
from interleave import compare

transformers = pytest.importorskip("transformers")
if reason := library.missing():
    pytest.skip(f"the CPU engine {reason}", allow_module_level=True)

SHAPE = dict(
    hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_key_value_heads=4, head_dim=64,
    vocab_size=32000, num_hidden_layers=12, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
NAME = "Llama-shaped, 125M"
N_LAYERS, N_NEURONS = SHAPE["num_hidden_layers"], SHAPE["intermediate_size"]
N_PROMPTS, HEADER, STEP, BATCH = int(os.environ.get("CNA_BENCH_PROMPTS", 1000)), 30, 10, 32
TOP = select.k_from_fraction(0.001, N_LAYERS, N_NEURONS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(ours, theirs) on one checkpoint made on the spot."""
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, attn_implementation="eager")).eval()
    theirs.save_pretrained(directory)
    config = read_config(directory)
    ours = load_transformer(directory, config, open_checkpoint(directory), dtype=None, device=torch.device("cpu"))
    return ours, theirs


@pytest.fixture(scope="module")
def prompts():
    draw = random.Random(0)
    header = [draw.randrange(2, SHAPE["vocab_size"]) for _ in range(HEADER)]
    rows = [[draw.randrange(2, SHAPE["vocab_size"]) for _ in range(draw.randint(8, 64))] for _ in range(N_PROMPTS)]
    return [TokenPrompt([*header, *row], f"prompt {number}") for number, row in enumerate(rows)]


def two_columns(n):
    """The first half is positive, the second negative."""
    return torch.tensor([[1.0, 0.0]] * (n // 2) + [[0.0, 1.0]] * (n - n // 2))


def sums_of(transformer, prompts, weights):
    sums = ActivationSums(N_LAYERS, N_NEURONS, weights.shape[1])
    collect(transformer, prompts, weights, sums)
    return sums


def ranked(delta):
    return delta.abs().flatten().sort(descending=True, stable=True).indices[:TOP].tolist()


def hooked(theirs, batches, n_prompts):
    """Contrast ``[L, N]`` with a hook on every down_proj. A batch: rows, ids, mask or None, each row's last token."""
    caught, sides = [], torch.zeros(2, N_LAYERS, N_NEURONS)
    last = None

    def keep(_, arguments):
        caught.append(arguments[0][torch.arange(len(last)), last])

    handles = [layer.mlp.down_proj.register_forward_pre_hook(keep) for layer in theirs.model.layers]
    with torch.inference_mode():
        for rows, ids, mask, last in batches:  # noqa: B007
            caught.clear()
            options = {} if mask is None else dict(attention_mask=mask, logits_to_keep=1)
            theirs(ids, use_cache=False, **options)
            acts = torch.stack(caught)  # [L, B, N]
            for place, row in enumerate(rows):
                sides[int(row >= n_prompts // 2)] += acts[:, place]
    for handle in handles:
        handle.remove()
    return sides[0] / (n_prompts // 2) - sides[1] / (n_prompts - n_prompts // 2)


def padded(prompts, order):
    batches = []
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        longest = max(len(prompts[row].ids) for row in rows)
        ids, mask = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest)
        for place, row in enumerate(rows):
            ids[place, : len(prompts[row].ids)] = torch.tensor(prompts[row].ids)
            mask[place, : len(prompts[row].ids)] = 1
        batches.append((rows, ids, mask, torch.tensor([len(prompts[row].ids) - 1 for row in rows])))
    return batches


@pytest.mark.parametrize(
    ("id", "competitor", "target"),
    [
        ("A1 discovery", "transformers + hooks, one at a time", 1 / 5),
        ("A2 discovery", "transformers + hooks, padded batches of 32", 1 / 2),
        ("A2 discovery", "transformers + hooks, padded batches of 32 sorted by length", None),
    ],
)
def test_discovery(attribution, benchmark, models, prompts, id, competitor, target):
    ours, theirs = models
    some = prompts[::STEP]
    if "one at a time" in competitor:
        batches = [
            ([row], torch.tensor([prompt.ids]), None, torch.tensor([len(prompt.ids) - 1]))
            for row, prompt in enumerate(some)
        ]
    else:
        order = list(range(len(some)))
        if "sorted" in competitor:
            order.sort(key=lambda row: len(some[row].ids))
        batches = padded(some, order)
    mine = select.contrast(sums_of(ours, some, two_columns(len(some))))
    expected = hooked(theirs, batches, len(some))
    assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert ranked(mine) == ranked(expected)

    def run():
        return sums_of(ours, prompts, two_columns(N_PROMPTS))

    result = compare(run, lambda: hooked(theirs, batches, len(some)), rounds=3)
    result["ours"] /= N_PROMPTS
    result["theirs"] /= len(some)
    result["ratio"] *= len(some) / N_PROMPTS
    add(attribution, benchmark, run, id, competitor, result, target)


class NoSums:
    """The same forward pass, and nothing kept."""

    def layer(self, _):
        return {}

    def fold(self, _):
        pass


def test_cost_of_sums(attribution, benchmark, models, prompts):
    ours, _ = models
    weights = two_columns(N_PROMPTS)

    def run():
        return sums_of(ours, prompts, weights)

    result = compare(run, lambda: collect(ours, prompts, weights, NoSums()), rounds=5)
    add(attribution, benchmark, run, "A3 sums", "the same packed forward without sums", per_prompt(result), 1.03)


@pytest.mark.parametrize(("id", "what"), [("A4 64 columns", "columns"), ("A5 100 bootstrap replicates", "bootstrap")])
def test_many_columns(attribution, benchmark, models, prompts, id, what):
    ours, _ = models
    two = two_columns(N_PROMPTS)
    if what == "columns":
        many = (torch.rand(N_PROMPTS, 64, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    else:
        entries = [Entry("", "", ((int(row >= N_PROMPTS // 2), 1.0),)) for row in range(N_PROMPTS)]
        many = Columns(2, (Contrast("", 0, 1),), bootstrap=100).weights(entries, 0)[1]
        assert many.shape[1] == 202

    def run():
        return sums_of(ours, prompts, many)

    if what == "bootstrap":
        assert torch.equal(run().total[:, :2], sums_of(ours, prompts, two).total)
    result = compare(run, lambda: sums_of(ours, prompts, two), rounds=5)
    add(attribution, benchmark, run, id, "2 columns", per_prompt(result), 1.10)


def per_prompt(result):
    return result | {"ours": result["ours"] / N_PROMPTS, "theirs": result["theirs"] / N_PROMPTS}


def add(attribution, benchmark, run, id, competitor, result, target):
    row = attribution.add(
        id,
        shape=NAME,
        m=f"{HEADER}+8-64",
        dtype="float32",
        competitor=competitor,
        result=result,
        target=target,
        prompts_per_s=round(1 / result["ours"], 2),
        competitor_prompts_per_s=round(1 / result["theirs"], 2),
    )
    benchmark.extra_info.update(row)
    benchmark.pedantic(run, rounds=1)
