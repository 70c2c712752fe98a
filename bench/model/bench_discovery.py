"""Discovery and steered generation on the bundled model, against transformers with forward hooks.

Ratios of interleaved runs; both sides must agree first.
"""

import pytest
import torch

from cna_kernels.model import demo_checkpoint, load
from cna_kernels.model.demo import world
from interleave import compare

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def models():
    directory = demo_checkpoint("instruct")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return load(directory, device="cpu", dtype="float32"), theirs


def hooked_contrast(theirs, positive, negative):
    """Mean input of every down_proj at the last token, one prompt at a time, as published code does it."""
    caught = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, arguments: caught.append(arguments[0][0, -1].clone()))
        for layer in theirs.model.layers
    ]

    def mean(rows):
        total = 0
        for ids in rows:
            caught.clear()
            theirs(torch.tensor([ids]), use_cache=False)
            total = total + torch.stack(caught)
        return total / len(rows)

    with torch.no_grad():
        delta = mean(positive) - mean(negative)
    for handle in handles:
        handle.remove()
    return delta


def test_discovery(models, benchmark, results):
    ours, theirs = models
    positive, negative = world.discovery_positive(), world.discovery_negative()
    rows = [ours.tokenizer.encode_chat(prompts) for prompts in (positive, negative)]

    def discover():
        return ours.discover(positive, negative, fraction=0.001, universal_prompts=False)

    order = hooked_contrast(theirs, *rows).abs().flatten().sort(descending=True, stable=True).indices
    n_neurons = ours.config.intermediate_size
    assert discover().pairs == [divmod(place, n_neurons) for place in order[: discover().k].tolist()]

    result = compare(discover, lambda: hooked_contrast(theirs, *rows))
    report(benchmark, results, discover, "G1 discovery", 200, result)


def test_generation(models, benchmark, results):
    ours, theirs = models
    prompts = world.heldout_refusable()[:32]
    circuit = ours.discover(world.discovery_positive(), world.discovery_negative())
    tokenizer_rows = ours.tokenizer.encode_chat(prompts)
    members = circuit.by_layer()

    def scale(layer):
        def multiply(_, arguments):
            act = arguments[0].clone()
            act[..., members.get(layer, [])] *= 0.0
            return (act,)

        return multiply

    def hooked():
        handles = [
            block.mlp.down_proj.register_forward_pre_hook(scale(layer))
            for layer, block in enumerate(theirs.model.layers)
        ]
        answers = []
        for ids in tokenizer_rows:
            ids = torch.tensor([ids])
            tokens = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, do_sample=False,
                eos_token_id=list(ours.stop_ids), pad_token_id=0,
            )  # fmt: skip
            answers.append(ours.tokenizer.decode(tokens[0, ids.shape[1] :].tolist()))
        for handle in handles:
            handle.remove()
        return answers

    def steered():
        return ours.generate(prompts, circuit=circuit, multiplier=0.0, max_new_tokens=100)

    assert steered() == hooked()
    report(benchmark, results, steered, "G2 ablated answers", 32, compare(steered, hooked, rounds=3))


def report(benchmark, results, run, name, n_prompts, result):
    benchmark.extra_info.update(result)
    benchmark.pedantic(run, rounds=3)
    results.add(
        name, shape="bundled instruct model", m=f"{n_prompts} prompts", dtype="float32",
        competitor="transformers + hooks, one at a time", result=result,
    )  # fmt: skip
