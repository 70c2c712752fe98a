"""Rotary position embedding (J. Su et al., arXiv 2104.09864) with the scalings of Llama and Qwen checkpoints.

The scalings are those of transformers, term by term, so that the logits agree. Sources: yarn, B. Peng et al., arXiv
2309.00071; longrope, Y. Ding et al., arXiv 2402.13753.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .checkpoint.config import ModelConfig, Rope


class RotaryEmbedding(nn.Module):
    """cos and sin of every position. ``dynamic`` and ``longrope`` depend on a sequence's length, never on its batch."""

    exponent: Tensor
    inv_freq: Tensor
    long_inv_freq: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rope = config.rope
        self.max_position = config.max_position_embeddings
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
        self.register_buffer("exponent", exponent, persistent=False)  # [D / 2]
        inv_freq = 1.0 / self.rope.theta**exponent
        self.register_buffer("inv_freq", _scaled(inv_freq, self.rope, exponent), persistent=False)
        if self.rope.kind == "longrope":
            long = torch.tensor(self.rope.long_factor, dtype=torch.float32, device="cpu")
            self.register_buffer("long_inv_freq", 1.0 / (long * self.rope.theta**exponent), persistent=False)

    def forward(self, positions: Tensor, lengths: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin ``[B, 1, S, D]``.

        Args:
            positions: ``[B, S]`` int64.
            lengths: ``[B]`` int64, tokens seen so far in each row; only ``dynamic`` and ``longrope`` read it.
        """
        inv_freq = self.inv_freq
        if self.rope.kind == "dynamic":
            inv_freq = self._dynamic(lengths)[:, None]  # [B, 1, D / 2]
        elif self.rope.kind == "longrope":
            is_long = lengths > self.rope.original_max_position
            inv_freq = torch.where(is_long[:, None, None], self.long_inv_freq, self.inv_freq)
        angle = positions[..., None].float() * inv_freq  # [B, S, D / 2]
        angle = torch.cat((angle, angle), dim=-1)[:, None]
        cos, sin = angle.cos(), angle.sin()
        if self.rope.attention_factor != 1:
            cos, sin = cos * self.rope.attention_factor, sin * self.rope.attention_factor
        return cos.to(dtype), sin.to(dtype)

    def _dynamic(self, lengths):
        """NTK-aware scaling: the base grows with the sequence once it is longer than max_position."""
        factor, dim = self.rope.factor, 2 * self.exponent.shape[0]
        longest = lengths.clamp(min=self.max_position).float()
        stretch = (factor * longest / self.max_position - (factor - 1)) ** (dim / (dim - 2))
        return 1.0 / (self.rope.theta * stretch)[:, None] ** self.exponent  # [B, D / 2]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the embedding to x ``[B, heads, S, D]``: the halves of D are the two coordinates of each rotation."""
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


def _scaled(inv_freq: Tensor, rope: Rope, exponent: Tensor) -> Tensor:
    """The frequencies after scaling. llama3 divides low ones by ``factor``, keeps high ones, and blends in between."""
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind == "yarn":
        return _yarn(rope, exponent)
    if rope.kind in ("longrope", "factors"):
        return 1.0 / (torch.tensor(rope.short_factor, dtype=torch.float32, device="cpu") * rope.theta**exponent)
    if rope.kind != "llama3":
        return inv_freq
    turns = rope.original_max_position * inv_freq / (2 * math.pi)  # full rotations within the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * inv_freq / rope.factor + blend * inv_freq


def _yarn(rope: Rope, exponent: Tensor) -> Tensor:
    """Divide low frequencies by ``factor``, keep high ones; a ramp over the frequencies' numbers lies in between.

    The ramp's ends are the frequencies that turn ``beta_fast`` and ``beta_slow`` times within the original context.
    """
    n = exponent.shape[0]

    def number(turns: float) -> float:
        """The number of the frequency that turns so often within the original context."""
        return n * math.log(rope.original_max_position / (turns * 2 * math.pi)) / math.log(rope.theta)

    low, high = number(rope.beta_fast), number(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * n - 1)
    if low == high:
        high += 0.001  # no division by zero
    kept = 1 - ((torch.arange(n, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    wave = rope.theta**exponent
    return 1.0 / (rope.factor * wave) * (1 - kept) + 1.0 / wave * kept
