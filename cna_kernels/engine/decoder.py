"""The forward of an attached decoder: it tells the engine of every call."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .patch import call_plain

ENGINE = "_cna_engine"  # the attribute of an attached decoder


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    layers = decoder.layers
    assert isinstance(layers, nn.ModuleList), "find_decoder has looked"
    return list(layers)


def decoder_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    engine = getattr(self, ENGINE, None)
    if engine is None:
        return call_plain(self, *args, **kwargs)

    def argument(name: str, place: int) -> Any:
        return kwargs[name] if name in kwargs else args[place] if len(args) > place else None

    embeds, ids = argument("inputs_embeds", 4), argument("input_ids", 0)
    source, finished = ids if embeds is None else embeds, False
    with nullcontext() if torch.compiler.is_compiling() else engine.table.lock:
        try:
            engine._begin(
                source.shape[:2],
                source.device,
                argument("attention_mask", 1),
                argument("position_ids", 2),
                argument("past_key_values", 3),
            )
            y = call_plain(self, *args, **kwargs)
            finished = True
            return y
        finally:
            engine._end(finished)


decoder_forward.__name__ = "forward"  # pickle then takes the ``forward`` of the model's class for it
