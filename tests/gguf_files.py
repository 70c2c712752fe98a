"""Tiny GGUF files, as llama.cpp writes them: by the ``gguf`` package from a transformers model and a tokenizer."""

import gguf
import numpy as np
import torch
import transformers

from tiny import SHAPE, VARIANTS

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
# Type -> bytes of a block of 256, and where its fp16 scales lie.
K_QUANTS = {"Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}
# Those of tiny.VARIANTS that a GGUF file holds as they are.
FAMILIES = [
    (name, changes)
    for name, (_, changes) in VARIANTS.items()
    if "dynamic" not in name and "sliding" not in name and name not in ("mistral", "llama-rope-linear")
]


def gguf_name(name):
    """ "model.layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight"."""
    stem, _, end = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, number, rest = stem.split(".", 3)
        return f"blk.{number}.{NAMES[rest]}.{end}"
    return f"{NAMES[stem]}.{end}"


def in_pairs(weight, n_heads):
    """Rows 0, D/2, 1, D/2 + 1, ... of each head, as llama.cpp stores the query and key projections of Llama."""
    halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def blocks_of(values, kind, seed):
    """The bytes of a matrix in a block format, ``[rows, bytes]``. K-quants, which gguf cannot write, hold random
    numbers of about the size of ``values``."""
    if kind not in K_QUANTS:
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    n_bytes, scales = K_QUANTS[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (values.size // 256, n_bytes), dtype=np.uint8)
    for place in scales:
        size = 1e-4 if kind == "Q6_K" else 2e-4
        scale = (size * rng.uniform(0.5, 1.5, len(blocks))).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(values.shape[0], -1)


def write_gguf(path, model, *, kind="F32", fields=(), tokenizer=None, tensors=()):
    """Write a transformers model; its matrices are stored as ``kind``.

    Args:
        fields: pairs of a method of GGUFWriter, without "add_", and its argument.
        tokenizer: a function that is given the GGUFWriter.
        tensors: further (name, array), or (name, None) for a tensor to leave out.
    """
    config = model.config
    arch = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim * config.num_attention_heads != config.hidden_size or arch == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    for name, value in fields:
        getattr(writer, f"add_{name}")(*value) if isinstance(value, tuple) else getattr(writer, f"add_{name}")(value)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        tokenizer(writer)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    left_out = {name for name, value in tensors if value is None}
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        values = parameter.detach().float().numpy()
        part = name.split(".")[-2]
        if arch == "llama" and part in heads:
            values = in_pairs(values, heads[part])
        name = gguf_name(name)
        if name in left_out:
            continue
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(name, np.ascontiguousarray(values))
        elif kind == "F16":
            writer.add_tensor(name, values.astype(np.float16))
        else:
            stored = blocks_of(np.ascontiguousarray(values), kind, seed)
            writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType[kind])
    for name, value in tensors:
        if value is not None:
            writer.add_tensor(name, np.asarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors(rope, head_dim):
    """The numbers of ``rope_freqs.weight``: what llama.cpp divides each frequency of a llama3 embedding by."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    original, low, high = (
        rope[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    factors = []
    for frequency in frequencies.tolist():
        turns = original * frequency / (2 * np.pi)
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(rope["factor"])
        else:
            smooth = (turns - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return factors


def tiny_model(stem="Llama", *, seed=0, **changes):
    """A random model whose rows hold whole blocks of 256."""
    shape = SHAPE | dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2) | changes
    torch.manual_seed(seed)
    model = getattr(transformers, f"{stem}ForCausalLM")(getattr(transformers, f"{stem}Config")(**shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.03))
    return model


def as_transformers_reads(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    )
    return model.eval()


def add_bytes(writer):
    """Give a GGUFWriter a byte-level tokenizer of the bytes and one pair of them, 257 tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_key_value("tokenizer.ggml.merges", ["a b"], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)
