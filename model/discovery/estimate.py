"""The memory, reads and time that a discovery will need, from config, headers, a sample of prompts and two probes."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cna_kernels import ActivationSums
from cna_kernels.errors import InputError

from ..checkpoint.config import dtype_asked
from ..checkpoint.formats import open_checkpoint
from ..checkpoint.load import check_entries, dtype_of, expected_shapes, layer_size
from ..engines import Chosen
from ..memory import usable_device
from ..prompts.corpus import STREAMED_UNITS, UNIT_BYTES, UNIT_PROMPTS
from ..prompts.files import PromptSet
from ..rope import RotaryEmbedding
from ..text.prompt_encoder import PromptEncoder
from ..text.tokenizer import Tokenizer
from ..transformer import Layer
from .collect import default_tokens, pack_prompts
from .packed import run_layer
from .packing import Group, TokenPrompt, group_by_prefix, plan_packs
from .streamed import HIDDEN_BYTES

SAMPLE = 1000  # prompts that are tokenised to measure
PROBE_BYTES = 256 << 20  # bytes of the checkpoint that are read to measure the rate
LINE_BYTES = 80  # bytes of a prompt's line in the corpus file, beside its text


def estimate(
    directory,
    prompts: Iterable[tuple[str, str]],
    *,
    engine: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    stream_layers: bool = False,
    chat: bool | None = None,
    max_tokens: int | None = None,
    n_columns: int = 2,
    system: str | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> dict:
    """Estimate the bytes, tokens and seconds of a discovery over ``prompts``, each a (text, place).

    Sizes are computed, for sums with their squares, as a run directory keeps them. Times follow from three
    measurements: a sample of the prompts is tokenised, one layer with random weights runs over a pack of that sample,
    and a part of the checkpoint is read. ``device`` and ``dtype`` are as in :class:`LanguageModel`.
    """
    asked, device = dtype_asked(dtype), usable_device(device)
    chosen = Chosen(Path(directory), engine, own_only="stream_layers" if stream_layers else None)
    config = chosen.config
    tokenizer = Tokenizer(directory, config.vocab_size)
    checkpoint = open_checkpoint(directory)
    if chosen.engine == "own":
        check_entries(checkpoint, config, directory)
    dtype_in_use = dtype_of(config, checkpoint) if asked is None else asked
    max_tokens = max_tokens or default_tokens(device)

    stream = iter(prompts)
    sample = list(itertools.islice(stream, SAMPLE))
    n_prompts = len(sample) + sum(1 for _ in stream)
    start = time.perf_counter()
    texts, places = zip(*sample, strict=True)
    encoder = PromptEncoder(tokenizer, config.context_length, system=system, template_args=template_args)
    encoded = encoder.encode(PromptSet(texts, places), chat=chat, keep_long=True)
    ids = [prompt.ids for prompt in encoded if 0 < len(prompt.ids) <= config.context_length]
    if not ids:
        raise InputError("prompts", f"none of the first {len(sample)} fits the model's context")
    tokenise = (time.perf_counter() - start) / len(sample)
    shares = config.shares_beginnings(max(map(len, ids)))
    groups = group_by_prefix(ids) if shares else [Group(0, list(range(len(ids))))]
    shared = sum((len(group.prompts) - 1) * group.prefix for group in groups)
    per_prompt = sum(map(len, ids)) / len(ids)
    run_per_prompt = per_prompt - shared / len(ids)

    n_layers, n_neurons = config.num_hidden_layers, config.intermediate_size
    probe: Any = dict(dtype=dtype_in_use, device=device, max_tokens=max_tokens, n_columns=n_columns)
    if chosen.engine == "own":
        layer = layer_size(config) * dtype_in_use.itemsize
        all_weights = sum(torch.Size(x).numel() for x in expected_shapes(config).values()) * dtype_in_use.itemsize
        n_active, measured = n_neurons, partial(_layer_seconds, config, ids, **probe)
    else:
        from ..hf import hf_estimate, hf_load

        layer, all_weights = 0, hf_load.weight_bytes(checkpoint, asked)
        n_active = hf_estimate.active_neurons(config, chosen.hf_config)
        measured = partial(hf_estimate.layer_seconds, config, chosen.hf_config, ids, **probe)
    larger = STREAMED_UNITS if stream_layers else 1
    text_bytes = sum(len(text.encode("utf-8")) for text in texts) / len(texts) + LINE_BYTES
    per_unit = max(1, int(min(UNIT_PROMPTS * larger, UNIT_BYTES * larger / text_bytes)))
    n_units = -(-n_prompts // per_unit)
    hidden = min(n_prompts, per_unit) * run_per_prompt * config.hidden_size * dtype_in_use.itemsize
    sums = n_layers * n_neurons * n_columns * (4 + 8) * 2
    pack = max_tokens * (3 * n_active + 8 * config.hidden_size) * dtype_in_use.itemsize
    on_disk = sum(entry.end - entry.start for entry in checkpoint.entries.values())
    read_bytes = on_disk * n_units if stream_layers else on_disk
    memory = {
        "weights": 2 * layer if stream_layers else all_weights,
        "hidden_states": min(hidden, HIDDEN_BYTES) if stream_layers else 0,
        "forward_pass": pack,
        "sums": sums,
    }
    per_token = measured()
    seconds = {
        "tokenise": tokenise * n_prompts,
        "read": read_bytes / _read_rate(checkpoint),
        "compute": per_token * n_layers * run_per_prompt * n_prompts,
    }
    # Reading and tokenising go on while the model computes. The first layer, or all weights, must be read before.
    first = seconds["read"] / n_layers if stream_layers else seconds["read"]
    beside = max(seconds["tokenise"], seconds["read"] - first if stream_layers else 0.0, seconds["compute"])
    return {
        "prompts": n_prompts,
        "tokens": round(per_prompt * n_prompts),
        "tokens_run": round(run_per_prompt * n_prompts),
        "units": n_units,
        "memory_bytes": {name: round(size) for name, size in memory.items()} | {"all": round(sum(memory.values()))},
        "spilled_bytes": max(round(hidden) - HIDDEN_BYTES, 0) and round(hidden) if stream_layers else 0,
        "read_bytes": read_bytes,
        "part_bytes": n_units * n_layers * n_neurons * n_columns * 8 * 2,
        "seconds": {name: round(value, 1) for name, value in seconds.items()} | {"all": round(first + beside, 1)},
        "sample": len(sample),
    }


def _layer_seconds(config, ids, dtype, device, max_tokens, n_columns) -> float:
    """Measure the seconds that one layer takes for a token, with random weights and a pack of these prompts."""
    with torch.device("meta"):
        layer = Layer(config, 0)
    layer = layer.to(dtype).to_empty(device=device).eval()
    for parameter in layer.parameters():
        parameter.data.normal_(std=config.hidden_size**-0.5)
    prompts = sorted((TokenPrompt(row, "sample") for row in ids), key=lambda prompt: len(prompt.ids))
    packs = plan_packs([len(p.ids) for p in prompts], [1] * len(prompts), max_prompts=None, max_tokens=max_tokens)
    rows = packs[len(packs) // 2]
    packed = pack_prompts(prompts, rows, 0, torch.ones(len(prompts), n_columns, dtype=torch.float32), device)
    sums = ActivationSums(1, config.intermediate_size, n_columns, device=device)
    rotation = packed.rotation(RotaryEmbedding(config).to(device), dtype)
    x = torch.randn(1, packed.n_tokens, config.hidden_size, dtype=torch.float32, device=device).to(dtype)
    times = []
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            run_layer(layer, packed, x, rotation, None, window=None, last=False, **sums.layer(0))
            sums.fold(torch.ones(1, n_columns, dtype=torch.float32))  # fold waits for the device
            times.append(time.perf_counter() - start)
    return min(times[1:]) / packed.n_tokens


def _read_rate(checkpoint) -> float:
    """Measure the bytes a second read from the largest file, emptied from the system's cache where it can be."""
    entry = max(checkpoint.entries.values(), key=lambda entry: entry.end)
    with open(entry.path, "rb", buffering=0) as file:
        size = min(os.fstat(file.fileno()).st_size, PROBE_BYTES)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        buffer, done, start = bytearray(4 << 20), 0, time.perf_counter()
        while done < size:
            got = file.readinto(buffer)
            if not got:
                break
            done += got
    return done / max(time.perf_counter() - start, 1e-9)
