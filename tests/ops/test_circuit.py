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
    "positive_mean: expected 3 numbers, one for each neuron, got 2": {"positive_mean": [0.5, 1]},
    "positive_mean: expected a number, got 'x'": {"positive_mean": "x"},
    "positive_mean[1]: expected a number, got True": {"positive_mean": [0.5, True, 1]},
    "positive_mean[2]: expected a number, got None": {"positive_mean": [0.5, 1, None]},
    "positive_mean[0]: expected a number, got 1": {"positive_mean": [10**400, 1, 2]},
    "mirrored: expected [layer, index] in the model's shape, got True": {"mirrored": True},
    "mirrored[0]: expected [layer, index] in the model's shape, got [3, 1]": {"mirrored": [[3, 1]]},
    "mirrored: expected neurons of the circuit, each once": {"mirrored": [[2, 7], [2, 7]]},
    "mirrored: expected neurons of the circuit": {"mirrored": [[2, 8]]},
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


def test_a_random_control_holds_no_universal_neuron():
    circuit = Circuit(((0, 1, 1.0), (2, 3, 1.0)), 3, 6, universal={"excluded": [[0, 0], [0, 2], [0, 4], [1, 5]]})
    draws = [circuit.random_like(seed).pairs for seed in range(40)]
    assert {pairs[0] for pairs in draws} == {(0, 3), (0, 5)}, "layer 0 has two others"
    assert {index for _, (_, index) in draws} == {0, 1, 2, 4, 5}


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


# Means on the positive prompts, and circuits that are steered along their contrast.

NEURONS = ((1, 3, 2.0), (0, 5, -1.5), (1, 0, 0.25), (0, 0, -0.1), (0, 7, 0.0), (1, 6, -3.0))
MEANS = (-4.0, 0.5, 1e-200, -0.25, -1.0, 1e-200)


def measured(**changes):
    return Circuit(NEURONS, 2, 8, positive_mean=MEANS, **changes)


@pytest.mark.parametrize(
    ("contrast", "mean", "mirrored"),
    [
        (1.0, 2.0, False), (-1.0, -2.0, False), (1.0, -2.0, True), (-1.0, 2.0, True), (-1.0, 0.0, False),
        (0.0, -1.0, False), (0.0, 0.0, False), (1e-200, 1e-200, False), (1e-200, -1e-200, True), (-0.0, 3.0, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("m", [0.0, 0.5, 1.0, 1.5, 2.0, -3.0])
def test_aligned_moves_every_neuron_along_its_contrast(contrast, mean, mirrored, m):
    """The step from the mean on the positive prompts is along the contrast above 1, against it below 1."""
    circuit = Circuit(((0, 1, contrast), (1, 2, 1.0)), 2, 8, positive_mean=(mean, 1.0)).aligned()
    first, second = circuit.multipliers(m)
    assert circuit.mirrored == (((0, 1),) if mirrored else ()) and (first, second) == (2 - m if mirrored else m, m)
    step = (first - 1) * mean
    assert step == 0 or contrast == 0 or (np.sign(step) == np.sign(contrast)) == (m > 1)


def test_plain_circuits_give_every_neuron_the_multiplier():
    assert measured().multipliers(1.5) == [1.5] * 6 == make().multipliers(1.5) + [1.5] * 3


def test_what_an_aligned_circuit_is():
    circuit = measured(model={"name": "m"}, bootstrap={"seed": 0})
    aligned = circuit.aligned()
    assert aligned.mirrored == ((1, 3), (0, 5), (1, 6)) and aligned.multipliers(2.0) == [0, 0, 2, 2, 2, 0]
    assert aligned.multipliers(0.0) == [2, 2, 0, 0, 0, 2] and aligned.multipliers(1.0) == [1.0] * 6
    assert aligned.aligned() is aligned and aligned != circuit and aligned.to_json() != circuit.to_json()
    assert (aligned.neurons, aligned.positive_mean, aligned.bootstrap) == (NEURONS, MEANS, {"seed": 0})
    with pytest.raises(InputError, match=r"^positive_mean: is missing, .*: discover it again$"):
        make().aligned()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"positive_mean": (1.0,)}, "positive_mean: expected 6 finite numbers, one for each neuron"),
        ({"positive_mean": (float("nan"),) * 6}, "positive_mean: expected 6 finite numbers"),
        ({"mirrored": ((0, 1),)}, "mirrored: expected neurons of the circuit, each once"),
        ({"mirrored": ((0, 5), (0, 5))}, "mirrored: expected neurons of the circuit, each once"),
        ({"mirrored": ((0.5, 5),)}, "mirrored: expected a whole number"),
    ],
)
def test_means_and_mirrored_neurons_are_checked(changes, said):
    with pytest.raises(InputError, match=said):
        Circuit(NEURONS, 2, 8, **changes)


@pytest.mark.parametrize("make_one", [measured, lambda: measured().aligned(), lambda: measured().aligned().positive()])
def test_files_hold_the_means_and_what_is_mirrored(tmp_path, make_one):
    circuit = make_one()
    circuit.save(tmp_path / "c.json")
    assert (
        Circuit.load(tmp_path / "c.json") == circuit
        and Circuit.load(tmp_path / "c.json").to_json() == (tmp_path / "c.json").read_text()
    )


def test_old_files_are_read_and_written_as_before(tmp_path):
    """Nothing new stands in the file of a circuit without means, so its hash, too, is what it was."""
    record = json.loads(make().to_json())
    assert not {"positive_mean", "mirrored"} & set(record) and Circuit.from_record(record, "c.json") == make()
    record |= {"positive_mean": None, "mirrored": None}
    assert Circuit.from_record(record, "c.json").positive_mean is None
    with pytest.raises(InputError, match=r"not a field of a circuit file"):
        Circuit.from_record(record | {"aligned": True}, "c.json")


def test_halves_keep_what_is_known_of_their_neurons():
    for circuit in (measured(), measured().aligned()):
        known = dict(zip(circuit.pairs, MEANS, strict=True))
        for half in (circuit.positive(), circuit.negative()):
            assert half.positive_mean == tuple(known[pair] for pair in half.pairs) and 0 < half.k < 6
            assert half.aligned().multipliers(1.5) == [
                dict(zip(circuit.pairs, circuit.aligned().multipliers(1.5), strict=True))[pair] for pair in half.pairs
            ]
            assert (half.mirrored is None) == (circuit.mirrored is None)


def test_a_random_control_mirrors_as_many():
    """In each layer as many as the circuit, of the neurons that the plain circuit's control has, too."""
    plain = Circuit(
        tuple((layer, index, -1.0 if index < 9 else 1.0) for layer in (0, 1, 3) for index in range(3 * layer, 12)),
        4, 400, positive_mean=(1.0,) * 24,
    )  # fmt: skip
    circuit, places = plain.aligned(), set()
    for seed in range(20):
        control = circuit.random_like(seed)
        assert control.neurons == plain.random_like(seed).neurons and plain.random_like(seed).mirrored is None
        assert control.aligned() is control and control.positive_mean is None
        for layer in range(4):
            of = [sum(at == layer for at, _ in one.mirrored) for one in (circuit, control)]
            assert of[0] == of[1] and (layer != 0 or of[0] == 9)
        own = {layer: [i for at, i in control.pairs if at == layer] for layer in range(4)}
        places |= {own[layer].index(index) for layer, index in control.mirrored if layer == 0}
    assert places == set(range(12)), "which ones are mirrored is random"


# Mixtures: layer 0 is dense with 12 neurons, layer 1 has 3 experts of 5.

EXPERTS = ((1, 12), (3, 5))


def mixture(**changes):
    return Circuit(
        **dict(
            neurons=((1, 11, 2.0), (0, 11, -1.0), (1, 4, 0.5)), n_layers=2, n_neurons=15, experts=EXPERTS,
            excluded=((1, 5), (0, 0)), mirrored=((1, 4),),
            universal={"prompts": 3, "fraction": 0.1, "threshold": 0.8, "excluded": [[1, 14]], "prompts_sha256": None},
            bootstrap={"replicates": 2, "seed": 0, "overlap": 0.5, "pairwise_overlap": 0.5,
                       "frequency": [1.0, 0.5, 0.5], "others": [[1, 9, 0.5]]},
        )
        | changes
    )  # fmt: skip


def test_a_mixtures_file_names_the_expert_of_every_neuron(tmp_path):
    path = tmp_path / "c.json"
    mixture().save(path)
    record = json.loads(path.read_text())
    assert record["neurons"] == [[1, 2, 1, 2.0], [0, 0, 11, -1.0], [1, 0, 4, 0.5]]
    assert record["excluded"] == [[1, 1, 0], [0, 0, 0]] and record["mirrored"] == [[1, 0, 4]]
    assert record["universal"]["excluded"] == [[1, 2, 4]] and record["bootstrap"]["others"] == [[1, 1, 4, 0.5]]
    assert record["experts"] == [[1, 12], [3, 5]]
    assert Circuit.load(path) == mixture() and "expert   2  neuron      1" in str(mixture())
    plain = mixture(universal=None, bootstrap=None, mirrored=None)
    plain.save(path)
    assert json.loads(path.read_text())["excluded"] == [[1, 1, 0], [0, 0, 0]], "numbered once"
    assert Circuit.load(path) == plain and plain.n_all == 27
    assert mixture().universal["excluded"] == [[1, 14]], "saving changes nothing of the circuit"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r["neurons"][0].__setitem__(1, 3), r"neurons\[0\]: expected \[layer, expert, index, ...\]"),
        (lambda r: r["neurons"][0].__setitem__(2, 5), r"neurons\[0\]: expected \[layer, expert, index, ...\]"),
        (lambda r: r["neurons"][1].__setitem__(1, 1), r"neurons\[1\]: expected \[layer, expert, index, ...\]"),
        (lambda r: r["mirrored"].append([1, 4]), r"mirrored\[1\]: expected \[layer, expert, index, ...\]"),
        (lambda r: r["bootstrap"]["others"].append([2, 0, 0, 1]), r"bootstrap.others\[1\]: expected \[layer, expert"),
        (lambda r: r.update(experts=[[1, 12]]), "experts: expected one for each of 2 layers, the widest of 15"),
        (lambda r: r.update(experts=[[1, 12], [3, 4]]), "experts: expected one for each of 2 layers"),
        (lambda r: r.update(experts=[[1, 12], [0, 5]]), r"experts\[1\]: expected \[experts, neurons of each\]"),
    ],
)
def test_bad_experts_are_named(tmp_path, change, message):
    record = json.loads(mixture().to_json())
    change(record)
    (tmp_path / "c.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=message):
        Circuit.load(tmp_path / "c.json")


def test_a_mixtures_control_is_drawn_from_the_same_experts():
    for seed in range(20):
        control = mixture(mirrored=None).random_like(seed)
        assert sorted(control.expert_of(layer, index)[0] for layer, index in control.pairs if layer == 1) == [0, 2]
        assert not {*control.pairs} & {*mixture().pairs, (1, 14)} and control.experts == EXPERTS
    with pytest.raises(InputError, match=r"\(0, 12\) is outside 2 layers of 12 neurons"):
        mixture(neurons=((0, 12, 1.0),), mirrored=None, bootstrap=None)
    with pytest.raises(InputError, match="experts: expected"):
        mixture(experts=((1, 12), (3, 4)))
