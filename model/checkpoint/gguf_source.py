"""What a GGUF file is written from: another GGUF file, or a directory in Hugging Face layout.

A GGUF file gives its fields and tensors as they are. The fields of a directory follow from config.json and from its
tokenizer, where GGUF has a place for all that they say; anything else is refused by file and field. For ``llama`` the
rows of the query and key projections of each head are stored in pairs, see ``gguf_model``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cna_kernels.errors import InputError
from cna_kernels.files import FilePath

from ..hub.names import checkpoint_name
from ..rope import RotaryEmbedding
from ..text.gguf_fields import BOOL, FLOAT32, HOW, TEXT, UINT32, Value, require_same_tokenizer, tokenizer_fields
from ..text.tokenizer import Tokenizer, stop_ids
from .config import ModelConfig, Rope
from .formats import open_checkpoint, read_config
from .gguf_file import is_gguf, read_gguf
from .gguf_model import FREQUENCIES, gguf_name, read_gguf_config
from .load import check_entries, expected_shapes

# Fields of a file that another file has of its own.
_OWN = ("general.architecture", "general.alignment", "general.file_type", "general.quantization_version")
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


@dataclass(frozen=True)
class SourceTensor:
    """One tensor to write.

    Attributes:
        name: in the GGUF file.
        stored: the type that it has now.
        pieces: yields its bytes in their order, about so many at a time, each with the rows ``[n, N]`` that they stand
            for. A vector is one row.
        heads: of a projection whose rows are to be stored in pairs: the number of heads; 0 where they stay in order.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    pieces: Callable[[int], Iterator[tuple[Any, torch.Tensor]]]
    heads: int = 0


@dataclass(frozen=True)
class Source:
    """What to write.

    Attributes:
        arch: ``general.architecture``.
        fields: all other fields, by name.
        tensors: in their order; ``rope_freqs.weight`` comes first.
        tied: whether the output projection is the embedding.
        check: raises InputError unless the file of that path, whose first tensor is there, is read as this model.
    """

    arch: str
    fields: dict[str, Value]
    tensors: list[SourceTensor]
    tied: bool
    check: Callable[[FilePath], None]


def source_of(path: FilePath) -> Source:
    """What a checkpoint in either format is to be written from.

    Raises:
        InputError: naming the file and the field that cannot be used, or that GGUF has no place for.
    """
    config, checkpoint = read_config(path), open_checkpoint(path)
    check_entries(checkpoint, config, path)
    return _of_gguf(path, config) if is_gguf(path) else _of_directory(Path(path), config, checkpoint)


def _of_gguf(path: FilePath, config: ModelConfig) -> Source:
    gguf = read_gguf(path)
    fields: dict[str, Value] = {}
    for name, value in gguf.metadata.record.items():
        if name in _OWN or name.startswith("split."):
            continue
        if value == []:
            raise gguf.metadata.error(name, "is an empty array, which the package gguf does not write")
        fields[name] = (value, *gguf.kinds[name])
    tensors = [SourceTensor(entry.name, entry.shape, entry.stored, entry.pieces) for entry in gguf.tensors.values()]
    tensors.sort(key=lambda tensor: tensor.name != FREQUENCIES)

    def check(written: FilePath) -> None:
        _require_same(config, read_gguf_config(written), path)

    return Source(config.model_type, fields, tensors, config.tie_word_embeddings, check)


def _of_directory(directory: Path, config: ModelConfig, checkpoint) -> Source:
    arch = _ARCHITECTURES[config.model_type]
    tokenizer = Tokenizer(directory, config.vocab_size)
    fields = _settings(directory, config, arch)
    fields |= tokenizer_fields(tokenizer, config.model_type, stop_ids(directory, tokenizer, config.vocab_size))
    tensors = []
    if config.rope.kind == "llama3":
        factors = _factors(config)
        tensors.append(SourceTensor(FREQUENCIES, tuple(factors.shape), "F32", lambda _: iter([(b"", factors[None])])))
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if arch == "llama" else {}
    for name, shape in expected_shapes(config).items():
        entry = checkpoint.entries[name]
        tensors.append(
            SourceTensor(gguf_name(name), shape, entry.stored, entry.pieces, heads.get(name.split(".")[-2], 0))
        )

    def check(written: FilePath) -> None:
        _require_same(config, read_gguf_config(written), directory / "config.json")
        require_same_tokenizer(tokenizer, config.model_type, written)

    return Source(arch, fields, tensors, config.tie_word_embeddings, check)


def _settings(directory: Path, config: ModelConfig, arch: str) -> dict[str, Value]:
    """The fields of ``config.json``."""
    whole = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    if any(window is not None and window < config.max_position_embeddings for window in config.sliding_windows):
        raise _no_place(directory, "sliding_window", "a window shorter than the context is not read from GGUF")
    fields: dict[str, Value] = {
        "general.type": ("model", TEXT, None),
        "general.name": (checkpoint_name(directory).rpartition("/")[2] or "model", TEXT, None),
        **{f"{arch}.{name}": (value, UINT32, None) for name, value in whole.items()},
        f"{arch}.attention.layer_norm_rms_epsilon": (config.rms_norm_eps, FLOAT32, None),
        f"{arch}.rope.freq_base": (config.rope.theta, FLOAT32, None),
    }
    scaling = _scaling(directory, config.rope)
    return fields | {f"{arch}.rope.scaling.{name}": value for name, value in scaling.items()}


def _scaling(directory: Path, rope: Rope) -> dict[str, Value]:
    if rope.kind in ("default", "llama3"):  # llama3 is a tensor of factors
        return {}
    if rope.kind not in ("linear", "yarn"):
        raise _no_place(directory, "rope_scaling.rope_type", f"{rope.kind} has no equivalent that is read from GGUF")
    fields: dict[str, Value] = {"type": (rope.kind, TEXT, None), "factor": (rope.factor, FLOAT32, None)}
    if rope.kind == "yarn":
        if not rope.truncate:
            raise _no_place(directory, "rope_scaling.truncate", "false has no equivalent in GGUF")
        fields |= {
            "original_context_length": (rope.original_max_position, UINT32, None),
            "finetuned": (True, BOOL, None),
            "yarn_beta_fast": (rope.beta_fast, FLOAT32, None),
            "yarn_beta_slow": (rope.beta_slow, FLOAT32, None),
        }
    return fields


def _factors(config: ModelConfig) -> torch.Tensor:
    """What each frequency of a llama3 embedding is divided by, ``[D / 2]`` fp32."""
    plain = RotaryEmbedding(dataclasses.replace(config, rope=Rope(theta=config.rope.theta))).inv_freq.double()
    return (plain / RotaryEmbedding(config).inv_freq.double()).float()


def _require_same(config: ModelConfig, written: ModelConfig, where: FilePath) -> None:
    """Raise InputError unless the settings of the file that is written are those of the checkpoint."""
    ours = dataclasses.asdict(config)
    theirs = dataclasses.asdict(written)
    for name in ("model_type", "dtype", "sliding_windows"):
        ours.pop(name), theirs.pop(name)
    if config.rope.kind == "llama3":  # as factors: the same frequencies but for their rounding
        one, two = (RotaryEmbedding(each).inv_freq for each in (config, written))
        if torch.allclose(one, two, rtol=1e-6, atol=0):
            theirs["rope"] = ours["rope"]
    for name, value in ours.items():
        if theirs[name] != value:
            name = next((f"rope.{n}" for n in value if value[n] != theirs[name][n]), name) if name == "rope" else name
            raise InputError(f"{where}: {name}", f"would be read as another value from GGUF; {HOW}")


def _no_place(directory: Path, name: str, what: str) -> InputError:
    return InputError(f"{directory / 'config.json'}: {name}", f"{what}; {HOW}")
