"""Safetensors checkpoints in Hugging Face layout -> a Transformer. All names and shapes are checked before any read."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from cna_kernels.errors import InputError
from cna_kernels.files import write_bytes

from ..memory import memory_of
from ..transformer import Layer, Transformer
from .config import DTYPES, ModelConfig
from .safetensors_file import SINGLE, Checkpoint

_LAYER = "model.layers.{}."


DOWN = "model.layers.{}.mlp.down_proj.weight"


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
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for number in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes


def check_entries(checkpoint: Checkpoint, config: ModelConfig, directory):
    """Raise InputError naming the first tensor that is missing, extra or misshapen, or differs from its tied tensor."""
    shapes = expected_shapes(config)
    for name, shape in shapes.items():
        if name not in checkpoint.entries:
            raise InputError(f"{directory}: {name!r}", "is missing from the checkpoint")
        entry = checkpoint.entries[name]
        if entry.shape != shape:
            raise InputError(f"{entry.path}: {name!r}", f"expected shape {list(shape)}, got {list(entry.shape)}")
    for name, entry in checkpoint.entries.items():
        derived = name.endswith(".rotary_emb.inv_freq")  # Llama 2 files hold inv_freq; it follows from config.json
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        if name not in shapes and not derived and not tied:
            raise InputError(f"{entry.path}: {name!r}", f"is not a tensor of a {config.model_type} model")
    if config.tie_word_embeddings and "lm_head.weight" in checkpoint.entries:
        _require_equal(checkpoint, "lm_head.weight", "model.embed_tokens.weight")


def _require_equal(checkpoint, name, other):
    if not checkpoint.same_values(name, other):
        path = checkpoint.entries[name].path
        raise InputError(f"{path}: {name!r}", f"differs from {other!r}, though config.json ties them")


def load_transformer(
    directory, config: ModelConfig, checkpoint: Checkpoint, *, dtype=None, device="cpu"
) -> Transformer:
    """Build the model on the meta device and give it the checkpoint's tensors one by one.

    At most one tensor exists twice at a time. ``dtype`` None keeps the dtype of config.json.
    """
    check_entries(checkpoint, config, directory)
    dtype = DTYPES[config.dtype] if dtype is None else dtype
    check_memory(config, dtype, device, directory)
    with torch.device("meta"):
        transformer = Transformer(config)
    for name in expected_shapes(config):
        _load_tensor(transformer, name.removeprefix("model."), checkpoint, name, dtype, device)
    transformer.rotary.to(device)
    return transformer.eval()


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


def check_memory(config, dtype, device, directory):
    """Raise InputError where memory cannot hold the weights, before any weight is allocated."""
    needed = dtype.itemsize * sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())
    available = memory_of(device)
    if available is not None and needed > available:
        raise InputError(directory, f"needs {needed / 2**30:.1f} GiB for weights, {device} has {available / 2**30:.1f}")


def save_transformer(transformer: Transformer, directory, *, dtype=torch.bfloat16):
    """Write ``model.safetensors`` with the checkpoint's names; gate_up_proj is split into gate_proj and up_proj."""
    from safetensors.torch import save

    state = dict(transformer.named_parameters())
    tensors = {}
    for name in expected_shapes(transformer.config):
        path = name.removeprefix("model.")
        half = 0 if ".gate_proj." in path else 1 if ".up_proj." in path else None
        value: torch.Tensor = state[path.replace("gate_proj", "gate_up_proj").replace(".up_proj", ".gate_up_proj")]
        value = value if half is None else value.chunk(2)[half]
        tensors[name] = value.detach().to(dtype).contiguous()
    write_bytes(Path(directory) / SINGLE, save(tensors, metadata={"format": "pt"}))
