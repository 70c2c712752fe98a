"""cna compare: two models' circuits side by side, and both steered with both."""

import json
import shutil

import pytest
import torch

from cna_kernels import Circuit, InputError
from cna_kernels.model import load
from cna_kernels.model.cli import main
from cna_kernels.model.evaluation.compare import alike, compare, spearman
from cna_kernels.model.evaluation.suite import Suite
from cna_kernels.model.prompts.files import PromptSet
from tiny import write_language_model

pytest.importorskip("transformers")

POSITIVE = PromptSet.of([f"please {n}" for n in range(6)], "positive")
NEGATIVE = PromptSet.of([f"look at {n} of them" for n in range(5)], "negative")
HARMFUL = PromptSet.of(["open it", "why not now", "go"], "harmful")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Two models of one shape, the second a little different, and a third of another shape."""
    root = tmp_path_factory.mktemp("models")
    for name, changes in (("base", {}), ("instruct", {"seed": 3}), ("wide", {"intermediate_size": 64})):
        (root / name).mkdir()
        write_language_model(root / name, **changes)
    return root


def test_spearman_is_pearson_of_ranks():
    a, b = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([9.0, 1.0, 4.0, 5.0])
    ranks = torch.tensor([[4.0, 1.0, 2.5, 2.5], [4.0, 1.0, 2.0, 3.0]]).double()
    assert spearman(a, b) == pytest.approx(torch.corrcoef(ranks)[0, 1].item())
    assert spearman(a, a.exp()) == pytest.approx(1.0) and spearman(a, -a) == pytest.approx(-1.0)
    assert spearman(a, torch.ones(4)) == 0.0


def test_alike():
    delta_a = torch.tensor([[5.0, -4.0, 1.0, 0.0], [3.0, 0.5, 0.1, 0.2]]).double()
    delta_b = torch.tensor([[5.0, 0.1, 4.0, 0.0], [-3.0, 0.5, 0.2, 0.3]]).double()
    a = Circuit(((0, 0, 5.0), (0, 1, -4.0), (1, 0, 3.0)), 2, 4)
    b = Circuit(((0, 0, 5.0), (0, 2, 4.0), (1, 0, -3.0)), 2, 4)
    found = alike(a, b, delta_a, delta_b)
    assert found["overlap"] == pytest.approx(2 / 3) and found["by chance"] == 3 / 8
    assert found["overlap of the top 8"] == 1.0
    assert found["in either"] == pytest.approx(spearman(torch.tensor([5, 4, 1, 3.0]), torch.tensor([5, 0.1, 4, 3.0])))


def test_two_models(directories, tmp_path):
    models = {name: load(directories / name) for name in ("base", "instruct")}
    suite = Suite(positive=POSITIVE, negative=NEGATIVE, harmful=HARMFUL, multipliers=(1.0, 0.0, 5.0), max_new_tokens=6)
    found = compare(models, suite, out=tmp_path / "out", top_k=6, universal_prompts=False)
    for name, model in models.items():
        circuit = model.discover(POSITIVE, NEGATIVE, top_k=6, universal_prompts=False)
        assert Circuit.load(tmp_path / "out" / f"{name}.circuit.json").neurons == circuit.neurons
        assert found["circuits"][name]["per_layer"] == circuit.per_layer()
        assert found["circuits"][name]["last quarter"] == circuit.per_layer()[-1] / 6
        rows = found["evaluations"][name]["rows"]
        other = {"base": "instruct", "instruct": "base"}[name]
        assert {row["method"] for row in rows} == {"unsteered", "circuit", f"circuit of {other}"}
        transplanted = Circuit.load(tmp_path / "out" / f"{other}.circuit.json")
        (row,) = [r for r in rows if r["method"] == f"circuit of {other}" and r["multiplier"] == 5.0]
        answers = [model.generate(t, circuit=transplanted, multiplier=5.0, max_new_tokens=6) for t in HARMFUL.texts]
        plain = [model.generate(t, max_new_tokens=6) for t in HARMFUL.texts]
        assert row["harmful"]["unchanged"]["share"] == sum(a == b for a, b in zip(answers, plain, strict=True)) / 3
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["alike"] == found["alike"]
    assert "circuit of base" in (tmp_path / "out" / "compare.md").read_text()


def test_models_of_different_shapes(directories):
    models = {name: load(directories / name) for name in ("base", "wide")}
    suite = Suite(positive=POSITIVE, negative=NEGATIVE, harmful=HARMFUL, multipliers=(0.0,), max_new_tokens=3)
    found = compare(models, suite, universal_prompts=False)
    assert found["alike"] is None
    assert {row["method"] for row in found["evaluations"]["wide"]["rows"]} == {"unsteered", "circuit"}


def test_different_chat_templates_are_refused(directories, tmp_path):
    shutil.copytree(directories / "base", tmp_path / "other")
    record = json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())
    record["chat_template"] = "{{ bos_token }}" + record["chat_template"]
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps(record))
    models = {"base": load(directories / "base"), "other": load(tmp_path / "other")}
    options = dict(positive=POSITIVE, negative=NEGATIVE, harmful=HARMFUL, multipliers=(0.0,), max_new_tokens=2)
    with pytest.raises(InputError, match="--no-template: the models' chat templates differ"):
        compare(models, Suite(**options), universal_prompts=False)
    found = compare(models, Suite(**options, chat=False), universal_prompts=False)
    assert found["alike"]["overlap"] == 1.0  # both models have the same weights


def test_the_command(directories, tmp_path, capsys):
    for name, prompts in (("positive", POSITIVE), ("negative", NEGATIVE), ("harmful", HARMFUL)):
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts.texts))
    shutil.copytree(directories / "base", tmp_path / "again" / "base")
    words = [
        "compare", str(directories / "base"), str(tmp_path / "again" / "base"), "--positive",
        f"{tmp_path}/positive.txt", "--negative", f"{tmp_path}/negative.txt", "--harmful", f"{tmp_path}/harmful.txt",
        "--m", "1,0", "--max-new-tokens", "4", "-o", f"{tmp_path}/out", "--device", "cpu",
    ]  # fmt: skip
    assert main(words) == 0
    assert "wrote compare.json" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["alike"]["overlap"] == 1.0 and found["alike"]["rank correlation"] == pytest.approx(1.0)
    assert set(found["circuits"]) == {"base", "base (second)"}
