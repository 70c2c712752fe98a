"""Behaviours against circuits on the bundled model, against a plain loop over prompts."""

import itertools
import json
import math

import pytest
import torch

from cna_kernels import Circuit
from cna_kernels.errors import InputError
from cna_kernels.model import load
from cna_kernels.model.cli import main
from cna_kernels.model.demo import world
from cna_kernels.model.demo.checkpoint import demo_checkpoint
from cna_kernels.model.evaluation.behaviour import Behaviour
from cna_kernels.model.evaluation.matrix import matrix, overlaps
from cna_kernels.model.evaluation.measures import Item, Measure
from cna_kernels.model.evaluation.metrics import mcnemar
from cna_kernels.model.evaluation.store import Store
from cna_kernels.model.prompts.files import PromptSet


@pytest.fixture(scope="module")
def model():
    return load(demo_checkpoint("instruct"), dtype="float32")


POSITIVE, NEGATIVE = world.discovery_positive()[:40], world.discovery_negative()[:40]
HELD_OUT = world.heldout_refusable()[:6]


def behaviour(name, measure, items):
    sides = PromptSet.of(POSITIVE, "positive"), PromptSet.of(NEGATIVE, "negative")
    return Behaviour(name, "", ("a", "b"), *sides, tuple(items), measure)


@pytest.fixture(scope="module")
def behaviours():
    refused = Measure("phrases", words=tuple(world.REFUSAL_KEYWORDS))
    first = [Item(prompt, f"first[{n}]", ("Sorry",), ("To",)) for n, prompt in enumerate(HELD_OUT)]
    return [
        behaviour("refusal", refused, [Item(prompt, f"held[{n}]") for n, prompt in enumerate(HELD_OUT)]),
        behaviour("first-word", Measure("next token"), [Item(i.prompt, i.place, i.answers) for i in first]),
        behaviour("sorry-or-to", Measure("pair"), first),
    ]


@pytest.fixture(scope="module")
def circuits(model):
    found = model.discover(POSITIVE, NEGATIVE, score="magnitude", top_k=8)
    return {"refusal": found, "other": found.random_like(5)}


@pytest.fixture(scope="module")
def found(model, behaviours, circuits):
    prompts = PromptSet.of(world.heldout_benign()[:5], "harmless")
    neutral = PromptSet.of(world.neutral_prompts()[:4], "neutral")
    return matrix(
        model, behaviours, circuits, random_draws=1, max_new_tokens=24, neutral=neutral, harmless=prompts
    )  # fmt: skip


def test_cells_are_those_of_a_plain_loop(model, behaviours, circuits, found):
    variants = found["variants"]
    assert [(v["circuit"], v["multiplier"], v["random"]) for v in variants] == [
        (None, 1.0, None), ("refusal", 0.0, None), ("refusal", 2.0, None), ("refusal", 0.0, 0), ("refusal", 2.0, 0),
        ("other", 0.0, None), ("other", 2.0, None), ("other", 0.0, 0), ("other", 2.0, 0),
    ]  # fmt: skip
    sorry, to = (model.tokenizer.encode_answer(word)[0] for word in ("Sorry", "To"))
    for number, variant in enumerate(variants):
        circuit = None if variant["circuit"] is None else circuits[variant["circuit"]]
        if variant["random"] is not None:
            circuit = circuit.random_like(variant["random"])
        for place, prompt in enumerate(HELD_OUT):
            kwargs = {} if circuit is None else dict(circuit=circuit, multiplier=variant["multiplier"])
            answer = model.generate(prompt, max_new_tokens=24, **kwargs)
            assert found["samples"]["refusal"][number][place] == answer
            assert found["cells"]["refusal"][number]["hits"][place] == world.is_refusal(answer)
            ids = torch.tensor([model.tokenizer.encode_chat([prompt])[0]])
            with torch.inference_mode():
                if circuit is None:
                    logits = model(ids)[0, -1]
                else:
                    with model.steered(circuit, variant["multiplier"]):
                        logits = model(ids)[0, -1]
            assert found["cells"]["first-word"][number]["hits"][place] == (int(logits.argmax()) == sorry)
            assert found["cells"]["sorry-or-to"][number]["hits"][place] == bool(logits[sorry] > logits[to])
    refusal = [cell["share"] for cell in found["cells"]["refusal"]]
    assert refusal[0] == 1.0 and refusal[1] == 0.0 and refusal[3] == 1.0, "the circuit works, random neurons do not"


def test_controls_get_every_multiplier(model, behaviours, circuits):
    """Far from 1, so that random neurons change the answers, too. 1 itself is no strength: nothing would change."""
    circuit = circuits["refusal"]
    found = matrix(
        model, behaviours[:1], {"refusal": circuit}, multipliers=(1.0, -60.0, 40.0), random_draws=1, max_new_tokens=12
    )
    assert [(variant["multiplier"], variant["random"]) for variant in found["variants"]] == [
        (1.0, None), (-60.0, None), (40.0, None), (-60.0, 0), (40.0, 0),
    ]  # fmt: skip
    plain, *_, low, high = found["samples"]["refusal"]
    for control, multiplier in ((low, -60.0), (high, 40.0)):
        expected = model.generate(HELD_OUT, circuit=circuit.random_like(0), multiplier=multiplier, max_new_tokens=12)
        assert control == expected != plain
    assert low != high


def test_costs_stand_beside_every_variant(found):
    plain, ablated = found["variants"][0], found["variants"][1]
    assert plain["kl"]["mean"] == 0 and 0 < ablated["kl"]["mean"] < 1
    assert plain["answered"]["share"] == ablated["answered"]["share"] == 1.0
    assert sum(ablated["kinds"].values()) == 5
    test = found["cells"]["refusal"][1]["against unsteered"]
    assert test == {"lost": 6, "gained": 0, "p": 2 / 2**6}
    assert found["cells"]["first-word"][1]["kinds"] is None


def test_finished_parts_are_kept(model, behaviours, circuits, tmp_path, monkeypatch):
    options = dict(random_draws=1, multipliers=(0.0,), max_new_tokens=8)
    with Store(tmp_path, {}) as store:
        first = matrix(model, behaviours, circuits, store=store, **options)
    monkeypatch.setattr("cna_kernels.model.evaluation.answers.generate", None)
    monkeypatch.setattr("cna_kernels.model.evaluation.matrix.each_logits", None)
    with Store(tmp_path, {}) as store:
        assert matrix(model, behaviours, circuits, store=store, **options) == first


def test_two_behaviours_of_one_name(model, behaviours, circuits):
    with pytest.raises(InputError, match="two have one name"):
        matrix(model, [behaviours[0], behaviours[0]], circuits)


def test_overlaps():
    def circuit(*neurons):
        return Circuit(tuple((0, n, 1.0) for n in neurons), 1, 100)

    found = overlaps({"a": circuit(1, 2, 3), "b": circuit(3, 4), "c": circuit(9)})
    assert found[0] == {"circuits": ["a", "b"], "shared": 1, "own": [2, 1], "jaccard": 1 / 4}
    assert [record["shared"] for record in found] == [1, 0, 0] and found[2]["circuits"] == ["b", "c"]


def test_mcnemar_is_the_binomial_test():
    """Against the sum over all ways to toss so many coins."""
    for lost, gained in itertools.product(range(6), repeat=2):
        before = [True] * lost + [False] * gained + [True, False] * 3
        after = [False] * lost + [True] * gained + [True, False] * 3
        n = lost + gained
        as_uneven = [k for k in range(n + 1) if abs(2 * k - n) >= abs(lost - gained)]
        expected = sum(math.comb(n, k) for k in as_uneven) / 2**n
        found = mcnemar(before, after)
        assert (found["lost"], found["gained"]) == (lost, gained)
        assert found["p"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="argument 2"):
        mcnemar([True], [])


def test_command(tmp_path, capsys):
    """The command finds the circuit of a behaviour's file, takes another from its file, and goes on after a kill."""
    record = {
        "behaviour": "mine", "positive": POSITIVE, "negative": NEGATIVE, "measured": HELD_OUT,
        "measure": {"kind": "phrases", "phrases": list(world.REFUSAL_KEYWORDS)},
    }  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(record))
    Circuit(((3, 5, 1.0), (2, 9, 1.0)), 8, 1024).save(tmp_path / "other.json")
    words = ["matrix", "demo:instruct", "--behaviour", str(tmp_path / "mine.json"), "--fraction", "0.01"]
    words += ["-c", f"other={tmp_path / 'other.json'}", "--random-draws", "1", "-o", str(tmp_path / "out"), "--m", "0"]
    words += ["--dtype", "float32"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "matrix.json").read_text())
    counts = [sum(cell["hits"]) for cell in results["cells"]["mine"]]
    assert counts[:3] == [6, 6, 6] and counts[3] <= 1, "nothing, another circuit, neurons like it, the circuit"
    assert results["overlap"][0]["circuits"] == ["other", "mine"]
    assert "6 of 6" in shown and "KL, nats" in (tmp_path / "out" / "matrix.md").read_text()
    circuit = Circuit.load(tmp_path / "out" / "circuit-mine.json")
    assert circuit.k == 82
    assert main(words) == 0
    assert main([*words, "--no-kl"]) == 2
    assert "manifest.json: kl: belongs to another evaluation" in capsys.readouterr().err
    swapped = [*words, "-c", f"mine={tmp_path / 'out' / 'circuit-mine.json'}"]
    swapped.remove("--fraction"), swapped.remove("0.01")
    assert main(swapped) == 0
    first = swapped.index("-c")
    assert main([*swapped[:first], *swapped[-2:], *swapped[first:-2]]) == 2, "columns of cells are in the other order"
    assert "manifest.json: circuits: belongs to another evaluation" in capsys.readouterr().err
    assert main([*swapped, "--system", "Be terse."]) == 2, "the answers would be those without it"
    assert "manifest.json: chat: belongs to another evaluation" in capsys.readouterr().err


FAULTS = [
    (["--behaviour", "nowhere.json"], "nowhere.json: No such file"),
    (["-c", "x.json"], "--circuit: expected NAME=FILE, NAME of letters, digits, - and _, got 'x.json'"),
    (["-c", "../a=x.json"], "--circuit: expected NAME=FILE"),
    (["-c", "a=x.json", "-c", "a=y.json"], "--circuit: names 'a' twice"),
    (["--behaviour", "json", "--behaviour", "json"], "--behaviour: two have one name: json, json"),
    (["--behaviour", "json", "-c", "json=x.json", "--fraction", "0.1"], "--fraction: is for circuits that are"),
    (["-c", "a=nowhere.json"], "nowhere.json: No such file"),
    (["--m", "x"], "--m"),
    (["--m", "1"], "--m: expected a multiplier besides 1, which changes nothing"),
]


@pytest.mark.parametrize(("words", "what"), FAULTS, ids=[each[1] for each in FAULTS])
def test_faults_of_the_command(words, what, capsys):
    assert main(["matrix", "demo:instruct", *words]) == 2
    assert what in capsys.readouterr().err
