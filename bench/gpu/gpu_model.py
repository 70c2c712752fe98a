"""A random transformers model of a real size, made on the device: what steering costs a step of decoding.

B1 compares it with the plain model, B2 with hooks that steer alike. Both are measured eager, where the host may decide
the time, and in a CUDA graph of the whole step, where it cannot. All three models share their weights.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
import traceback

import torch

from cna_kernels import Circuit, attach
from gpu_device import brief

SHAPES = {  # layers, heads, key and value heads, vocabulary
    "Llama-3.1-8B": (32, 32, 8, 128_256),
    "Llama-3.2-1B": (16, 32, 8, 128_256),
}
PROMPT, STEPS, ROUNDS = 32, 3, 15  # tokens of a prompt; steps of one sample; samples
CACHE = PROMPT + 64


def make_model(bench, model):
    """(the model with an engine, the plain model with the same weights, the engine, a circuit)"""
    import transformers

    H, N = bench.shape(model)
    layers, heads, kv_heads, vocabulary = SHAPES[model]
    if bench.mode == "dry":
        layers, heads, kv_heads, vocabulary = 2, 4, 2, 99
    if bench.once:
        layers = 1  # one layer launches the same kernels
    config = transformers.LlamaConfig(
        hidden_size=H, intermediate_size=N, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(bench.device):
            plain = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    steered = copy.deepcopy(plain, {id(x): x for x in [*plain.parameters(), *plain.buffers()]})
    engine = attach(steered, backend="triton")
    return steered, plain, engine, realistic_circuit(layers, N)


def realistic_circuit(n_layers, N):
    """0.1% of the neurons, 90% of them in the last quarter of the layers."""
    rng, total = random.Random(0), max(1, n_layers * N // 1000)
    first_late = n_layers - max(1, n_layers // 4)
    where = lambda layers, k: rng.sample([(layer, n) for layer in layers for n in range(N)], k)  # noqa: E731
    n_early = round(0.1 * total) if first_late else 0
    chosen = where(range(first_late, n_layers), total - n_early) + where(range(first_late), n_early)
    return Circuit(tuple((*place, 1.0) for place in sorted(chosen)), n_layers, N)


class Step:
    """One step of decoding on a static cache, as a user's program would call it."""

    def __init__(self, model, ids):
        import transformers

        self.model, self.last = model, ids[:, -1:].contiguous()
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=CACHE)
        self.position = torch.full_like(self.last, PROMPT)
        model(ids, past_key_values=self.cache, logits_to_keep=1)

    def __call__(self):
        out = self.model(self.last, past_key_values=self.cache, position_ids=self.position)
        return out.logits

    def rewind(self):
        """Empty the cache: every step takes a place in it, and it must not fill up."""
        self.cache.reset()


def hook_on(plain, circuit, multiplier, device):
    for layer, members in circuit.by_layer().items():
        index = torch.tensor(list(members), device=device)

        def scale(_, arguments, index=index):
            arguments[0][..., index] *= multiplier

        plain.model.layers[layer].mlp.down_proj.register_forward_pre_hook(scale)


def generate(bench, model, n_rows):
    """B1 and B2 at ``n_rows`` sequences."""
    if "model" not in bench.kept:
        bench.forget()
        steered, plain, engine, circuit = made = make_model(bench, model)
        hooked = copy.deepcopy(plain, {id(x): x for x in [*plain.parameters(), *plain.buffers()]})
        hook_on(hooked, circuit, 9.0, bench.device)
        bench.kept["model"] = *made, hooked
    steered, plain, engine, circuit, hooked = bench.kept["model"]
    if bench.mode == "dry":
        n_rows = min(n_rows, 2)
    engine.set([circuit], [9.0])  # far from 1, so that steering shows above the rounding of bf16
    engine.rows([0] * n_rows)
    ids = torch.randint(3, steered.config.vocab_size, (n_rows, PROMPT), device=bench.device)
    with torch.no_grad():
        steps = {"steered": Step(steered, ids), "plain": Step(plain, ids), "hooks": Step(hooked, ids)}
        if bench.once:
            steps["steered"]()
            return
        yield same_answers(model, n_rows, {name: step().float() for name, step in steps.items()})
        yield from compare(bench, model, n_rows, "eager", {name: (step, step.rewind) for name, step in steps.items()})
        captured = {}
        for name, step in steps.items():
            try:
                captured[name] = (capture(bench, step), step.rewind)
            except Exception as error:
                traceback.print_exc()
                yield dict(row="B1 graph", model=model, T=n_rows, ours=name, note=brief(error))
                bench.synchronize()
        yield from compare(bench, model, n_rows, "graph", captured)


def same_answers(model, n_rows, logits):
    """A row: whether the steered model's logits are near the hooked model's, and far from the plain model's."""
    scale = logits["plain"].abs().max()
    near = ((logits["steered"] - logits["hooks"]).abs().max() / scale).item()
    far = ((logits["steered"] - logits["plain"]).abs().max() / scale).item()
    note = f"differs from hooks by {near:.1e}, from the plain model by {far:.1e}"
    return dict(row="B same", model=model, T=n_rows, ours="steered", theirs="hooks", ok=near < far / 3, note=note)


def capture(bench, step):
    """A function that replays one step from a CUDA graph; on a CPU the step itself."""
    step.rewind()
    if bench.mode == "dry":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def compare(bench, model, n_rows, how, runs):
    """runs: name -> (one step, its rewind). Yield rows of the steered model against each of the other models."""
    rounds, steps = (1, 1) if bench.mode == "dry" else (ROUNDS, STEPS)
    took = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (step, rewind) in runs.items():
            rewind()
            step()
            bench.synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                step()
            bench.synchronize()
            took[name].append((time.perf_counter() - start) / steps)
    for id, theirs in (("B1", "plain"), ("B2", "hooks")):
        if "steered" in took and theirs in took:
            ratios = sorted(a / b for a, b in zip(took["steered"], took[theirs], strict=True))
            ours_us, theirs_us = (1e6 * statistics.median(took[name]) for name in ("steered", theirs))
            row = dict(row=f"{id} {how}", model=model, T=n_rows, ours="steered", theirs=theirs)
            row |= dict(ratio=statistics.median(ratios), low=ratios[rounds // 5], high=ratios[-1 - rounds // 5])
            yield row | dict(ours_us=ours_us, theirs_us=theirs_us, note=f"{1e6 / ours_us * n_rows:.0f} tokens/s")
