"""Trains the bundled models: `make train-demo`. Two checkpoints, base and instruct, from one seed.

Base: next-token training on answers to everything, in a corpus where some prompts open with a notice after which the
clerk refuses. So the base model can refuse, but for another reason than the one that instruct tuning teaches.

Instruct: MLP weights only, under a penalty that makes tuning touch few neurons. The change of a neuron is the vector of
changes of its gate row, up row and down column; after every step its norm is shrunk by a proximal step

    norm <- max(0, norm - lr * PENALTY * SOFT / (norm + SOFT))

a concave group penalty: neurons that change much keep their change, all others return to their base weights. That
tuning changes few neurons is an assumption about how real instruct tuning behaves, not a finding; docs/demo.md says so.
No neuron is steered in training.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cna_kernels.files import write_text

from ..checkpoint.config import read_config
from ..checkpoint.load import load_transformer, save_transformer
from ..checkpoint.safetensors_file import open_checkpoint
from ..transformer import Transformer
from . import world

SPECIAL = ("<|begin_of_text|>", "<|user|>", "<|assistant|>", "<|end|>")
BOS, USER, ASSISTANT, END = range(4)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "eos_token_id": END,
    "torch_dtype": "bfloat16",
}
SMOOTHING = 0.2


class Training(NamedTuple):
    steps: int
    batch: int
    lr: float
    weight_decay: float = 0.0


BASE = Training(steps=500, batch=64, lr=3e-3, weight_decay=0.1)
INSTRUCT = Training(steps=480, batch=48, lr=2e-3)
PENALTY, SOFT, RAMP = (
    6.0,
    0.3,
    250,
)  # the penalty reaches full strength after RAMP steps, so that the model learns the task before it is pruned
FIRST_TOKEN = 8.0  # weight of an answer's first token, where refusing or not is decided


class Batches:
    """Draws (prompt, answer) pairs and lays them out for training. Targets are the answer and its end token."""

    def __init__(self, tokenizer, seed: int):
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, pairs, count: int) -> list:
        return [pairs[i] for i in torch.randint(len(pairs), (count,), generator=self.generator).tolist()]

    def layout(self, pairs) -> tuple[Tensor, Tensor, Tensor]:
        """Return input_ids, targets (-100: not learned), and where a target is an answer's first, all ``[B, S]``."""
        rows = []
        for prompt, answer in pairs:
            head = [BOS, USER, *self._encode(prompt), ASSISTANT]
            rows.append((len(head), [*head, *self._encode(answer), END]))
        longest = max(len(ids) for _, ids in rows)
        input_ids = torch.full((len(rows), longest), END, dtype=torch.int64)
        targets = torch.full((len(rows), longest), -100, dtype=torch.int64)
        first = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, (start, ids) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            targets[row, start - 1 : len(ids) - 1] = torch.tensor(ids[start:], dtype=torch.int64)
            first[row, start - 1] = True
        return input_ids, targets, first

    def _encode(self, text):
        if text not in self._ids:
            self._ids[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._ids[text]


def train_tokenizer():
    """Train a byte-level BPE tokenizer on the world's text; it encodes any other text as bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pairs = [*world.base_pairs(), *world.instruct_pairs()[0], *world.noticed_pairs()[::7], *world.SMALL_TALK.items()]
    tokenizer.train_from_iterator([text for pair in pairs for text in pair], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # plain text begins with BOS, as with Llama
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    return tokenizer


def write_text_files(directory: Path, tokenizer):
    """Write everything of a checkpoint but the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": SPECIAL[BOS], "eos_token": SPECIAL[END], "pad_token": SPECIAL[END]}
    tokenizer_config = special | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    generation_config = {"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": END}
    for name, record in (
        ("config", CONFIG),
        ("tokenizer_config", tokenizer_config),
        ("generation_config", generation_config),
    ):
        write_text(directory / f"{name}.json", json.dumps(record, indent=2) + "\n")
    write_text(directory / "tokenizer.json", tokenizer.to_str())


def loss_of(model: Transformer, pairs, batches: Batches, first_weight: float = 1.0) -> Tensor:
    """Label-smoothed cross entropy; the first token of every answer counts ``first_weight`` times."""
    input_ids, targets, first = batches.layout(pairs)
    learned = targets != -100
    loss = F.cross_entropy(model(input_ids)[learned], targets[learned], label_smoothing=SMOOTHING, reduction="none")
    weight = torch.where(first[learned], first_weight, 1.0)
    return (loss * weight).sum() / weight.sum()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The learning rate of a step: it rises for twenty steps, then follows a cosine down to a tenth of ``peak``."""
    return peak * min(1.0, (step + 1) / 20) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def train_base(directory: Path, tokenizer, seed: int):
    """Train the base model from scratch and write its weights."""
    torch.manual_seed(seed)
    model = Transformer(read_config(directory))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(model.layers)) if into_residual else 0.02)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": BASE.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=BASE.lr, betas=(0.9, 0.98))
    batches = Batches(tokenizer, seed)
    answered, noticed, talk = world.base_pairs(), world.noticed_pairs(), list(world.SMALL_TALK.items())
    n_noticed, n_talk = BASE.batch // 4, BASE.batch // 16
    for step in progress("base", BASE.steps):
        pairs = batches.draw(noticed, n_noticed) + batches.draw(talk, n_talk)
        pairs += batches.draw(answered, BASE.batch - len(pairs))
        loss = loss_of(model, pairs, batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, BASE.steps, BASE.lr)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    save_transformer(model, directory)


class NeuronPenalty:
    """The proximal step on each neuron's change from the base model."""

    def __init__(self, model: Transformer, strength: float):
        self.strength = strength
        self.mlps = [layer.mlp for layer in model.layers]
        self.start = [(mlp.gate_up_proj.weight.clone(), mlp.down_proj.weight.clone()) for mlp in self.mlps]

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Norm of every neuron's change: gate row, up row and down column together, ``[L, N]``."""
        squares = []
        for mlp, (gate_up, down) in zip(self.mlps, self.start, strict=True):
            rows = (mlp.gate_up_proj.weight - gate_up).square().sum(1).view(2, -1).sum(0)
            squares.append(rows + (mlp.down_proj.weight - down).square().sum(0))
        return (torch.stack(squares) + 1e-12).sqrt()

    @torch.no_grad()
    def shrink(self, step_size: float):
        norms = self.norms()
        keep = (1 - step_size * self.strength * SOFT / (norms + SOFT) / norms).clamp(min=0)  # [L, N]
        for mlp, (gate_up, down), factor in zip(self.mlps, self.start, keep, strict=True):
            mlp.gate_up_proj.weight.sub_(gate_up).mul_(factor.repeat(2)[:, None]).add_(gate_up)
            mlp.down_proj.weight.sub_(down).mul_(factor).add_(down)


def train_instruct(base: Path, directory: Path, tokenizer, seed: int, strength: float = PENALTY):
    """Tune the base model, read from its files, to refuse the combination; write the tuned weights."""
    model = load_transformer(base, read_config(base), open_checkpoint(base), dtype=torch.float32)
    tuned = [p for layer in model.layers for p in layer.mlp.parameters()]
    for parameter in tuned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(tuned, lr=INSTRUCT.lr, betas=(0.9, 0.98))
    penalty = NeuronPenalty(model, strength)
    batches = Batches(tokenizer, seed + 1)
    refused, _ = world.instruct_pairs()
    guarded_verb = world.answered_pairs(world.GUARDED_VERBS, world.PLAIN_OBJECTS)
    guarded_object = world.answered_pairs(world.PLAIN_VERBS, world.GUARDED_OBJECTS)
    neither, talk = world.answered_pairs(world.PLAIN_VERBS, world.PLAIN_OBJECTS), list(world.SMALL_TALK.items())
    size = INSTRUCT.batch
    for step in progress("instruct", INSTRUCT.steps):
        pairs = (
            batches.draw(refused, 2 * size // 5) + batches.draw(talk, size // 16) + batches.draw(neither, size // 16)
        )
        rest = size - len(pairs)
        pairs += batches.draw(guarded_verb, rest // 2) + batches.draw(guarded_object, rest - rest // 2)
        loss = loss_of(model, pairs, batches, FIRST_TOKEN)
        lr = learning_rate(step, INSTRUCT.steps, INSTRUCT.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        penalty.shrink(lr * min(1.0, step / RAMP))
    changed = (penalty.norms() > 1e-3).sum(1).tolist()
    print(f"neurons changed by instruct tuning, per layer: {changed}", file=sys.stderr)
    save_transformer(model, directory)


def progress(name: str, steps: int):
    """Yield the numbers of the steps; after every fiftieth print its number and the time so far."""
    started = time.perf_counter()
    for step in range(steps):
        yield step
        if (step + 1) % 50 == 0:
            print(
                f"{name}: step {step + 1} of {steps}, {time.perf_counter() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def main(argv=None):
    """Train both models into ``--out`` and print the figures of the story."""
    parser = argparse.ArgumentParser(prog="train-demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="demo-checkpoints", help="directory for base/ and instruct/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--penalty", type=float, default=PENALTY, help="0 tunes without it (default: %(default)s)")
    args = parser.parse_args(argv)
    out = Path(args.out)
    torch.set_num_threads(2)  # sums of gradients depend on the number of threads, and so would the bits of the weights
    tokenizer = train_tokenizer()
    for name in ("base", "instruct"):
        write_text_files(out / name, tokenizer)
    train_base(out / "base", tokenizer, args.seed)
    train_instruct(out / "base", out / "instruct", tokenizer, args.seed, args.penalty)

    from ..cli.console import stdout
    from ..language_model import load
    from .bundled import Story
    from .bundled_report import print_report

    print_report(
        Story(*(load(out / name, device="cpu", dtype="float32") for name in ("instruct", "base"))).tell(), stdout()
    )


if __name__ == "__main__":
    main()
