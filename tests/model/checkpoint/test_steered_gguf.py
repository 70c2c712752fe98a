"""Copies of GGUF files with scaled columns: other bytes stay, and the copy is the steered model."""

import gguf
import pytest
import torch

from cna_kernels import Circuit, InputError
from cna_kernels.model import load
from cna_kernels.model.checkpoint import export
from cna_kernels.model.checkpoint.gguf_file import read_gguf
from cna_kernels.model.checkpoint.steered_gguf import to_gguf
from cna_kernels.model.cli import main
from gguf_files import as_transformers_reads, tiny_model, write_gguf

CIRCUIT = Circuit(tuple((1, index, 1.0) for index in (7, 31, 32, 50, 300, 511, 16, 15)), 2, 512)
IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
# type of the matrices -> whether blocks of the type hold a 0
KINDS = {"F32": True, "F16": True, "BF16": True, "Q8_0": True, "Q4_0": True, "Q5_0": True, "Q4_1": False, "Q6_K": False}


def contents(path):
    """The bytes of every tensor, by the package gguf."""
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("m", [0.0, 0.5, -2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_is_the_steered_model(tmp_path, kind, m):
    path = write_gguf(tmp_path / "a.gguf", tiny_model(), kind=kind, fields=[("custom_alignment", 64)])
    out = tmp_path / "b.gguf"
    n_wide, grown = to_gguf(path, export.neuron_multipliers([CIRCUIT], [m]), out)
    plain = kind in ("F32", "F16", "BF16")
    assert n_wide == (0 if plain or (KINDS[kind] and m == 0) else 1)
    assert (grown == 0) == (n_wide == 0) and grown == out.stat().st_size - path.stat().st_size
    before, after = contents(path), contents(out)
    assert list(before) == list(after)
    name = "blk.1.ffn_down.weight"
    assert before.pop(name) != (changed := after.pop(name)) and before == after
    assert changed[0] == ("F32" if n_wide else kind)
    start = read_gguf(path).pairs_end
    assert path.read_bytes()[:start] == out.read_bytes()[:start], "magic, counts and metadata"
    old, new = (read_gguf(each).tensors[name].read().float() for each in (path, out))
    factor = torch.ones(512)
    factor[[index for _, index in CIRCUIT.pairs]] = m
    expected = old * factor
    if plain:
        expected = expected.to(read_gguf(path).tensors[name].dtype).float()
    assert torch.equal(new, expected + 0.0) and not torch.equal(new, old)
    model, steered = load(path, dtype="float32"), load(out, dtype="float32")
    with model.steered(CIRCUIT, m), torch.inference_mode():
        wanted = model(IDS)
    tolerance = 2e-5 if kind not in ("F16", "BF16") else 3e-3
    with torch.inference_mode():
        assert (steered(IDS) - wanted).abs().max() <= tolerance < 0.1 * (wanted - model(IDS)).abs().max()
        if kind != "BF16":
            assert (as_transformers_reads(out)(IDS).logits - wanted).abs().max() <= max(tolerance, 1e-4)


def test_the_command(tmp_path, capsys):
    path = write_gguf(tmp_path / "a.gguf", tiny_model(), kind="Q4_1")
    CIRCUIT.save(tmp_path / "c.json")
    words = ["export", str(path), "-c", f"{tmp_path}/c.json", "-m", "0", "--to", "checkpoint", "--any-model", "-o"]
    assert main([*words, f"{tmp_path}/new/b.gguf"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "8 columns scaled, 1 matrices became F32, the file is +0.4 MB" in said
    assert main([*words, f"{tmp_path}/new/b.gguf"]) == 2 and "is there already" in capsys.readouterr().err
    assert main([*words, f"{tmp_path}/b"]) == 2 and "expected a name that ends in .gguf" in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.gguf", "c.json", "new"]


def test_refusals_leave_nothing(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", tiny_model(), kind="F16")
    with pytest.raises(InputError, match="changes nothing"):
        to_gguf(path, {}, tmp_path / "b.gguf")
    with pytest.raises(InputError, match="would hold infinities or NaN in float16"):
        to_gguf(path, {1: {7: 1e9}}, tmp_path / "b.gguf")
    assert [each.name for each in tmp_path.iterdir()] == ["a.gguf"]
