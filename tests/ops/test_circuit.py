"""The circuit file: round trip, every bad field named, the public code's JSON, random controls."""

import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from cna_kernels import Circuit, InputError
from cna_kernels.circuit import check_fits, check_found_in, check_template
from cna_kernels.errors import InputWarning


def make():
    return Circuit(
        neurons=((2, 7, -1.5), (0, 3, 1.25), (2, 1, 0.1)),
        n_layers=3,
        n_neurons=10,
        score="abs-delta",
        fraction=0.1,
        k_rule="rule",
        position="last prompt token",
        skipped_layers=(1,),
        universal={"prompts": 24, "prompts_sha256": "x", "fraction": 0.001, "threshold": 0.8, "excluded": [[0, 1]]},
        model={"name": "m", "settings_sha256": "a", "tensors_sha256": "b", "decoder_sha256": "c"},
        tokenizer_sha256="d",
        prompts={"positive": {"count": 2, "sha256": "e"}, "negative": {"count": 3, "sha256": "f"}},
        dtype="float32",
        versions={"torch": "x"},
    )


def test_round_trip(tmp_path):
    make().save(tmp_path / "c.json")
    assert Circuit.load(tmp_path / "c.json") == make()
    record = json.loads((tmp_path / "c.json").read_text())
    assert record["schema_version"] == 1 and record["k"] == 3 and record["site"] == "mlp.down_proj.input"
    assert record["neurons"][0] == [2, 7, -1.5] and "multiplier" not in record


def test_empty_circuit_round_trip(tmp_path):
    empty = Circuit((), 3, 10)
    empty.save(tmp_path / "c.json")
    assert Circuit.load(tmp_path / "c.json") == empty


def test_neurons_are_plain_numbers():
    """Numbers of PyTorch and NumPy count as what they are; what is no whole number is refused."""
    expected = ((0, 4, 0.5), (1, 2, -1.0))
    for kind in (torch.tensor, np.array):
        found = Circuit([tuple(kind(number) for number in neuron) for neuron in expected], 2, 5)
        assert found.neurons == expected and found == Circuit(expected, 2, 5)
        assert {type(x) for neuron in found.neurons for x in neuron[:2]} == {int}
        with pytest.raises(InputError, match="appears twice"):
            Circuit(((kind(0), kind(1), 0.0), (0, 1, 0.0)), 2, 5)
    for neuron in ((0, 1.5, 0.0), (0.5, 1, 0.0), (True, 1, 0.0), (torch.tensor(True), 1, 0.0), ("0", 1, 0.0)):
        with pytest.raises(InputError, match=r"neurons\[0\]: expected a whole number"):
            Circuit((neuron,), 2, 5)
    for neuron in ((0, 1), 3, (0, 1, None), (0, 1, "a")):
        with pytest.raises(InputError, match=r"neurons\[0\]: expected \(layer, index, contrast\)"):
            Circuit((neuron,), 2, 5)


def test_shape_of_a_circuit():
    circuit = make()
    assert circuit.k == 3 and circuit.per_layer() == [1, 0, 2]
    assert circuit.by_layer() == {0: [3], 2: [1, 7]}
    assert "layer   2  neuron      7  contrast -1.5000" in str(circuit)


CHANGES = {
    "schema_version: expected 1, got 2": {"schema_version": 2},
    "schema_version: expected 1, got None": {"schema_version": None},
    "n_layers: expected a whole number from 1 to 10000, got 'three'": {"n_layers": "three"},
    "n_layers: expected a whole number from 1 to 10000, got 0": {"n_layers": 0},
    "n_neurons: expected a whole number from 1 to 10000000, got True": {"n_neurons": True},
    "site: expected mlp.down_proj.input, got 'residual'": {"site": "residual"},
    "fraction: expected a number above 0 and at most 1, got 1.5": {"fraction": 1.5},
    "k: expected 3, the length of neurons, got 4": {"k": 4},
    "skipped_layers[0]: expected layers below 3, got 3": {"skipped_layers": [3]},
    "neurons[0]: expected [layer, index, contrast], got [1, 2]": {"neurons": [[1, 2]], "k": 1},
    "neurons[1]: expected [layer, index, contrast], got [1, 2.0, 3]": {"neurons": [[1, 2, 3], [1, 2.0, 3]], "k": 2},
    "neurons: (3, 0) is outside 3 layers of 10 neurons": {"neurons": [[3, 0, 1]], "k": 1},
    "neurons: (0, -1) is outside 3 layers of 10 neurons": {"neurons": [[0, -1, 1]], "k": 1},
    "neurons: (0, 1) appears twice": {"neurons": [[0, 1, 1], [0, 1, 2]], "k": 2},
    "universal: expected a JSON object, got []": {"universal": []},
    "universal.prompts: is missing": {"universal": {}},
    "universal.fraction: expected a number from 0 to 1, got 7": {
        "universal": {"prompts": 1, "prompts_sha256": "x", "fraction": 7, "threshold": 1, "excluded": []}
    },
    "model.name: expected text, got 3": {"model": {"name": 3}},
    "prompts.positive: expected a JSON object, got 5": {"prompts": {"positive": 5}},
    "prompts.other: not a field of a circuit file": {
        "prompts": {
            "positive": {"count": 1, "sha256": "x"},
            "negative": {"count": 1, "sha256": "x"},
            "other": {},
        }
    },
    "neurons[0]: expected a number that a double holds, got 1": {"neurons": [[0, 1, 10**400]], "k": 1},
    "multiplier: not a field of a circuit file": {"multiplier": 0},
}


@pytest.mark.parametrize("message", CHANGES)
def test_bad_fields_are_named(tmp_path, message):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(json.loads(make().to_json()) | CHANGES[message]))
    with pytest.raises(InputError) as caught:
        Circuit.load(path)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"[1]", "expected a JSON object"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b'{"schema_version": 1, "schema_version": 1}', "repeats the key 'schema_version'"),
        (make().to_json().replace("1.25", "NaN").encode(), "holds NaN"),
        (make().to_json().replace("1.25", "1e999").encode(), "holds 1e999"),
        (b"[" * 100_000, "is nested too deeply"),
        (make().to_json()[:-20].encode(), "is not JSON"),
    ],
)
def test_files_that_are_no_circuit(tmp_path, content, message):
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        Circuit.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_public_code_json(tmp_path):
    path = tmp_path / "public.json"
    neurons = {"5,-1,30": 0.5, "2,11,4": -2.0, "3,-1,4": 0.5}
    path.write_text(json.dumps({"neurons": neurons, "prompt": "p", "target_token": "t", "total_logit_diff": 1.0}))
    circuit = Circuit.load(path, n_layers=8, n_neurons=64)
    assert circuit.neurons == ((2, 4, -2.0), (3, 4, 0.5), (5, 30, 0.5)) and circuit.n_neurons == 64
    assert Circuit.load(path).n_layers == 6
    with pytest.raises(InputError, match=r"public.json: neurons: \(5, 30\) is outside"):
        Circuit.load(path, n_layers=4, n_neurons=64)
    path.write_text(json.dumps({"neurons": {"5,30": 0.5}}))
    with pytest.raises(InputError, match="expected keys 'layer,position,index'"):
        Circuit.load(path)
    path.write_text(json.dumps({"neurons": {"999999999999,0,0": 0.5}}))
    with pytest.raises(InputError, match=r"\(999999999999, 0\) is no layer and neuron of a model"):
        Circuit.load(path)


def test_random_control_draws_elsewhere_in_the_same_layers():
    circuit = make()
    draws = {circuit.random_like(seed).neurons for seed in range(5)}
    assert len(draws) == 5
    for seed in range(5):
        control = circuit.random_like(seed)
        assert control.per_layer() == circuit.per_layer()
        assert not set(control.pairs) & set(circuit.pairs)
    assert circuit.random_like(3) == circuit.random_like(3)


def test_a_circuit_of_another_shape_is_refused():
    check_fits(make(), 3, 10)
    with pytest.raises(InputError, match="circuit: n_neurons: made for another model: expected 11, got 10"):
        check_fits(make(), 3, 11)


@pytest.mark.parametrize("where", ["missing/c.json", "."])
def test_unwritable_output(tmp_path, where):
    with pytest.raises(InputError, match="cannot be written"):
        make().save(tmp_path / where)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.json"
    make().save(path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="No space left on device"):
        Circuit((), 3, 10).save(path)
    assert Circuit.load(path) == make() and os.listdir(tmp_path) == ["c.json"]
    assert not list(Path(tmp_path).glob(".*"))


FOUND_IN = Circuit(((0, 1, 1.0),), 2, 8, model={"name": "m", "tensors_sha256": "w"}, chat_template_sha256="t")
OLD = Circuit(((0, 1, 1.0),), 2, 8, model={"name": "m", "weights_sha256": "w"})
NAMED = Circuit(((0, 1, 1.0),), 2, 8, model={"name": "m"})
PLAIN = Circuit(((0, 1, 1.0),), 2, 8, model={"name": "m", "tensors_sha256": "w"}, tokenizer_sha256="k")
IMPORTED = Circuit(((0, 1, 1.0),), 2, 8)
HERE = {"model.name": "n", "model.tensors_sha256": "w", "tokenizer_sha256": "k", "chat_template_sha256": "t"}


@pytest.mark.parametrize(
    ("circuit", "here", "refused", "said"),
    [
        (FOUND_IN, HERE, None, None),
        (FOUND_IN, {"model.tensors_sha256": "x"}, "model.tensors_sha256: made for another model", None),
        (PLAIN, HERE | {"tokenizer_sha256": "other"}, "tokenizer_sha256: made for another model", None),
        (PLAIN, HERE | {"chat_template_sha256": None}, None, None),
        (PLAIN, HERE, None, r"found on plain text, here .* the chat template \(t\); --no-template, .* follows it"),
        (FOUND_IN, HERE | {"chat_template_sha256": "u"}, None, r"found with another chat template \(t\) than .* \(u\)"),
        (FOUND_IN, HERE | {"chat_template_sha256": None}, None, r"chat template \(t\), here prompts are plain text"),
        (FOUND_IN, {"model.tensors_sha256": "w"}, None, None),
        (FOUND_IN, {"model.name": "n"}, None, "found in 'm', this is 'n': .* this model's weights have no hash"),
        (OLD, HERE, None, "model: found in 'm', this is 'n': .* hashes are of an earlier version"),
        (NAMED, HERE, None, "model: found in 'm', this is 'n': .* the circuit has no hash of it"),
        (IMPORTED, HERE, None, None),
    ],
)
def test_where_a_circuit_was_found(circuit, here, refused, said):
    """Another model is refused. What cannot be known, and another template, are one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if refused is None:
            check_found_in(circuit, here, "c.json")
        else:
            with pytest.raises(InputError, match=f"c.json: {refused}: found in 'm', this is .*--any-model"):
                check_found_in(circuit, here, "c.json")
    lines = [str(warning.message) for warning in caught]
    assert len(lines) == (said is not None) and all(re.search(said, line) and line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("circuit", "now", "said"),
    [
        (FOUND_IN, "t", None),
        (FOUND_IN, "u", None),  # another model has another template
        (FOUND_IN, None, "here prompts are plain text"),
        (PLAIN, None, None),
        (PLAIN, "u", "found on plain text, here prompts go through the chat template"),
        (IMPORTED, "u", None),
        (NAMED, "u", None),  # found by an engine, which is given tokens
    ],
)
def test_plain_text_and_a_template_of_another_model(circuit, now, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_template(circuit, now, "c.json", any_template=True)
    assert len(caught) == (said is not None)
    assert all(issubclass(w.category, InputWarning) and said in str(w.message) for w in caught)


def test_the_largest_seed_can_be_read_again(tmp_path):
    bootstrap = {
        "replicates": 2, "seed": 2**63 - 1, "overlap": 1.0, "pairwise_overlap": 1.0, "frequency": [1.0], "others": []
    }  # fmt: skip
    Circuit(((0, 1, 1.0),), 2, 8, bootstrap=bootstrap).save(tmp_path / "c.json")
    assert Circuit.load(tmp_path / "c.json").bootstrap == bootstrap


def test_halves_by_sign(tmp_path):
    about = dict(score="abs-delta", k_rule="top_k", model={"name": "m"}, bootstrap={"frequency": [1.0, 0.5, 0.2]})
    circuit = Circuit(((1, 3, 2.0), (0, 5, -1.5), (1, 0, 0.25), (0, 0, 0.0)), 2, 8, **about)
    assert circuit.positive().neurons == ((1, 3, 2.0), (1, 0, 0.25))
    assert circuit.negative().neurons == ((0, 5, -1.5),)
    half = circuit.negative()
    assert (half.k_rule, half.score, half.bootstrap) == ("negative contrast of top_k", "abs-delta", None)
    half.save(tmp_path / "half.json")
    assert Circuit.load(tmp_path / "half.json") == half
    with pytest.raises(InputError, match="sign: no neuron of the circuit has a negative contrast"):
        circuit.positive().negative()
