"""Behaviours from files: every field checked, prompts apart, and those that come with the package."""

import json

import pytest

from cna_kernels.errors import InputError
from cna_kernels.model.evaluation.behaviour import BUNDLED, Behaviour

RECORD = {
    "behaviour": "capitals", "labels": ["capital", "country"], "template": False, "positive": ["p1", "p2"],
    "negative": ["n1", "n2"], "measured": [{"prompt": "m1", "answer": " Lima"}, {"prompt": "m2", "answer": ["a", "b"]}],
    "measure": {"kind": "next token"},
}  # fmt: skip


def written(tmp_path, **changes):
    path = tmp_path / "b.json"
    record = {name: value for name, value in (RECORD | changes).items() if value != "left out"}
    path.write_text(json.dumps(record))
    return path


def test_what_is_read(tmp_path):
    found = Behaviour.read(written(tmp_path))
    assert (found.name, found.labels, found.chat) == ("capitals", ("capital", "country"), False)
    assert found.positive.texts == ("p1", "p2") and found.prompts.texts == ("m1", "m2")
    assert [item.answers for item in found.measured] == [(" Lima",), ("a", "b")]
    assert found.measured[1].place == f"{tmp_path / 'b.json'}: measured[1]"


def test_prompts_in_files_beside_it(tmp_path):
    (tmp_path / "pos.txt").write_text("p1\np2\np3\n")
    (tmp_path / "held.csv").write_text("prompt\nm1\nm2\n")
    path = written(tmp_path, positive="pos.txt", measured="held.csv", measure={"kind": "json"})
    found = Behaviour.read(path)
    assert found.positive.texts == ("p1", "p2", "p3") and found.prompts.texts == ("m1", "m2")
    assert found.measured[0].place.endswith("held.csv:2: prompt")
    with pytest.raises(InputError, match=r"held\.csv:2: prompt\.answer: is missing"):
        Behaviour.read(written(tmp_path, measured="held.csv"))


def test_hash_follows_what_is_measured_not_words(tmp_path):
    one = Behaviour.read(written(tmp_path)).sha256
    assert Behaviour.read(written(tmp_path, about="x", behaviour="y", labels=["a", "b"])).sha256 == one
    for changes in (
        dict(positive=["p1", "p3"]), dict(template=True), dict(measured=RECORD["measured"][:1]),
        dict(measured=[{"prompt": "m1", "answer": " Quito"}, RECORD["measured"][1]]),
        dict(measure={"kind": "contains"}),
    ):  # fmt: skip
        assert Behaviour.read(written(tmp_path, **changes)).sha256 != one, changes


FAULTS = [
    (dict(behaviour="left out"), "behaviour: is missing"),
    (dict(behaviour="../x"), "behaviour: expected a name of letters, digits, - and _, got '../x'"),
    (dict(behaviour="harmless"), "behaviour: 'harmless' is a name of the matrix's own"),
    (dict(labels=["one"]), "labels: expected two, got 1"),
    (dict(template="yes"), "template: expected true or false"),
    (dict(positive="left out"), "positive: is missing"),
    (dict(positive=[1]), "positive[0]: expected text, got 1"),
    (dict(positive=[]), "positive: holds no prompt"),
    (dict(measured=[]), "measured: holds no prompt"),
    (dict(measured=["m1"]), "measured[0].answer: is missing"),
    (dict(measured=[{"prompt": "m1", "answer": []}]), "measured[0].answer: expected a text, or several"),
    (dict(measured=[{"prompt": "m1", "answr": "x"}]), "measured[0].answr: not a field of a measured prompt"),
    (dict(measured=[{"prompt": "n2", "answer": "x"}]), "measured[0]: is a discovery prompt, too"),
    (dict(measure="left out"), "measure: is missing"),
    (dict(metric="x"), "metric: not a field of a behaviour"),
    (dict(negative="nowhere.txt"), "nowhere.txt: No such file"),
]


@pytest.mark.parametrize(("changes", "what"), FAULTS, ids=[each[1] for each in FAULTS])
def test_faults_name_file_and_field(tmp_path, changes, what):
    with pytest.raises(InputError) as caught:
        Behaviour.read(written(tmp_path, **changes))
    assert what in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled(name):
    found = Behaviour.bundled(name)
    assert found.name == name and found.about and len(found.positive) == len(found.negative) >= 30
    texts = [*found.positive.texts, *found.negative.texts, *found.prompts.texts]
    assert len(set(texts)) == len(texts) and len(found.measured) >= 20


def test_no_other_is_bundled():
    with pytest.raises(InputError, match="expected one of refusal, capitals"):
        Behaviour.bundled("../secrets")
