"""Which of the paper's models stands beside a checkpoint, and that the table of them is of these models."""

import json

import pytest

from cna_kernels.errors import InputError
from cna_kernels.model.evaluation.published import MODELS, recognise
from cna_kernels.select import k_from_fraction

LLAMA = "Llama-3.2-1B-Instruct"
SIZES = [131, 229, 459, 2294, 251, 396, 530, 2365]  # 0.1% of the neurons, as the paper's models have them


def test_shapes_are_those_of_the_models():
    assert [k_from_fraction(0.001, found.n_layers, found.n_neurons) for found in MODELS.values()] == SIZES
    for name, found in MODELS.items():
        before, after = found.refusal
        assert 0 < after < before < 1, name
    assert "unverified" in MODELS["Llama-3.1-8B-Instruct"].note and not MODELS[LLAMA].note


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (LLAMA, LLAMA),
        ("models/llama-3.2-1b-instruct", LLAMA),
        ("models--meta-llama--Llama-3.2-1B-Instruct/snapshots/0123abcd", LLAMA),
        ("Llama-3.2-1B", None),  # the base model
        ("Llama-3.2-1B-Instruct-abliterated", None),
        ("Llama-3.2-1B-Instruct/checkpoint-500", None),  # somebody's fine-tune
        ("Llama-3.2-1B-Instruct.Q4_K_M.gguf", None),
        ("my-model", None),
    ],
)
def test_recognised_by_the_folder(tmp_path, path, name):
    directory = tmp_path / path
    directory.mkdir(parents=True)
    found = recognise(directory, 16, 8192)
    assert found.name == name and found.published == (None if name is None else MODELS[name])
    assert ("--as NAME" in found.how) == (name is None)


def test_recognised_by_a_link_and_by_the_config(tmp_path):
    (tmp_path / "Qwen2.5-3B-Instruct").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "Qwen2.5-3B-Instruct")
    (tmp_path / LLAMA).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    assert recognise(tmp_path / "link", 36, 11008).name == "Qwen2.5-3B-Instruct"
    assert recognise(tmp_path / LLAMA, 16, 8192).name == LLAMA
    config = tmp_path / "elsewhere" / "config.json"
    for said, name in (("meta-llama/Llama-3.2-1B-Instruct", LLAMA), ("meta-llama/Llama-3.2-1B", None), (7, None)):
        config.write_text(json.dumps({"_name_or_path": said}))
        found = recognise(tmp_path / "elsewhere", 16, 8192)
        assert found.name == name and (name is None or "config.json: _name_or_path says" in found.how)


def test_earlier_names():
    assert recognise("Meta-Llama-3.1-8B-Instruct", 32, 14336).name == "Llama-3.1-8B-Instruct"


def test_another_shape_is_another_model():
    found = recognise(LLAMA, 8, 1024)
    assert found.name is None and found.published is None
    assert "the folder's name says Llama-3.2-1B-Instruct, but the model has 8 layers of 1024 neurons" in found.how
    assert recognise("x", 8, 1024, "llama-3.2-1b-instruct").published == MODELS[LLAMA], "the user's word counts"


def test_a_name_that_is_none():
    with pytest.raises(InputError, match=r"--as: expected one of Llama-3.2-1B-Instruct, .*, got 'Llama-3.2-1B'"):
        recognise("x", 8, 1024, "Llama-3.2-1B")
