"""The prompts of a batch in one pass, before decoding: what all of them begin with alike runs only once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kv_cache import KVCache
from .steering import Steering

if TYPE_CHECKING:
    from .transformer import Transformer

_SHORTEST = 8  # tokens of a beginning that is worth a pass of its own


def prefill(
    transformer: Transformer, input_ids: Tensor, lengths: Tensor, cache_length: int, steer: Steering | None
) -> tuple[Tensor, KVCache]:
    """Run the prompts; return the hidden states ``[B, H]`` of their last tokens, and their keys and values.

    A beginning that all prompts share, as the header of a chat, is run once for each way of steering.
    """
    batch, longest = input_ids.shape
    device = input_ids.device
    rows = torch.arange(batch, dtype=torch.int64, device=device)
    shared = _shared_beginning(input_ids, lengths)
    first, members = _alike(batch, steer)
    by_length = transformer.config.rope.kind in ("dynamic", "longrope")  # the angles of a beginning depend on its row
    if shared < _SHORTEST or 2 * len(first) > batch or by_length:
        cache = transformer.new_cache(batch, cache_length)
        hidden = transformer.hidden(input_ids, lengths=lengths, cache=cache, steer=steer)
        return hidden[rows, lengths - 1], cache
    first, members = first.to(device), members.to(device)
    cache = transformer.new_cache(len(first), cache_length)
    transformer.hidden(input_ids[first, :shared], cache=cache, steer=None if steer is None else steer.keep(first))
    cache.keep(members)
    positions = torch.arange(shared, longest, dtype=torch.int64, device=device).expand(batch, -1)
    hidden = transformer.hidden(input_ids[:, shared:], lengths=lengths, positions=positions, cache=cache, steer=steer)
    return hidden[rows, lengths - 1 - shared], cache


def _shared_beginning(input_ids: Tensor, lengths: Tensor) -> int:
    """How many tokens all rows begin with alike; at least one token of each row is left."""
    same = (input_ids == input_ids[:1]).all(dim=0)[: int(lengths.min()) - 1]
    return int(same.long().cumprod(dim=0).sum())


def _alike(batch: int, steer: Steering | None) -> tuple[Tensor, Tensor]:
    """The first row of each way of steering, and for each row ``[B]`` the place of its own way among these."""
    every = torch.arange(batch, dtype=torch.int64)
    if steer is None:
        return every[:1], torch.zeros(batch, dtype=torch.int64)
    ways = steer.alike(batch)
    if ways is None:
        return every, every
    members = ways.unique(dim=0, return_inverse=True)[1]
    first = torch.full((int(members.max()) + 1,), batch, dtype=torch.int64).scatter_reduce(0, members, every, "amin")
    return first, members
