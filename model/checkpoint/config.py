"""config.json of a Llama, Qwen or Mistral checkpoint -> ModelConfig. Only known fields are read, each with a range.

Nothing in the file selects code: ``auto_map`` is refused. NotServed is a model for transformers, see ``hf/``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from cna_kernels.errors import InputError
from cna_kernels.fields import REQUIRED, Fields, is_number, short
from cna_kernels.files import read_json


class NotServed(InputError):
    """A model that may well be sound, but that our own forward pass does not serve."""


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dtype_asked(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that a caller asks for, by name or itself; None for "auto" and None: the checkpoint's own.

    Raises:
        InputError: none of DTYPES.
    """
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return None
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise InputError("dtype", f"expected auto or one of {', '.join(DTYPES)}, by name or of torch, got {short(dtype)}")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        kind: default, linear, dynamic, llama3, yarn, longrope, or factors: each frequency is divided by its own
            ``short_factor``, as a GGUF file stores llama3.
        factor: how much longer the context is than the one that the model was first trained for.
        low_freq_factor, high_freq_factor, original_max_position: of llama3; the last also of yarn and longrope.
        beta_fast, beta_slow, truncate: of yarn.
        short_factor, long_factor: of longrope, one for each frequency; the first also of factors.
        attention_factor: what cos and sin are multiplied by.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def by_length(self, max_position: int) -> int | None:
        """The length beyond which frequencies depend on the sequence's length; None where they never do."""
        return {"dynamic": max_position, "longrope": self.original_max_position}.get(self.kind)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model.

    Attributes:
        sliding_windows: for each layer its window, or None for full attention.
        dtype: of the weights; None where config.json does not say.
    """

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
    dtype: str | None
    mlp_bias: bool = False

    @property
    def widths(self) -> list[int]:
        """The neurons of each layer."""
        return [self.intermediate_size] * self.num_hidden_layers

    @property
    def experts(self) -> None:
        """As ``Circuit.experts``: no layer has any."""
        return None

    def shares_beginnings(self, longest: int) -> bool:
        """Whether prompts of up to ``longest`` tokens may share what was computed of their common beginning: not where
        rotations depend on a prompt's length."""
        limit = self.rope.by_length(self.max_position_embeddings)
        return limit is None or longest <= limit

    @property
    def context_length(self) -> int:
        """The longest sequence in tokens: a scaled rotary embedding stretches the context by its factor."""
        kind, factor = self.rope.kind, self.rope.factor
        if kind in ("dynamic", "linear"):
            return int(self.max_position_embeddings * factor)
        if kind == "yarn":
            return max(self.max_position_embeddings, int(self.rope.original_max_position * factor))
        return self.max_position_embeddings


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
        NotServed: naming the file and the field that asks for what our forward pass does not do.
        InputError: naming the file and the field that is missing, out of range or not supported.
    """
    path = Path(directory) / "config.json"
    fields = Fields(read_json(path, limit=1 << 20), path)
    model_type = _served_type(fields)
    architectures, stem = fields.record.get("architectures"), _ARCHITECTURES[model_type]
    if architectures not in (None, [], [stem], [stem.replace("ForCausalLM", "Model")]):
        raise fields.error("architectures", f"expected [{stem!r}], got {architectures!r}")
    fields.refuse("auto_map")
    mlp_bias = model_type == "llama" and fields.boolean("mlp_bias", False)

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
        rope=_read_rope(fields, max_position, head_dim),
        sliding_windows=_read_windows(fields, model_type, n_layers, defaults),
        dtype=_dtype(fields),
        mlp_bias=mlp_bias,
    )


def _served_type(fields: Fields) -> str:
    """The type of a model that our forward pass serves, as far as that shows without its sizes. Raises NotServed."""
    model_type = fields.text("model_type")
    try:
        fields.one_of("model_type", _ARCHITECTURES)
        fields.one_of("hidden_act", ("silu",), "silu")
        quantized = fields.record.get("quantization_config")
        if quantized is not None:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise fields.error("quantization_config", f"is not supported by our own forward pass, got {short(method)}")
        fields.refuse("partial_rotary_factor", (None, 1, 1.0))
        for name in ("rope_scaling", "rope_parameters"):
            rope = fields.record.get(name)
            if isinstance(rope, dict) and any(isinstance(value, dict) for value in rope.values()):
                raise fields.error(name, "different parameters for different layers are not supported")
            if isinstance(rope, dict):
                Fields(rope, fields.where, f"{name}.").refuse("partial_rotary_factor", (None, 1, 1.0))
    except InputError as error:
        raise NotServed(error.where, error.what) from None
    return model_type


def _dtype(fields: Fields) -> str | None:
    """The dtype of the weights, under its newer or its older name, or None: that of the weights themselves."""
    for name in ("dtype", "torch_dtype"):
        if fields.record.get(name) not in (None, "auto"):
            value = fields.text(name)
            return Fields({name: value.removeprefix("torch.")}, fields.where).one_of(name, DTYPES)
    return None


_SCALED = ("linear", "dynamic", "llama3", "yarn", "longrope")


def _read_rope(fields: Fields, max_position: int, head_dim: int) -> Rope:
    """Read ``rope_scaling`` with ``rope_theta``, or else ``rope_parameters``, as transformers 5 chooses.

    A file that has both was most likely written in the newer spelling and edited in the older.
    """
    theta_bounds = (1.0, 1e12)
    name = "rope_scaling" if fields.record.get("rope_scaling") else "rope_parameters"
    theta = fields.number("rope_theta", theta_bounds, 10_000.0)
    if not fields.record.get(name):
        return Rope(theta=theta)
    rope = fields.object(name)
    kinds = ("default", *_SCALED)
    kind = rope.one_of("rope_type", kinds, None) or rope.one_of("type", kinds, "default")
    theta = rope.number("rope_theta", theta_bounds, theta)
    if kind == "default":
        return Rope(theta=theta)
    if kind in ("linear", "dynamic"):
        return Rope(kind, theta, rope.number("factor", (1.0, 1e6)))
    # A value beside the object goes before the value in it.
    original = fields.integer("original_max_position_embeddings", _BIG, None)
    if original is None:
        original = rope.integer("original_max_position_embeddings", _BIG, max_position)
    if kind == "llama3":
        factor = rope.number("factor", (1.0, 1e6))
        low = rope.number("low_freq_factor", (1e-6, 1e6))
        high = rope.number("high_freq_factor", (1e-6, 1e6))
        if high <= low:
            raise rope.error("high_freq_factor", f"expected above low_freq_factor {low:g}, got {high:g}")
        return Rope(kind, theta, factor, low, high, original)
    stretch = max_position / original
    factor = rope.number("factor", (1e-6, 1e6), stretch if kind == "longrope" or "factor" in rope.record else REQUIRED)
    scale = rope.number("attention_factor", (1e-6, 1e6), None)
    if kind == "yarn" and theta == 1:
        where = rope if "rope_theta" in rope.record else fields
        raise where.error("rope_theta", "expected more than 1 for yarn, got 1")
    if kind == "longrope":
        if scale is None and factor > 1 and original == 1:
            raise rope.error("original_max_position_embeddings", "expected more than 1 for longrope, got 1")
        if scale is None:
            scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        short, long = (_factors(rope, name, head_dim // 2) for name in ("short_factor", "long_factor"))
        return Rope(
            kind, theta, factor, original_max_position=original, short_factor=short, long_factor=long,
            attention_factor=scale,
        )  # fmt: skip
    if scale is None:
        scales = [rope.number(name, (0.0, 1e6), None) for name in ("mscale", "mscale_all_dim")]
        scale = _yarn_scale(factor, scales[0]) / _yarn_scale(factor, scales[1]) if all(scales) else _yarn_scale(factor)
    return Rope(
        kind,
        theta,
        factor,
        original_max_position=original,
        beta_fast=_beta(rope, "beta_fast", 32.0),
        beta_slow=_beta(rope, "beta_slow", 1.0),
        truncate=rope.boolean("truncate", True),
        attention_factor=scale,
    )


def _factors(rope: Fields, name: str, n: int) -> tuple[float, ...]:
    values = rope.items(name, lambda x: is_number(x) and 0 < x < 1e9, "a number above 0")
    if len(values) != n:
        raise rope.error(name, f"expected {n} numbers, one for each frequency, got {len(values)}")
    return tuple(map(float, values))


def _beta(rope: Fields, name: str, default: float) -> float:
    """How often a frequency turns; 0 stands for the default, as in transformers."""
    value = rope.number(name, (0.0, 1e6), None) or default
    if value < 1e-6:
        raise rope.error(name, f"expected 0 or a number from 1e-06, got {value}")
    return value


def _yarn_scale(factor: float, weight: float | None = 1.0) -> float:
    """The attention's temperature. Source: B. Peng et al., YaRN, arXiv 2309.00071, equation 22."""
    return 1.0 if factor <= 1 or weight is None else 0.1 * weight * math.log(factor) + 1.0


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
