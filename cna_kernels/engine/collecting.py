"""One collection: the forward pass that ``Engine.collect`` waits for, and the sums that it goes to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError


class Collecting:
    """The token weights of one forward pass, the sums they go to, and whether that pass has come to its end."""

    def __init__(self, token_weight: Tensor, buffers: list[dict[str, Tensor]]) -> None:
        self.token_weight, self.buffers = token_weight, buffers
        self.counted = token_weight.flatten(0, -2)  # [any, C] the weights of all tokens, or prompts, of the pass
        self.done = False

    def of_call(self, shape: tuple[int, int], device: torch.device, attention_mask: object) -> Tensor:
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
        if token_weight.dim() == 2:
            if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
                raise InputError("token_weight", "[B, C] needs an attention mask [B, S], or none; give [B, S, C]")
            place = torch.arange(shape[1], device=device)
            last = place[-1:].expand(shape[0])
            if attention_mask is not None:
                last = (attention_mask[:, -shape[1] :].to(device) * place).argmax(1)
            token_weight = (place == last[:, None])[:, :, None] * token_weight[:, None]
        return token_weight.flatten(0, 1)
