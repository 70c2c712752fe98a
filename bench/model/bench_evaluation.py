"""A sweep over six multipliers: on the bundled model, and on a random Llama-shaped checkpoint of about 100M parameters.

V1: the sweep against as many unsteered answers of our own model. V2: against transformers with hooks, one prompt at a
time. All answers have the same length: none ends early. The competitor of V2 answers every twentieth prompt; times are
per answer. CNA_BENCH_PROMPTS=10 makes the run short, to try the file out.
"""

import os
import random
import shutil

import pytest
import torch

from bench_attribution import SHAPE
from cna_kernels import Circuit
from cna_kernels.model import demo_checkpoint, load
from cna_kernels.model.demo import world
from cna_kernels.model.evaluation.answers import answer_all, auto_batch
from cna_kernels.model.evaluation.interventions import UNSTEERED, Interventions, Method, Variant
from cna_kernels.model.evaluation.store import Store
from cna_kernels.model.evaluation.suite import MULTIPLIERS
from cna_kernels.model.prompts.files import PromptSet
from interleave import compare

transformers = pytest.importorskip("transformers")
N_PROMPTS, STEP = int(os.environ.get("CNA_BENCH_PROMPTS", 100)), 20
NEW_TOKENS = {"bundled instruct model": 40, "Llama-shaped, 125M": 24}


def large(directory):
    """The directory of a random checkpoint with the bundled model's tokenizer."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_checkpoint("instruct") / name, directory / name)
    return directory


@pytest.fixture(scope="module", params=list(NEW_TOKENS))
def models(request, tmp_path_factory):
    """(name, ours, theirs, a circuit of 0.1% of the neurons)."""
    bundled = request.param.startswith("bundled")
    directory = demo_checkpoint("instruct") if bundled else large(tmp_path_factory.mktemp("checkpoint"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = load(directory, device="cpu", dtype="float32")
    ours.stop_ids = frozenset()
    n_layers, n_neurons = ours.config.num_hidden_layers, ours.config.intermediate_size
    chosen = sorted(random.Random(0).sample(range(n_layers * n_neurons), n_layers * n_neurons // 1000))
    return (
        request.param,
        ours,
        theirs,
        Circuit(tuple((*divmod(n, n_neurons), 1.0) for n in chosen), n_layers, n_neurons),
    )


def answers(model, variants, prompts, n_tokens):
    numbers = list(range(len(variants)))
    batch = auto_batch(model, max(len(prompt.ids) for prompt in prompts), n_tokens)
    with Store(None, {}) as store:
        return answer_all(
            model, Interventions(model, variants), numbers, prompts, max_new_tokens=n_tokens, batch=batch, store=store,
            name="answers",
        )  # fmt: skip


def hooked(theirs, circuit, prompts, n_tokens):
    """The answers of transformers, one at a time, with a hook on every down_proj that has a neuron of the circuit."""
    found = []
    for multiplier in MULTIPLIERS:
        handles = []
        for layer, members in circuit.by_layer().items() if multiplier != 1 else ():

            def scale(_, arguments, members=members, multiplier=multiplier):
                act = arguments[0].clone()
                act[..., members] *= multiplier
                return (act,)

            handles.append(theirs.model.layers[layer].mlp.down_proj.register_forward_pre_hook(scale))
        for prompt in prompts:
            ids = torch.tensor([prompt.ids])
            tokens = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, min_new_tokens=n_tokens,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            found.append(tokens[0, ids.shape[1] :].tolist())
        for handle in handles:
            handle.remove()
    return found


def test_sweep(evaluation, benchmark, models):
    name, ours, theirs, circuit = models
    n_tokens = NEW_TOKENS[name]
    method = Method("circuit", "", circuit)
    variants = [UNSTEERED if m == 1 else Variant(method, m) for m in MULTIPLIERS]
    texts = world.heldout_refusable()[:N_PROMPTS]
    prompts = ours.encode(PromptSet.of(texts, "heldout"))
    some = prompts[::STEP]

    def sweep():
        return answers(ours, variants, prompts, n_tokens)

    def plain():
        return answers(ours, [UNSTEERED] * len(variants), prompts, n_tokens)

    mine = [list(answer.tokens) for found in answers(ours, variants, some, n_tokens).values() for answer in found]
    assert mine == hooked(theirs, circuit, some, n_tokens)
    n, n_some = len(prompts) * len(variants), len(some) * len(variants)
    add(evaluation, benchmark, "V1 sweep", name, "as many plain answers", compare(sweep, plain, rounds=2), n, n, 1.25)
    result = compare(sweep, lambda: hooked(theirs, circuit, some, n_tokens), rounds=2)
    add(evaluation, benchmark, "V2 sweep", name, "transformers + hooks, one at a time", result, n, n_some, 1 / 3)


def add(evaluation, benchmark, id, name, competitor, result, n, n_theirs, target):
    result = result | {"ours": result["ours"] / n, "theirs": result["theirs"] / n_theirs}
    result["ratio"] *= n_theirs / n
    row = evaluation.add(
        id, shape=name, m=f"{N_PROMPTS} prompts x {len(MULTIPLIERS)} multipliers", dtype="float32",
        competitor=competitor, result=result, target=target, answers_per_s=round(1 / result["ours"], 2),
        competitor_answers_per_s=round(1 / result["theirs"], 2),
    )  # fmt: skip
    benchmark.extra_info[competitor] = row
    if len(benchmark.extra_info) == 1:
        benchmark.pedantic(lambda: None, rounds=1)
