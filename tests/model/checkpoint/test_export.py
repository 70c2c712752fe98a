"""Exports: PEFT and transformers on the written files, against the steered model; and bytes that must not change."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cna_kernels import Circuit, InputError
from cna_kernels.model import load
from cna_kernels.model.checkpoint import export
from cna_kernels.model.cli import main
from cna_kernels.model.text.chat_template import find_chat_template
from export_cases import ALIGNED, CASES, IDS, A, B, steered, theirs, write_model


@pytest.fixture(scope="module", params=["llama", "qwen3-tied"])
def model(request, tmp_path_factory):
    return write_model(request.param, tmp_path_factory.mktemp(request.param))


def test_neuron_multipliers_several_circuits_multiply():
    multiplied = export.neuron_multipliers([A, B], [0.5, 3.0])
    assert multiplied == {0: {3: 0.5, 9: 0.5, 40: 3.0}, 1: {11: 3.0}, 2: {7: 1.5, 8: 0.5, 40: 0.5}}
    assert export.neuron_multipliers([A, A], [0.5, 2.0]) == {} == export.neuron_multipliers([A], [1.0])
    with pytest.raises(InputError, match="multiplier: expected 2"):
        export.neuron_multipliers([A, B], [0.0])


def test_neuron_multipliers_of_an_aligned_circuit():
    assert ALIGNED.mirrored == ((2, 7), (0, 3), (1, 9))
    assert export.neuron_multipliers([ALIGNED], [0.5]) == {
        0: {3: 1.5}, 1: {8: 0.5, 9: 1.5}, 2: {7: 1.5, 20: 0.5, 40: 0.5}
    }  # fmt: skip
    both = export.neuron_multipliers([ALIGNED, B], [2.0, 3.0])
    assert both == {0: {3: 0.0, 40: 3.0}, 1: {8: 2.0, 9: 0.0, 11: 3.0}, 2: {7: 0.0, 20: 2.0, 40: 2.0}}


def test_all_chat_templates_are_exported(model, tmp_path):
    shutil.copytree(model.directory, tmp_path / "model")
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    (tmp_path / "model" / "additional_chat_templates" / "default.jinja").write_text("new {{ messages[0].content }}")
    whole = load(tmp_path / "model", dtype="float32")
    export.to_checkpoint(whole.directory, whole.checkpoint, export.neuron_multipliers([B], [0.0]), tmp_path / "c")
    template = find_chat_template(tmp_path / "c", {}, {})
    assert template.render([[{"role": "user", "content": "x"}]]) == ["new x"]


@pytest.mark.parametrize(("circuits", "multipliers"), CASES)
def test_transformers_loads_the_checkpoint(model, tmp_path, circuits, multipliers):
    export.to_checkpoint(
        model.directory, model.checkpoint, export.neuron_multipliers(circuits, multipliers), tmp_path / "c"
    )
    with torch.no_grad():
        found = theirs(tmp_path / "c")(IDS, use_cache=False).logits
    assert (found - steered(model, circuits, multipliers)).abs().max() <= 1e-4


def test_other_tensors_and_files_stay_byte_for_byte(model, tmp_path):
    export.to_checkpoint(model.directory, model.checkpoint, export.neuron_multipliers([B], [0.0]), tmp_path / "c")
    assert {p.name for p in model.directory.iterdir()} == {p.name for p in (tmp_path / "c").iterdir()}
    for path in model.directory.iterdir():
        if path.suffix != ".safetensors":
            assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes()
    changed = 0
    for name, entry in model.checkpoint.entries.items():
        contents = [
            (directory / entry.path.name).read_bytes()[entry.start : entry.end]
            for directory in (model.directory, tmp_path / "c")
        ]
        if "down_proj" not in name:
            assert contents[0] == contents[1]
            continue
        layer = int(name.split(".")[2])
        before, after = (torch.frombuffer(bytearray(c), dtype=entry.dtype).view(entry.shape) for c in contents)
        members = B.by_layer().get(layer, [])
        assert not after[:, members].any() and before[:, members].any()
        others = [index for index in range(48) if index not in members]
        assert torch.equal(before[:, others], after[:, others])
        changed += len(members)
    assert changed == B.k


def test_a_copy_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_scale_columns", full)
    with pytest.raises(InputError, match="c: cannot be written: No space left on device"):
        export.to_checkpoint(model.directory, model.checkpoint, export.neuron_multipliers([A], [0.0]), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="is there already"):
        export.to_checkpoint(
            model.directory, model.checkpoint, export.neuron_multipliers([A], [0.0]), tmp_path / "there"
        )


def test_the_public_json_is_read_again(tmp_path):
    with pytest.raises(InputError, match="circuit: is aligned: the public code's JSON has no place for"):
        export.to_ref_code(ALIGNED, tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()
    export.to_ref_code(A, tmp_path / "c.json")
    again = Circuit.load(tmp_path / "c.json", n_layers=3, n_neurons=48)
    assert sorted(again.neurons) == sorted(A.neurons)


def test_the_command(model, tmp_path, capsys):
    for name, circuit in (("a", A), ("b", B)):
        circuit.save(tmp_path / f"{name}.json")
    words = ["export", str(model.directory), "-c", f"{tmp_path}/a.json", "-c", f"{tmp_path}/b.json", "-m", "0,2"]
    assert main([*words, "--to", "lora", "-o", f"{tmp_path}/lora"]) == 0
    assert "7 neurons in 3 layers, at most 3 in one" in " ".join(capsys.readouterr().out.split())
    record = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert record["r"] == record["lora_alpha"] == 3 and record["rank_pattern"] == {}
    assert main([*words, "--to", "checkpoint", "-o", f"{tmp_path}/c"]) == 0
    assert "7 columns scaled" in " ".join(capsys.readouterr().out.split())
    assert main([*words, "--to", "checkpoint", "-o", f"{tmp_path}/c"]) == 2
    assert capsys.readouterr().err == f"cna export: {tmp_path}/c: is there already\n"
    assert main([*words, "--to", "ref-code", "-o", f"{tmp_path}/c.json"]) == 2
    assert "holds one circuit" in capsys.readouterr().err
    assert main([*words[:4], "--to", "ref-code", "-o", f"{tmp_path}/c.json"]) == 0
    before = (tmp_path / "a.json").read_bytes()
    assert main([*words[:4], "--to", "ref-code", "-o", f"{tmp_path}/a.json"]) == 2
    assert "is a file that the command reads" in capsys.readouterr().err
    assert (tmp_path / "a.json").read_bytes() == before
    assert main([*words, "--to", "checkpoint", "-o", f"{tmp_path}/d", "--max-rank", "2"]) == 2
    assert "--max-rank: is for --to lora" in capsys.readouterr().err


def test_a_quantized_checkpoint_is_refused(model, tmp_path, capsys):
    import shutil

    shutil.copytree(model.directory, tmp_path / "q")
    record = json.loads((tmp_path / "q" / "config.json").read_text())
    record["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "q" / "config.json").write_text(json.dumps(record))
    for path in (tmp_path / "q").glob("*.safetensors"):
        tensors = load_file(path)
        save_file({name: x.to(torch.int8) if "down_proj" in name else x for name, x in tensors.items()}, path)
    A.save(tmp_path / "a.json")
    words = ["export", str(tmp_path / "q"), "-c", f"{tmp_path}/a.json", "--to", "lora", "-o", f"{tmp_path}/lora"]
    assert main([*words, "--engine", "own"]) == 2
    assert "quantization_config: is not supported by our own forward pass, got 'bits" in capsys.readouterr().err
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "is quantised (I8): scale the columns of the checkpoint that it was quantised from" in said
    assert not (tmp_path / "lora").exists()
    assert main([*words[:-1], f"{tmp_path}/new/folders/lora"]) == 2 and not (tmp_path / "new").exists()
