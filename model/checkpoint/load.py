"""Safetensors checkpoints in Hugging Face layout -> a Transformer. All names and shapes are checked before any read."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cna_kernels.blocks import BlockWeight, dense
from cna_kernels.errors import InputError, InputWarning
from cna_kernels.files import write_bytes

from ..memory import memory_of
from ..transformer import Layer, Transformer
from .config import DTYPES, ModelConfig
from .gguf_file import GgufEntry
from .safetensors_file import SINGLE, Checkpoint, TensorEntry

_LAYER = "model.layers.{}."


DOWN = "model.layers.{}.mlp.down_proj.weight"
_EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name in the file, and the shape, of every tensor that a checkpoint of this model holds."""
    hidden, neurons, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_proj.weight": (neurons, hidden),
        "mlp.up_proj.weight": (neurons, hidden),
        "mlp.down_proj.weight": (hidden, neurons),
    }
    if config.qkv_bias:
        layer |= {"self_attn.q_proj.bias": (query,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if config.o_bias:
        layer["self_attn.o_proj.bias"] = (hidden,)
    if config.mlp_bias:
        layer |= {"mlp.gate_proj.bias": (neurons,), "mlp.up_proj.bias": (neurons,), "mlp.down_proj.bias": (hidden,)}
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for number in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes


# Tensors that change no logit: tables that follow from config.json, and scales of a quantised KV cache.
_DERIVED = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|attn(ention)?\.(bias|masked_bias)|[qkv]_scale|kv_scale)$"
)


def check_entries(checkpoint: Checkpoint, config: ModelConfig, directory):
    """Raise InputError naming the first tensor that is missing, misshapen or might change what the model computes.

    Accepted beside the model's own tensors are tables that follow from config.json, biases of zeros, layers beyond
    those of config.json, and tensors outside the decoder, such as a value head's.
    """
    shapes, entries = expected_shapes(config), checkpoint.entries
    if config.tie_word_embeddings and _EMBEDDING not in entries and HEAD in entries:
        entries[_EMBEDDING] = entries[HEAD]  # the tied tensor is stored under its other name
    for name, shape in shapes.items():
        if name not in entries:
            raise InputError(f"{directory}: {name!r}", "is missing from the checkpoint")
        entry = entries[name]
        if entry.dtype is None:
            raise InputError(f"{entry.path}: {name!r}", f"expected dtype BF16, F16, F32 or F64, got {entry.stored}")
        if entry.shape != shape:
            raise InputError(f"{entry.path}: {name!r}", f"expected shape {list(shape)}, got {list(entry.shape)}")
    beyond = set()
    for name, entry in entries.items():
        if name in shapes or (config.tie_word_embeddings and name == HEAD):
            continue
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is not None and int(layer[1]) >= config.num_hidden_layers:
            beyond.add(int(layer[1]))
        else:
            _require_harmless(checkpoint, config, name, entry)
    if beyond:
        what = f"holds {len(beyond)} layers more than the {config.num_hidden_layers} of config.json; they are not used"
        warnings.warn(f"{directory}: {what}", InputWarning, stacklevel=4)
    if config.tie_word_embeddings and HEAD in entries and entries[HEAD] is not entries[_EMBEDDING]:
        _require_equal(checkpoint, HEAD, _EMBEDDING)


def _require_harmless(checkpoint: Checkpoint, config: ModelConfig, name: str, entry: TensorEntry):
    outside = not name.startswith("model.") and name != HEAD
    if _DERIVED.search(name) or outside:
        return
    if name.endswith(".bias") and entry.dtype is not None and not checkpoint.read(name).any():
        return
    what = f"is not a tensor of a {config.model_type} model, and may change what it computes"
    raise InputError(f"{entry.path}: {name!r}", what)


def _require_equal(checkpoint, name, other):
    if not checkpoint.same_values(name, other):
        path = checkpoint.entries[name].path
        what = f"differs from {other!r}, though config.json ties them; some loaders take this one, others that one"
        raise InputError(f"{path}: {name!r}", what)


def load_transformer(
    directory, config: ModelConfig, checkpoint: Checkpoint, *, dtype=None, device="cpu"
) -> Transformer:
    """Build the model on the meta device and give it the checkpoint's tensors one by one.

    At most one tensor exists twice at a time. ``dtype`` None keeps the dtype of config.json. On a CPU matrices that a
    GGUF file holds in blocks stay there: the file is mapped into memory, and must not change while the model is used.
    """
    check_entries(checkpoint, config, directory)
    dtype = dtype_of(config, checkpoint) if dtype is None else dtype
    in_blocks = _in_blocks(checkpoint, config) if torch.device(device).type == "cpu" else {}
    check_memory(config, dtype, device, directory, in_blocks)
    with torch.device("meta"):
        transformer = Transformer(config)
    transformer.embed_tokens.row_dtype = dtype
    files: dict[Path, Any] = {}
    for name in expected_shapes(config):
        path = name.removeprefix("model.")
        if name not in in_blocks:
            _load_tensor(transformer, path, checkpoint, name, dtype, device)
        elif ".gate_proj." in path:
            up = in_blocks[name.replace("gate_proj", "up_proj")]
            pair = in_blocks[name].in_blocks(files), up.in_blocks(files)
            _set_blocks(transformer, path.replace("gate_proj", "gate_up_proj"), pair)
        elif ".up_proj." not in path:
            _set_blocks(transformer, path, in_blocks[name].in_blocks(files))
    transformer.rotary.to(device)
    return transformer.eval()


def _in_blocks(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, GgufEntry]:
    """The matrices that stay in the blocks of their file. gate_proj and up_proj do so together, or not at all."""
    entries = {name: checkpoint.entries[name] for name in expected_shapes(config)}
    found = {name: entry for name, entry in entries.items() if isinstance(entry, GgufEntry) and entry.is_in_blocks}

    def other(name: str) -> str:
        return name.replace("gate_proj", "up_proj") if "gate_proj" in name else name.replace("up_proj", "gate_proj")

    return {name: entry for name, entry in found.items() if other(name) in found}


def _set_blocks(module: nn.Module, path: str, value: BlockWeight | tuple[BlockWeight, BlockWeight]):
    owner_path, _, name = path.rpartition(".")
    owner = module.get_submodule(owner_path)
    delattr(owner, name)  # a Parameter, whose name takes nothing else
    setattr(owner, name, value)


def dtype_of(config: ModelConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that config.json names, or else that of the weights: of the first that is stored."""
    if config.dtype is not None:
        return DTYPES[config.dtype]
    first = min(checkpoint.entries.values(), key=lambda entry: (entry.dtype is None, entry.path.name, entry.start))
    if first.dtype is None or first.dtype not in DTYPES.values():
        what = f"is stored as {first.stored}, and config.json names no dtype; name one (--dtype)"
        raise InputError(f"{first.path}: {first.name!r}", what)
    return first.dtype


def layer_size(config: ModelConfig) -> int:
    """The number of weights in one layer."""
    return sum(math.prod(shape) for name, shape in expected_shapes(config).items() if name.startswith(_LAYER.format(0)))


def load_layer(checkpoint: Checkpoint, config: ModelConfig, number: int, *, dtype, device) -> Layer:
    """Read one layer of a checkpoint."""
    with torch.device("meta"):
        layer = Layer(config, number)
    start = _LAYER.format(number)
    for name in expected_shapes(config):
        if name.startswith(start):
            _load_tensor(layer, name.removeprefix(start), checkpoint, name, dtype, device)
    return layer.eval()


def _load_tensor(module: nn.Module, path: str, checkpoint, name: str, dtype, device):
    """Read one tensor into a module's parameter; gate_proj and up_proj are the two halves of gate_up_proj."""
    part = next((part for part in ("gate_proj", "up_proj") if f"{part}." in path), None)
    if part is None:
        _set_parameter(module, path, checkpoint.read(name).to(device=device, dtype=dtype))
        return
    path = path.replace(part, "gate_up_proj")
    joined = module.get_parameter(path)
    if joined.is_meta:
        joined = _set_parameter(module, path, torch.empty(joined.shape, dtype=dtype, device=device))
    half = 0 if part == "gate_proj" else 1
    joined.data.chunk(2)[half].copy_(checkpoint.read(name))


def _set_parameter(module: nn.Module, path: str, value: torch.Tensor) -> nn.Parameter:
    owner, _, name = path.rpartition(".")
    parameter = nn.Parameter(value, requires_grad=False)
    setattr(module.get_submodule(owner), name, parameter)
    return parameter


def check_memory(config, dtype, device, directory, in_blocks: Mapping[str, TensorEntry] | None = None):
    """Raise InputError where memory cannot hold the weights, before any weight is allocated.

    ``in_blocks``: those that take as many bytes as in the file.
    """
    in_blocks = in_blocks or {}
    read = [shape for name, shape in expected_shapes(config).items() if name not in in_blocks]
    needed = dtype.itemsize * sum(map(math.prod, read)) + sum(x.end - x.start for x in in_blocks.values())
    available = memory_of(device)
    if available is not None and needed > available:
        raise InputError(directory, f"needs {needed / 2**30:.1f} GiB for weights, {device} has {available / 2**30:.1f}")


def save_transformer(transformer: Transformer, directory, *, dtype=torch.bfloat16):
    """Write ``model.safetensors`` with the checkpoint's names; gate_up_proj is split into gate_proj and up_proj."""
    from safetensors.torch import save

    tensors = {}
    for name in expected_shapes(transformer.config):
        path = name.removeprefix("model.")
        half = 0 if ".gate_proj." in path else 1 if ".up_proj." in path else None
        owner, _, leaf = path.replace("gate_proj", "gate_up_proj").replace(".up_proj", ".gate_up_proj").rpartition(".")
        value: Any = getattr(transformer.get_submodule(owner), leaf)
        if half is not None:
            value = value[half] if isinstance(value, tuple) else value.chunk(2)[half]
        tensors[name] = dense(value, torch.float32).detach().to(dtype).contiguous()
    write_bytes(Path(directory) / SINGLE, save(tensors, metadata={"format": "pt"}))
