"""A circuit at a multiplier as LoRA adapters, in the forms that other engines read right.

Multiplying neuron j of a layer by m before ``down_proj`` equals adding ``(m - 1) W_down[:, j] act[j]`` to the output of
``down_proj``. A LoRA adapter on ``down_proj`` does exactly this: its A picks the neurons (rows of the identity), its B
holds ``(m - 1) W_down[:, neurons]``. Source of the LoRA form: E. Hu et al., arXiv 2106.09685.

An engine multiplies a layer's correction by alpha / rank, and engines differ in what they take for the two:

| engine | alpha | rank |
|---|---|---|
| PEFT, vLLM from 0.32 on | ``alpha_pattern``, else ``lora_alpha`` | ``rank_pattern``, else ``r`` |
| llama.cpp | ``lora_alpha`` alone | that of the layer's tensors |
| vLLM before 0.32, SGLang | ``lora_alpha`` alone | ``r`` alone |

The form written by default has no ``alpha_pattern``. Each layer's rank is the largest one divided by a power of two,
padded with zeros, and the ones of its A are divided by the same power: alpha / rank gives it back. This rounds nothing
in any dtype; in B small numbers of fp16 would lose bits. PEFT, llama.cpp and a new vLLM read it alike. The uniform form
has the largest rank in every layer, and all engines read it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from cna_kernels.errors import InputError
from cna_kernels.files import FilePath, make_directory, read_text, write_bytes, write_text
from cna_kernels.renamed import renamed

from .config import DTYPES
from .export import NeuronMultipliers, columns_of, require_finite
from .load import DOWN
from .safetensors_file import Checkpoint

ENGINES = ("peft", "llama.cpp", "vllm", "sglang")
UNIFORM = ("vllm", "sglang")  # read one rank; vLLM from 0.32 on reads several
TOGETHER = ("peft", "llama.cpp")  # can have several adapters active in one request
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values of its --max-lora-rank
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
TAG = "cna-kernels"  # of the cards written here


@renamed(factors="multipliers")
def to_lora(
    checkpoint: Checkpoint,
    config: Any,
    multipliers: NeuronMultipliers,
    out: FilePath,
    *,
    base_model: str = "",
    revision: str | None = None,
    engine: str | None = None,
    max_rank: int | None = None,
    split: bool = False,
    uniform: bool = False,
    dtype: str = "float32",
    about: str = "",
) -> list[Path]:
    """Write a PEFT adapter directory, or several where ``split`` allows several. Return the directories written.

    Args:
        config: ModelConfig, or the HfConfig of a model on transformers.
        multipliers: see :func:`~cna_kernels.model.checkpoint.export.neuron_multipliers`.
        out: the directory to make. Several adapters go to ``out/1``, ``out/2``, ...: all adapters together are the
            circuit.
        base_model: the base model that the adapter records: a path, or a name on the Hub, there of ``revision``.
        engine: one of ENGINES, whose limits the adapter then keeps; None: the form that most engines read.
        max_rank: the largest rank allowed. A layer with more neurons is refused, or with ``split`` divided.
        uniform: give all layers of the model the same rank, padded with zeros.
        dtype: of A and B. A is exact in every dtype. B is exact in "float32"; for m = 0 and m = 2 also in the
            checkpoint's own dtype.
        about: a sentence for the adapter's card.

    Raises:
        InputError: no neuron is scaled; a layer needs a larger rank than ``max_rank``; or the engine would misread it.
    """
    if dtype not in DTYPES:
        raise InputError("dtype", f"expected one of {', '.join(DTYPES)}, got {dtype!r}")
    max_rank, uniform = _for_engine(engine, max_rank, split, uniform)
    if config.experts is not None:
        raise InputError("circuit", "is of a mixture, whose experts an adapter does not reach: use --to checkpoint")
    for name in columns_of(checkpoint, multipliers):
        if name not in map(DOWN.format, multipliers):
            raise InputError("model", f"an adapter's names would find no layer of it ({name!r}): use --to checkpoint")
    if not multipliers:
        raise InputError("multiplier", "changes nothing: there is nothing to export")
    largest = max(map(len, multipliers.values()))
    if max_rank is not None and largest > max_rank and not split:
        wide = ", ".join(f"{layer} ({len(found)})" for layer, found in multipliers.items() if len(found) > max_rank)
        several = "" if engine not in (None, *TOGETHER) else "; --split writes several adapters"
        raise InputError("max_rank", f"layers with more than {max_rank} neurons: {wide}{several}")
    step = largest if max_rank is None else max_rank
    parts = [
        {layer: pairs for layer, found in multipliers.items() if (pairs := list(found.items())[start : start + step])}
        for start in range(0, largest, step)
    ]
    forms = [_ranks(part, config.num_hidden_layers, uniform, max_rank) for part in parts]
    for part, ranks in zip(parts, forms, strict=True):  # before anything is written
        for name, tensor in _adapter(checkpoint, config, part, ranks, DTYPES[dtype]).items():
            require_finite(out, name, tensor)
    places = [Path(out, str(number)) for number in range(1, len(parts) + 1)] if len(parts) > 1 else [Path(out)]
    for config_file in (*Path(out).glob(CONFIG), *Path(out).glob(f"*/{CONFIG}")):
        if config_file.parent not in places:
            raise InputError(config_file.parent, "holds an adapter that would stay beside the new one; remove it first")
    for place in places:
        _check_card(place / CARD)
    make_directory(out)
    for place, part, ranks in zip(places, parts, forms, strict=True):
        make_directory(place)
        tensors = _adapter(checkpoint, config, part, ranks, DTYPES[dtype])
        write_bytes(place / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        write_text(place / CONFIG, json.dumps(_config(ranks, base_model, revision, uniform), indent=2) + "\n")
        write_text(place / CARD, _card(part, ranks, base_model, about, len(parts)))
    return places


def _for_engine(engine: str | None, max_rank: int | None, split: bool, uniform: bool) -> tuple[int | None, bool]:
    """The largest rank and whether ranks are uniform, for an engine. Raises InputError where it would misread them."""
    if engine is None:
        return max_rank, uniform
    if engine not in ENGINES:
        raise InputError("for", f"expected one of {', '.join(ENGINES)}, got {engine!r}")
    if split and engine not in TOGETHER:
        raise InputError("split", f"writes adapters that are one circuit together; {engine} uses one a request")
    if engine == "vllm":
        max_rank = min(max_rank or VLLM_RANKS[-1], VLLM_RANKS[-1])
    return max_rank, uniform or engine in UNIFORM


def _ranks(part: dict[int, list[Any]], n_layers: int, uniform: bool, max_rank: int | None) -> dict[int, int]:
    """The rank of each layer that the adapter has."""
    needed = max(map(len, part.values()))
    if uniform:
        return dict.fromkeys(range(n_layers), needed)
    return padded_ranks({layer: len(pairs) for layer, pairs in part.items()}, max_rank)


def padded_ranks(needed: dict[int, int], max_rank: int | None = None) -> dict[int, int]:
    """Ranks that are at least those needed, each the largest one divided by a power of two.

    Of all largest ranks, up to ``max_rank`` and the next power of two, that one is taken with which the ranks of all
    layers have the smallest sum.
    """
    least = max(needed.values())
    most = 1 << (least - 1).bit_length()
    if max_rank is not None:
        most = max(least, min(most, max_rank))
    largest = min(range(least, most + 1), key=lambda rank: sum(_halved(rank, n) for n in needed.values()))
    return {layer: _halved(largest, n) for layer, n in needed.items()}


def _halved(rank: int, needed: int) -> int:
    """A rank halved as often as it stays whole and large enough."""
    while rank % 2 == 0 and rank // 2 >= needed:
        rank //= 2
    return rank


def _adapter(checkpoint, config, part, ranks: dict[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one adapter. ``part`` is layer -> [(neuron, multiplier)]."""
    largest, tensors = max(ranks.values()), dict[str, Tensor]()
    for layer, rank in ranks.items():
        pairs = part.get(layer, [])
        a = torch.zeros(rank, config.intermediate_size, dtype=torch.float32)
        b = torch.zeros(config.hidden_size, rank, dtype=torch.float32)
        if pairs:
            neurons, scales = zip(*pairs, strict=True)
            a[range(len(pairs)), neurons] = rank / largest  # a power of two
            columns = checkpoint.read(DOWN.format(layer))[:, list(neurons)]
            b[:, : len(pairs)] = (columns.double() * (torch.tensor(scales, dtype=torch.float64) - 1)).float()
        name = f"base_model.model.{DOWN.format(layer).removesuffix('.weight')}"
        tensors |= {f"{name}.lora_A.weight": a.to(dtype), f"{name}.lora_B.weight": b.to(dtype)}
    return tensors


def _config(ranks: dict[int, int], base_model: str, revision: str | None, uniform: bool) -> dict[str, Any]:
    """The content of an adapter's adapter_config.json."""
    largest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": ["down_proj"] if uniform else [f"layers.{layer}.mlp.down_proj" for layer in ranks],
        "rank_pattern": {f"layers.{layer}.mlp.down_proj": rank for layer, rank in ranks.items() if rank != largest},
        "alpha_pattern": {},
    }


def _card(part: dict[int, list[Any]], ranks: dict[int, int], base_model: str, about: str, n_parts: int) -> str:
    """The adapter's README.md, with the fields that the Hub reads."""
    n, several = sum(map(len, part.values())), len(set(ranks.values())) > 1
    base, first = json.dumps(base_model) if base_model else "unknown", f"{about}\n\n" if about else ""
    together = f"This is one of {n_parts} adapters that must be active together.\n\n" if n_parts > 1 else ""
    ranks_line = f"Ranks {min(ranks.values())} to {max(ranks.values())}" if several else f"Rank {max(ranks.values())}"
    read = (
        "PEFT, llama.cpp, and vLLM from 0.32 on read it; SGLang and an earlier vLLM would misread the ranks."
        if several
        else "PEFT, llama.cpp, vLLM and SGLang read it."
    )
    return f"""---
base_model: {base}
library_name: peft
tags:
- lora
- {TAG}
---

# {n} MLP neurons in {len(part)} layers, at another multiplier

{first}{together}The adapter multiplies the input of `down_proj` at these neurons, exactly up to rounding.
It was not trained. {ranks_line} in {len(ranks)} layers, `lora_alpha` {max(ranks.values())}.
{read}

{_recipes(max(ranks.values()), several, n_parts)}"""


def _recipes(rank: int, several: bool, n_parts: int) -> str:
    """How each engine that reads the adapter loads it. BASE is the base model."""
    if n_parts > 1:
        return """PEFT:

    model = PeftModel.from_pretrained(BASE, "adapter/1", "1")
    model.load_adapter("adapter/2", "2")
    model.base_model.set_adapter(["1", "2"])

llama.cpp, each part converted by convert_lora_to_gguf.py:

    llama-server -m model.gguf --lora 1.gguf --lora 2.gguf
"""
    text = """PEFT:

    model = PeftModel.from_pretrained(BASE, "adapter/")

llama.cpp:

    python convert_lora_to_gguf.py adapter/ --base BASE --outfile adapter.gguf
    llama-server -m model.gguf --lora adapter.gguf
"""
    if several:
        return text
    vllm = f"vllm serve BASE --enable-lora --max-lora-rank {vllm_rank(rank)} --lora-modules NAME=adapter/"
    if rank > VLLM_RANKS[-1]:
        vllm = f"(takes no rank above {VLLM_RANKS[-1]})"
    return f"""{text}
vLLM:

    {vllm}

SGLang:

    python -m sglang.launch_server --model-path BASE --enable-lora --lora-paths NAME=adapter/
"""


def vllm_rank(rank: int) -> int:
    """The value of vLLM's ``--max-lora-rank`` for adapters of a rank; of more than it takes, the rank itself."""
    return next((value for value in VLLM_RANKS if value >= rank), rank)


def _check_card(path: Path) -> None:
    """Refuse to write over a README.md that is no adapter's card."""
    if os.path.lexists(path) and f"\n- {TAG}\n" not in read_text(path, limit=1 << 20):
        raise InputError(path, "is there already, and is not the card of an adapter; move it away first")
