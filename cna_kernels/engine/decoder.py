"""The forward of an attached decoder: it tells the engine of every call."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .patch import call_plain

ENGINE = "_cna_engine"  # the attribute of an attached decoder
ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    layers = decoder.layers
    assert isinstance(layers, nn.ModuleList), "find_decoder has looked"
    return list(layers)


def decoder_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    engine = getattr(self, ENGINE, None)
    if engine is None:
        return call_plain(self, *args, **kwargs)

    call = dict(zip(engine._passes.places, args, strict=False)) | kwargs
    embeds = call.get("inputs_embeds")
    source = call.get("input_ids") if embeds is None else embeds
    if source is None:
        return call_plain(self, *args, **kwargs)  # raises what it raises without an engine
    if call.get("use_cache") is None:
        call["use_cache"] = getattr(self.config, "use_cache", False)
    with nullcontext() if torch.compiler.is_compiling() else engine.table.lock:
        begun, y = engine._passes.begin(source.shape[:2], source.device, call), None
        try:
            y = call_plain(self, *args, **kwargs)
            return y
        finally:
            engine._passes.end(begun, y)


decoder_forward.__name__ = "forward"  # pickle then takes the ``forward`` of the model's class for it
