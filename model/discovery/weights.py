"""What selection asks of a model's weights: the norms of the columns of ``down_proj``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cna_kernels.blocks import dense

from ..transformer import Transformer

if TYPE_CHECKING:
    from ..language_model import LanguageModel


def down_norms(model: LanguageModel) -> Tensor:
    """Return the norm of each neuron's column of ``down_proj``, fp64 ``[L, N]``: how far it can move the stream.

    A model that is streamed or shared does not hold its layers: the weights are read from the checkpoint, one layer at
    a time, and rounded to the dtype that the model runs in.
    """
    transformer, found = model.transformer, []
    for number in range(model.config.num_hidden_layers):
        if type(transformer) is Transformer:
            weight = dense(transformer.layers[number].mlp.down_proj.weight, torch.float32)  # [H, N]
        else:
            weight = model.checkpoint.read(f"model.layers.{number}.mlp.down_proj.weight").to(transformer.dtype)
        found.append(weight.double().norm(dim=0).cpu())
    return torch.stack(found)
