"""A whole model on the CPU engine against transformers: a random bf16 checkpoint of Llama-3.2-1B's shape.

E1 decode, E2 prefill, E3 discovery of 64 prompts, E4 steered decoding. Competitors: transformers eager in bf16 and
fp32, transformers with forward hooks doing the same discovery and steering, and ``torch.compile``. Greedy decoding;
the answers and the circuits are compared first. CNA_BENCH_LAYERS=2 makes the model small, to try the file out.
"""

import os

import pytest
import torch

from cna_kernels import ActivationSums, Circuit, SteeringTable, select
from cna_kernels.cpu import library
from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from cna_kernels.model.discovery.collect import collect
from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.generate import generate
from cna_kernels.model.transformer import Steering
from interleave import compare

transformers = pytest.importorskip("transformers")
if reason := library.missing():
    pytest.skip(f"the CPU engine {reason}", allow_module_level=True)

SHAPE = dict(
    hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
    vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=True,
    num_hidden_layers=int(os.environ.get("CNA_BENCH_LAYERS", 16)), bos_token_id=0, eos_token_id=1,
)  # fmt: skip
NAME = "Llama-3.2-1B" if SHAPE["num_hidden_layers"] == 16 else f"{SHAPE['num_hidden_layers']} layers"
PROMPT, NEW, PREFILL = 32, 32, 256
TOLERANCE = 0.1  # share of the largest logit: both sides round to bf16 in different orders


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(our model, transformers' model in bf16) of one random checkpoint."""
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(torch.bfloat16).eval()
    theirs.save_pretrained(directory)
    config = read_config(directory)
    ours = load_transformer(directory, config, open_checkpoint(directory), dtype=None, device=torch.device("cpu"))
    for path in directory.iterdir():  # 2.5 GB
        path.unlink()
    return ours, theirs


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def tokens(n, seed=0):
    return torch.randint(2, SHAPE["vocab_size"], (1, n), generator=torch.Generator().manual_seed(seed))


def decode(ours, ids, steer=None):
    prompt = TokenPrompt(ids[0].tolist(), "prompt")
    return generate(ours, [prompt], max_new_tokens=NEW, stop_ids=frozenset(), steer=steer)[0]


def decode_hf(theirs, ids, **options):
    options = dict(do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids), **options)
    return theirs.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, **options)[0, ids.shape[1] :].tolist()


def agree(ours, theirs, ids, answers, steer=None):
    """Both models give the same logits, and greedy decoding followed them on both sides.

    Random weights leave near-ties, which bf16 may break either way, so the answers themselves need not be the same.
    """
    for answer in answers:
        text = torch.cat((ids, torch.tensor([answer])), dim=1)
        # the logits that chose the answer's tokens
        before = slice(ids.shape[1] - 1, -1)
        mine = ours.logits(ours.hidden(text, steer=steer)[0, before]).float()
        other = theirs(text, use_cache=False).logits[0, before].float()
        same_logits(mine, other)
        chosen = other.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (other.amax(1) - chosen).max() < TOLERANCE * other.abs().max(), "not a greedy answer"


def same_logits(mine, other):
    assert (mine - other).abs().max() < TOLERANCE * other.abs().max()


@pytest.mark.parametrize("competitor", ["transformers bf16", "transformers fp32", "torch.compile bf16"])
def test_decode(results, benchmark, models, competitor):
    ours, theirs = models
    ids = tokens(PROMPT)
    theirs, options = prepared(theirs, competitor, static=True)
    agree(ours, theirs, ids, (decode(ours, ids), decode_hf(theirs, ids, **options)))
    result = compare(lambda: decode(ours, ids), lambda: decode_hf(theirs, ids, **options), rounds=3)
    row = results.add("E1 decode", **fields(1, competitor, result, 1 / 1.5, NEW))
    record(benchmark, row, lambda: decode(ours, ids))


@pytest.mark.parametrize("competitor", ["transformers bf16", "transformers fp32", "torch.compile bf16"])
def test_prefill(results, benchmark, models, competitor):
    ours, theirs = models
    ids = tokens(PREFILL)
    theirs, _ = prepared(theirs, competitor)

    def mine():
        return ours.logits(ours.hidden(ids)[:, -1])

    def other():
        return theirs(ids, use_cache=False, logits_to_keep=1).logits[:, -1]

    same_logits(mine().float(), other().float())
    result = compare(mine, other, rounds=5)
    row = results.add("E2 prefill", **fields(PREFILL, competitor, result, 1 / 3, PREFILL))
    record(benchmark, row, mine)


def prepared(theirs, competitor, static=False):
    """The competitor's model, and options of its generate()."""
    if competitor != "transformers bf16" and "CNA_BENCH_SETTING" in os.environ:
        pytest.skip("measured on the machine as it is")
    if competitor.endswith("fp32"):
        return in_fp32(theirs), {}
    if competitor.startswith("torch.compile"):
        torch._dynamo.reset()
        compiled = type(theirs)(theirs.config).to("meta")
        compiled.load_state_dict(theirs.state_dict(), assign=True)
        compiled.tie_weights()
        compiled.model.rotary_emb = theirs.model.rotary_emb
        compiled.generation_config = theirs.generation_config
        compiled.eval().forward = torch.compile(compiled.forward)
        return compiled, dict(cache_implementation="static") if static else {}
    return theirs, {}


_wide = []


def in_fp32(theirs):
    """A copy of the model in fp32, made once."""
    if not _wide:
        wide = type(theirs)(theirs.config).eval()
        wide.load_state_dict({name: part.float() for name, part in theirs.state_dict().items()}, assign=True)
        wide.tie_weights()
        _wide.append(wide)
    return _wide[0]


def hooked(theirs, hook):
    return [layer.mlp.down_proj.register_forward_pre_hook(hook(n)) for n, layer in enumerate(theirs.model.layers)]


def test_discovery(results, benchmark, models):
    """64 prompts of 8 to 64 tokens: contrast and the top 0.1%, against one prompt at a time with hooks."""
    ours, theirs = models
    _wide.clear()
    lengths = torch.randint(8, 65, (64,), generator=torch.Generator().manual_seed(5)).tolist()
    prompts = [TokenPrompt(tokens(n, seed)[0].tolist(), f"prompt {seed}") for seed, n in enumerate(lengths)]
    positive, negative = prompts[:32], prompts[32:]

    sides = torch.tensor([[1.0, 0.0]] * 32 + [[0.0, 1.0]] * 32)
    n_layers, n_neurons = SHAPE["num_hidden_layers"], SHAPE["intermediate_size"]
    k = select.k_from_fraction(0.001, n_layers, n_neurons)

    def mine():
        sums = ActivationSums(n_layers, n_neurons, 2)
        collect(ours, prompts, sides, sums)
        return select.top_neurons(select.contrast(sums).abs(), k)

    def with_hooks():
        caught = []

        def catch(_):
            return lambda _, arguments: caught.append(arguments[0][0, -1].float())

        handles = hooked(theirs, catch)
        means = []
        for side in (positive, negative):
            total = 0
            for prompt in side:
                caught.clear()
                theirs(torch.tensor([prompt.ids]), use_cache=False)
                total = total + torch.stack(caught)
            means.append(total / len(side))
        for handle in handles:
            handle.remove()
        size = (means[0] - means[1]).abs().flatten()
        return size.sort(descending=True, stable=True).indices

    found, order = set(mine()), with_hooks()
    common = len(found & {divmod(place, n_neurons) for place in order[:k].tolist()}) / k
    assert common > 0.9, f"{common:.0%} of the neurons are the same"  # bf16 rounds the two forward passes differently
    result = compare(mine, with_hooks, rounds=3)
    row = results.add(
        "E3 discovery of 64 prompts",
        same_neurons=round(common, 3),
        **fields("8-64", "transformers + hooks bf16", result, 1 / 4, 64),
    )
    record(benchmark, row, mine)


def test_steered_decode(results, benchmark, models):
    ours, theirs = models
    ids, n_neurons = tokens(PROMPT), SHAPE["intermediate_size"]
    members = [list(range(layer, n_neurons, 1000)) for layer in range(SHAPE["num_hidden_layers"])]
    steer = ablation(members, n_neurons)

    def multiply(layer):
        def apply(_, arguments):
            act = arguments[0].clone()
            act[..., members[layer]] *= 0.0
            return (act,)

        return apply

    def with_hooks():
        handles = hooked(theirs, multiply)
        answer = decode_hf(theirs, ids)
        for handle in handles:
            handle.remove()
        return answer

    answers = decode(ours, ids, steer), with_hooks()
    handles = hooked(theirs, multiply)
    agree(ours, theirs, ids, answers, steer)
    for handle in handles:
        handle.remove()
    result = compare(lambda: decode(ours, ids, steer), with_hooks, rounds=3)
    row = results.add("E4 steered decode", **fields(1, "transformers + hooks bf16", result, 1 / 1.5, NEW))
    record(benchmark, row, lambda: decode(ours, ids, steer))


def ablation(members, n_neurons):
    """The Steering that multiplies these neurons of each layer by 0."""
    neurons = tuple((layer, neuron, 1.0) for layer, chosen in enumerate(members) for neuron in chosen)
    circuit = Circuit(neurons=neurons, n_layers=len(members), n_neurons=n_neurons)
    table = SteeringTable([circuit], [0.0], len(members), n_neurons, device="cpu")
    return Steering(table, torch.zeros(1, dtype=torch.int32))


def fields(m, competitor, result, target, count):
    """The fields that all rows of this file have. Tokens (or prompts) a second on both sides are for orientation."""
    return dict(
        shape=NAME,
        m=m,
        dtype="bfloat16",
        competitor=competitor,
        result=result,
        target=None if competitor == "transformers fp32" else round(target, 4),
        per_s=round(count / result["ours"], 2),
        competitor_per_s=round(count / result["theirs"], 2),
    )


def record(benchmark, row, ours):
    benchmark.extra_info.update(row)
    benchmark.pedantic(ours, rounds=1)
