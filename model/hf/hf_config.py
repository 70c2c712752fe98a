"""The shape of a model that transformers runs, from its config.json and an empty model: no weight is read."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cna_kernels.engine.find import find_decoder, layer_experts
from cna_kernels.errors import InputError, warn
from cna_kernels.fields import short
from cna_kernels.files import read_json

from ..packages import require

ENDLESS = 1 << 30  # the context of a model whose config.json gives none
_WRITERS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "Model")
# Fields of config.json that say nothing of what the model computes.
_ASIDE = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache")


@dataclass(frozen=True)
class HfConfig:
    """What the rest of the package asks of a model's shape. The names are those of ``ModelConfig``.

    Attributes:
        intermediate_size: the most neurons of any layer; those of all experts count.
        widths: the neurons of each layer.
        experts: as ``Circuit.experts``; None without a mixture.
        dtype: of the weights; None where config.json does not say.
        context_length: the longest sequence in tokens, and at most the length from which on transformers lets the
            rotation of all rows of a batch depend on the longest (dynamic and longrope scaling).
        decoder_names: the names of the decoder's weights, without any quantisation.
        settings: the fields of config.json that count for the identity of the model.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    context_length: int
    widths: tuple[int, ...]
    experts: tuple[tuple[int, int], ...] | None
    dtype: str | None
    decoder_names: tuple[str, ...]
    settings: dict[str, Any]

    def shares_beginnings(self, longest: int) -> bool:
        """Whether prompts of up to ``longest`` tokens may share what was computed of their common beginning."""
        return True


@contextmanager
def in_one_line(directory: Path | str) -> Iterator[None]:
    """Turn what transformers raises over a checkpoint into an InputError that names the directory."""
    try:
        yield
    except InputError as error:
        raise error if error.where != "model" else InputError(directory, error.what) from None
    except Exception as error:  # anything: the files decide which code runs
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        what = " ".join(lines[:3])
        raise InputError(directory, f"transformers cannot load it: {type(error).__name__}: {what}") from None


def read_hf_config(directory: Path) -> tuple[HfConfig, Any]:
    """Return the shape of a checkpoint, and its configuration as transformers has it.

    Raises:
        InputError: transformers is missing or does not know the model, or :func:`cna_kernels.attach` does not.
    """
    require("transformers")
    import transformers

    path = directory / "config.json"
    record = read_json(path, limit=1 << 22)
    if not isinstance(record, dict):
        raise InputError(path, "expected a JSON object")
    architectures = record.get("architectures")
    if architectures and not any(str(name).endswith(_WRITERS) for name in architectures):
        raise InputError(f"{path}: architectures", f"expected a model that writes text, got {short(architectures)}")
    with in_one_line(directory):
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        text = config.get_text_config(decoder=True)
        _pass_over_stray_window(text, path)
        decoder = find_decoder(empty_model(config))
        pairs = layer_experts(decoder)
        widths = tuple(n * own for n, own in pairs)
        dtype = text.dtype if text.dtype is not None else config.dtype
        found = HfConfig(
            model_type=str(record.get("model_type")),
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=max(widths),
            num_hidden_layers=len(widths),
            context_length=_context(getattr(text, "max_position_embeddings", None) or ENDLESS, text),
            widths=widths,
            experts=tuple(pairs) if any(n > 1 for n, _ in pairs) else None,
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            decoder_names=tuple(decoder.state_dict()),
            settings={name: value for name, value in sorted(record.items()) if name not in _ASIDE},
        )
    return found, config


def _context(max_position: int, text: Any) -> int:
    """The context of a model whose config.json names ``max_position``, after its rope scaling."""
    rope = getattr(text, "rope_parameters", None) or {}
    each = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # one, or one for each kind of layer
    lengths = []
    for part in each:
        kind, factor = part.get("rope_type"), part.get("factor") or 1.0
        original = part.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        if kind == "longrope":
            lengths.append(original or max_position)
        elif kind == "linear":
            lengths.append(int(max_position * factor))
        elif kind == "yarn":
            lengths.append(max(max_position, int((original or max_position) * factor)))
    return min(lengths, default=max_position)


def _pass_over_stray_window(text: Any, path: Path) -> None:
    """Take away a sliding window that the model's class does not have: its attention would see all tokens, while
    caches of transformers would drop those outside of the window."""
    kind = type(text)
    known = hasattr(kind, "sliding_window") or "sliding_window" in inspect.signature(kind.__init__).parameters
    if getattr(text, "sliding_window", None) is not None and not known:
        warn(f"{path}: sliding_window: is no setting of {kind.__name__}, and is passed over")
        del text.sliding_window


def plain_config(config: Any) -> Any:
    """A copy of a configuration that asks for no quantisation."""
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return plain


def empty_model(config: Any, device: torch.device | str = "meta", dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a configuration, its layers as they are before any quantisation: on the meta device it has no
    weights, on another one random weights."""
    import transformers

    plain = plain_config(config)
    with torch.device(device):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(plain, dtype=dtype, trust_remote_code=False)
    return model
