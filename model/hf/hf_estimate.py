"""What a model on transformers will take for a token, measured on random weights: no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from cna_kernels import ActivationSums, attach

from ..discovery.packing import TokenPrompt, plan_packs
from .hf_config import HfConfig, empty_model, in_one_line, plain_config
from .hf_load import quietly
from .hf_passes import HfPasses
from .hf_transformer import HfTransformer

VOCABULARY = 256  # of the model that is measured
REPEATS = 4


def active_neurons(config: HfConfig, hf_config: Any) -> int:
    """The most neurons of a layer that compute for one token: those of the experts that it is sent to."""
    if config.experts is None:
        return config.intermediate_size
    n_each = getattr(hf_config.get_text_config(decoder=True), "num_experts_per_tok", None) or 1
    return max(min(n, n_each) * own for n, own in config.experts)


def layer_seconds(
    config: HfConfig,
    hf_config: Any,
    ids: Sequence[list[int]],
    dtype: torch.dtype,
    device: torch.device,
    max_tokens: int,
    n_columns: int,
) -> float:
    """Measure the seconds that a layer takes for a token, with random weights that are not quantised.

    The model that runs has as many of the first layers as it takes to have one of the most frequent kind.
    """
    kinds = config.experts or [(1, width) for width in config.widths]
    usual = Counter(kinds).most_common(1)[0][0]
    n_layers = kinds.index(usual) + 1
    small = plain_config(hf_config)
    with in_one_line("model"), quietly(), torch.inference_mode():
        text = small.get_text_config(decoder=True)
        text.num_hidden_layers, text.vocab_size, text.pad_token_id = n_layers, VOCABULARY, None
        if isinstance(getattr(text, "layer_types", None), list):
            text.layer_types = text.layer_types[:n_layers]
        model = empty_model(small, device, dtype).eval().requires_grad_(False)
        engine = attach(model, max_circuits=1, max_entries=1)
        transformer = HfTransformer(model, engine, config, {})
        lengths = [len(row) for row in ids]
        packs = plan_packs(lengths, [1] * len(ids), max_prompts=None, max_tokens=max_tokens, padded=True)
        rows = packs[len(packs) // 2]
        draw = torch.Generator().manual_seed(0)
        prompts = [
            TokenPrompt(torch.randint(VOCABULARY, (lengths[row],), generator=draw).tolist(), "sample") for row in rows
        ]
        weights = torch.ones(len(prompts), n_columns, dtype=torch.float32)
        sums = ActivationSums(n_layers, engine.n_neurons, n_columns, device=device)
        times = [HfPasses.seconds(transformer, prompts, weights, sums) for _ in range(REPEATS)]
    return min(times[1:]) / sum(lengths[row] for row in rows) / n_layers
