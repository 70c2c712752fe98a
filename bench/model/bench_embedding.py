"""The engine attached to a transformers model, on a random Llama-shaped checkpoint of about 100M parameters.

B1: steered generation against the plain model. B2: against hooks that steer alike, and what B2 would be if MLPs took no
time. B3: 64 circuits, one for each row, against one circuit. B4: 100 circuits that no row uses, against no circuits.
B5: a forward pass with sums against hooks that sum alike. B6: one compiled decoding step, attached against plain. Both
sides share their weights. All answers have the same length. CNA_BENCH_DEVICE=cuda runs the rows on a GPU, B6 in a CUDA
graph.
"""

import copy
import os
import random

import pytest
import torch

from bench_attribution import SHAPE
from cna_kernels import Circuit, attach
from interleave import compare, compare_all

transformers = pytest.importorskip("transformers")
DEVICE = os.environ.get("CNA_BENCH_DEVICE", "cpu")
N_TOKENS, NEW_TOKENS = 32, 24
ROUNDS = int(os.environ.get("CNA_BENCH_ROUNDS", 7))
NAME = "Llama-shaped, 125M"
DTYPES = ["float32", "bfloat16"]


def twins(dtype):
    """Two models that share their weights in memory."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE)
    model = transformers.LlamaForCausalLM(config).to(DEVICE, getattr(torch, dtype)).eval()
    return model, copy.deepcopy(model, {id(x): x for x in [*model.parameters(), *model.buffers()]})


@pytest.fixture(scope="module", params=DTYPES)
def models(request):
    """(dtype, the model with an engine, the plain model, the engine)."""
    ours, plain = twins(request.param)
    engine = attach(ours, max_circuits=128)
    return request.param, ours, plain, engine


def random_circuit(engine, seed):
    """A circuit of 0.1% of the neurons, drawn at random."""
    n = engine.n_layers * engine.n_neurons
    chosen = sorted(random.Random(seed).sample(range(n), n // 1000))
    return Circuit(tuple((*divmod(i, engine.n_neurons), 1.0) for i in chosen), engine.n_layers, engine.n_neurons)


def prompts(n_rows, n_tokens=N_TOKENS):
    generator = torch.Generator().manual_seed(n_rows)
    return torch.randint(3, SHAPE["vocab_size"], (n_rows, n_tokens), generator=generator).to(DEVICE)


def generate(model, ids):
    done = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return done


@torch.inference_mode()
def logits_of(model, ids):
    return model(ids).logits.float()


def hook_steering(plain, circuit, multiplier):
    """Register hooks that multiply a circuit's neurons in place; return a function that removes the hooks."""
    handles = []
    for layer, members in circuit.by_layer().items():
        index = torch.tensor(members, device=DEVICE)

        def scale(_, arguments, index=index):
            arguments[0][..., index] *= multiplier

        handles.append(plain.model.layers[layer].mlp.down_proj.register_forward_pre_hook(scale))
    return lambda: [handle.remove() for handle in handles]


def with_hooks(put_on, run):
    take_off = put_on()
    try:
        return run()
    finally:
        take_off()


def without_mlps(plain, run):
    """Call ``run`` while every MLP returns its input, to time all parts of the model but the MLPs."""
    mlps = [layer.mlp for layer in plain.model.layers]
    for mlp in mlps:
        mlp.forward = lambda x: x
    try:
        return run()
    finally:
        for mlp in mlps:
            del mlp.forward


def assert_same(ours, theirs, unlike):
    """``ours`` equals ``theirs`` up to rounding, and differs much more from ``unlike``, which is not steered."""
    scale = unlike.abs().max()
    near, far = (ours - theirs).abs().max() / scale, (ours - unlike).abs().max() / scale
    assert near < 0.05 and near < far / 3, (near, far)


def add(embedding, benchmark, id, dtype, rows, competitor, result, target, **more):
    row = embedding.add(
        id, shape=NAME, m=rows, dtype=dtype, competitor=competitor, result=result, target=target,
        ms=round(1e3 * result["ours"], 1), competitor_ms=round(1e3 * result["theirs"], 1), **more,
    )  # fmt: skip
    benchmark.extra_info[f"{id} {competitor}"] = row
    if len(benchmark.extra_info) == 1:
        benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("n_rows", [1, 8, 32])
def test_generation(embedding, benchmark, models, n_rows):
    dtype, ours, plain, engine = models
    circuit, ids = random_circuit(engine, 0), prompts(n_rows)
    engine.set([circuit], [0.0])
    engine.rows(0)
    unlike = logits_of(plain, ids)
    theirs = with_hooks(lambda: hook_steering(plain, circuit, 0.0), lambda: logits_of(plain, ids))
    assert_same(logits_of(ours, ids), theirs, unlike)

    def hooked():
        return with_hooks(lambda: hook_steering(plain, circuit, 0.0), lambda: generate(plain, ids))

    first, second = compare_all(lambda: generate(ours, ids), [lambda: generate(plain, ids), hooked], rounds=ROUNDS)
    if n_rows == 8:
        floor = compare(lambda: without_mlps(plain, lambda: generate(plain, ids)), hooked, rounds=ROUNDS)
        add(embedding, benchmark, "B2 floor", dtype, f"8 x {NEW_TOKENS} tokens", "transformers, hooks", floor, None)
    rows = f"{n_rows} x {NEW_TOKENS} tokens"
    add(embedding, benchmark, "B1 steered", dtype, rows, "transformers, plain", first, 1.0)
    target = round(1 / 1.15, 3) if n_rows == 8 else None
    add(embedding, benchmark, "B2 steered", dtype, rows, "transformers, hooks", second, target)


def test_circuits(embedding, benchmark, models):
    dtype, ours, plain, engine = models
    ids, circuits = prompts(64), [random_circuit(engine, seed) for seed in range(64)]
    engine.set(circuits, 9.0)  # far from 1, so that each row's own circuit shows above bf16's rounding
    engine.rows(range(64))
    got, unlike = logits_of(ours, ids), logits_of(plain, ids)
    for row in (0, 31, 63):
        alone = with_hooks(
            lambda row=row: hook_steering(plain, circuits[row], 9.0),
            lambda row=row: logits_of(plain, ids[row : row + 1]),
        )
        assert_same(got[row : row + 1], alone, unlike[row : row + 1])
    engine.set(circuits, 0.0)

    def run(rows):
        engine.rows(rows)
        generate(ours, ids)

    result = compare(lambda: run(list(range(64))), lambda: run([0] * 64), rounds=ROUNDS)
    rows = f"64 x {NEW_TOKENS} tokens"
    add(embedding, benchmark, "B3 64 circuits", dtype, rows, "one circuit", result, 1.03)


def test_unused_circuits(embedding, benchmark, models):
    """Both models have an engine here; one engine holds no circuit."""
    dtype, ours, other, engine = models
    ids = prompts(8)
    engine.set([random_circuit(engine, seed) for seed in range(100)], 0.0)
    engine.rows(None)
    empty = attach(other, max_circuits=128)
    try:
        result = compare(lambda: generate(ours, ids), lambda: generate(other, ids), rounds=ROUNDS)
    finally:
        empty.detach()
    add(embedding, benchmark, "B4 100 unused", dtype, f"8 x {NEW_TOKENS} tokens", "no circuit", result, 1.01)


def test_sums(embedding, benchmark, models):
    dtype, ours, plain, engine = models
    ids = prompts(8, 128)
    token_weight = torch.zeros(8, 2)
    token_weight[:4, 0] = token_weight[4:, 1] = 1
    engine.rows(None)
    kept = []

    @torch.inference_mode()
    def summed():
        with engine.collect(token_weight) as sums:
            ours(ids, logits_to_keep=1)
        kept[:] = [sums.total[:, :, :]]

    @torch.inference_mode()
    def hooked():
        totals = torch.zeros(engine.n_layers, 2, engine.n_neurons, dtype=torch.float64, device=DEVICE)
        on_device = token_weight.to(DEVICE, torch.float64)

        def put_on():
            handles = []
            for layer, block in enumerate(plain.model.layers):

                def add_up(_, arguments, layer=layer):
                    totals[layer] += on_device.t() @ arguments[0][:, -1].double()

                handles.append(block.mlp.down_proj.register_forward_pre_hook(add_up))
            return lambda: [handle.remove() for handle in handles]

        with_hooks(put_on, lambda: plain(ids, logits_to_keep=1))
        kept.append(totals)

    summed()
    hooked()
    assert (kept[0] - kept[1]).abs().max() < 0.03 * kept[1].abs().max()
    result = compare(summed, hooked, rounds=ROUNDS)
    add(embedding, benchmark, "B5 sums", dtype, "8 x 128 tokens", "transformers, hooks", result, None)


def test_compiled_step(embedding, benchmark):
    """A decoding step of 8 rows in a static cache: on a GPU one CUDA graph, on a CPU compiled by Inductor."""
    dtype = "bfloat16" if DEVICE == "cuda" else "float32"
    ours, plain = twins(dtype)
    engine = attach(ours, max_circuits=128)
    circuit = random_circuit(engine, 0)
    engine.set([circuit], [0.0])
    engine.rows([0] * 8)
    mode = "reduce-overhead" if DEVICE == "cuda" else "default"
    steps = [step_of(model, torch.compile(model, fullgraph=True, dynamic=False, mode=mode)) for model in (ours, plain)]
    got, unlike = (step().float().clone() for step in steps)
    theirs = with_hooks(lambda: hook_steering(plain, circuit, 0.0), lambda: step_of(plain, plain)().float())
    assert_same(got, theirs, unlike)
    result = compare(*(lambda step=step: [step() for _ in range(20)] for step in steps), rounds=ROUNDS)
    add(embedding, benchmark, "B6 compiled step", dtype, "8 x 1 token", "transformers, compiled", result, 1.0)


def step_of(model, run):
    """One decoding step of ``run`` on a cache that ``model`` has filled."""
    ids = prompts(8)
    cache = transformers.StaticCache(config=model.config, max_cache_len=512)  # each step takes a place
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    position = torch.full((8, 1), N_TOKENS, device=DEVICE)

    @torch.inference_mode()
    def step():
        logits = run(ids[:, -1:], past_key_values=cache, position_ids=position).logits
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return logits

    return step
