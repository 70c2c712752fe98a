"""A real model, SmolLM2-135M-Instruct, the way the public CNA code goes: transformers, eager attention, a hook on every
down_proj, one prompt at a time.

R1: discovery with 60 prompts. R2: 32 answers of at most 16 tokens with a circuit ablated. Both sides read the same
file, dequantised. In fp32 the 200 neurons of the largest contrast, and the answers, are compared first; in bf16 two
forward passes round differently, and the answers fork.
"""

from functools import partial

import pytest
import torch

from cna_kernels.model import demo_checkpoint, load
from cna_kernels.model.evaluation.behaviour import Behaviour
from cna_kernels.model.prompts.files import PromptSet, harmless_prompts
from interleave import compare

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
N_PROMPTS, N_ANSWERS, NEW_TOKENS, TOP = 60, 32, 16, 200


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def models(request):
    """(dtype, our model, transformers' model, its tokenizer)."""
    path = demo_checkpoint("smollm2")
    dtype = getattr(torch, request.param)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, attn_implementation="eager"
    )
    assert type(theirs.model.layers[0].mlp.down_proj) is torch.nn.Linear, "the weights are not dequantised"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return request.param, load(path, device="cpu", dtype=request.param), theirs.eval(), tokenizer


def encoded(tokenizer, text):
    """``[1, S]``: the tokens of a chat of one message."""
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids


def contrast(theirs, tokenizer, sides):
    """``[L, N]``: mean of the input of down_proj at the last token over one side's prompts, minus the other's."""
    layers, means = theirs.model.layers, []
    for prompts in sides:
        total = [0.0] * len(layers)
        for text in prompts.texts:
            caught: dict[int, torch.Tensor] = {}

            def keep(_, arguments, number, caught=caught):
                caught[number] = arguments[0][0, -1]

            handles = [
                layer.mlp.down_proj.register_forward_pre_hook(partial(keep, number=number))
                for number, layer in enumerate(layers)
            ]
            with torch.inference_mode():
                theirs(encoded(tokenizer, text))
            for handle in handles:
                handle.remove()
            total = [sums + caught[number].float() for number, sums in enumerate(total)]
        means.append(torch.stack(total) / len(prompts))
    return means[0] - means[1]


def answers(theirs, tokenizer, texts, circuit, stop_ids):
    """Each answer's new tokens, with a hook that writes zeros to the circuit's neurons."""
    handles = []
    for layer, members in circuit.by_layer().items():

        def ablate(_, arguments, members=members):
            act = arguments[0].clone()
            act[..., members] = 0
            return (act,)

        handles.append(theirs.model.layers[layer].mlp.down_proj.register_forward_pre_hook(ablate))
    found = []
    for text in texts:
        ids = encoded(tokenizer, text)
        tokens = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
            eos_token_id=[*stop_ids], pad_token_id=0,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        found.append([token for token in tokens if token not in stop_ids])
    for handle in handles:
        handle.remove()
    return found


def test_real_model(real, benchmark, models):
    dtype, ours, theirs, tokenizer = models
    behaviour = Behaviour.bundled("refusal")
    sides = behaviour.positive, behaviour.negative
    assert sum(map(len, sides)) == N_PROMPTS

    def discover(top_k=None):
        return ours.discover(*sides, top_k=top_k, universal_prompts=False)

    circuit = discover()
    asked = PromptSet.of([*behaviour.prompts.texts, *harmless_prompts().texts][:N_ANSWERS], "asked")

    def answer():
        return ours.generate(asked.texts, circuit=circuit, multiplier=0.0, max_new_tokens=NEW_TOKENS, batch=N_ANSWERS)

    if dtype == "float32":
        theirs_first = (
            contrast(theirs, tokenizer, sides).abs().flatten().sort(descending=True, stable=True).indices[:TOP]
        )
        n_neurons = ours.config.intermediate_size
        assert [layer * n_neurons + index for layer, index in discover(TOP).pairs] == theirs_first.tolist()
        expected = [
            ours.tokenizer.decode(row) for row in answers(theirs, tokenizer, asked.texts, circuit, ours.stop_ids)
        ]
        assert sum(a == b for a, b in zip(answer(), expected, strict=True)) >= N_ANSWERS - 1, "but for a near-tie"
    shape, rows = "SmolLM2-135M-Instruct", {}
    hooks = "transformers + hooks, one prompt at a time"
    result = compare(discover, lambda: contrast(theirs, tokenizer, sides), rounds=5)
    rows["R1"] = add(real, "R1 discovery", shape, f"{N_PROMPTS} prompts", dtype, hooks, result, 0.10)
    result = compare(answer, lambda: answers(theirs, tokenizer, asked.texts, circuit, ours.stop_ids), rounds=2)
    rows["R2"] = add(real, "R2 answers", shape, f"{N_ANSWERS} answers", dtype, hooks, result, 0.12)
    benchmark.extra_info.update(rows)
    benchmark.pedantic(lambda: None, rounds=1)


def add(real, id, shape, m, dtype, competitor, result, target):
    return real.add(
        id, shape=shape, m=m, dtype=dtype, competitor=competitor, result=result, target=target,
        seconds=round(result["ours"], 3), competitor_seconds=round(result["theirs"], 3),
    )  # fmt: skip
