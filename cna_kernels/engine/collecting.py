"""One collection: the forward pass that ``Engine.collect`` waits for, and the sums that it goes to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..reference import sum_statistics_only
from ..sums import ActivationSums
from .prompt import Prompt, seen_by

MASKED = -1e4  # an additive mask hides what it adds so much to, or less


class Collecting:
    """The token weights of one forward pass, the sums they go to, and whether that pass has come to its end.

    Attributes:
        counted: ``[any, C]``, the weights of all tokens, or prompts, of the pass.
        found: ``[B]`` bool: the rows that have a last token; None where all have, or where weights are by token.
    """

    def __init__(self, token_weight: Tensor, buffers: list[dict[str, Tensor]], counted: Tensor | None = None) -> None:
        self.token_weight, self.buffers = token_weight, buffers
        self.counted = token_weight.flatten(0, -2) if counted is None else counted
        self.found: Tensor | None = None
        self.done = False

    @property
    def by_prompt(self) -> bool:
        """Whether the weights are of prompts, and count at their last tokens."""
        return self.token_weight.dim() == 2

    def of_call(
        self, shape: tuple[int, int], device: torch.device, attention_mask: object, past: Any, prompt: Prompt
    ) -> Tensor:
        """The weights of a call's tokens, ``[T, C]``; empties the buffers. ``shape``: [B, S] of the call."""
        expected = list(shape[: self.token_weight.dim() - 1])
        if list(self.token_weight.shape[:-1]) != expected:
            raise InputError(
                "token_weight",
                f"expected {[*expected, self.token_weight.shape[-1]]}, got {list(self.token_weight.shape)}",
            )
        for buffers in self.buffers:  # an earlier pass that did not come to its end may have left sums
            for buffer in buffers.values():
                buffer.zero_()
        token_weight = self.token_weight.to(device)
        if self.by_prompt:
            place = torch.arange(shape[1], dtype=torch.int64, device=device)
            seen = seen_by(past)
            shown = shown_tokens(attention_mask, shape, seen, device)
            if prompt.end is not None:  # `generate` may look ahead: tokens behind the prompt
                ahead = (place + seen < prompt.end)[None]
                shown = ahead if shown is None else shown & ahead
            last = place[-1:].expand(shape[0])
            if shown is not None:
                last = torch.where(shown, place, -1).amax(1).expand(shape[0])
                self.found = last >= 0
            token_weight = (place == last[:, None])[:, :, None] * token_weight[:, None]
        if torch.is_grad_enabled():  # from here on ``end_call`` follows
            sum_statistics_only(True)
        return token_weight.flatten(0, 1)

    def end_call(self, finished: bool) -> None:
        """The call is over; ``finished``: it came to its end."""
        self.done = finished
        if torch.is_grad_enabled():
            sum_statistics_only(False)

    def check_found(self) -> None:
        """Raise InputError if a row that counts has shown no token."""
        if self.found is not None:
            empty = ~self.found & (self.token_weight != 0).any(1).to(self.found.device)
            if empty.any():
                row = int(empty.nonzero()[0, 0])
                raise InputError("attention_mask", f"row {row} has no last token in this pass; give the row no weight")

    def fold_into(self, sums: ActivationSums) -> None:
        """Add the pass to the sums."""
        self.check_found()
        sums.discard()
        for layer, buffers in enumerate(self.buffers):
            for name, buffer in buffers.items():
                getattr(sums, name)[layer, :, : buffer.shape[-1]] = buffer.to(sums.act_sum.device)
        sums.fold(self.counted)


def buffers_for(sums: ActivationSums, layer: int, width: int, device: torch.device) -> dict[str, Tensor]:
    """Empty buffers for a layer's part of the sums, by their names."""
    kept = {name: x for name, x in sums.layer(layer).items() if x is not None}
    shape = sums.count.shape[0], width
    return {name: torch.zeros(shape, dtype=x.dtype, device=device) for name, x in kept.items()}


def shown_tokens(mask: object, shape: tuple[int, int], seen: Any, device: torch.device) -> Tensor | None:
    """Which tokens of a call an attention mask shows, ``[B, S]`` or ``[1, S]`` bool; None: it hides none.

    Args:
        mask: as the decoders of transformers take it: ``[B, K]``, not 0 where shown, with a column for each token in
            the cache, too; ``[B, heads, S, K]``, bool or added to the scores; a dict of such masks; or None.
        shape: [B, S] of the call.
        seen: how many tokens the cache held before.
    """
    n_rows, n_tokens = shape
    if isinstance(mask, dict):
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()), None)
    if mask is None:
        return None
    by_key = isinstance(mask, Tensor) and mask.dim() == 2
    by_pair = isinstance(mask, Tensor) and mask.dim() == 4 and (mask.dtype == torch.bool or mask.is_floating_point())
    if not isinstance(mask, Tensor) or not (by_key or by_pair):
        raise InputError("token_weight", "[B, C] needs an attention mask [B, S] or [B, heads, S, S]; give [B, S, C]")
    first = seen if torch.compiler.is_compiling() else int(seen)
    rows = mask.shape[0] in ((n_rows,) if by_key else (1, n_rows))
    if not rows or mask.shape[-1] < first + n_tokens or (by_pair and mask.shape[2] != n_tokens):
        what = f"expected {n_rows} rows and a column for each of {first + n_tokens} tokens, those in the cache too"
        raise InputError("attention_mask", f"{what}; got {list(mask.shape)}; or give token_weight as [B, S, C]")
    column = torch.arange(n_tokens, dtype=torch.int64, device=mask.device) + first
    if by_key:
        return (mask[:, column] != 0).to(device)
    own = mask[:, :, column - first, column]  # [B, heads, S]: whether each token sees itself
    return (own if own.dtype == torch.bool else own > MASKED).any(1).to(device)
