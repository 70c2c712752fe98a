"""No wreck wins: rows, curves and choices on the bundled toy model, and the rules by hand."""

import math

import pytest
import torch

from cna_kernels import Circuit, InputError
from cna_kernels.model import demo_checkpoint, load
from cna_kernels.model.demo import world
from cna_kernels.model.evaluation import pictures, report
from cna_kernels.model.evaluation.alternatives import alternatives
from cna_kernels.model.evaluation.baselines import Discovery, Sides
from cna_kernels.model.evaluation.choosing import Chooser, best_neuron, choose
from cna_kernels.model.evaluation.counted import Counted
from cna_kernels.model.evaluation.directions import Direction
from cna_kernels.model.evaluation.evaluate import evaluate
from cna_kernels.model.evaluation.interventions import UNSTEERED, Interventions, Method, Variant
from cna_kernels.model.evaluation.likelihood import divergences, ignoring
from cna_kernels.model.evaluation.metrics import KINDS, Refusals
from cna_kernels.model.evaluation.ranking import added, is_wrecked, removed, wrecks
from cna_kernels.model.evaluation.store import Store
from cna_kernels.model.evaluation.suite import Suite
from cna_kernels.model.prompts.files import PromptSet

L, N = 8, 1024
KEYWORDS = Refusals(world.REFUSAL_KEYWORDS)
HARMFUL = PromptSet.of(world.heldout_refusable()[:12], "harmful")
BENIGN = PromptSet.of(world.heldout_benign()[:6], "benign")
NEUTRAL = PromptSet.of(world.neutral_prompts(), "neutral")
FIRST_LAYERS = Circuit(tuple((layer, index, 0.0) for layer in (0, 1) for index in range(N)), L, N)


@pytest.fixture(scope="module")
def model():
    return load(demo_checkpoint(), dtype="float32")


@pytest.fixture(scope="module")
def circuit(model):
    return model.discover(world.discovery_positive(), world.discovery_negative(), score="magnitude")


@pytest.fixture(scope="module")
def discovery(model):
    positive, negative = (
        model.encode(PromptSet.of(prompts[:40], "p"))
        for prompts in (world.discovery_positive(), world.discovery_negative())
    )
    return Discovery.of(model, Sides.split(positive, negative), torch.zeros(L, N, dtype=torch.bool))


@pytest.fixture(scope="module")
def silence(model):
    """A direction that makes the model end every answer at once."""
    vectors = torch.zeros(L, model.config.hidden_size)
    vectors[-1] = -100 * model.transformer.embed_tokens.weight[next(iter(model.stop_ids))].detach()
    return Direction("residual", vectors)


def test_a_broken_method_is_ranked_last(model, circuit, tmp_path):
    """A layer whose neurons are all zeroed refuses nothing, and neither does what is babbled: it is the last row."""
    suite = Suite(
        methods=("circuit", "random"), harmful=HARMFUL, benign=BENIGN, neutral=NEUTRAL, multipliers=(1.0, 0.0),
        max_new_tokens=24, random_draws=2, refusals={"keywords": KEYWORDS}, others={"two layers": FIRST_LAYERS},
    )  # fmt: skip
    results = evaluate(model, circuit, suite)
    rows = {row["method"]: row for row in results["rows"]}
    assert rows["two layers"]["harmful"]["refusal"]["keywords"]["share"] == 0, "as good as the circuit, by refusals"
    assert [entry["method"] for entry in results["ranking"]] == ["circuit", "random, 2 draws", "two layers"]
    assert [entry["wrecked"] for entry in results["ranking"]] == [False, False, True]
    assert results["ranking"][0]["removed"]["share"] >= 0.9 and results["ranking"][1]["removed"]["share"] == 0
    text = report.to_markdown(results, [])
    assert "| 3 | two layers (wrecked) | 0 |" in text and "| 1 | circuit | 0 |" in text
    assert text.count("| two layers (wrecked) | 0 |") == 4  # three tables, and the ranking


def test_silence_is_ranked_last(model, circuit, silence, monkeypatch):
    from cna_kernels.model.evaluation import directions

    monkeypatch.setattr(directions, "caa_as_released", lambda difference: silence)
    suite = Suite(
        methods=("circuit", "caa-released"), harmful=HARMFUL, multipliers=(0.0, 2.0), max_new_tokens=24,
        refusals={"keywords": KEYWORDS}, positive=PromptSet.of(world.discovery_positive()[:12], "p"),
        negative=PromptSet.of(world.discovery_negative()[:12], "n"),
    )  # fmt: skip
    results = evaluate(model, circuit, suite)
    (row,) = [r for r in results["rows"] if (r["method"], r["multiplier"]) == ("caa-released", 2.0)]
    assert row["harmful"]["kinds"]["empty"] == 12 and row["harmful"]["refusal"]["keywords"]["share"] == 0
    ranked = [(entry["method"], entry["multiplier"], entry["wrecked"]) for entry in results["ranking"]]
    assert ranked[:2] == [("circuit", 0.0, False), ("circuit", 2.0, False)]
    assert {entry[0] for entry in ranked[2:]} == {"caa-released"} and all(entry[2] for entry in ranked[2:])


def test_a_broken_method_is_ranked_last_in_curves(model, circuit, discovery, tmp_path):
    """A score that takes whole layers: its largest sizes refuse nothing, and stand behind sizes that do nothing."""
    layers = torch.zeros(L, N, dtype=torch.float64)
    layers[:2] = 1
    magnitude = torch.zeros(L, N, dtype=torch.float64)
    magnitude[:2] = -1
    for place, (layer, index) in enumerate(reversed(circuit.pairs), 1):
        magnitude[layer, index] = place
    k = 256  # sizes 32 to 2048
    texts = model.encode(NEUTRAL, chat=False)
    sets = {
        side: Counted(name, prompts.texts, model.encode(prompts), {"keywords": KEYWORDS})
        for side, name, prompts in (("necessity", "harmful", HARMFUL), ("sufficiency", "benign", BENIGN))
    }
    points = alternatives(
        model, Circuit(tuple((0, index, 0.0) for index in range(k)), L, N), {"layers": layers, "good": magnitude},
        discovery, sets, texts=texts, steps=(1 / 8, 1, 8),
        ignoring=ignoring(model, [text.ids for text in texts]), is_refusal=KEYWORDS, max_new_tokens=24, batch=None,
        store=Store(None, {}),
    )  # fmt: skip
    here = {(point["score"], point["k"]): point["necessity"] for point in points}
    broken = here["layers", 2048]
    assert broken["refusal"]["share"] == 0 and broken["kl"]["mean"] > broken["kl"]["ignoring"] > 0.5
    assert broken["rank"] == len(points) and here["layers", 32]["rank"] < len(points)
    assert here["good", 32]["rank"] == 1 and here["good", 32]["removed"]["share"] >= 0.9
    interventions = Interventions(model, [UNSTEERED, Variant(Method("", "", FIRST_LAYERS), 0.0)])
    kl = divergences(model, interventions, [1], [text.ids for text in texts])[1]
    assert broken["kl"]["mean"] == pytest.approx(sum(kl) / len(kl))
    for point in points:
        for side in ("necessity", "sufficiency"):
            assert point[side]["answered"]["share"] == point[side]["kinds"]["answer"] / point[side]["answered"]["n"]
    titles, *rows = report._alternatives({"alternatives": points})
    shown = dict(zip(titles, next(row for row in rows if row[:2] == ["layers", "2048"]), strict=True))
    assert shown["necessity: rank"] == f"{len(points)} (wrecked)"
    assert shown["necessity: KL, nats"] == f"{broken['kl']['mean']:.3f}"
    plt = pytest.importorskip("matplotlib.pyplot")
    figure = pictures._draw_sizes(plt, points)
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].get_lines()}
    assert math.isnan(lines["layers"][-1]) and not any(map(math.isnan, lines["good"][:1]))
    assert "wrecked" in figure.axes[0].get_legend_handles_labels()[1]
    plt.close(figure)


def test_a_choice_passes_over_wrecks(model, discovery, silence):
    """Of silence, which refuses nothing, and a direction that does nothing, the latter is chosen."""
    nothing = Direction("residual", torch.zeros(L, model.config.hidden_size))
    chooser = Chooser(model, discovery.sides, KEYWORDS, None, Store(None, {}))
    candidates = [Method("silence", "", silence), Method("nothing", "", nothing)]
    table = chooser.trials(candidates, "x")
    assert table[0]["shown"] == 0 and table[0]["wrecked"] == 1 and not table[0]["sound"]
    assert table[1]["shown"] > 0.9 and table[1]["sound"] and choose(table, "x") == 1
    with pytest.raises(InputError, match="x: each of the 1 tried leaves answers most of which are empty"):
        choose(table[:1], "x")
    texts = model.encode(NEUTRAL, chat=False)
    babble = [Method("babble", "", FIRST_LAYERS), Method("nothing", "", nothing)]
    (first, second) = Chooser(
        model, discovery.sides, KEYWORDS, None, Store(None, {}), texts, ignoring(model, [text.ids for text in texts])
    ).trials(babble, "y")
    assert first["kl"] > 0.5 and not first["sound"] and second["kl"] == pytest.approx(0, abs=1e-6)


def test_a_neuron_that_wrecks_is_passed_over(model, discovery, monkeypatch):
    chooser = Chooser(model, discovery.sides, KEYWORDS, None, Store(None, {}))
    _, record = best_neuron(chooser, discovery)
    assert record["passed over"] == 0
    trials = Chooser.trials

    def first_is_a_wreck(self, candidates, name):
        return [row | {"sound": row["sound"] and place > 0} for place, row in enumerate(trials(self, candidates, name))]

    monkeypatch.setattr(Chooser, "trials", first_is_a_wreck)
    _, other = best_neuron(chooser, discovery)
    assert other["passed over"] == 1 and other["neuron"] != record["neuron"]
    monkeypatch.setattr(Chooser, "trials", lambda self, candidates, name: [{"sound": False}] * len(candidates))
    with pytest.raises(InputError, match="neuron: each of the 64 tried"):
        best_neuron(chooser, discovery)


def test_the_distance_of_a_model_that_ignores_its_text(model):
    texts = [text.ids for text in model.encode(NEUTRAL, chat=False)]
    p = torch.cat([model(torch.tensor([ids]))[0].detach().double().softmax(-1) for ids in texts])
    mean = p.mean(0, keepdim=True)
    expected = (p * (p / mean).log()).sum(-1).mean().item()
    assert ignoring(model, texts) == pytest.approx(expected, rel=1e-4) and expected > 0.5
    assert ignoring(model, texts[:2]) is None, "a mean of few tokens says little"


def kinds(**counts):
    return {kind: counts.get(kind, 0) for kind in KINDS}


@pytest.mark.parametrize(
    ("counts", "share"),
    [
        (dict(answer=10), 0.0),
        (dict(refusal=10), 0.0),
        (dict(answer=1, empty=9), 0.9),
        (dict(answer=2, degenerate=1, unfinished=2, short=3), 0.75),
        ({}, 0.0),
    ],
)
def test_wrecks(counts, share):
    assert wrecks(kinds(**counts)) == pytest.approx(share)
    assert is_wrecked({"harmful": {"kinds": kinds(**counts)}}) == (share > 0.5)
    assert is_wrecked({"benign": {"kinds": kinds(**counts)}, "harmful": {"kinds": kinds(answer=3)}}) == (share > 0.5)


def test_only_answers_count():
    kinds = ["answer", "empty", "refusal", "answer", "short", "degenerate"]
    hits = [False, False, True, False, False, False]
    assert removed([True, True, True, False, True, True], hits, kinds)["share"] == 1 / 5
    assert removed([True, True, True, False, True, True], hits, None)["share"] == 4 / 5
    assert removed([True], [True], ["answer"])["share"] == 0, "an answer that still shows the behaviour"
    hits = [True, True, True, False, False, True]
    assert added([False, True, False, False, False, False], hits, kinds)["share"] == 2 / 5
    assert removed([False] * 6, hits, kinds) == {"share": None, "low": None, "high": None, "n": 0}
    assert is_wrecked({"kl": {"mean": 3.0, "ignoring": 2.0}}) and not is_wrecked(
        {"kl": {"mean": 3.0, "ignoring": None}}
    )
