"""Safetensors checkpoints in Hugging Face layout -> a Transformer. Every tensor is accounted for before any is read."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from cna_kernels.checks import InputError
from cna_kernels.files import open_regular, parse_json, read_json, sha256, write_bytes

from .config import DTYPES, ModelConfig
from .memory import memory_of
from .transformer import Layer, Transformer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPE_NAMES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_LAYER = "model.layers.{}."
_MAX_HEADER, _MAX_TENSORS, _MAX_DIMS = 100 << 20, 1 << 16, 8
_PIECE = 4096  # bytes hashed at each of _PIECES places of a tensor larger than _WHOLE
_PIECES, _WHOLE = 16, 1 << 20


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, dtype, shape, and its byte range in the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint directory, read from the headers only.

    Attributes:
        entries: tensor name -> where it lies.
        headers_sha256: hash of all safetensors headers.
    """

    entries: dict[str, TensorEntry]
    headers_sha256: str

    def weights_sha256(self) -> str:
        """Hash sampled contents: all of a tensor up to 1 MiB, 16 evenly spaced pieces of 4 KiB of a larger one."""
        parts = [self.headers_sha256]
        for name, entry in sorted(self.entries.items()):
            with open(entry.path, "rb") as file:
                size = entry.end - entry.start
                places = [(0, size)]
                if size > _WHOLE:
                    places = [(number * (size - _PIECE) // (_PIECES - 1), _PIECE) for number in range(_PIECES)]
                parts.append(name)
                for place, length in places:
                    file.seek(entry.start + place)
                    parts.append(file.read(length))
        return sha256(*parts)


def open_checkpoint(directory) -> Checkpoint:
    """Read the headers of a single or sharded checkpoint.

    Raises:
        InputError: a file is missing, truncated or malformed, or the index does not describe the shards.
    """
    directory = Path(directory)
    if os.path.lexists(directory / INDEX):
        weight_map, shards = _read_index(directory / INDEX)
    else:
        weight_map, shards = None, [SINGLE]
        if not os.path.lexists(directory / SINGLE):
            raise InputError(directory, f"holds neither {SINGLE} nor {INDEX}")
    entries: dict[str, TensorEntry] = {}
    headers = []
    for shard in shards:
        found, header = _read_header(directory / shard)
        headers += [shard, header]
        for name, entry in found.items():
            if name in entries:
                raise InputError(f"{directory / shard}: {name!r}", f"is also in {entries[name].path.name}")
            if weight_map is not None and weight_map.get(name) != shard:
                raise InputError(f"{directory / shard}: {name!r}", f"{INDEX} does not place it in this file")
            entries[name] = entry
    if weight_map is not None:
        absent = sorted(set(weight_map) - set(entries))
        if absent:
            raise InputError(
                f"{directory / weight_map[absent[0]]}: {absent[0]!r}", f"is missing, though {INDEX} lists it"
            )
    return Checkpoint(entries, sha256(*headers))


def _read_index(path) -> tuple[dict[str, str], list[str]]:
    """Return tensor name -> shard name, and the shards. Only plain file names beside the index are accepted."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: weight_map", "expected an object of tensor name to file name")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not set("/\\\0") & set(shard)
        if not plain:
            raise InputError(f"{path}: weight_map[{name!r}]", f"expected a .safetensors file beside it, got {shard!r}")
    return weight_map, sorted(set(weight_map.values()))


def _read_header(path: Path) -> tuple[dict[str, TensorEntry], bytes]:
    """Return the tensors of one file and the raw header, after checking that the file holds what it declares."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise InputError(path, f"is not a complete safetensors file: {size} bytes, header of {length}")
        raw = file.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(path, "is not a safetensors file: its header is not UTF-8") from None
    header = parse_json(text, path)
    if not isinstance(header, dict):
        raise InputError(path, "is not a safetensors file: its header is not a JSON object")
    if len(header) > _MAX_TENSORS:
        raise InputError(path, f"holds {len(header)} tensors, more than the {_MAX_TENSORS} accepted")
    entries = {}
    start_of_data = 8 + length
    for name, record in header.items():
        if name == "__metadata__":
            continue
        entries[name] = _tensor_entry(record, path, name, start_of_data)
    end_of_data = max((entry.end for entry in entries.values()), default=start_of_data)
    if end_of_data != size:
        raise InputError(path, f"is truncated or has extra bytes: expected {end_of_data}, got {size}")
    return entries, raw


def _tensor_entry(record, path, name, start_of_data) -> TensorEntry:
    where = f"{path}: {name!r}"
    try:
        dtype, shape, (start, end) = record["dtype"], tuple(record["shape"]), record["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise InputError(where, "expected dtype, shape and data_offsets") from None
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in (*shape, start, end)):
        raise InputError(where, "expected whole numbers in shape and data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_NAMES:
        raise InputError(where, f"expected dtype {', '.join(_DTYPE_NAMES)}, got {dtype!r}")
    if len(shape) > _MAX_DIMS:
        raise InputError(where, f"expected at most {_MAX_DIMS} dimensions, got {len(shape)}")
    count = math.prod(shape)
    if end - start != count * _DTYPE_NAMES[dtype].itemsize:
        raise InputError(where, f"data_offsets span {end - start} bytes, which is not {dtype} {list(shape)}")
    return TensorEntry(path, _DTYPE_NAMES[dtype], shape, start_of_data + start, start_of_data + end)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor that a checkpoint of this model holds, by its name in the file, with its shape."""
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
    """Raise InputError naming the first tensor that is missing, extra or misshapen, or if memory cannot hold them."""
    shapes = expected_shapes(config)
    for name, shape in shapes.items():
        if name not in checkpoint.entries:
            raise InputError(f"{directory}: {name!r}", "is missing from the checkpoint")
        entry = checkpoint.entries[name]
        if entry.shape != shape:
            raise InputError(f"{entry.path}: {name!r}", f"expected shape {list(shape)}, got {list(entry.shape)}")
    for name, entry in checkpoint.entries.items():
        derived = name.endswith(".rotary_emb.inv_freq")  # Llama 2 files carry it; it follows from config.json
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        if name not in shapes and not derived and not tied:
            raise InputError(f"{entry.path}: {name!r}", f"is not a tensor of a {config.model_type} model")
    if config.tie_word_embeddings and "lm_head.weight" in checkpoint.entries:
        _require_equal(checkpoint, "lm_head.weight", "model.embed_tokens.weight")


def _require_equal(checkpoint, name, other):
    if not _same_values(checkpoint.entries[name], checkpoint.entries[other]):
        path = checkpoint.entries[name].path
        raise InputError(f"{path}: {name!r}", f"differs from {other!r}, though config.json ties them")


def _same_values(one: TensorEntry, other: TensorEntry) -> bool:
    """Compare two tensors piece by piece; they may be larger than memory."""
    if one.shape != other.shape:
        return False
    with open(one.path, "rb") as first, open(other.path, "rb") as second:
        for start in range(0, math.prod(one.shape), _WHOLE):
            n = min(_WHOLE, math.prod(one.shape) - start)
            pieces = []
            for file, entry in ((first, one), (second, other)):
                file.seek(entry.start + start * entry.dtype.itemsize)
                pieces.append(torch.frombuffer(bytearray(file.read(n * entry.dtype.itemsize)), dtype=entry.dtype))
            if not torch.equal(pieces[0], pieces[1].to(one.dtype)):
                return False
    return True


def _read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Read one tensor into memory of its own. No mapping: a file truncated later must not kill the process."""
    path = checkpoint.entries[name].path
    try:
        with safe_open(path, framework="pt", device="cpu", backend="pread") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: {name!r}", error) from None


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
    """Read one tensor into a module's parameter; gate_proj and up_proj are the halves of one."""
    part = next((part for part in ("gate_proj", "up_proj") if f"{part}." in path), None)
    if part is None:
        _set_parameter(module, path, _read_tensor(checkpoint, name).to(device=device, dtype=dtype))
        return
    path = path.replace(part, "gate_up_proj")
    joined = module.get_parameter(path)
    if joined.is_meta:
        joined = _set_parameter(module, path, torch.empty(joined.shape, dtype=dtype, device=device))
    half = 0 if part == "gate_proj" else 1
    joined.data.chunk(2)[half].copy_(_read_tensor(checkpoint, name))


def _set_parameter(module: nn.Module, path: str, value: torch.Tensor) -> nn.Parameter:
    owner, _, name = path.rpartition(".")
    parameter = nn.Parameter(value, requires_grad=False)
    setattr(module.get_submodule(owner), name, parameter)
    return parameter


def check_memory(config, dtype, device, directory):
    """Refuse what cannot fit before anything is allocated."""
    needed = dtype.itemsize * sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())
    available = memory_of(device)
    if available is not None and needed > available:
        raise InputError(directory, f"needs {needed / 2**30:.1f} GiB for weights, {device} has {available / 2**30:.1f}")


def save_transformer(transformer: Transformer, directory, *, dtype=torch.bfloat16):
    """Write ``model.safetensors`` with the checkpoint's own names, gate and up apart again."""
    from safetensors.torch import save

    state = dict(transformer.named_parameters())
    tensors = {}
    for name in expected_shapes(transformer.config):
        path = name.removeprefix("model.")
        half = 0 if ".gate_proj." in path else 1 if ".up_proj." in path else None
        value = state[path.replace("gate_proj", "gate_up_proj").replace(".up_proj", ".gate_up_proj")]
        value = value if half is None else value.chunk(2)[half]
        tensors[name] = value.detach().to(dtype).contiguous()
    write_bytes(Path(directory) / SINGLE, save(tensors, metadata={"format": "pt"}))


def config_sha256(directory) -> str:
    """Hash the meaning of config.json: key order and white space do not count."""
    return sha256(json.dumps(read_json(Path(directory) / "config.json"), sort_keys=True))
