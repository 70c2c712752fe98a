"""Damaged and hostile GGUF headers: one line that names the file, never another error, never a wrong number."""

import random
import re
import struct

import pytest
import torch
import transformers

from cna_kernels.errors import InputError
from cna_kernels.model.checkpoint.gguf_file import is_gguf, read_gguf
from gguf_files import write_gguf
from tiny import SHAPE


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def header(*, magic=b"GGUF", version=3, tensors=(), pairs=(), n_tensors=None, n_pairs=None, data=b""):
    """The bytes of a file: pairs are (key, type, bytes of the value), tensors (name, shape, type, offset)."""
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_pairs = len(pairs) if n_pairs is None else n_pairs
    content = magic + struct.pack("<IQQ", version, n_tensors, n_pairs)
    for key, kind, value in pairs:
        content += text(key) + struct.pack("<I", kind) + value
    for name, shape, kind, offset in tensors:
        content += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape)
        content += struct.pack("<IQ", kind, offset)
    return content + bytes(-len(content) % 32) + data


ONE = ("w", (4, 2), 0, 0)
WHOLE = (2).to_bytes(4, "little")
FAULTS = [
    (b"", "is not a GGUF file"),
    (b"GG", "is not a GGUF file"),
    (header(magic=b"GGML"), "is not a GGUF file: it does not begin with GGUF"),
    (header(version=1), "version: is 1; versions 2 and 3 are read"),
    (header(version=3 << 24), "version: is 50331648; a big-endian file is not read"),
    (header(n_tensors=1 << 60), "tensors and 0 fields, more than the 65536 accepted"),
    (header(n_pairs=1 << 60), "more than the 65536 accepted"),
    (header(n_pairs=1)[:24], "the key of a field: is cut off"),
    (header(pairs=[("a", 4, WHOLE)], n_pairs=2)[:40], "is cut off"),
    (header(pairs=[("a", 8, struct.pack("<Q", 1 << 62))]), "a: is cut off"),
    (header(pairs=[("a", 8, text(b"\xff"))]), "a: is not UTF-8 text"),
    (header(pairs=[(b"\xff", 4, WHOLE)]), "the key of a field: is not UTF-8 text"),
    (header(pairs=[("a", 77, WHOLE)]), "a: is of type 77, which GGUF does not have"),
    (header(pairs=[("a", 9, struct.pack("<IQ", 4, 1 << 61))]), "a: is cut off"),
    (header(pairs=[("a", 9, struct.pack("<IQ", 8, 1 << 61))]), "a: is cut off"),
    (
        header(
            pairs=[("a", 9, struct.pack("<IQ", 0, 1 << 22) + bytes(1 << 22)), ("b", 9, struct.pack("<IQ", 0, 1) + b"x")]
        ),
        "b: is an array of 1; all arrays hold at most 4194304 items",
    ),
    (header(pairs=[("a", 9, struct.pack("<IQ", 9, 1))]), "a: is an array of 1 of type 9, which is not read"),
    (header(pairs=[("a", 4, WHOLE)] * 2), "repeats the field 'a'"),
    (header(pairs=[("general.alignment", 4, bytes(4))]), "general.alignment: expected a whole number from 1"),
    (header(tensors=[("w", (1,) * 5, 0, 0)], data=bytes(32)), "'w': expected at most 4 dimensions, got 5"),
    (header(tensors=[("w", (1 << 60, 1), 0, 0)]), "'w': has the shape"),
    (header(tensors=[("w", (4, 2), 16, 0)], data=bytes(32)), "'w': is of type 16, expected F32, F16"),
    (header(tensors=[("w", (33, 2), 2, 0)], data=bytes(99)), "'w': expected rows of whole blocks of 32 Q4_0 numbers"),
    (header(tensors=[("w", (0, 2), 0, 0)], data=bytes(32)), "'w': expected rows of whole blocks"),
    (header(tensors=[("w", (), 0, 0)], data=bytes(32)), "'w': expected rows of whole blocks"),
    (header(tensors=[ONE], data=bytes(31)), "'w': lies at bytes 96 to 128 of a file of 127: it is truncated"),
    (header(tensors=[("w", (4, 2), 0, 7)], data=bytes(99)), "'w': lies at bytes"),
    (header(tensors=[("w", (4, 2), 0, (1 << 64) - 32)], data=bytes(99)), "'w': lies at bytes"),
    (header(tensors=[ONE, ONE], data=bytes(99)), "'w': is there twice"),
    (
        header(tensors=[ONE, ("v", (4, 2), 0, 0)], data=bytes(32)),
        "'v': lies at bytes 128 to 160, over 'w' at 128 to 160",
    ),
    (
        header(tensors=[("v", (4, 2), 0, 32), ("w", (4, 3), 0, 0)], data=bytes(64)),
        "'v': lies at bytes 160 to 192, over 'w' at 128 to 176",
    ),
    (
        header(tensors=[("long", (4, 9), 0, 0), ("a", (2,), 0, 32), ("b", (2,), 0, 64)], data=bytes(144)),
        "'a': lies at bytes 192 to 200, over 'long' at 160 to 304",
    ),
    (header(pairs=[("split.count", 2, bytes([3, 0]))]), "split.count: is 3; parts of a split file"),
]


@pytest.mark.parametrize(("content", "what"), FAULTS, ids=[each[1][:40] for each in FAULTS])
def test_faults(tmp_path, content, what):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(f"{path}: ") and what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_read(tmp_path):
    numbers = torch.arange(8, dtype=torch.float32).numpy().tobytes()
    pairs = [("flag", 7, b"\1"), ("list", 9, struct.pack("<IQff", 6, 2, 0.5, -2)), ("name", 8, text("ü"))]
    path = tmp_path / "x.gguf"
    path.write_bytes(header(version=2, pairs=pairs, tensors=[ONE], data=numbers))
    found = read_gguf(path)
    assert found.metadata.record == {"flag": True, "list": [0.5, -2.0], "name": "ü"}
    assert found.tensors["w"].read().tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    path.write_bytes(path.read_bytes().replace(b"flag", b"flug"))  # of the same size
    assert "flug" in read_gguf(path).metadata.record


def test_truncated_while_it_is_read(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(header(tensors=[ONE], data=bytes(32)))
    entry = read_gguf(path).tensors["w"]
    path.write_bytes(path.read_bytes()[:-1])
    for read in (entry.read, lambda: entry.read_rows([1]), lambda: list(entry.pieces(100))):
        with pytest.raises(InputError, match="'w': was truncated while it was read"):
            read()


def test_every_cut_and_any_flipped_byte_of_a_header(tmp_path):
    """A cut is always an error. A flipped byte is an error or other metadata, nothing else."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    path = write_gguf(tmp_path / "whole.gguf", model)
    content = path.read_bytes()
    end = min(entry.start for entry in read_gguf(path).tensors.values())
    rng = random.Random(0)
    for cut in (*range(0, end, 13), len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(InputError):
            read_gguf(path)
    refused = 0
    for _ in range(600):
        place = rng.randrange(end)
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])
        try:
            read_gguf(path)
        except InputError:
            refused += 1
    assert refused > 60


@pytest.mark.parametrize(("name", "what"), [
    ("x-00001-of-00000.gguf", "expected a part from 1 to 0 in its name, got 1"),
    ("x-00000-of-00002.gguf", "expected a part from 1 to 2 in its name, got 0"),
    ("x-00003-of-00002.gguf", "expected a part from 1 to 2 in its name, got 3"),
    ("x-00001-of-00002.gguf", "split.count: is 1; parts of a split file"),
    ("x-00001-of-99999.gguf", "split.count: is 1; parts of a split file"),
])  # fmt: skip
def test_names_of_parts(tmp_path, name, what):
    (tmp_path / name).write_bytes(header())
    (tmp_path / "x-00001-of-00002.gguf").write_bytes(header())
    with pytest.raises(InputError, match=re.escape(what)):
        read_gguf(tmp_path / name)


def test_tensors_that_follow_each_other(tmp_path):
    """Tensors in any order, with nothing or a gap between them, share no byte."""
    tensors = [("c", (4, 3), 0, 96), ("a", (4, 2), 0, 0), ("b", (4, 2), 0, 32)]
    path = tmp_path / "x.gguf"
    path.write_bytes(header(tensors=tensors, data=bytes(144)))
    assert set(read_gguf(path).tensors) == {"a", "b", "c"}


def test_names(tmp_path):
    assert is_gguf("a/b.gguf") and not is_gguf("a/b") and not is_gguf("a/gguf")
    (tmp_path / "folder.gguf").mkdir()
    assert not is_gguf(tmp_path / "folder.gguf")
    with pytest.raises(InputError, match=r"nowhere\.gguf: No such file"):
        read_gguf(tmp_path / "nowhere.gguf")
