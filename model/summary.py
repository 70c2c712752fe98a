"""A loaded model in a line: what ``repr(model)`` shows, and what commands say of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .checkpoint.config import ModelConfig
from .checkpoint.load import expected_shapes
from .discovery.streamed import StreamedTransformer
from .transformer import Transformer

if TYPE_CHECKING:
    from .language_model import LanguageModel

WAYS = {Transformer: "", StreamedTransformer: ", layers streamed from the checkpoint"}


def summary_of(model: LanguageModel) -> str:
    """Name, type, shape, dtype, device, and how the layers are split, from what is in memory: no file is read.

    A model whose loading has failed, as a debugger may show it, has a line, too.
    """
    if "transformer" not in vars(model):
        return "LanguageModel(not loaded)"
    config = model.config
    transformer: Any = model.transformer
    shape = f"{config.num_hidden_layers} layers x {config.intermediate_size} neurons"
    if isinstance(config, ModelConfig):
        n_weights = sum(math.prod(size) for size in expected_shapes(config).values())
    else:
        n_weights = transformer.n_weights() if transformer.answers else 0
    where = f"{str(transformer.dtype).removeprefix('torch.')} on {model.device}"
    if type(transformer) is Transformer and any(transformer.block_weights()):
        where += ", matrices in GGUF's blocks"
    way = WAYS.get(type(transformer))
    if model.engine != "own":
        way = ", on transformers" + ("" if transformer.answers else ", its weights not loaded")
    elif way is None:
        way = f", layers shared by {transformer.mesh.size()} ranks"
    name = model.directory.name or str(model.directory)
    return f"LanguageModel({name!r}, {config.model_type}, {shape}, {_count(n_weights)} weights, {where}{way})"


def described(model: LanguageModel, chat: bool | None, *, hashed: bool) -> str:
    """What prompts meet, in a line; see ``LanguageModel.describe``."""
    weights = f" {model.identity()['tensors_sha256'][:8]}" if hashed else ""
    tokens = ", ".join(f"{number} {model.tokenizer.token(number)!r}" for number in sorted(model.stop_ids))
    engine = "" if model.engine == "own" else f" on {model.engine}"
    name = f"{model.source.name!r}{weights}{model.source.origin}{engine}"
    return f"model {name}; {model.encoder.describe(chat)}; an answer ends at {tokens or 'no token'}"


def _count(n: float) -> str:
    """A number as 512, 12.3K, 134.5M or 8.0B."""
    if n < 1000:
        return str(n)
    for unit in "KMB":
        n /= 1000
        if n < 999.95 or unit == "B":
            break
    return f"{n:.1f}{unit}"
