"""The engine on a transformers model: find a circuit, and steer some rows of one batch.

    python examples/attach_transformers.py [MODEL]

MODEL is a directory in Hugging Face layout; default the bundled model, for which the prompts here are made.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cna_kernels import attach
from cna_kernels.model import demo_checkpoint
from cna_kernels.model.demo import world

directory = sys.argv[1] if len(sys.argv) > 1 else demo_checkpoint("instruct")
tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def encode(prompts):
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )


engine = attach(model)

# Sums of the last prompt token of both sets: column 0 shows the behaviour, column 1 does not.
refused, answered = world.discovery_positive(), world.discovery_negative()
token_weight = torch.tensor([[1.0, 0.0]] * len(refused) + [[0.0, 1.0]] * len(answered))
with torch.inference_mode(), engine.collect(token_weight) as sums:
    model(**encode(refused + answered), logits_to_keep=1)
circuit = engine.select(sums, score="magnitude", fraction=0.002)

# One batch, four settings of the same prompt: plain, ablated, halved, and random neurons of the same layers ablated.
prompt = world.heldout_refusable()[0]
engine.set([circuit, circuit, circuit.random_like(seed=0)], [0.0, 0.5, 0.0])
engine.rows([-1, 0, 1, 2])
batch = encode([prompt] * 4)
answers = model.generate(**batch, max_new_tokens=60, do_sample=False)[:, batch["input_ids"].shape[1] :]
print(f"{circuit.k} neurons; {prompt}")
for name, answer in zip(("plain", "m = 0", "m = 0.5", "random"), answers, strict=True):
    print(f"{name:8}", tokenizer.decode(answer, skip_special_tokens=True))

engine.detach()
