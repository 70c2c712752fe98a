"""Discovery on a model of transformers: packs are batches, padded on the right, and a prefix is a cache."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cna_kernels.errors import InputError
from cna_kernels.sums import ActivationSums

from ..discovery.collect import Pack, Passes, prefix_weight
from ..discovery.packing import TokenPrompt
from ..generate import pad

if TYPE_CHECKING:
    from .hf_transformer import HfTransformer


class HfPasses(Passes):
    """The passes of ``discovery.collect`` through a model that runs all its layers at once."""

    transformer: Any
    PADDED = True

    def blocks(self) -> list[None]:
        """One block, which is the whole model."""
        return [None]

    def _pass(self, block: None, pack: Pack, past: Any) -> Any:
        prompts = [self.prompts[row] for row in pack.rows]
        if pack.is_prefix:
            ids = torch.tensor([prompts[0].ids[: pack.prefix]], dtype=torch.int64, device=self.transformer.device)
            weight = prefix_weight(self.prompts, pack.rows, pack.prefix, self.column_weights).float()[None]
            return run_pass(self.transformer, ids, weight, self.sums, self.column_weights[:0], keep=True)
        weights = self.column_weights[pack.rows]
        ids, weight = padded(prompts, pack.prefix, weights, self.transformer.device)
        return run_pass(self.transformer, ids, weight, self.sums, weights, past=past, n_past=pack.prefix)

    def _is_last(self, block: None) -> bool:
        return True

    @staticmethod
    def seconds(
        transformer: HfTransformer, rows: Sequence[TokenPrompt], weights: Tensor, sums: ActivationSums
    ) -> float:
        """Measure the seconds that one pass of these prompts takes."""
        ids, weight = padded(rows, 0, weights, transformer.device)
        start = time.perf_counter()
        run_pass(transformer, ids, weight, sums, weights)
        return time.perf_counter() - start


def padded(prompts: Sequence[TokenPrompt], prefix: int, weights: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids ``[B, S]`` of prompts without their prefix, padded on the right, and token weights ``[B, S, C]``.

    ``weights`` ``[B, C]``: how much each prompt counts; its counted tokens share it equally.
    """
    ids, lengths = pad([prompt.ids[prefix:] for prompt in prompts], device)
    weight = torch.zeros(*ids.shape, weights.shape[1], dtype=torch.float32)
    for row, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True)):
        weight[row, length - min(prompt.n_counted, length) : length] = weights[row] / prompt.n_counted
    return ids, weight


def run_pass(
    transformer: HfTransformer,
    ids: Tensor,
    weight: Tensor,
    sums: ActivationSums,
    counted: Tensor,
    *,
    past: Any = None,
    n_past: int = 0,
    keep: bool = False,
) -> Any:
    """Run one batch and fold its activations into ``sums``; with ``keep`` return the cache of its keys and values.

    Args:
        ids: ``[B, S]``; weight: ``[B, S, C]``, how much each token counts; counted: ``[any, C]``, what is counted.
        past: the cache of a prefix of ``n_past`` tokens, of one row. It stays as it is.
    """
    batch, n_tokens = ids.shape
    position = torch.arange(n_past, n_past + n_tokens, dtype=torch.int64, device=ids.device).expand(batch, -1)
    if past is not None:
        past = copy.deepcopy(past)
        past.reorder_cache(torch.zeros(batch, dtype=torch.int64, device=ids.device))
    transformer.unsteered()
    with torch.inference_mode(), transformer.engine.collect(weight, sums, counted=counted):
        found = transformer.run(ids, position=position, past=past, use_cache=keep or past is not None)
    kept = getattr(found, "past_key_values", None) if keep else None
    if keep and kept is None:
        raise InputError("model", "its decoder hands out no cache, which prompts that begin alike would share")
    return kept
