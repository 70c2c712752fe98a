"""config.json of a Llama, Qwen or Mistral checkpoint -> ModelConfig. Only known fields are read, each with a range.

Nothing in the file selects code: ``auto_map``, custom attention and quantization are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from cna_kernels.fields import REQUIRED, Fields
from cna_kernels.files import read_json

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: ``kind`` is default, linear, dynamic or llama3."""

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. ``sliding_windows`` has for each layer its window, or None for full attention."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    rope: Rope
    sliding_windows: tuple[int | None, ...]
    dtype: str

    @property
    def context_length(self) -> int:
        """The longest sequence in tokens: dynamic scaling stretches ``max_position_embeddings`` by its factor."""
        stretch = self.rope.factor if self.rope.kind == "dynamic" else 1.0
        return int(self.max_position_embeddings * stretch)


# The value of a field that config.json lacks, by model type, as in the models' own configuration classes.
_DEFAULTS = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_INT, _BIG = (1, 1 << 20), (1, 1 << 30)


def read_config(directory) -> ModelConfig:
    """Read and check ``config.json``.

    Raises:
        InputError: naming the file and the field that is missing, out of range or not supported.
    """
    path = Path(directory) / "config.json"
    fields = Fields(read_json(path, limit=1 << 20), path)
    model_type = fields.one_of("model_type", _ARCHITECTURES)
    architectures = fields.record.get("architectures")
    if architectures not in (None, [_ARCHITECTURES[model_type]]):
        raise fields.error("architectures", f"expected [{_ARCHITECTURES[model_type]!r}], got {architectures!r}")
    fields.one_of("hidden_act", ("silu",), "silu")
    fields.refuse("auto_map")
    fields.refuse("quantization_config")
    fields.refuse("mlp_bias", (None, False))
    fields.refuse("partial_rotary_factor", (None, 1, 1.0))

    defaults = _DEFAULTS[model_type]
    hidden_size = fields.integer("hidden_size", _INT)
    n_heads = fields.integer("num_attention_heads", _INT)
    # An explicit null means as many key-value heads as heads. A missing field means the model type's default.
    kv_default = n_heads if "num_key_value_heads" in fields.record else defaults.get("num_key_value_heads", n_heads)
    n_kv_heads = fields.integer("num_key_value_heads", _INT, min(kv_default, n_heads))
    head_dim = fields.integer("head_dim", (4, 1 << 12), defaults.get("head_dim"))
    if head_dim is None:
        if hidden_size % n_heads:
            raise fields.error(
                "hidden_size", f"expected a multiple of num_attention_heads {n_heads}, got {hidden_size}"
            )
        head_dim = hidden_size // n_heads
        if head_dim < 4:
            raise fields.error("hidden_size", f"expected at least 4 for each of {n_heads} heads, got {hidden_size}")
    if n_heads % n_kv_heads:
        raise fields.error("num_key_value_heads", f"expected a divisor of {n_heads} heads, got {n_kv_heads}")
    if head_dim % 2:
        raise fields.error("head_dim", f"expected an even number, got {head_dim}")
    n_layers = fields.integer("num_hidden_layers", (1, 1024))
    max_position = fields.integer("max_position_embeddings", _BIG, 2048 if model_type == "llama" else REQUIRED)
    attention_bias = fields.boolean("attention_bias", False)
    return ModelConfig(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size", _BIG),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", _INT),
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", (0, 1), 1e-6),
        max_position_embeddings=max_position,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        qkv_bias={"qwen2": True, "mistral": False}.get(model_type, attention_bias),
        o_bias=False if model_type in ("qwen2", "mistral") else attention_bias,
        qk_norm=model_type == "qwen3",
        rope=_read_rope(fields, max_position),
        sliding_windows=_read_windows(fields, model_type, n_layers, defaults),
        dtype=fields.one_of("dtype", DTYPES, None) or fields.one_of("torch_dtype", DTYPES, "float32"),
    )


def _read_rope(fields: Fields, max_position: int) -> Rope:
    """Read ``rope_parameters`` (newer spelling), or ``rope_theta`` with ``rope_scaling`` (older, may be null)."""
    theta_bounds = (1.0, 1e12)
    name = "rope_parameters" if fields.record.get("rope_parameters") is not None else "rope_scaling"
    record = fields.record.get(name)
    theta = fields.number("rope_theta", theta_bounds, 10_000.0)
    if record is None:
        return Rope(theta=theta)
    rope = fields.object(name)
    if any(isinstance(value, dict) for value in record.values()):
        raise fields.error(name, "different parameters for different layers are not supported")
    kinds = ("default", "linear", "dynamic", "llama3")
    kind = rope.one_of("rope_type", kinds, None) or rope.one_of("type", kinds, "default")
    rope.refuse("partial_rotary_factor", (None, 1, 1.0))
    theta = rope.number("rope_theta", theta_bounds, theta)
    if kind == "default":
        return Rope(theta=theta)
    factor = rope.number("factor", (1.0, 1e6))
    if kind != "llama3":
        return Rope(kind, theta, factor)
    low = rope.number("low_freq_factor", (1e-6, 1e6))
    high = rope.number("high_freq_factor", (1e-6, 1e6))
    if high <= low:
        raise rope.error("high_freq_factor", f"expected above low_freq_factor {low:g}, got {high:g}")
    return Rope(kind, theta, factor, low, high, rope.integer("original_max_position_embeddings", _BIG, max_position))


def _read_windows(fields: Fields, model_type, n_layers, defaults) -> tuple[int | None, ...]:
    """The sliding window of each layer. An explicit null in the file means full attention."""
    if model_type == "llama":
        return (None,) * n_layers
    if "sliding_window" in fields.record and fields.record["sliding_window"] is None:
        window = None
    else:
        window = fields.integer("sliding_window", _BIG, defaults["sliding_window"])
    if model_type == "mistral":
        return (window,) * n_layers
    if not fields.boolean("use_sliding_window", False):
        window = None
    kinds = fields.record.get("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers", (0, 1 << 20), defaults["max_window_layers"])
        return tuple(window if layer >= first else None for layer in range(n_layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != n_layers or any(kind not in known for kind in kinds):
        raise fields.error("layer_types", f"expected {n_layers} entries of {' or '.join(known)}")
    if window is None and "sliding_attention" in kinds:
        raise fields.error("layer_types", "asks for sliding_attention, but the sliding window is off")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
