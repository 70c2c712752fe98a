"""Scores that ask for more than sums: norm-weighted in every path, and relp, which needs gradients."""

import json

import pytest
import torch

from cna_kernels import Circuit, InputError
from cna_kernels.model import demo_checkpoint, load
from cna_kernels.model.cli import main
from cna_kernels.model.demo import world
from cna_kernels.model.discovery.settings import SCORES, settings_from
from cna_kernels.model.discovery.weights import down_norms
from cna_kernels.model.evaluation import relp
from cna_kernels.model.evaluation.metrics import Refusals
from cna_kernels.model.prompts.files import PromptSet

L, N, K = 8, 1024, 12
POSITIVE, NEGATIVE = world.discovery_positive()[:30], world.discovery_negative()[:30]


@pytest.fixture(scope="module")
def model():
    return load(demo_checkpoint(), dtype="float32")


@pytest.fixture(scope="module")
def expected(model):
    """(layer, index) and contrast of the K neurons with the largest abs(contrast) times norm, by a plain sort."""
    every = model.discover(POSITIVE, NEGATIVE, top_k=L * N, universal_prompts=False)
    weights = [layer.mlp.down_proj.weight.detach().double() for layer in model.transformer.layers]
    value = {
        (layer, index): abs(contrast) * weights[layer][:, index].square().sum().sqrt().item()
        for layer, index, contrast in every.neurons
    }
    contrast = {(layer, index): contrast for layer, index, contrast in every.neurons}
    best = sorted(value, key=lambda pair: -value[pair])[:K]
    assert best != every.pairs[:K], "norms that change nothing would hide everything"
    return [(*pair, contrast[pair]) for pair in best]


def same(circuit, expected):
    assert circuit.pairs == [(layer, index) for layer, index, _ in expected]
    for (*_, got), (*_, want) in zip(circuit.neurons, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-4)
    assert circuit.score == "norm-weighted"


@pytest.mark.parametrize("stream_layers", [False, True])
def test_norms_of_models_in_memory_and_on_file(model, stream_layers):
    found = down_norms(load(demo_checkpoint(), dtype="float32", stream_layers=stream_layers))
    for layer, index in ((0, 0), (3, 435), (7, 1023)):
        column = model.transformer.layers[layer].mlp.down_proj.weight[:, index]
        assert found[layer, index].item() == pytest.approx(sum(x * x for x in column.tolist()) ** 0.5, rel=1e-6)
    assert found.shape == (L, N) and found.dtype == torch.float64


def test_norms_are_those_of_the_dtype_in_use():
    """A streamed model rounds its weights as it runs them, so that both ways choose the same neurons."""
    both = [down_norms(load(demo_checkpoint(), dtype="bfloat16", stream_layers=how)) for how in (False, True)]
    assert torch.equal(*both)


@pytest.mark.parametrize("stream_layers", [False, True])
def test_norm_weighted(expected, stream_layers):
    model = load(demo_checkpoint(), dtype="float32", stream_layers=stream_layers)
    options = dict(top_k=K, score="norm-weighted", universal_prompts=False)
    same(model.discover(POSITIVE, NEGATIVE, **options), expected)
    circuit = model.discover(POSITIVE, NEGATIVE, **options, bootstrap=4, folds=3)
    same(circuit, expected)
    assert len(circuit.bootstrap["frequency"]) == K and circuit.bootstrap["overlap"] > 0.3
    assert len(circuit.folds["overlap"]) == 3 and min(circuit.folds["overlap"]) > 0.3


@pytest.fixture
def files(tmp_path):
    for name, prompts in (("p", POSITIVE), ("n", NEGATIVE)):
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts))
    lines = [
        {"prompt": prompt, "columns": [f"{name}.{side}"]}
        for side, prompts in (("positive", POSITIVE), ("negative", NEGATIVE)) for prompt in prompts
        for name in ("one", "two")
    ]  # fmt: skip
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def discover(files, *more, score="norm-weighted"):
    words = ["discover", "demo:instruct", "--dtype", "float32", "--device", "cpu", "--top-k", str(K), "--no-universal"]
    more = [word.replace("DIR", str(files)) for word in more]
    return main([*words, "--score", score, "-o", f"{files}/out", *more])


TWO = ["--positive", "DIR/p.txt", "--negative", "DIR/n.txt"]


@pytest.mark.parametrize(
    "more",
    [
        TWO,
        [*TWO, "--stream-layers"],
        [*TWO, "--run-dir", "DIR/run", "--unit", "16"],
        ["--contrasts", "DIR/many.jsonl"],
        ["--contrasts", "DIR/many.jsonl", "--run-dir", "DIR/run", "--unit", "50", "--stream-layers"],
    ],
    ids=["alone", "streamed", "run directory", "contrasts", "all"],
)
def test_norm_weighted_by_every_path(files, expected, more, capsys):
    assert discover(files, *more) == 0
    for path in ["out/one.json", "out/two.json"] if "--contrasts" in more else ["out"]:
        same(Circuit.load(files / path), expected)


def test_the_score_may_change_over_one_run_directory(files, expected):
    assert discover(files, *TWO, "--run-dir", "DIR/run", score="abs-delta") == 0
    assert discover(files, *TWO, "--run-dir", "DIR/run") == 0
    same(Circuit.load(files / "out"), expected)


def test_relp_is_the_relevance_that_the_evaluation_compares(model, files, tmp_path):
    sides = [model.encode(PromptSet.of(prompts, "p")) for prompts in (POSITIVE, NEGATIVE)]
    score = relp.relevance(model.transformer, sides[0], *relp.first_tokens(model.transformer, *sides))
    best = sorted(((-value, place) for place, value in enumerate(score.flatten().tolist())))[:K]
    circuit = model.discover(POSITIVE, NEGATIVE, top_k=K, score="relp", universal_prompts=False)
    assert circuit.pairs == [divmod(place, N) for _, place in best] and circuit.score == "relp"
    plain = model.discover(POSITIVE, NEGATIVE, top_k=L * N, universal_prompts=False)
    contrast = {(layer, index): value for layer, index, value in plain.neurons}
    for layer, index, value in circuit.neurons:
        assert value == contrast[layer, index], "the file holds the contrast, whatever ranks"
    answers = model.generate(world.heldout_refusable()[:12], circuit=circuit, multiplier=0.0, max_new_tokens=30)
    assert sum(map(Refusals(world.REFUSAL_KEYWORDS), answers)) <= 2, "on the bundled model relp finds the neurons"
    assert discover(files, *TWO, score="relp") == 0
    assert Circuit.load(files / "out").pairs == circuit.pairs


def test_relp_leaves_universal_neurons_out(model):
    circuit = model.discover(POSITIVE, NEGATIVE, top_k=K, score="relp", universal_threshold=0.3)
    excluded = {tuple(pair) for pair in circuit.universal["excluded"]}
    assert excluded and not excluded & set(circuit.pairs)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--contrasts", "DIR/many.jsonl"],
            "--score: relp needs gradients of one contrast in one process: it is not for --c",
        ),
        ([*TWO, "--run-dir", "DIR/run"], "it is not for --run-dir"),
        ([*TWO, "--stream-layers"], "it is not for --stream-layers"),
        ([*TWO, "--tensor-parallel"], "it is not for --tensor-parallel"),
        ([*TWO, "--position", "all"], "score: relp explains the token after the prompt"),
        ([*TWO, "--bootstrap", "5"], "score: relp has no sums to draw again from"),
        ([*TWO, "--folds", "3"], "score: relp has no sums to draw again from"),
    ],
    ids=str,
)
def test_what_relp_cannot_do_is_one_line(files, capsys, more, message):
    assert discover(files, *more, score="relp") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (files / "run").exists() and not (files / "out").is_file()


def test_relp_of_a_model_without_gradients_is_refused():
    with pytest.raises(InputError, match="engine: the score relp needs gradients: the model must be whole"):
        load(demo_checkpoint(), stream_layers=True).discover(POSITIVE, NEGATIVE, score="relp")


def test_sides_that_begin_alike_have_no_relevance(model, monkeypatch):
    monkeypatch.setattr(relp, "DIFFERENCE", 1.1)  # no token begins so many more answers of one side
    with pytest.raises(InputError, match="positive: answers begin like those of the negative prompts"):
        model.discover(POSITIVE, NEGATIVE, score="relp", universal_prompts=False)


def test_the_scores_by_name():
    assert [settings_from(score=name).score for name in SCORES] == list(SCORES)
    with pytest.raises(InputError, match="score: expected one of abs-delta, magnitude, cohen-d, norm-weighted, relp"):
        settings_from(score="best")
