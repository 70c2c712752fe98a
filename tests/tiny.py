"""Tiny random checkpoints of every family, written by transformers itself; prompts and questions for them."""

import csv
import json
import random
from pathlib import Path

import pytest
import torch

from cna_kernels import plans

SHAPE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip

LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16,
    rope_theta=10000.0,
)  # fmt: skip

# name: (transformers class stem, changes to SHAPE)
VARIANTS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama-bias": ("Llama", dict(attention_bias=True)),
    "llama-mlp-bias": ("Llama", dict(mlp_bias=True)),
    "llama-head-dim": ("Llama", dict(head_dim=12)),
    "llama-mha": ("Llama", dict(num_key_value_heads=4)),
    "llama-rope-llama3": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama-rope-linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0))),
    # 16 positions, fewer than the 20 tokens of the tests
    "llama-rope-dynamic": (
        "Llama",
        dict(rope_parameters=dict(rope_type="dynamic", factor=8.0, rope_theta=10000.0), max_position_embeddings=16),
    ),
    "mistral": ("Mistral", dict(sliding_window=7)),
    "mistral-full": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2-sliding": ("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3-tied": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
}


def write_checkpoint(variant, directory, *, dtype=torch.float32, max_shard_size="1GB", seed=2, **changes):
    """Write a random checkpoint of the variant in Hugging Face layout; return the transformers model."""
    import transformers

    stem, of_variant = VARIANTS[variant]
    config = getattr(transformers, f"{stem}Config")(**(SHAPE | of_variant | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{stem}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # norms and biases start as constants, which would hide a swap of two of them
            spread = 0.2 if parameter.dim() == 1 else 0.15
            if config.tie_word_embeddings and name.endswith(("o_proj.weight", "down_proj.weight")):
                spread = 0.6  # layers that add little make a tied model repeat its last token for ever
            offset = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.normal_(offset, spread)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<user>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# A judge of answers, a program that gives each this score: JUDGE % "1".
JUDGE = "import json,sys\nfor line in sys.stdin:\n r=json.loads(line)\n print(json.dumps({'id':r['id'],'score':%s}))\n"
# A multiple-choice task of lm-evaluation-harness, over the lines of a file in the place of DATA.
CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no", "who knows"]
doc_to_target: right
metric_list: [{metric: acc}]
"""
SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "<end>"]
TEXT_VOCABULARY = 256 + len(SPECIAL)


def write_text_files(directory, *, adds_bos=True):
    """Write a byte-level tokenizer with a chat template; every byte is one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    directory = Path(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    record = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(record))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))


def set_field(directory, **changes):
    """Change fields of a checkpoint's tokenizer_config.json."""
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_language_model(directory, variant="llama", **changes):
    """Write a random checkpoint with text files, ready for ``cna_kernels.model.load``."""
    write_checkpoint(variant, directory, **({"vocab_size": TEXT_VOCABULARY} | changes))
    write_text_files(directory)
    return directory


def write_mmlu(directory, subjects=("abstract_algebra", "virology"), n=6):
    """Write files in the layout of the MMLU distribution: no header, answers as letters."""
    for split in ("test", "dev"):
        (directory / split).mkdir(parents=True, exist_ok=True)
        for number, subject in enumerate(subjects):
            rows = [
                [f"{subject[:3]} {split} {i}?", *(f"{i + c}, yes" for c in range(4)), "ABCD"[(i + number) % 4]]
                for i in range(n if split == "test" else 2)
            ]
            with open(directory / split / f"{subject}_{split}.csv", "w", newline="") as file:
                csv.writer(file).writerows(rows)
    return directory


def ragged(n, header=(), seed=0, longest=20):
    """n random prompts of 1 to ``longest`` tokens after a header."""
    draw = random.Random(seed)
    return [
        [*header, *(draw.randrange(3, SHAPE["vocab_size"]) for _ in range(draw.randint(1, longest)))] for _ in range(n)
    ]


def random_prompts(n, seed):
    """n random prompts of 2 to 13 tokens."""
    from cna_kernels.model.discovery.packing import TokenPrompt

    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 14, (n,), generator=generator).tolist()
    return [
        TokenPrompt(torch.randint(3, 97, (length,), generator=generator).tolist(), f"prompt {number}")
        for number, length in enumerate(lengths)
    ]


def assert_model_agrees_with_reference(backend, monkeypatch, directory, device="cpu"):
    """Discovery and steered decoding of a tiny checkpoint: the backend against the definition."""
    pytest.importorskip("transformers")
    load = pytest.importorskip("cna_kernels.model").load
    model = load(write_language_model(directory), device=device, dtype="float32")
    found = {}
    for name in ("reference", backend):
        monkeypatch.setenv("CNA_BACKEND", name)
        plans.forget()
        circuit = model.discover(
            positive=["open it", "why"], negative=["yes", "no no"], top_k=6, universal_prompts=False
        )
        answers = [model.generate("go on", circuit=circuit, multiplier=m, max_new_tokens=3) for m in (1.0, 0.0, 4.0)]
        found[name] = circuit, answers
    (expected, expected_answers), (circuit, answers) = found["reference"], found[backend]
    assert [n[:2] for n in circuit.neurons] == [n[:2] for n in expected.neurons]
    assert [n[2] for n in circuit.neurons] == pytest.approx([n[2] for n in expected.neurons], rel=1e-4)
    assert answers == expected_answers
