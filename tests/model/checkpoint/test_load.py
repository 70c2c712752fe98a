"""Checkpoint files: an error names what is missing, extra, misshapen, truncated or points elsewhere."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from cna_kernels import InputError
from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.load import load_transformer, save_transformer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from tiny import write_checkpoint

pytest.importorskip("transformers")


def load(directory):
    return load_transformer(directory, read_config(directory), open_checkpoint(directory))


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint("llama", tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    write_checkpoint("llama", tmp_path, max_shard_size="20KB")
    return tmp_path


def refused(directory, message):
    with pytest.raises(InputError) as caught:
        load(directory)
    text = str(caught.value)
    assert str(directory) in text and message in text and "\n" not in text, text


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def test_each_missing_tensor_is_named(checkpoint):
    whole = load_file(checkpoint / "model.safetensors")
    for name in whole:
        save_file({n: t for n, t in whole.items() if n != name}, checkpoint / "model.safetensors")
        refused(checkpoint, f"'{name}': is missing from the checkpoint")


def test_each_misshapen_tensor_is_named(checkpoint):
    whole = load_file(checkpoint / "model.safetensors")
    for name, tensor in whole.items():
        bad = tensor.T.contiguous() if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1] else tensor[..., :-1]
        save_file(whole | {name: bad.contiguous()}, checkpoint / "model.safetensors")
        refused(checkpoint, f"'{name}': expected shape {list(tensor.shape)}, got {list(bad.shape)}")


def test_extra_tensors_are_named(checkpoint):
    rewrite(checkpoint, lambda t: t.update({"model.layers.2.self_attn.q_norm.weight": torch.ones(2)}))
    refused(checkpoint, "'model.layers.2.self_attn.q_norm.weight': is not a tensor of a llama model, and may change")


def test_rotary_buffers_of_old_files_are_no_extra(checkpoint):
    rewrite(checkpoint, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load(checkpoint)


def test_other_dtypes_are_refused(checkpoint):
    rewrite(checkpoint, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()}))
    refused(checkpoint, "'model.norm.weight': expected dtype BF16, F16, F32 or F64, got I32")


def test_tied_checkpoints_may_carry_an_equal_lm_head(tmp_path):
    write_checkpoint("llama-tied", tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    refused(tmp_path, "'lm_head.weight': differs from 'model.embed_tokens.weight'")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1, -4000])
def test_truncated_files(checkpoint, keep):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(checkpoint, "model.safetensors: is ")


def test_extra_bytes_at_the_end(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    refused(checkpoint, "is truncated or has extra bytes")


def write_header(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


HEADERS = {
    "is not JSON": b"{ ",
    "header is not UTF-8": b"\xff\xff\xff",
    "header is not a JSON object": [1],
    "repeats the key 'a'": b'{"a": {}, "a": {}}',
    "'a': expected dtype, shape and data_offsets": {"a": {}},
    "'b': expected dtype, shape and data_offsets": {"b": 3},
    "'a': data_offsets span 4 bytes, which is not F32 [2]": {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}
    },
    "'a': expected whole numbers in shape and data_offsets": {
        "a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}
    },
    "'a': expected at most 8 dimensions, got 200000": {
        "a": {"dtype": "F32", "shape": [(1 << 48) - 1] * 200_000, "data_offsets": [0, 4]}
    },
    "holds 70000 tensors, more than the 65536 accepted": {
        f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(70_000)
    },
    "'a\\x1b[31m\\n': expected dtype": {"a\x1b[31m\n": {"dtype": "I9", "shape": [1], "data_offsets": [0, 1]}},
}


@pytest.mark.parametrize("message", HEADERS)
def test_malformed_headers(checkpoint, message):
    write_header(checkpoint / "model.safetensors", HEADERS[message], b"1234")
    refused(checkpoint, message)


def test_a_header_longer_than_the_file(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused(checkpoint, "is not a complete safetensors file")


def test_pickle_under_any_name(checkpoint):
    torch.save({"a": torch.ones(2)}, checkpoint / "model.safetensors")
    refused(checkpoint, "model.safetensors")


def test_no_weights_at_all(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    refused(checkpoint, "holds neither model.safetensors nor model.safetensors.index.json")


def test_an_adapter_beside_the_weights(checkpoint):
    """transformers with PEFT loads the adapter's base model then, and not these weights."""
    (checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "other", "peft_type": "LORA"}')
    refused(checkpoint, "adapter_config.json: transformers with peft loads an adapter and its base model; merge")


@pytest.mark.parametrize("elsewhere", ["../x.safetensors", "/etc/hostname", "sub/x.safetensors", "x.bin", 3, None])
def test_an_index_that_points_elsewhere(sharded, elsewhere):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = elsewhere
    path.write_text(json.dumps(index))
    refused(sharded, f"weight_map['model.norm.weight']: expected a .safetensors file beside it, got {elsewhere!r}")


def test_an_index_without_its_shards(sharded):
    path = sharded / "model.safetensors.index.json"
    text = path.read_text()
    other = sorted(set(json.loads(text)["weight_map"].values()))[0]
    path.write_text('{"weight_map": []}')
    refused(sharded, "weight_map: expected an object")
    path.write_text(text)
    (sharded / other).unlink()
    refused(sharded, f"{other}: No such file or directory")


def test_save_and_load_round_trip(checkpoint, tmp_path):
    ours = load(checkpoint)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.json").write_text((checkpoint / "config.json").read_text())
    save_transformer(ours, tmp_path / "copy", dtype=torch.float32)
    again = load(tmp_path / "copy")
    for (name, a), (_, b) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    saved, original = (load_file(d / "model.safetensors") for d in (tmp_path / "copy", checkpoint))
    assert saved.keys() == original.keys()


@pytest.mark.exhaustive
def test_loading_holds_no_second_copy(tmp_path):
    """Peak memory of a load stays below the weights plus the largest tensor and some slack."""
    import subprocess
    import sys

    write_checkpoint("llama", tmp_path, hidden_size=512, intermediate_size=4096, num_hidden_layers=6, vocab_size=8000)
    program = (
        "import sys, resource\n"
        "import torch, safetensors.torch, cna_kernels.ops\n"
        "from cna_kernels.model.checkpoint.config import read_config\n"
        "from cna_kernels.model.checkpoint.load import load_transformer\n"
        "from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        "d = sys.argv[1]\n"
        "model = load_transformer(d, read_config(d), open_checkpoint(d))\n"
        "print(peak() - before, sum(p.nbytes for p in model.parameters()), max(p.nbytes for p in model.parameters()))\n"
    )
    output = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    grown, weights, largest = map(int, output.stdout.split())
    assert weights > 150 << 20
    assert grown <= weights + largest + (24 << 20), f"{grown=} {weights=} {largest=}"
