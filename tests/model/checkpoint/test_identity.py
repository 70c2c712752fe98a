"""What makes a checkpoint another model, what does not, and a cache that is never believed more than the file."""

import json
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from cna_kernels import InputError, attach
from cna_kernels.model import load as load_model
from cna_kernels.model.checkpoint import identity
from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.identity import identity_of
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from tiny import VARIANTS, write_checkpoint, write_language_model

transformers = pytest.importorskip("transformers")


def identity_in(directory):
    return identity_of(directory, open_checkpoint(directory), read_config(directory)) | {"name": ""}


def attached_hash(directory, **options):
    engine = attach(transformers.AutoModelForCausalLM.from_pretrained(directory, **options))
    return engine.identity().get("decoder_sha256")


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a").mkdir()
    write_checkpoint("llama", tmp_path / "a")
    return tmp_path / "a"


def test_every_tensor_counts(checkpoint):
    """One bit of one number, anywhere: on file and in memory."""
    path = checkpoint / "model.safetensors"
    whole = load_file(path)
    found, attached = {str(identity_in(checkpoint))}, {attached_hash(checkpoint)}
    for name, tensor in whole.items():
        other = tensor.clone()
        other.view(-1)[tensor.numel() // 3].neg_()
        save_file(whole | {name: other}, path, metadata={"format": "pt"})
        found.add(str(identity_in(checkpoint)))
        attached.add(attached_hash(checkpoint))
    assert len(found) == len(whole) + 1
    assert len(attached) == len(whole), "all but lm_head, which is not the decoder's"


def test_a_bit_that_bf16_does_not_hold_counts_on_file(checkpoint):
    path = checkpoint / "model.safetensors"
    whole, before = load_file(path), identity_in(checkpoint)
    whole["model.norm.weight"].view(torch.int32)[3] ^= 1
    save_file(whole, path)
    after = identity_in(checkpoint)
    assert after["tensors_sha256"] != before["tensors_sha256"] and after["decoder_sha256"] == before["decoder_sha256"]


def edit(**changes):
    def change(directory):
        record = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps({k: v for k, v in record.items() if v is not ...}))

    return change


def reshard(directory):
    whole = load_file(directory / "model.safetensors")
    names = sorted(whole)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, inside in halves.items():
        save_file({name: whole[name] for name in inside}, directory / shard)
    index = {"weight_map": {name: shard for shard, inside in halves.items() for name in inside}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()


def save_again(directory):
    whole = load_file(directory / "model.safetensors")
    save_file(whole, directory / "model.safetensors", metadata={"by": "another tool"})


def rename_dtype(directory):
    dtype = json.loads((directory / "config.json").read_text())["dtype"]
    edit(dtype=..., torch_dtype=dtype)(directory)


COSMETIC = {
    "transformers_version": edit(transformers_version="4.40.0"),
    "name": edit(_name_or_path="/home/someone/x"),
    "use_cache": edit(use_cache=False),
    "a field nobody reads": edit(something={"new": [1]}),
    "no architectures": edit(architectures=...),
    "dtype renamed": rename_dtype,
    "generation_config": lambda directory: (directory / "generation_config.json").write_text("{}"),
    "a default said": edit(attention_bias=False, hidden_act="silu"),
    "a default left out": edit(attention_bias=..., hidden_act=..., head_dim=...),
    "in shards": reshard,
    "saved again": save_again,
}


@pytest.mark.parametrize("name", COSMETIC)
def test_what_changes_nothing(checkpoint, name):
    before = identity_in(checkpoint)
    COSMETIC[name](checkpoint)
    assert identity_in(checkpoint) == before


READ = {
    "rope_theta": edit(rope_parameters={"rope_type": "default", "rope_theta": 20000.0}),
    "rms_norm_eps": edit(rms_norm_eps=1e-3),
    "max_position_embeddings": edit(max_position_embeddings=32),
    "num_key_value_heads": edit(num_attention_heads=8, num_key_value_heads=4, head_dim=4),
    "dtype": edit(dtype="float16"),
}


@pytest.mark.parametrize("name", READ)
def test_fields_that_are_read_count(checkpoint, name):
    before = identity_in(checkpoint)
    READ[name](checkpoint)
    after = identity_in(checkpoint)
    assert after["settings_sha256"] != before["settings_sha256"] and after["tensors_sha256"] == before["tensors_sha256"]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_the_same_hash_on_file_and_in_memory(variant, tmp_path):
    """Of a checkpoint in each dtype, loaded in each dtype that holds bf16; a file in fp16 is read in fp32."""
    for number, kept in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        (tmp_path / str(number)).mkdir()
        write_checkpoint(variant, tmp_path / str(number), dtype=kept)
        on_file = identity_in(tmp_path / str(number))["decoder_sha256"]
        for dtype in (torch.float32, torch.bfloat16, torch.float64) if variant == "llama" else (torch.float32,):
            assert attached_hash(tmp_path / str(number), dtype=dtype) == on_file, (kept, dtype)


# The cache.


@pytest.fixture
def reads(checkpoint, monkeypatch):
    """The names of the tensors that were read, and a clock that is an hour ahead: files are old enough to remember."""
    names, hash_of, clock = [], identity._hash, time.time

    def counted(entry):
        names.append(entry.name)
        return hash_of(entry)

    monkeypatch.setattr(identity, "_hash", counted)
    monkeypatch.setattr(identity.time, "time", lambda: clock() + 3600)
    return names


def cache_files(checkpoint):
    return [*(checkpoint.parent / "cache" / "cna-kernels").glob("*")]


def test_a_file_is_read_once(checkpoint, reads):
    before = identity_in(checkpoint)
    n = len(reads)
    assert identity_in(checkpoint) == before and len(reads) == n > 0
    (checkpoint.parent / "moved").symlink_to("a")
    assert identity_in(checkpoint.parent / "moved") == before and len(reads) == n, "under any path"
    assert len(cache_files(checkpoint)) == 1


def test_a_file_that_was_just_written_is_not_remembered(checkpoint):
    identity_in(checkpoint)
    assert cache_files(checkpoint) == []


def write_in_place(path):
    with open(path, "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\x01" * 8)


def replace(path):
    whole = load_file(path)
    whole["model.norm.weight"][0] += 1
    save_file(whole, path.with_suffix(".new"), metadata={"format": "pt"})
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize("change", [write_in_place, replace])
@pytest.mark.parametrize("same_time", [False, True])
def test_a_changed_file_is_read_again(checkpoint, reads, change, same_time):
    path = checkpoint / "model.safetensors"
    before, times = identity_in(checkpoint), path.stat()
    time.sleep(0.02)  # longer than the file system's clock takes for a step
    change(path)
    if same_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identity_in(checkpoint)["tensors_sha256"] != before["tensors_sha256"]
    assert len(cache_files(checkpoint)) <= 2


def damage(change):
    def apply(path):
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return apply


def make_fifo(path):
    path.unlink()
    os.mkfifo(path)


def make_folder(path):
    path.unlink()
    path.mkdir()


def name_of(record):
    return next(iter(record["tensors"]))


DAMAGED = {
    "empty": lambda path: path.write_text(""),
    "cut": lambda path: path.write_text(path.read_text()[:100]),
    "random bytes": lambda path: path.write_bytes(os.urandom(300)),
    "brackets": lambda path: path.write_text("[" * 100_000),
    "a list": lambda path: path.write_text("[1]"),
    "another hash": damage(lambda record: record["tensors"].update({name_of(record): ["0" * 64, "0" * 64]})),
    "another stamp": damage(lambda record: record["stamp"].update(ino=1)),
    "no tensors": damage(lambda record: record.update(tensors={})),
    "tensors of another kind": damage(lambda record: record.update(tensors=[1, 2])),
    "a format to come": damage(lambda record: record.update(format=record["format"] + 1)),
    "a FIFO": make_fifo,
    "a folder": make_folder,
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_cache_is_not_believed(checkpoint, reads, name):
    before = identity_in(checkpoint)
    (path,) = cache_files(checkpoint)
    DAMAGED[name](path)
    n = len(reads)
    assert identity_in(checkpoint) == before and len(reads) == 2 * n


@pytest.mark.parametrize("place", ["file", "file/inside", "relative", ""])
def test_no_place_for_a_cache(checkpoint, monkeypatch, place):
    monkeypatch.setenv("HOME", str(checkpoint.parent / "file"))
    (checkpoint.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(checkpoint.parent / place) if "file" in place else place)
    monkeypatch.setattr(identity, "FRESH", -1e9)
    assert identity_in(checkpoint) == identity_in(checkpoint)


def test_files_that_change_after_they_were_loaded(tmp_path):
    model = load_model(write_language_model(tmp_path))
    os.link(tmp_path / "model.safetensors", tmp_path / "another name")
    replace(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: was changed after it was loaded"):
        model.identity()


def test_files_that_change_while_they_are_read(checkpoint, monkeypatch):
    hash_of = identity._hash

    def changes(entry):
        write_in_place(entry.path)
        os.utime(entry.path, (1, 1))
        return hash_of(entry)

    monkeypatch.setattr(identity, "_hash", changes)
    with pytest.raises(InputError, match=r"model\.safetensors: was changed while it was read"):
        identity_in(checkpoint)
