"""cna estimate: sizes are computed, times are given, and no model is loaded."""

import json

import pytest
import torch

from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.load import layer_size, load_layer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from cna_kernels.model.cli import main
from tiny import write_language_model

pytest.importorskip("transformers")


@pytest.fixture
def case(tmp_path):
    write_language_model(tmp_path, intermediate_size=200)
    (tmp_path / "p.txt").write_text("\n".join(f"prompt number {number}" for number in range(3000)))
    return tmp_path


def estimate(case, capsys, *more):
    assert main(["estimate", str(case), "--prompts", str(case / "p.txt"), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_sizes(case, capsys):
    found = estimate(case, capsys)
    files = sum(path.stat().st_size for path in case.glob("*.safetensors"))
    assert found["prompts"] == 3000 and found["sample"] == 1000 and found["units"] == 3
    assert 0.9 * files < found["memory_bytes"]["weights"] <= files and found["read_bytes"] < files
    assert found["memory_bytes"]["sums"] == 3 * 200 * 2 * 12 * 2
    assert found["part_bytes"] == 3 * 3 * 200 * 2 * 8 * 2
    assert 0 < found["tokens_run"] < found["tokens"], "all prompts share the template's header"
    assert all(seconds >= 0 for seconds in found["seconds"].values()) and found["seconds"]["all"] >= 0
    assert estimate(case, capsys, "--columns", "10")["memory_bytes"]["sums"] == 5 * found["memory_bytes"]["sums"]
    assert estimate(case, capsys, "--limit", "5")["prompts"] == 5


def test_streamed_sizes(case, capsys, monkeypatch):
    config = read_config(case)
    layer = load_layer(open_checkpoint(case), config, 0, dtype=torch.float32, device="cpu")
    assert layer_size(config) == sum(parameter.numel() for parameter in layer.parameters())
    found = estimate(case, capsys, "--stream-layers")
    assert found["memory_bytes"]["weights"] == 2 * layer_size(config) * 4 and found["units"] == 1
    assert found["spilled_bytes"] == 0 and found["memory_bytes"]["hidden_states"] > 0
    monkeypatch.setattr("cna_kernels.model.discovery.estimate.HIDDEN_BYTES", 1000)
    found = estimate(case, capsys, "--stream-layers")
    assert found["memory_bytes"]["hidden_states"] == 1000 and found["spilled_bytes"] == found["tokens_run"] * 32 * 4


def test_the_table(case, capsys):
    assert main(["estimate", str(case), "--prompts", str(case / "p.txt"), "--stream-layers"]) == 0
    shown = capsys.readouterr().out
    for word in ("memory: weights", "read from the checkpoint", "time: compute", "3,000"):
        assert word in shown


def test_bad_input(case, capsys):
    (case / "p.txt").write_text("")
    for words, message in (
        ([str(case), "--prompts", str(case / "p.txt")], "p.txt: holds no prompt"),
        ([str(case), "--prompts", "nowhere.txt"], "nowhere.txt: No such file"),
        (["nowhere", "--prompts", str(case / "p.txt")], "nowhere"),
    ):
        assert main(["estimate", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
