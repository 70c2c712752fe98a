"""Batched decoding, greedy or sampled, with a static cache, for prompts of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cna_kernels.errors import InputError

from .discovery.collect import check_length
from .discovery.packing import TokenPrompt
from .memory import DoesNotFit, memory_of
from .steering import Steering
from .transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy: the largest logit, ties to the lowest id.

    Attributes:
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: of the tokens that ``top_k`` keeps, keep the most likely ones that together reach this probability.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise InputError("temperature", f"expected 0 or above, got {self.temperature}")
        if self.top_k < 0:
            raise InputError("top_k", f"expected 0 or above, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError("top_p", f"expected above 0 and at most 1, got {self.top_p}")


def generate(
    transformer: Transformer,
    prompts: Sequence[TokenPrompt],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    steer: Steering | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, without the stop token.

    A row ends at a stop id, after ``max_new_tokens``, or where the model's context ends.

    Args:
        seeds: one for each prompt. Each row draws from its own generator, so its answer does not depend on the batch.
        on_token: called with (row, id) as each token is chosen.

    Raises:
        InputError: a prompt has no token or is longer than the context.
    """
    if max_new_tokens < 1:
        raise InputError("max_new_tokens", f"expected at least 1, got {max_new_tokens}")
    context = transformer.config.context_length
    for prompt in prompts:
        check_length(prompt, context)
    sampling = sampling or Sampling()
    device = transformer.device
    input_ids, lengths = pad([prompt.ids for prompt in prompts], device)
    batch, longest = input_ids.shape
    cache_length = min(longest + max_new_tokens, context)
    generators = [torch.Generator().manual_seed(_checked_seed(seed)) for seed in seeds or [0] * batch]
    answers: list[list[int]] = [[] for _ in range(batch)]
    members = list(range(batch))  # the prompt that each row of the batch decodes
    running = set(members)
    with torch.inference_mode():
        _check_cache_fits(transformer, batch, cache_length)
        hidden, cache = transformer.begin(input_ids, lengths, cache_length, steer)
        while True:
            logits = transformer.logits(hidden)
            _require_finite(logits, members, running, prompts)
            chosen = choose(logits, sampling, [generators[member] for member in members])  # [B]
            for member, token in zip(members, chosen.tolist(), strict=True):
                if member not in running:
                    continue
                if token in stop_ids:
                    running.discard(member)
                    continue
                answer = answers[member]
                answer.append(token)
                if on_token is not None:
                    on_token(member, token)
                if len(answer) == max_new_tokens or len(prompts[member].ids) + len(answer) >= context:
                    running.discard(member)
            if not running:
                return answers
            if 2 * len(running) <= len(members):  # ended rows stay in the batch until half of its rows have ended
                alive = [row for row, member in enumerate(members) if member in running]
                kept = torch.tensor(alive, dtype=torch.int64, device=device)
                members = [member for member in members if member in running]
                cache.keep(kept)
                chosen, lengths = chosen[kept], lengths[kept]
                steer = None if steer is None else steer.keep(kept)
            lengths = lengths + 1
            hidden = transformer.step(chosen, lengths, cache, steer)


def pad(ids: Sequence[list[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return input_ids ``[B, S]`` padded on the right with 0, and lengths ``[B]``."""
    lengths = torch.tensor([len(row) for row in ids], dtype=torch.int64)
    input_ids = torch.zeros(len(ids), int(lengths.max()), dtype=torch.int64)
    for number, row in enumerate(ids):
        input_ids[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return input_ids.to(device), lengths.to(device)


def _checked_seed(seed) -> int:
    if not -(2**63) <= seed < 2**64:
        raise InputError("seed", f"expected -2**63 to 2**64 - 1, got {seed}")
    return int(seed)


def _check_cache_fits(transformer: Transformer, batch: int, length: int):
    """Raise DoesNotFit, which names max_new_tokens, for a cache that memory cannot hold."""
    device = transformer.device
    needed, available = transformer.cache_bytes(batch, length), memory_of(device)
    if available is not None and needed > available:
        what = f"keys and values of {batch} x {length} tokens need {needed / 2**30:.1f} GiB"
        raise DoesNotFit("max_new_tokens", f"{what}, {device} has {available / 2**30:.1f}")


def _require_finite(logits, members, running, prompts):
    """Raise InputError naming the first running prompt whose logits are not finite: its multiplier may be too large."""
    finite = torch.isfinite(logits).all(-1).tolist()
    for member, is_finite in zip(members, finite, strict=True):
        if member in running and not is_finite:
            raise InputError(prompts[member].place, "the logits are not finite; is the multiplier too large?")


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Return the next token of each row, ``[B]`` int64, from logits ``[B, V]``."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # at most 0, so it cannot overflow
    scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        scaled = scaled[:, : sampling.top_k]
    cumulative = scaled.softmax(-1).cumsum(-1)  # [B, kept]
    before = cumulative - scaled.softmax(-1)
    mass = cumulative.masked_fill(before >= sampling.top_p, 0).amax(-1, keepdim=True)
    drawn = [torch.rand(1, dtype=torch.float32, generator=generator) for generator in generators]
    uniform = torch.stack(drawn).to(logits.device)
    place = torch.searchsorted(cumulative, uniform * mass, right=True).clamp(max=cumulative.shape[1] - 1)
    return order.gather(1, place)[:, 0]
