"""GGUF files with scaled rows: our model on them against the steered model, and bytes that must not change."""

import os
import re

import pytest
import torch

from cna_kernels import Circuit, InputError
from cna_kernels.blocks import FORMATS
from cna_kernels.model import load
from cna_kernels.model.checkpoint import export
from cna_kernels.model.checkpoint.gguf_file import TYPES, read_gguf
from cna_kernels.model.checkpoint.steered_gguf import SCALES, to_gguf
from cna_kernels.model.cli import main
from tiny import VARIANTS

pytest.importorskip("transformers")
pytest.importorskip("gguf")

NEURONS = ((0, 3), (1, 0), (1, 7), (1, 300), (1, 511))
CIRCUIT = Circuit(tuple((*pair, 1.0) for pair in NEURONS), 2, 512)
IDS = torch.randint(6, 90, (2, 15), generator=torch.Generator().manual_seed(1))
PLAIN = ["F32", "F16"]


def write(path, kind="F32", **changes):
    from gguf_files import tiny_model, write_gguf

    return write_gguf(path, tiny_model(**changes), kind=kind)


def rewrite(path, out, m=0.0):
    return to_gguf(path, export.neuron_multipliers([CIRCUIT], [m]), out)


def logits(model):
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("m", [0.0, 0.5, 2.0, -1.0, 0.3])
@pytest.mark.parametrize("kind", [*PLAIN, *FORMATS])
def test_our_model_on_the_file_is_the_steered_model(tmp_path, kind, m):
    path = write(tmp_path / "a.gguf", kind)
    off = rewrite(path, tmp_path / "b.gguf", m)
    # fp16 has 11 bits; the scales that the tests give K blocks are of about 2^-12, of which fp16 keeps 13 bits
    largest = 0.0 if m in (0.0, 2.0, -1.0) else 2e-3
    assert 0 <= off <= largest
    if m == 0.3 and kind != "F32":
        assert off > 1e-6, "an error that is always 0 would say nothing"
    model, written = (load(each, dtype="float32") for each in (path, tmp_path / "b.gguf"))
    with model.steered(CIRCUIT, m):
        wanted = logits(model)
    effect = (wanted - logits(model)).abs().max()
    assert effect > 2e-3, "steering without effect would hide everything"
    assert (logits(written) - wanted).abs().max() <= 1e-5 + 10 * off * effect


@pytest.mark.parametrize("kind", [*PLAIN, *FORMATS])
def test_only_the_rows_of_the_circuit_change(tmp_path, kind):
    path = write(tmp_path / "a.gguf", kind)
    rewrite(path, tmp_path / "b.gguf")
    before, after = (bytearray(each.read_bytes()) for each in (path, tmp_path / "b.gguf"))
    assert len(before) == len(after)
    for layer, neuron in NEURONS:
        entry = read_gguf(path).tensors[f"blk.{layer}.ffn_up.weight"]
        start = entry.start + neuron * entry.row_bytes
        assert before[start : start + entry.row_bytes] != after[start : start + entry.row_bytes]
        for content in (before, after):
            content[start : start + entry.row_bytes] = bytes(entry.row_bytes)
    assert before == after
    written = read_gguf(tmp_path / "b.gguf").tensors
    for layer, neuron in NEURONS:
        row = written[f"blk.{layer}.ffn_up.weight"].read_rows([neuron])
        assert not row.any()


def test_every_format_has_its_scales():
    """The numbers of a block are proportional to its scales: twice these are twice the numbers."""
    assert SCALES.keys() == FORMATS.keys() and {name for name, _, _ in TYPES.values()} > SCALES.keys()


def test_a_bias_is_scaled_with_its_row(tmp_path):
    assert "mlp_bias" in VARIANTS["llama-mlp-bias"][1]
    path = write(tmp_path / "a.gguf", "Q8_0", mlp_bias=True)
    rewrite(path, tmp_path / "b.gguf", 0.0)
    model, written = (load(each, dtype="float32") for each in (path, tmp_path / "b.gguf"))
    with model.steered(CIRCUIT, 0.0):
        wanted = logits(model)
    assert (logits(written) - wanted).abs().max() <= 1e-5 < (wanted - logits(model)).abs().max() / 100
    bias = read_gguf(tmp_path / "b.gguf").tensors["blk.1.ffn_up.bias"].read()
    assert bias[[0, 7, 300, 511]].tolist() == [0, 0, 0, 0] and bias.count_nonzero() == 508


@pytest.mark.parametrize(
    ("out", "m", "message"),
    [
        ("b.bin", 0.0, r"b\.bin: expected a name that ends in \.gguf"),
        ("a.gguf", 0.0, r"a\.gguf: is there already"),
        ("b.gguf", 1e38, r"b\.gguf: 'blk\.0\.ffn_up\.weight': would hold infinities or NaN in float"),
    ],
)
def test_what_cannot_be_written(tmp_path, out, m, message):
    path = write(tmp_path / "a.gguf", "Q8_0")
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        rewrite(path, tmp_path / out, m)
    assert os.listdir(tmp_path) == ["a.gguf"] and path.read_bytes() == before


def test_a_circuit_of_another_shape_writes_nothing(tmp_path):
    path = write(tmp_path / "a.gguf", "Q8_0")
    for layer, neuron, message in ((0, 512, "expected neuron 512 among its rows"), (2, 0, "is missing from the check")):
        with pytest.raises(InputError, match=rf"'blk\.{layer}\.ffn_up\.weight': {message}"):
            to_gguf(path, {layer: {neuron: 0.0}}, tmp_path / "b.gguf")
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_a_copy_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = write(tmp_path / "a.gguf", "Q8_0")
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(InputError, match=r"b\.gguf: cannot be written: No space left on device"):
        rewrite(path, tmp_path / "b.gguf")
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_a_part_of_a_split_file_is_refused(tmp_path, monkeypatch):
    import dataclasses

    from cna_kernels.model.checkpoint import steered_gguf

    path = write(tmp_path / "a.gguf", "Q8_0")
    gguf = read_gguf(path)
    monkeypatch.setattr(steered_gguf, "read_gguf", lambda _: dataclasses.replace(gguf, parts=2))
    with pytest.raises(InputError, match=r"a\.gguf: is divided into several files; llama-gguf-split --merge"):
        rewrite(path, tmp_path / "c.gguf")


def test_the_command(tmp_path, capsys):
    from gguf_files import tiny_model, write_gguf

    write_gguf(tmp_path / "a.gguf", tiny_model(), kind="Q4_K")
    CIRCUIT.save(tmp_path / "c.json")
    words = ["export", f"{tmp_path}/a.gguf", "-c", f"{tmp_path}/c.json", "--to", "checkpoint"]
    assert main([*words, "-o", f"{tmp_path}/x/b.gguf"]) == 0
    out = capsys.readouterr().out
    assert out == f"wrote {tmp_path}/x/b.gguf: 5 rows of ffn_up scaled exactly\n"
    assert main([*words, "-m", "0.3", "-o", f"{tmp_path}/c.gguf"]) == 0
    assert re.search(r"5 rows of ffn_up scaled to within 0\.00\d+ of themselves", capsys.readouterr().out)
    assert main([*words, "-m", "1", "-o", f"{tmp_path}/d.gguf"]) == 2
    assert capsys.readouterr().err == "cna export: multiplier: changes nothing: there is nothing to export\n"
