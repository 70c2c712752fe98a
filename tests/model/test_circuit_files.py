"""Circuits by the names of their files, in generate and steered: read once, checked, and an error names the file."""

import warnings
from pathlib import Path

import pytest
import torch

from cna_kernels import Circuit, InputError
from cna_kernels.errors import InputWarning
from cna_kernels.model import load
from tiny import write_language_model

pytest.importorskip("transformers")
PROMPTS = ["hi", "what is the time", "a"]
SHORT = dict(multiplier=-3.0, max_new_tokens=10)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_language_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def found(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        return model.discover(["a", "b"], ["c"], top_k=9)


@pytest.fixture
def file(found, tmp_path):
    found.save(tmp_path / "c.json")
    return str(tmp_path / "c.json")


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        yield


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_steers_as_its_circuit(model, found, file, kind):
    expected, plain = model.generate(PROMPTS, circuit=found, **SHORT), model.generate(PROMPTS, max_new_tokens=10)
    assert model.generate(PROMPTS, circuit=kind(file), **SHORT) == expected != plain
    assert model.generate(PROMPTS[1], circuit=kind(file), **SHORT) == expected[1]
    mixed = model.generate(PROMPTS, circuit=[None, kind(file), found], **SHORT)
    assert mixed == [plain[0], *expected[1:]]
    ids = torch.tensor([model.tokenizer.encode(PROMPTS[1])])
    for given in (kind(file), [kind(file)], (kind(file),)):
        with model.steered(found, -3.0):
            logits = model(ids)
        with model.steered(given, -3.0):
            assert torch.equal(model(ids), logits) and model.generate(PROMPTS, max_new_tokens=10) == expected


def test_a_file_is_read_once(model, file, monkeypatch):
    paths, read = [], Circuit.from_record
    monkeypatch.setattr(Circuit, "from_record", lambda r, path, **how: paths.append(path) or read(r, path, **how))
    model.generate(PROMPTS, circuit=[file, Path(file), file], **SHORT)
    assert paths == [file]


def test_what_is_refused_names_the_file(model, found, file, tmp_path):
    other = load(write_language_model(tmp_path / "other", seed=1))
    Circuit((), 3, 50).save(tmp_path / "shape.json")
    (tmp_path / "text.json").write_text("no JSON")
    refused = [
        (model, "nowhere.json", r"nowhere\.json: No such file"),
        (model, tmp_path / "text.json", r"text\.json: is not JSON"),
        (model, tmp_path / "shape.json", r"shape\.json: n_neurons: made for another model: expected 48, got 50"),
        (other, file, r"c\.json: model\.\w+_sha256: made for another model: .*any_model=True"),
        (model, 3, "circuit: expected a Circuit, or the file of one, got 3"),
        (model, [found.neurons[0]], r"circuit: expected a Circuit, or the file of one, got \(\d, "),
    ]  # fmt: skip
    for language_model, given, said in refused:
        for listed in (given,) if isinstance(given, list) else (given, [given]):
            with pytest.raises(InputError, match=said):
                language_model.generate(["hi"], circuit=listed, **SHORT)
            with pytest.raises(InputError, match=said), language_model.steered(listed, 0.0):
                pass
    expected = other.generate(PROMPTS, circuit=found, **SHORT)
    assert other.generate(PROMPTS, circuit=file, any_model=True, **SHORT) == expected
    with other.steered(file, -3.0, any_model=True):
        assert other.generate(PROMPTS, max_new_tokens=10) == expected


def test_another_template_is_said_where_prompts_are_known(model, found, tmp_path):
    warnings.simplefilter("ignore", InputWarning)
    plain = model.discover(["a", "b"], ["c"], top_k=3, chat=False)
    warnings.simplefilter("error", InputWarning)
    plain.save(tmp_path / "plain.json")
    found.save(tmp_path / "chat.json")
    model.generate("hi", circuit=tmp_path / "plain.json", chat=False, **SHORT)
    with pytest.warns(InputWarning, match=r"plain\.json: chat_template_sha256: found on plain text"):
        model.generate("hi", circuit=tmp_path / "plain.json", **SHORT)
    with pytest.warns(InputWarning, match=r"chat\.json: chat_template_sha256: .*, here prompts are plain text"):
        model.generate("hi", circuit=tmp_path / "chat.json", chat=False, **SHORT)
    with model.steered(tmp_path / "plain.json", 0.0):  # what runs inside is not known
        pass


def test_nothing_asks_whether_a_circuit_is_true(model, found, file, monkeypatch):
    """An empty circuit is false; where a circuit may be None, it is compared with None."""

    def fail(_):
        raise AssertionError("the truth of a circuit")

    plain, empty = model.generate(PROMPTS, max_new_tokens=10), Circuit((), 3, 48)
    assert not empty and len(empty) == 0
    monkeypatch.setattr(Circuit, "__bool__", fail, raising=False)
    assert model.generate(PROMPTS, circuit=empty, **SHORT) == plain
    assert model.generate(PROMPTS, circuit=[empty, None, empty], **SHORT) == plain
    assert model.generate(PROMPTS, circuit=[empty, file, found], **SHORT) != plain
    with model.steered(empty, 0.0) as table:
        assert table.n_circuits == 1 and model.generate(PROMPTS, max_new_tokens=10) == plain
