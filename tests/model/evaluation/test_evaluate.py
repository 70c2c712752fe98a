"""cna eval: every figure against a plain re-implementation, resumed runs, judges, bad input."""

import dataclasses
import itertools
import math
import sys

import pytest
import torch

from cna_kernels import Circuit, InputError
from cna_kernels.model import load
from cna_kernels.model.evaluation.answers import answer_all
from cna_kernels.model.evaluation.evaluate import Evaluation, evaluate, run_facts
from cna_kernels.model.evaluation.interventions import UNSTEERED, Interventions, Method, Variant
from cna_kernels.model.evaluation.likelihood import divergences, perplexities, perplexity, windows_of
from cna_kernels.model.evaluation.metrics import Refusals, kind_of
from cna_kernels.model.evaluation.store import Store
from cna_kernels.model.evaluation.suite import Suite
from cna_kernels.model.generate import generate
from cna_kernels.model.prompts.files import PromptSet
from tiny import (
    JUDGE,
    SPECIAL,
    TEMPLATE,
    TEXT_VOCABULARY,
    set_field,
    write_language_model,
    write_mmlu,
    write_text_files,
)

pytest.importorskip("transformers")

CIRCUIT = Circuit(((0, 3, 1.0), (1, 40, 0.5), (2, 7, -1.0), (2, 8, 0.25)), 3, 48)
HARMFUL = PromptSet.of(["open it", "why not now", "go", "what is that over there", "a b c", "d"], "harmful")
BENIGN = PromptSet.of(["good morning", "hi", "one two three"], "benign")
POSITIVE = PromptSet.of([f"please {n}" for n in range(9)], "positive")
NEGATIVE = PromptSet.of([f"look at {n} of them" for n in range(8)], "negative")
# Phrases that a random model can write; none is a word, so they count within a run of letters, too.
MARKS = {"broad": Refusals((",", "~", "*")), "strict": Refusals(("^,", "^\x14", "^."))}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_language_model(tmp_path_factory.mktemp("m"), max_position_embeddings=512))


def suite(**changes):
    options = dict(
        harmful=HARMFUL, benign=BENIGN, max_new_tokens=12, refusals=MARKS, multipliers=(1.0, 0.0, 4.0), batch=7
    )
    return Suite(**(options | changes))


def row_of(results, method, multiplier):
    (row,) = [r for r in results["rows"] if (r["method"], r["multiplier"]) == (method, multiplier)]
    return row


def test_every_figure_of_an_answer(model):
    results = evaluate(model, CIRCUIT, suite())
    assert [(row["method"], row["multiplier"]) for row in results["rows"]] == [
        ("unsteered", 1.0),
        ("circuit", 0.0),
        ("circuit", 4.0),
    ]
    seen: list[bool] = []
    for multiplier in (0.0, 4.0):
        for name, prompts in (("harmful", HARMFUL), ("benign", BENIGN)):
            answers = [
                model.generate(text, circuit=CIRCUIT, multiplier=multiplier, max_new_tokens=12)
                for text in prompts.texts
            ]
            plain = [model.generate(text, max_new_tokens=12) for text in prompts.texts]
            found = row_of(results, "circuit", multiplier)[name]
            n = len(answers)
            refused = [any(mark in text for mark in ",~*") for text in answers]
            assert found["refusal"]["broad"]["share"] == sum(refused) / n
            starts = [" ".join(text.split()).startswith((",", "\x14", ".")) for text in answers]
            assert found["refusal"]["strict"]["share"] == sum(starts) / n
            seen += refused + starts
            assert found["unchanged"]["share"] == sum(a == b for a, b in zip(answers, plain, strict=True)) / n
            assert sum(found["kinds"].values()) == n
            assert found["answered"]["share"] == found["kinds"]["answer"] / n
            quality = []
            for text in answers:
                words = text.split()
                grams = [" ".join(words[i : i + 4]) for i in range(len(words) - 3)]
                quality.append(len(set(grams)) / len(grams) if grams else 1.0)
            assert found["quality"]["mean"] == pytest.approx(sum(quality) / n)
    assert 4 < sum(seen) < len(seen) - 4, "phrases that all texts hold, or none, would hide everything"
    answers = generate(model.transformer, model.encode(HARMFUL), max_new_tokens=12, stop_ids=model.stop_ids)
    wanted = []
    for ids in answers:
        grams = [tuple(ids[place : place + 4]) for place in range(len(ids) - 3)]
        wanted.append(len(set(grams)) / len(grams) if grams else 1.0)
    assert row_of(results, "unsteered", 1.0)["harmful"]["token_quality"]["mean"] == pytest.approx(sum(wanted) / 6)
    changed = row_of(results, "circuit", 4.0)["harmful"]["unchanged"]["share"]
    assert changed < 1, "steering without effect would hide everything"
    assert row_of(results, "unsteered", 1.0)["benign"]["unchanged"]["share"] == 1


def test_samples_are_the_answers_to_their_prompts(model):
    with Store(None, {}) as store:
        evaluation = Evaluation(model, CIRCUIT, suite(batch=4), store)
        evaluation.run()
    assert len(evaluation.samples) == 3 * 9
    for sample in evaluation.samples:
        circuit = None if sample["method"] == "unsteered" else CIRCUIT
        expected = model.generate(sample["prompt"], circuit=circuit, multiplier=sample["multiplier"], max_new_tokens=12)
        assert sample["answer"] == expected
        assert sample["prompt"] in (HARMFUL if sample["set"] == "harmful" else BENIGN).texts
    assert len({sample["answer"] for sample in evaluation.samples}) > 9, "equal answers would hide everything"


def logits_of(model, ids, circuit=None, multiplier=1.0):
    with torch.no_grad():
        if circuit is None:
            return model(torch.tensor([ids]))[0]
        with model.steered(circuit, multiplier):
            return model(torch.tensor([ids]))[0]


def test_divergence_and_perplexity_are_the_textbooks(model):
    variants = [UNSTEERED, Variant(Method("c", "", CIRCUIT), 0.0), Variant(Method("c", "", CIRCUIT), 4.0)]
    interventions = Interventions(model, variants)
    texts = [model.tokenizer.encode(text) for text in ("hello there", "a", "one two three four")]
    found = divergences(model, interventions, [0, 1, 2], texts)
    assert found[0] == [0.0] * 3
    for number, multiplier in ((1, 0.0), (2, 4.0)):
        for text, value in zip(texts, found[number], strict=True):
            p = logits_of(model, text).double().softmax(-1)
            q = logits_of(model, text, CIRCUIT, multiplier).double().softmax(-1)
            assert value == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-3, abs=1e-6)
    assert min(found[2]) > 1e-3, "steering without effect would hide everything"

    text = "the quick brown fox jumps over the lazy dog " * 4
    windows = windows_of(model, text, length=50)
    assert [token for window in windows for token in window.ids[1:]] == model.tokenizer.encode_answer(text)
    assert len(windows) > 2 and all(window.ids[0] == model.tokenizer.bos_id for window in windows)
    losses = perplexities(model, interventions, [0, 2], windows)
    for number, multiplier in ((0, 1.0), (2, 4.0)):
        total = n = 0
        for window, _ in windows:
            log_p = logits_of(model, window, CIRCUIT, multiplier).log_softmax(-1)
            total -= sum(log_p[place, token].item() for place, token in enumerate(window[1:]))
            n += len(window) - 1
        found = perplexity(losses[number])
        assert found["mean"] == pytest.approx(math.exp(total / n), rel=1e-4) and found["n"] == n
        assert found["low"] < found["mean"] < found["high"]


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory):
    """A model whose tokenizer knows a BOS and puts none before plain text."""
    directory = write_language_model(tmp_path_factory.mktemp("no-bos"), max_position_embeddings=512)
    write_text_files(directory, adds_bos=False)
    return load(directory)


@pytest.mark.parametrize("stride", [None, 1, 7, 19, 20])
@pytest.mark.parametrize(("adds_bos", "n"), [(True, 61), (False, 61), (True, 20), (False, 20), (False, 2), (True, 1)])
def test_windows_against_a_loop_over_tokens(model, without_bos, adds_bos, n, stride):
    """Each token after as many tokens as its window gives it: window - stride or more, a BOS counted."""
    mine, length = model if adds_bos else without_bos, 20
    text = ("the quick brown fox jumps over the lazy dog, and then it sleeps for a while" * 2)[:n]
    ids = mine.tokenizer.encode_answer(text)
    assert mine.tokenizer.bos_id == 1 and mine.tokenizer.encode(text) == [1] * adds_bos + ids and len(ids) == n
    moves = min(stride or length, length - 1)
    loss = scored = 0.0
    contexts = []
    for place, token in enumerate(ids):
        first = length - adds_bos  # tokens of the text in the first window
        number = 0 if place < first else 1 + (place - first) // moves  # the window that scores this token
        context = [1] * adds_bos + ids[number * moves : place]
        if context:
            loss -= logits_of(mine, context, CIRCUIT, 4.0)[-1].log_softmax(-1)[token].item()
            scored += 1
            contexts.append(len(context))
    windows = windows_of(mine, text, length, stride)
    interventions = Interventions(mine, [UNSTEERED, Variant(Method("c", "", CIRCUIT), 4.0)])
    found = perplexity(perplexities(mine, interventions, [1], windows)[1])
    assert found["n"] == scored == n - (not adds_bos)
    assert found["mean"] == pytest.approx(math.exp(loss / scored), rel=1e-4)
    assert max(len(window.ids) for window in windows) <= length
    assert min(contexts[length - 1 :], default=length) >= max(length - (stride or length), 1)
    if n == 61 and stride == 7:  # more context tells: the test would see windows that do not overlap
        apart = perplexity(perplexities(mine, interventions, [1], windows_of(mine, text, length))[1])
        assert abs(apart["mean"] - found["mean"]) > 1e-3 * found["mean"]


def test_no_bos_is_made_up(without_bos):
    text = "the quick brown fox"
    (window,) = windows_of(without_bos, text)
    assert window.ids == without_bos.tokenizer.encode(text) and window.n_scored == len(window.ids) - 1
    results = evaluate(without_bos, CIRCUIT, suite(harmful=None, benign=None, text=text, multipliers=(0.0,)))
    assert row_of(results, "unsteered", 1.0)["perplexity"]["n"] == len(text) - 1


def test_a_stride_is_from_1_to_the_window(model):
    text = "the quick brown fox " * 30
    changes = dict(harmful=None, benign=None, text=text, multipliers=(0.0,))
    found = [row_of(evaluate(model, CIRCUIT, suite(**changes, stride=n)), "circuit", 0.0) for n in (None, 512, 100)]
    assert found[0] == found[1] and found[1]["perplexity"]["mean"] != found[2]["perplexity"]["mean"]
    assert found[2]["perplexity"]["n"] == len(text)
    with pytest.raises(InputError, match="stride: expected 1 to 512, the tokens of a window, got 513"):
        evaluate(model, CIRCUIT, suite(**changes, stride=513))


def everything(tmp_path, **changes):
    from cna_kernels.model.evaluation.multiple_choice import read_multiple_choice

    mmlu = read_multiple_choice(write_mmlu(tmp_path / "mmlu", n=3), shots=1)
    methods = ("circuit", "random", "activation", "caa", "caa-released", "ablation")
    return suite(
        methods=methods, positive=POSITIVE, negative=NEGATIVE, neutral=BENIGN, text="a b c d e f",
        multiple_choice=mmlu, shots=1, choice_tokens=4,
        multipliers=(1.0, 0.0), random_draws=2, max_new_tokens=6, **changes,
    )  # fmt: skip


def test_a_run_that_is_killed_anywhere_ends_the_same(model, tmp_path):
    whole = evaluate(model, CIRCUIT, everything(tmp_path), out=tmp_path / "whole")
    n_parts = len(list((tmp_path / "whole" / "parts").iterdir()))
    assert n_parts > 10

    class Killed(Exception):
        pass

    out = tmp_path / "killed"
    for _ in range(n_parts + 1):
        left = [3]

        def get(self, name, compute, left=left, original=Store.get):
            if not (out / "parts" / f"{name}.json").exists():
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return original(self, name, compute)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "get", get)
            try:
                resumed = evaluate(model, CIRCUIT, everything(tmp_path), out=out)
                break
            except Killed:
                continue
    for results in (whole, resumed):
        results["environment"].pop("seconds")
    assert resumed == whole
    assert (out / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    methods = {row["method"] for row in whole["rows"]}
    assert methods == {
        "unsteered", "circuit", "random 1", "random 2", "top activation", "caa", "caa-released", "ablation",
    }  # fmt: skip
    assert {"harmful", "benign", "kl", "perplexity", "mmlu"} <= set(whole["rows"][-1])


def test_two_runs_in_one_directory(model, tmp_path):
    out = tmp_path / "out"
    evaluate(model, CIRCUIT, suite(), out=out)
    with pytest.raises(InputError, match=r"manifest\.json: suite\.max_new_tokens: belongs to another.*it has 12"):
        evaluate(model, CIRCUIT, suite(max_new_tokens=13), out=out)
    other = Circuit(((0, 4, 1.0),), 3, 48)
    with pytest.raises(InputError, match="circuit_sha256: belongs to another"):
        evaluate(model, other, suite(), out=out)
    with (
        Store(out, run_facts(model, CIRCUIT, suite())),
        pytest.raises(InputError, match="is writing here"),
    ):
        evaluate(model, CIRCUIT, suite(), out=out)
    evaluate(model, CIRCUIT, suite(), out=out)


def test_bad_input_shows_before_any_work(model, tmp_path):
    out = tmp_path / "out"
    for name in ("harmful", "positive", "neutral"):
        long = PromptSet.of(["a b", "c d", "e f", "x" * 600], name)
        with pytest.raises(InputError, match=rf"{name}\[3\]: has \d+ tokens, the model's context is 512"):
            evaluate(model, CIRCUIT, suite(**({"positive": POSITIVE, "negative": NEGATIVE} | {name: long})), out=out)
    with pytest.raises(InputError, match="negative: expected at least 3 prompts, got 1"):
        evaluate(model, CIRCUIT, suite(positive=POSITIVE, negative=PromptSet.of(["a"], "negative")), out=out)
    assert not list((out / "parts").iterdir())
    evaluate(model, CIRCUIT, suite(), out=out)  # the directory is still free for another suite


def test_another_batch_size_goes_on_in_the_same_directory(model, tmp_path):
    results = [evaluate(model, CIRCUIT, suite(batch=batch), out=tmp_path / "out")["rows"] for batch in (None, 4, 1)]
    assert results[0] == results[1] == results[2]
    assert len(list((tmp_path / "out" / "parts").glob("answers-by-4-*.json"))) == 7  # 27 answers


def test_a_cache_that_does_not_fit_is_halved(model, monkeypatch):
    expected = evaluate(model, CIRCUIT, suite(batch=27))["rows"]
    config, seen = model.config, []
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * 60

    def memory_of(_device):
        seen.append(1)
        return 3 * row  # three rows of 60 tokens

    monkeypatch.setattr("cna_kernels.model.generate.memory_of", memory_of)
    assert evaluate(model, CIRCUIT, suite(batch=27))["rows"] == expected and len(seen) > 9


def test_what_is_not_finite_names_the_variant(model):
    for changes in (dict(neutral=BENIGN), dict(text="some text")):
        with pytest.raises(InputError, match=r"circuit, m = 3e\+38: the logits are not finite"):
            evaluate(model, CIRCUIT, suite(harmful=None, benign=None, multipliers=(3e38,), **changes))


def test_notes_say_what_a_reader_should_know(model, tmp_path):
    from cna_kernels.model.evaluation.multiple_choice import read_multiple_choice

    mmlu = read_multiple_choice(write_mmlu(tmp_path, n=2), shots=2)
    shared = PromptSet.of([*HARMFUL.texts, *POSITIVE.texts[:2]], "harmful")
    options = dict(harmful=shared, positive=POSITIVE, negative=NEGATIVE, multiple_choice=mmlu, shots=5, choice_tokens=2)
    notes = evaluate(model, CIRCUIT, suite(**options))["notes"]
    assert notes[0] == "2 of the harmful prompts are discovery prompts, too"
    assert notes[1].startswith("multiple choice, likelihood: ") and "instead of 5" in notes[1]
    assert evaluate(model, CIRCUIT, suite())["notes"] == []
    own = dataclasses.replace(CIRCUIT, prompts={"negative": {"count": 3, "sha256": BENIGN.sha256}})
    elsewhere = dataclasses.replace(own, neurons=((1, 1, 0.5),), prompts=None)
    for circuit in (own, elsewhere | own):
        assert evaluate(model, circuit, suite())["notes"] == [
            "the benign prompts are the negative prompts that found the circuit"
        ]


def test_a_rival_that_cannot_be_found_is_left_out(model):
    same = PromptSet.of(["a b c x"] * 6, "same")  # both sides begin their answers alike
    found = evaluate(
        model, CIRCUIT, suite(methods=("neuron", "circuit"), positive=same, negative=same, alternatives=True)
    )
    assert {row["method"] for row in found["rows"]} == {"unsteered", "circuit"}
    assert {point["score"] for point in found["alternatives"]} == {"abs-delta", "magnitude", "cohen-d", "norm-weighted"}
    assert [note.split(" is left out")[0] for note in found["notes"]] == ["relp", "the single neuron"]


def test_alternatives_and_curves(model):
    results = evaluate(model, CIRCUIT, suite(positive=POSITIVE, negative=NEGATIVE, curves=True, max_new_tokens=4))
    points = results["alternatives"]
    assert {point["score"] for point in points} == {"abs-delta", "magnitude", "cohen-d", "norm-weighted", "relp"}
    assert sorted({point["k"] for point in points}) == [1, 2, 4, 8, 16, 32]
    for point in points:
        assert sum(point["per_layer"]) == point["k"]
        assert point["necessity"]["refusal"]["n"] == 6 and point["sufficiency"]["refusal"]["n"] == 3
    ranks = results["rank_curve"]
    assert ranks[0][0] == 1 and ranks[-1][0] == 3 * 48
    assert all(a[1] >= b[1] for a, b in itertools.pairwise(ranks))


def test_writing_all_neurons_is_the_released_caa(model):
    """Writing the contrast of all neurons is CAA as released: both add W_down @ delta to every layer."""
    from cna_kernels.model.evaluation import baselines, directions

    sides = baselines.Sides.split(model.encode(POSITIVE), model.encode(NEGATIVE))
    found = baselines.Discovery.of(model, sides, torch.zeros(3, 48, dtype=torch.bool))
    every = baselines.top_circuit("abs-delta", found.delta.abs(), found, found.delta.numel())
    released = directions.caa_as_released(found.difference)
    written = baselines.written(model, every, found.delta)
    assert written.vectors.abs().max() > 0.05
    assert (written.vectors - released.vectors).abs().max() <= 1e-5


def test_norms_and_first_tokens(model):
    from cna_kernels.model.evaluation import baselines

    norms = baselines.down_norms(model)
    weight = model.transformer.layers[1].mlp.down_proj.weight
    assert norms[1, 5] == pytest.approx(weight[:, 5].norm().item(), rel=1e-5)
    sides = baselines.Sides.split(model.encode(POSITIVE), model.encode(NEGATIVE))
    firsts = [
        [model(torch.tensor([prompt.ids]))[0, -1].argmax().item() for prompt in prompts]
        for prompts in (sides.positive, sides.negative)
    ]
    try:
        targets, counterfactuals = baselines.first_tokens(model, sides)
    except InputError:
        assert sorted(set(firsts[0])) == sorted(set(firsts[1]))
        return
    for token in targets:
        assert firsts[0].count(token) / len(firsts[0]) > firsts[1].count(token) / len(firsts[1])
    for token in counterfactuals:
        assert firsts[0].count(token) / len(firsts[0]) < firsts[1].count(token) / len(firsts[1])


def test_a_judge_from_outside(model, tmp_path):
    script = tmp_path / "judge.py"
    script.write_text(JUDGE % "len(r['answer'])")
    results = evaluate(model, CIRCUIT, suite(judge_command=f"{sys.executable} {script}"))
    found = row_of(results, "circuit", 0.0)["benign"]["judge"]
    answers = [model.generate(t, circuit=CIRCUIT, multiplier=0.0, max_new_tokens=12) for t in BENIGN.texts]
    assert found["mean"] == pytest.approx(sum(map(len, answers)) / 3) and found["n"] == 3


def test_a_judge_that_fails_loses_nothing(model, tmp_path, monkeypatch):
    script = tmp_path / "judge.py"
    script.write_text("import sys; sys.exit('no key')")
    command, out = f"{sys.executable} {script}", tmp_path / "out"
    with pytest.raises(InputError, match="no key"):
        evaluate(model, CIRCUIT, suite(judge_command=command), out=out)
    script.write_text(JUDGE % "1")

    def generate(*_, **__):
        raise AssertionError("answers are written again")

    monkeypatch.setattr("cna_kernels.model.evaluation.answers.generate", generate)
    results = evaluate(model, CIRCUIT, suite(judge_command=command), out=out)
    assert row_of(results, "circuit", 0.0)["benign"]["judge"]["mean"] == 1
    script.write_text(JUDGE % "2")  # another command is another judge of the same answers
    results = evaluate(model, CIRCUIT, suite(judge_command=f"{command} again"), out=out)
    assert row_of(results, "circuit", 0.0)["benign"]["judge"]["mean"] == 2


def test_thoughts_between_special_tokens(tmp_path, monkeypatch):
    """A tokenizer whose tags of thoughts are special tokens, which decoded text does not hold."""
    directory = write_language_model(tmp_path / "model", "llama", vocab_size=TEXT_VOCABULARY + 2)
    numbered = [*enumerate(SPECIAL), (TEXT_VOCABULARY, "[THINK]"), (TEXT_VOCABULARY + 1, "[/THINK]")]
    added = {str(number): {"content": token, "special": True} for number, token in numbered}
    set_field(directory, added_tokens_decoder=added, chat_template=TEMPLATE + "[THINK]")
    model = load(directory, dtype="float32")
    answers = ["I can't, or can I?[/THINK]Take the key and turn it.", "I cannot.", "[/THINK]I can't help with that."]
    lines = [model.tokenizer.encode_answer(answer) for answer in answers]
    monkeypatch.setattr("cna_kernels.model.evaluation.answers._write", lambda *_: lines)
    prompts = model.encode(PromptSet.of(["a", "b", "c"], "p"))
    with Store(None, {}) as store:
        (found,) = answer_all(
            model, Interventions(model, [UNSTEERED]), [0], prompts, max_new_tokens=4, batch=3, store=store, name="x"
        ).values()
    assert [answer.text for answer in found] == [f"[THINK]{answer}" for answer in answers]
    kinds = [kind_of(answer.text, answer.tokens, Refusals.bundled("broad")) for answer in found]
    assert kinds == ["answer", "unfinished", "refusal"]


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"sha256": "x", "value": 1}', "[" * 100_000], ids=len)
def test_a_damaged_part_of_an_evaluation_is_named(tmp_path, damage):
    with Store(tmp_path, {"a": 1}) as store:
        assert store.get("one", lambda: {"b": [1.5, None]}) == store.get("one", lambda: 0) == {"b": [1.5, None]}
        (tmp_path / "parts" / "one.json").write_text(damage)
        with pytest.raises(InputError, match=r"one\.json"):
            store.get("one", lambda: 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(methods=("magic",)), "methods: expected some of"),
        (dict(methods=("caa",)), "discovery prompts are needed for caa"),
        (dict(curves=True), "discovery prompts are needed for discovery alternatives"),
        (dict(methods=("sae",), positive=POSITIVE, negative=NEGATIVE), "sae: the method sae, and a file"),
        (dict(sae=("file", 0, 0)), "sae: the method sae, and a file"),
        (dict(judge_command="x", harmful=None, benign=None, text="a b"), "there are no answers to judge"),
        (dict(harmful=None, benign=None), "nothing to evaluate on"),
        (dict(multipliers=(float("nan"),)), "multiplier"),
        (dict(multipliers=()), "at least one"),
        (dict(max_new_tokens=0), "at least 1"),
        (dict(stride=0, text="a b"), "stride: expected at least 1, got 0"),
        (dict(labels=("a", "a")), "labels: expected two different names"),
        (dict(labels=("a", "")), "labels: expected names of 1 to 40"),
        (dict(stride=2), "stride: is for a text, and there is none"),
    ],
)
def test_plans_that_cannot_be_carried_out(changes, message):
    with pytest.raises(InputError, match=message):
        suite(**changes)


def test_an_sae_feature_is_a_method(model, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "sae.safetensors"
    save_file({"W_dec": torch.randn(4, 32, generator=torch.Generator().manual_seed(0))}, path)
    options = dict(methods=("sae",), positive=POSITIVE, negative=NEGATIVE, multipliers=(-20.0,))
    results = evaluate(model, CIRCUIT, suite(sae=(str(path), 2, 1), **options))
    assert row_of(results, "sae", -20.0)["harmful"]["unchanged"]["share"] < 1
    assert row_of(results, "sae", -20.0)["strength"] == -21.0
    with pytest.raises(InputError, match="sae layer: expected 0 to 2, got 3"):
        evaluate(model, CIRCUIT, suite(sae=(str(path), 2, 3), **options))
    with pytest.raises(InputError, match="features 0 to 3, got 4"):
        evaluate(model, CIRCUIT, suite(sae=(str(path), 4, 1), **options))
