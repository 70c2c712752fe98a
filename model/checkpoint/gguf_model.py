"""A GGUF file of a Llama, Qwen or Mistral model as a checkpoint: its settings, and its tensors under their usual names.

llama.cpp writes Mistral models as ``llama``. For ``llama`` it stores the rows of the query and key projections of each
head in pairs, (0, D/2, 1, D/2 + 1, ...), as its rotary embedding reads them; here they are put back in order. Source:
``LlamaModel.permute`` in llama.cpp's ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

from cna_kernels.errors import InputError
from cna_kernels.fields import Fields, is_number, is_whole, short
from cna_kernels.files import FilePath

from .config import ModelConfig, Rope
from .gguf_file import Gguf, GgufEntry, read_gguf
from .safetensors_file import Checkpoint, TensorEntry

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_HUGGING_FACE = ("embed_tokens.", "layers.", "norm.")  # beginnings of names that would stand for a model's own tensors
FREQUENCIES = "rope_freqs.weight"
# Fields that change what a model computes, and that no model of these architectures here follows: -> accepted values.
_REFUSED = {
    "expert_count": (None, 0), "attention.scale": (None,), "logit_scale": (None, 1.0), "residual_scale": (None, 1.0),
    "embedding_scale": (None, 1.0), "attention.clamp_kqv": (None, 0.0), "attention.max_alibi_bias": (None, 0.0),
    "use_parallel_residual": (None, False), "attention.causal": (None, True), "attn_logit_softcapping": (None, 0.0),
    "final_logit_softcapping": (None, 0.0), "attention.layer_norm_epsilon": (None,),
}  # fmt: skip
_INT, _BIG = (1, 1 << 20), (1, 1 << 30)


def read_gguf_config(path: FilePath) -> ModelConfig:
    """Return the model's shape.

    Raises:
        InputError: naming the file and the field that is missing, out of range or not supported.
    """
    gguf = read_gguf(path)
    fields, names = gguf.metadata, gguf.tensors
    arch = fields.one_of("general.architecture", ARCHITECTURES)
    for name, accepted in _REFUSED.items():
        fields.refuse(f"{arch}.{name}", accepted)
    hidden = fields.integer(f"{arch}.embedding_length", _INT)
    n_heads = _same_in_all_layers(fields, f"{arch}.attention.head_count")
    n_kv_heads = _same_in_all_layers(fields, f"{arch}.attention.head_count_kv", n_heads)
    if n_heads % n_kv_heads:
        what = f"expected a divisor of {n_heads} heads, got {n_kv_heads}"
        raise fields.error(f"{arch}.attention.head_count_kv", what)
    head_dim = fields.integer(f"{arch}.attention.key_length", (4, 1 << 12), hidden // n_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        fields.refuse(f"{arch}.{name}", (None, head_dim))
    if head_dim % 2 or head_dim < 4:
        raise fields.error(f"{arch}.embedding_length", f"expected an even number of 4 or more a head, got {head_dim}")
    n_layers = fields.integer(f"{arch}.block_count", (1, 1024))
    context = fields.integer(f"{arch}.context_length", _BIG)
    window = fields.integer(f"{arch}.attention.sliding_window", (0, _BIG[1]), 0)
    if 0 < window < context:
        raise fields.error(f"{arch}.attention.sliding_window", f"is not supported, got {window}")
    return ModelConfig(
        model_type=arch,
        vocab_size=_rows_of_embedding(gguf),
        hidden_size=hidden,
        intermediate_size=_same_in_all_layers(fields, f"{arch}.feed_forward_length"),
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_decimal(fields.number(f"{arch}.attention.layer_norm_rms_epsilon", (0, 1))),
        max_position_embeddings=context,
        tie_word_embeddings="output.weight" not in names,
        qkv_bias=arch == "qwen2" or "blk.0.attn_q.bias" in names,
        o_bias="blk.0.attn_output.bias" in names,
        qk_norm=arch == "qwen3",
        rope=_read_rope(gguf, arch, context, head_dim),
        sliding_windows=(None,) * n_layers,
        dtype=_dtype(names),
        mlp_bias="blk.0.ffn_gate.bias" in names,
    )


def _decimal(value: float) -> float:
    """The decimal number that was rounded to fp32: 1e-5, not 9.999999747378752e-06."""
    return float(f"{value:.6g}")


def _same_in_all_layers(fields: Fields, name: str, default=None) -> int:
    """A whole number; or the one number that a list has for all layers."""
    value = fields.record.get(name)
    if isinstance(value, list):
        if len(set(map(short, value))) != 1 or not is_whole(value[0]) or not 1 <= value[0] <= _INT[1]:
            raise fields.error(name, f"expected the same number for every layer, got {short(value)}")
        return value[0]
    return fields.integer(name, _INT, default) if default else fields.integer(name, _INT)


def _rows_of_embedding(gguf: Gguf) -> int:
    entry = gguf.tensors.get("token_embd.weight")
    if entry is None:
        raise InputError(f"{gguf.path}: 'token_embd.weight'", "is missing from the checkpoint")
    return entry.shape[0]


def _dtype(tensors: dict[str, GgufEntry]) -> str:
    """The dtype of most weights as they are stored; bf16 for block formats, whose own error is larger than bf16's."""
    sizes: Counter[str] = Counter()
    for entry in tensors.values():
        if len(entry.shape) > 1:
            sizes[entry.stored] += math.prod(entry.shape)
    most = max(sizes, key=lambda stored: sizes[stored], default="F32")
    return {"F32": "float32", "F64": "float32", "F16": "float16"}.get(most, "bfloat16")


def _read_rope(gguf: Gguf, arch: str, context: int, head_dim: int) -> Rope:
    fields = gguf.metadata
    theta = fields.number(f"{arch}.rope.freq_base", (1.0, 1e12), 10_000.0)
    kind = fields.one_of(f"{arch}.rope.scaling.type", ("none", "linear", "yarn"), None)
    factor = fields.number(f"{arch}.rope.scaling.factor", (1.0, 1e6), None)
    if factor is None:
        factor = fields.number(f"{arch}.rope.scale_linear", (1.0, 1e6), None)
    if kind is None:  # a factor without a type is linear, as in llama.cpp
        kind = "none" if factor in (None, 1.0) else "linear"
    entry = gguf.tensors.get(FREQUENCIES)
    if entry is not None:
        where = f"{entry.path}: {FREQUENCIES!r}"
        if kind != "none":
            raise InputError(where, f"beside rope.scaling.type {kind} is not supported")
        if entry.shape != (head_dim // 2,):
            raise InputError(where, f"expected shape {[head_dim // 2]}, got {list(entry.shape)}")
        factors = tuple(entry.read().double().tolist())
        if not all(is_number(x) and 0 < x < 1e9 for x in factors):
            raise InputError(where, "expected numbers above 0")
        return Rope("factors", theta, short_factor=factors)
    if kind == "none":
        return Rope(theta=theta)
    if factor is None:
        raise fields.error(f"{arch}.rope.scaling.factor", "is missing")
    if kind == "linear":
        return Rope(kind, theta, factor)
    if theta == 1:
        raise fields.error(f"{arch}.rope.freq_base", "expected more than 1 beside rope.scaling.type yarn, got 1.0")
    original = fields.integer(f"{arch}.rope.scaling.original_context_length", _BIG, context)
    attention = fields.number(f"{arch}.rope.scaling.attn_factor", (1e-6, 1e6), 1.0)
    for name in ("yarn_ext_factor", "yarn_attn_factor", "yarn_log_multiplier"):
        fields.refuse(f"{arch}.rope.scaling.{name}", (None, 1.0, -1.0))
    return Rope(
        kind,
        theta,
        factor,
        original_max_position=original,
        beta_fast=fields.number(f"{arch}.rope.scaling.yarn_beta_fast", (1e-6, 1e6), 32.0),
        beta_slow=fields.number(f"{arch}.rope.scaling.yarn_beta_slow", (1e-6, 1e6), 1.0),
        attention_factor=attention * (1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0),
    )


def open_gguf(path: FilePath) -> Checkpoint:
    """The tensors under the names that a checkpoint in Hugging Face layout has.

    A tensor that no model here has keeps its name behind "model.", and ``check_entries`` refuses it.
    """
    gguf = read_gguf(path)
    arch = gguf.metadata.one_of("general.architecture", ARCHITECTURES)
    n_heads = _same_in_all_layers(gguf.metadata, f"{arch}.attention.head_count")
    n_kv_heads = _same_in_all_layers(gguf.metadata, f"{arch}.attention.head_count_kv", n_heads)
    entries: dict[str, TensorEntry] = {}
    for name, entry in gguf.tensors.items():
        usual = _usual_name(name)
        if name == FREQUENCIES:
            continue
        if arch == "llama":
            heads = {"q_proj": n_heads, "k_proj": n_kv_heads}.get(usual.split(".")[-2] if "." in usual else "")
            if heads is not None and entry.shape[0] % (2 * heads) == 0:  # other shapes are refused later
                entry = dataclasses.replace(entry, heads=heads)
        if usual in entries or name.startswith(_HUGGING_FACE):
            raise InputError(f"{entry.path}: {name!r}", f"is not llama.cpp's name of {usual!r}")
        entries[usual] = entry
    return Checkpoint(entries)


def _usual_name(name: str) -> str:
    stem, _, end = name.rpartition(".")
    layer = stem.split(".")
    if layer[0] == "blk" and len(layer) == 3 and layer[2] in _NAMES:
        return f"model.layers.{layer[1]}.{_NAMES[layer[2]]}.{end}"
    return f"{_NAMES[stem]}.{end}" if stem in _NAMES else f"model.{name}"


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor that a checkpoint in Hugging Face layout has: the other way round."""
    names = {usual: own for own, usual in _NAMES.items()}
    stem, _, end = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{names[stem]}.{end}"
    _, _, number, rest = stem.split(".", 3)
    return f"blk.{number}.{names[rest]}.{end}"
