"""What selection asks of a model's weights: the norms of the columns of ``down_proj``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cna_kernels.blocks import dense

from ..transformer import Transformer

if TYPE_CHECKING:
    from ..language_model import LanguageModel

_COLUMNS = 1024  # columns that are taken at a time


def down_norms(model: LanguageModel) -> Tensor:
    """Return the norm of each neuron's column of ``down_proj``, fp64 ``[L, N]``: how far it can move the stream.

    A model that is streamed or shared does not hold its layers: the weights are read from the checkpoint, one layer at
    a time, and rounded to the dtype that the model runs in.
    """
    transformer, found = model.transformer, []
    for number, width in enumerate(model.config.widths):
        if model.engine != "own":
            found.append(_norms_in_parts(transformer, number, width, model.config.intermediate_size))
            continue
        if type(transformer) is Transformer:
            weight = dense(transformer.layers[number].mlp.down_proj.weight, torch.float32)  # [H, N]
        else:
            weight = model.checkpoint.read(f"model.layers.{number}.mlp.down_proj.weight").to(transformer.dtype)
        found.append(weight.double().norm(dim=0).cpu())
    return torch.stack(found)


def _norms_in_parts(transformer: Any, layer: int, width: int, n_neurons: int) -> Tensor:
    """The norms of a layer's columns, ``[N]`` with 0 behind its own ``width`` neurons."""
    norms = torch.zeros(n_neurons, dtype=torch.float64)
    for start in range(0, width, _COLUMNS):
        index = range(start, min(start + _COLUMNS, width))
        norms[index.start : index.stop] = transformer.down_columns(layer, index).double().norm(dim=0).cpu()
    return norms
