"""The forward pass of a pack: tokens of many prompts in one row. A prompt attends to itself and to a shared prefix.

Everything but attention works on ``[1, T, H]``, whatever the prompts' lengths. Attention uses PyTorch's flash kernel
for sequences of varying length where the device has it (``tests/model/test_cuda_model.py``). Elsewhere attention goes
span by span: prompts of one length are a batch without padding, made of views of the packed tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache, partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rope import RotaryEmbedding
from ..transformer import Layer
from .packing import spans_of

Past = tuple[Tensor, Tensor]  # keys and values of a prefix in one layer, [1, KV heads, P, D]
KEY_BYTES, VARLEN_BYTES = 32 << 20, 1 << 30  # of keys and values, with prefixes, in one attention call


class Packed:
    """Tokens that go through the layers together.

    Attributes:
        ids: ``[T]`` int64, the own tokens of each prompt, without the prefix.
        rows: ``[R]`` int64, the places in ``ids`` of the tokens that the sums count.
        token_weight: ``[R, C]`` fp32, how much each token of ``rows`` counts in each column.
    """

    def __init__(self, ids: Sequence[list[int]], counted: Sequence[int], token_weight: Tensor, *, prefix: int, device):
        """
        Args:
            ids: the own tokens of each prompt, in the order of ``packing.plan_packs``.
            counted: how many tokens at the end of each prompt count; 0 is allowed.
            token_weight: fp32, ``[P, C]``: one row for all counted tokens of a prompt; or ``[R, C]``: a row for each.
            prefix: the number of tokens of the shared beginning in front of every prompt.
        """
        lengths = [len(row) for row in ids]
        self.spans, self.prefix, self.n_tokens = spans_of(lengths, counted), prefix, sum(lengths)
        self.ids = torch.tensor([token for row in ids for token in row], dtype=torch.int64, device=device)
        positions: list[int] = []
        rows: list[int] = []
        owners: list[int] = []
        start = 0
        for owner, (length, n_counted) in enumerate(zip(lengths, counted, strict=True)):
            positions += range(prefix, prefix + length)
            rows += range(start + length - n_counted, start + length)
            owners += [owner] * n_counted
            start += length
        self.positions = torch.tensor(positions, dtype=torch.int64, device=device)
        of_tokens = [prefix + length for length in lengths for _ in range(length)]
        self.lengths = torch.tensor(of_tokens, dtype=torch.int64, device=device)
        self.rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self._sequences: dict[bool, tuple] = {}
        if len(token_weight) != len(rows):
            token_weight = token_weight[torch.tensor(owners, dtype=torch.int64)]
        self.token_weight = token_weight.to(device)

    def token_weight_of_all(self) -> Tensor:
        """``[T, C]``: the weights of every token, 0 for those that do not count."""
        token_weight = self.token_weight.new_zeros(self.n_tokens, self.token_weight.shape[1])
        token_weight[self.rows] = self.token_weight
        return token_weight

    def owners(self, last: bool) -> list[int]:
        """The number of the prompt that every token belongs to; with ``last``, of the counted tokens only."""
        sizes = [span.n_counted if last else span.n_tokens for span in self.spans for _ in range(span.n_prompts)]
        return [owner for owner, size in enumerate(sizes) for _ in range(size)]

    def n_keys(self) -> int:
        """The number of tokens that the prompts of this pack attend to; the prefix counts once for each prompt."""
        return self.n_tokens + self.prefix * sum(span.n_prompts for span in self.spans)

    def sequences(self, last: bool) -> tuple[Tensor, Tensor, int, int, Tensor]:
        """What the flash kernel needs: where each prompt's queries, and its keys, begin (``[P + 1]`` int32 each); the
        most queries, and the most keys, of one prompt; and the rows of all keys among the prefix and the own tokens."""
        if last in self._sequences:
            return self._sequences[last]
        asked, keys, places = [0], [0], []
        for span in self.spans:
            for number in range(span.n_prompts):
                first = self.prefix + span.start + number * span.n_tokens
                places += [*range(self.prefix), *range(first, first + span.n_tokens)]
                asked.append(asked[-1] + (span.n_counted if last else span.n_tokens))
                keys.append(len(places))
        most = [max(b - a for a, b in pairwise(edges)) for edges in (asked, keys)]
        device = self.ids.device
        edges = [torch.tensor(part, dtype=torch.int32, device=device) for part in (asked, keys)]
        self._sequences[last] = *edges, *most, torch.tensor(places, dtype=torch.int64, device=device)
        return self._sequences[last]

    def rotation(self, rotary: RotaryEmbedding, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin ``[1, 1, T, D]``. The rotary embedding gets every token as a sequence of one token."""
        cos, sin = rotary(self.positions[:, None], self.lengths, dtype)  # [T, 1, 1, D]
        return cos.transpose(0, 2), sin.transpose(0, 2)


def run_layer(
    layer: Layer, packed: Packed, x: Tensor, rotation: tuple[Tensor, Tensor], past: Past | None, *, window, last, **sums
) -> tuple[Tensor, Past]:
    """Run one layer over a pack.

    Args:
        x: ``[1, T, H]``.
        past: keys and values of the prefix in this layer, or None.
        window: the layer's sliding window, or None.
        last: whether this is the model's last layer, after which only counted tokens are needed.
        sums: ``act_sum`` and ``act_sumsq`` of this layer; left out where nothing is summed.

    Returns:
        The hidden states, and this pack's own keys and values: if the pack is a prefix, the past of its prompts.
    """
    own: list[Tensor] = []
    extras = {}
    if sums and len(packed.rows):
        extras = {"token_weight": packed.token_weight if last else packed.token_weight_of_all(), **sums}
    rows = packed.rows if last else None
    keys = packed.n_keys() * 2 * layer.self_attn.k_proj.weight.shape[0] * x.element_size()
    attend = _attend_varlen if _has_varlen(x) and keys <= VARLEN_BYTES else _attend
    x = layer(x, *rotation, partial(attend, packed, past, window, last, own), rows, **extras)
    return x, (own[0], own[1])


def _has_varlen(x: Tensor) -> bool:
    """Whether the flash kernel of :func:`_attend_varlen` serves this tensor."""
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16) or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0) and {"window_size", "enable_gqa"} <= _varlen()[1]


@cache
def _varlen():
    """PyTorch's ``varlen_attn`` and the names of its arguments, which grew from version to version."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None, frozenset()
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def _attend_varlen(packed: Packed, past, window, last, own, _layer, query, key, value) -> Tensor:
    """As :func:`_attend`, but all prompts in one call. The last query of a prompt attends to all keys of the prompt."""
    own += [key, value]
    asked, edges, most_asked, most_keys, places = packed.sequences(last)
    if most_asked == 0:
        return torch.empty_like(query)
    keys, values = (part[0].transpose(0, 1) for part in (key, value))  # [T, KV heads, D]
    if past is not None:
        keys, values = (
            torch.cat((before[0].transpose(0, 1), part))[places]
            for before, part in zip(past, (keys, values), strict=True)
        )
    to_the_left = -1 if window is None else window - 1
    options = dict(window_size=(to_the_left, 0), enable_gqa=True)
    queries = query[0].transpose(0, 1)
    y = _varlen()[0](queries, keys, values, asked, edges, most_asked, most_keys, **options)
    return y.transpose(0, 1)[None]


def _attend(packed: Packed, past, window, last, own, _layer, query, key, value) -> Tensor:
    """Attention of every prompt to its prefix and causally to its own tokens; all tensors are ``[1, heads, T, D]``."""
    own += [key, value]
    spans = packed.spans
    y = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
    # The prefix is copied in front of the keys of every prompt, for a few prompts at a time, so that copies stay small.
    row_bytes = 2 * key.shape[1] * key.shape[3] * key.element_size()
    asked_before = 0
    for span in spans:
        n_asked = span.n_counted if last else span.n_tokens
        if n_asked == 0:
            continue
        at_once = (
            max(KEY_BYTES // ((packed.prefix + span.n_tokens) * row_bytes), 1) if packed.prefix else span.n_prompts
        )
        for done in range(0, span.n_prompts, at_once):
            n_prompts = min(at_once, span.n_prompts - done)
            start = span.start + done * span.n_tokens
            keys, values = (
                _apart(part[:, :, start : start + n_prompts * span.n_tokens], n_prompts) for part in (key, value)
            )
            if past is not None:
                keys, values = (
                    torch.cat((before.expand(n_prompts, -1, -1, -1), part), dim=2)
                    for before, part in zip(past, (keys, values), strict=True)
                )
            asked = slice(asked_before, asked_before + n_prompts * n_asked)
            asked_before = asked.stop
            queries = _apart(query[:, :, asked], n_prompts)
            mask, is_causal = _mask(n_asked, keys.shape[2], window, query.device)
            found = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=is_causal, enable_gqa=True)
            _apart(y[:, :, asked], n_prompts).copy_(found)
    return y


def _apart(x: Tensor, n_prompts: int) -> Tensor:
    """A view of ``[1, heads, n * S, D]`` as ``[n, heads, S, D]``."""
    return x[0].unflatten(1, (n_prompts, -1)).transpose(0, 1)


def _mask(n_asked: int, n_keys: int, window: int | None, device) -> tuple[Tensor | None, bool]:
    """The mask for the last ``n_asked`` of ``n_keys`` tokens, or None; and the argument ``is_causal``."""
    if window is None or window >= n_keys:
        if n_asked == 1:
            return None, False
        if n_asked == n_keys:
            return None, True
    key = torch.arange(n_keys, dtype=torch.int64, device=device)
    asking = torch.arange(n_keys - n_asked, n_keys, dtype=torch.int64, device=device)[:, None]
    allowed = key <= asking
    if window is not None:
        allowed &= key > asking - window
    return allowed, False
