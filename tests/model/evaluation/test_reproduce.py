"""cna reproduce on the bundled pair: figures from each prompt's own result, the paper's column, what is left out."""

import dataclasses
import json
import math
import shutil

import pytest

from cna_kernels import Circuit, InputError
from cna_kernels.model import LanguageModel, load
from cna_kernels.model.cli import main
from cna_kernels.model.demo import world
from cna_kernels.model.demo.checkpoint import demo_checkpoint
from cna_kernels.model.evaluation import choosing, reproduce_report
from cna_kernels.model.evaluation.behaviour import Behaviour
from cna_kernels.model.evaluation.measures import Item, Measure
from cna_kernels.model.evaluation.multiple_choice import read_multiple_choice
from cna_kernels.model.evaluation.published import MODELS, STRENGTHS
from cna_kernels.model.evaluation.reproduce import Sources, find_tops, reproduce
from cna_kernels.model.evaluation.store import Store
from cna_kernels.model.prompts.files import PromptSet
from tiny import write_language_model, write_mmlu

LLAMA = "Llama-3.2-1B-Instruct"
TOKENS = 24


def prompts(texts, name):
    return PromptSet.of(texts, name)


@pytest.fixture(scope="module", autouse=True)
def _capitals():
    """The bundled vocabulary has no tokens for capitals, so another behaviour bears their name here."""
    sides = prompts(world.discovery_positive()[:20], "positive"), prompts(world.discovery_negative()[:20], "negative")
    items = [Item(prompt, f"x[{n}]", ("Sorry",)) for n, prompt in enumerate(world.heldout_refusable()[:7])]
    mine = Behaviour("capitals", "says sorry", ("a", "b"), *sides, tuple(items), Measure("next token"))
    bundled = Behaviour.bundled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Behaviour, "bundled", lambda name: mine if name == "capitals" else bundled(name))
        yield


@pytest.fixture(scope="module")
def model():
    return load(demo_checkpoint("instruct"), dtype="float32")


@pytest.fixture(scope="module")
def base():
    return load(demo_checkpoint("base"), dtype="float32", stream_layers=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    questions = read_multiple_choice(write_mmlu(tmp_path_factory.mktemp("mmlu"), n=2), shots=1)
    return Sources(
        harmful=prompts(world.heldout_refusable()[:5], "harmful"), benign=prompts(world.heldout_benign()[:3], "benign"),
        positive=prompts(world.discovery_positive()[:60], "positive"),
        negative=prompts(world.discovery_negative()[:60], "negative"), multiple_choice=questions,
    )  # fmt: skip


def run(model, base, sources, out, **changes):
    options = dict(base=base, name=LLAMA, max_new_tokens=TOKENS, shots=1, random_draws=1, batch=64, out=out)
    return reproduce(model, sources, **(options | changes))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def found(model, base, sources, out):
    return run(model, base, sources, out)


@pytest.fixture(scope="module")
def samples(found, out):
    """(method, multiplier, set) -> the samples, in the order of the prompts."""
    every = {}
    for line in (out / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        every.setdefault((sample["method"], sample["multiplier"], sample["set"]), []).append(sample)
    return every


def wilson(hits, n):
    z, p = 1.959964, hits / n
    roots = sorted(
        (p + z * z / (2 * n) + sign * z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)
        for sign in (-1, 1)
    )
    return pytest.approx({"share": p, "low": roots[0], "high": roots[1], "n": n}, abs=1e-9)


def words_quality(text):
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(set(grams)) / len(grams) if grams else 1.0


def test_rows_are_the_methods_at_every_strength(found):
    strengths = [(method, alpha) for method in ("circuit", "random 1", "caa", "caa-released") for alpha in STRENGTHS]
    assert [(row["method"], row["alpha"]) for row in found["strengths"]] == [("unsteered", 0), *strengths]
    assert all(row["multiplier"] == 1 - row["alpha"] for row in found["strengths"])
    assert [(row["method"], row["alpha"]) for row in found["refusal"]] == [
        ("unsteered", 0), ("circuit", 1), ("random 1", 1),
    ]  # fmt: skip


def test_figures_are_those_of_each_prompt(found, samples):
    def refused(method, multiplier, name="harmful"):
        return [sample["refusal"]["broad"] for sample in samples[method, multiplier, name]]

    plain = refused("unsteered", 1.0)
    for row in found["strengths"]:
        key = row["method"], row["multiplier"]
        mine, hits = samples[(*key, "harmful")], refused(*key)
        assert [sample["prompt"] for sample in mine] == world.heldout_refusable()[:5]
        assert row["refused"] == wilson(sum(hits), 5)
        assert row["refused, strict list"] == wilson(sum(sample["refusal"]["strict"] for sample in mine), 5)
        assert row["answered"] == wilson(sum(sample["kind"] == "answer" for sample in mine), 5)
        assert row["kinds"]["degenerate"] == sum(sample["kind"] == "degenerate" for sample in mine)
        assert row["quality"]["mean"] == pytest.approx(sum(words_quality(sample["answer"]) for sample in mine) / 5)
        assert row["benign refused"] == wilson(sum(refused(*key, "benign")), 3)
        lost = sum(a and not b for a, b in zip(plain, hits, strict=True))
        gained = sum(b and not a for a, b in zip(plain, hits, strict=True))
        n = lost + gained
        p = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(lost - gained)) / 2**n
        assert row["against unsteered"] == {"lost": lost, "gained": gained, "p": pytest.approx(p)}
    by_name = {(row["method"], row["alpha"]): row["refused"]["share"] for row in found["refusal"]}
    assert by_name["unsteered", 0] == by_name["random 1", 1] == 1 and by_name["circuit", 1] <= 0.5, (
        "the circuit refuses"
    )


def test_the_circuit_is_the_papers_rule(model, sources, found, samples, out):
    circuit = Circuit.load(out / "circuit.json")
    assert circuit.preset == "paper" and circuit.k == 8 == found["circuit"]["k"]
    assert circuit.neurons == model.discover(sources.positive, sources.negative).neurons
    for multiplier in (0.5, 0.0):
        answers = model.generate(sources.harmful, circuit=circuit, multiplier=multiplier, max_new_tokens=TOKENS)
        assert [sample["answer"] for sample in samples["circuit", multiplier, "harmful"]] == answers


def test_layers_and_overlap_are_counts_of_neurons(model, sources, found, out):
    tops = {role: Circuit.load(out / f"top200-{role}-chat.json") for role in ("model", "base")}
    whole = load(demo_checkpoint("base"), dtype="float32")
    for role, each in (("model", model), ("base", whole)):
        expected = each.discover(sources.positive, sources.negative, top_k=200)
        assert set(tops[role].pairs) == set(expected.pairs)
    assert [row["role"] for row in found["layers"]] == ["model", "base"]
    for row in found["layers"]:
        layers = [layer for layer, _ in tops[row["role"]].pairs]
        assert len(layers) == 200 and row["per_layer"] == [layers.count(layer) for layer in range(8)]
        assert row["last three layers"] == sum(layer >= 5 for layer in layers) / 200
        assert row["last quarter"] == sum(layer >= 6 for layer in layers) / 200
    shared = len(set(tops["model"].pairs) & set(tops["base"].pairs))
    assert 0 < shared < 200 and found["overlap"]["shared"] == shared and found["overlap"]["share"] == shared / 200
    assert found["overlap"]["by chance"] == 200 / 8192


def test_multiple_choice_is_the_sum_of_the_subjects(found):
    for row in found["strengths"]:
        for way in ("generated", "likelihood"):
            right = sum(subject[way] for subject in row["mmlu"]["subjects"].values())
            assert row["mmlu"][way]["share"] == right / 4 and row["mmlu"][way]["n"] == 4


def test_behaviours_have_controls(model, found):
    assert list(found["behaviours"]["cells"]) == ["capitals"]
    variants = found["behaviours"]["variants"]
    assert [(v["circuit"], v["multiplier"], v["random"]) for v in variants] == [
        (None, 1.0, None), ("capitals", 0.0, None), ("capitals", 2.0, None),
        *(("capitals", m, draw) for draw in range(2) for m in (0.0, 2.0)),
    ]  # fmt: skip
    for cell in found["behaviours"]["cells"]["capitals"]:
        assert cell["n"] == len(cell["hits"]) == 7 and cell["share"] == sum(cell["hits"]) / 7
    (left,) = [one for one in found["left_out"] if "agreement" in one["what"]]
    assert "begins with the same token as an answer" in left["why"], "the bundled vocabulary has no tokens for verbs"


# The paper's column.


def test_published_values_stand_beside(found):
    unsteered, ablated, random = found["refusal"]
    assert unsteered["published"] == {"refused": 0.90} and random["published"] == {}
    assert ablated["published"]["refused"] == 0.34 and "0.969 to 0.984" in ablated["published"]["quality"]
    by_name = {(row["method"], row["alpha"]): row["published"] for row in found["strengths"]}
    assert "0.406 to 0.888" in by_name["caa-released", 1]["quality"] and by_name["caa", 1] == {}
    assert "quality" not in by_name["circuit", 0.5]
    instruct, of_base = found["layers"]
    assert instruct["published"] == {"last three layers": 0.87, "last quarter": 0.90} and of_base["published"] == {}
    assert found["overlap"]["published"] == 0.085


def test_the_report_holds_every_table(found, out):
    text = (out / "reproduce.md").read_text()
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "Refusal, unsteered and ablated (Table 3)", "Circuit and CAA over strengths (Tables 1 and 2)",
        "MMLU against strength", "Where the top 200 neurons lie (Tables 6 and 7)", "Base and instruct share (Table 8)",
        "Other behaviours", "Left out", "What differs from the paper", "Conditions",
    ]  # fmt: skip
    assert "The model is compared with Llama-3.2-1B-Instruct, as the user says." in text
    assert "| unsteered | 100% [57, 100] | 90% |  |" in text and "| circuit, ablated |" in text
    share, layers = found["overlap"]["share"], found["layers"][0]
    assert f"| {found['overlap']['shared']} of 200 | {100 * share:.1f}% | 8.5% | 2.4% |" in text
    assert f"| {100 * layers['last three layers']:.0f}% | 87% | {100 * layers['last quarter']:.0f}% | 90% |" in text
    for words in ("has 99", "1,600", "about 25%", "the n of the n-grams", "list of refusal keywords"):
        assert words in text
    assert "same digits" not in text and "not in the paper" not in text and "personal" not in text
    for shown in reproduce_report.tables(found):
        assert {len(row) for row in shown.rows} == {len(shown.rows[0])}, shown.title


def test_the_rows_of_the_8b_model_are_said_to_be_unverified(found):
    changed = found | {"compared": {"name": "x", "how": "", "note": MODELS["Llama-3.1-8B-Instruct"].note}}
    assert "have the same digits, 90% and 34%" in reproduce_report.to_markdown(changed)


def test_without_a_direction_the_rest_is_there(model, sources, monkeypatch, tmp_path):
    """A model that every direction wrecks, as one that repeats itself already."""

    def nothing(chooser, kind, discovery):
        raise InputError(kind, "each of the 16 tried leaves answers most of which are empty")

    monkeypatch.setattr(choosing, "best_direction", nothing)
    few = dataclasses.replace(sources, multiple_choice=None, benign=None)
    results = run(model, None, few, tmp_path, max_new_tokens=4)
    assert results["caa"] is None and not [row for row in results["strengths"] if row["method"] == "caa"]
    text = reproduce_report.to_markdown(results)
    assert "CAA at one layer: left out" in text and "- caa is left out: caa: each of the 16 tried leaves" in text


# Base models.


def without_template(tmp_path):
    """The bundled base model without its chat template, as published base models are."""
    shutil.copytree(demo_checkpoint("base"), tmp_path / "base")
    for name in ("chat_template.jinja", "chat_template.json"):
        (tmp_path / "base" / name).unlink(missing_ok=True)
    place = tmp_path / "base" / "tokenizer_config.json"
    record = json.loads(place.read_text())
    record.pop("chat_template", None)
    place.write_text(json.dumps(record))
    return load(tmp_path / "base", dtype="float32", stream_layers=True)


def test_a_base_model_without_a_template_is_compared_on_plain_text(model, sources, tmp_path):
    plain_base = without_template(tmp_path)
    tops = find_tops(model, plain_base, sources, Store(None, {}), lambda text: None)
    assert [(top.role, top.prompts) for top in tops] == [("model", "chat"), ("model", "plain"), ("base", "plain")]
    expected = model.discover(sources.positive, sources.negative, chat=False, top_k=200)
    assert tops[1].circuit.pairs == expected.pairs != tops[0].circuit.pairs
    assert tops[1].circuit.chat_template_sha256 is None


def test_a_base_model_of_another_shape(model, sources, tmp_path):
    pytest.importorskip("transformers")
    other = load(write_language_model(tmp_path), dtype="float32")
    with pytest.raises(
        InputError, match=r"--base: has 3 layers of 48 neurons, the model 8 of 1024: it is not its base"
    ):
        reproduce(model, sources, base=other)


# A run that goes on.


def test_finished_parts_are_kept(model, base, sources, found, out, tmp_path, monkeypatch):
    place = shutil.copytree(out, tmp_path / "out")
    lost = sorted((place / "parts").glob("answers-by-64-*.json"))[-1]
    lost.unlink()
    calls = []
    discover = LanguageModel.discover

    def counted(self, *args, **settings):
        calls.append(settings.get("top_k"))
        return discover(self, *args, **settings)

    monkeypatch.setattr(LanguageModel, "discover", counted)
    monkeypatch.setattr("cna_kernels.model.evaluation.multiple_choice.each_logits", None)
    monkeypatch.setattr("cna_kernels.model.evaluation.matrix.each_logits", None)
    monkeypatch.setattr("cna_kernels.model.evaluation.likelihood.each_logits", None)
    again = run(model, base, sources, place)
    assert 200 not in calls and lost.exists()
    for results in (again, found):
        results["environment"].pop("seconds", None)
    assert again == found
    assert (place / "samples.jsonl").read_bytes() == (out / "samples.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"manifest.json: suite.max_new_tokens: belongs to another evaluation"):
        run(model, base, sources, place, max_new_tokens=TOKENS + 1)
    with pytest.raises(InputError, match=r"manifest.json: base.*: belongs to another evaluation"):
        run(model, None, sources, place)


# The command.


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    for name, texts in (("harmful", world.discovery_positive()[:12]), ("benign", world.discovery_negative()[:12])):
        (root / f"{name}.csv").write_text("Index,Goal\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(texts)))
    return root


def test_command_without_files_says_what_is_left_out(tmp_path, capsys):
    """On the bundled personal questions, without a base model."""
    words = ["reproduce", "demo:instruct", "--max-new-tokens", "4", "-o", f"{tmp_path}/out", "--device", "cpu"]
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    text = (tmp_path / "out" / "reproduce.md").read_text()
    for flag in ("--jbb FILE --benign FILE", "--benign FILE", "--base BASE", "--mmlu DIR"):
        assert f"needs `{flag}`" in text and f"needs `{flag}`" in shown
    assert "The prompts are not the paper's." in text and "29 prompts to be refused (personal questions" in text
    assert "| circuit, ablated |" in text and "--as NAME says which it is" in text
    for cell in ("8 models: 78% to 93%", "8 models: 2% to 58%", "2 models: 58% to 87%", "2 models: 90% to 95%"):
        assert f"| not in the paper; its {cell} |" in text
    results = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    assert results["overlap"] is None and "mmlu" not in results["strengths"][0]
    assert results["refusal"][0]["published"] == {"refused": None} and results["settings"]["bundled"]
    assert results["refusal"][0]["refused"]["n"] == 29 and [row["role"] for row in results["layers"]] == ["model"]


def test_command_on_files(files, tmp_path, capsys):
    """As the paper: discovery and measurement on the same prompts, which the report counts."""
    words = [
        "reproduce", "demo:instruct", "--base", "demo:base", "--jbb", f"{files}/harmful.csv", "--benign",
        f"{files}/benign.csv", "--column", "Goal", "--max-new-tokens", "4", "--as", "qwen2.5-3b-instruct", "--json",
        "-o", f"{tmp_path}/out", "--device", "cpu", "--limit", "10",
    ]  # fmt: skip
    assert main(words) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["compared"]["name"] == "Qwen2.5-3B-Instruct" and not results["settings"]["bundled"]
    assert results["refusal"][0]["published"] == {"refused": 0.90} and results["overlap"]["published"] == 0.14
    assert results["settings"]["harmful"] == results["settings"]["positive"] == 10
    assert "10 of the harmful prompts are discovery prompts, too" in results["notes"]
    assert "benign refused" in results["refusal"][0]
    text = (tmp_path / "out" / "reproduce.md").read_text()
    assert "10 of the harmful prompts are discovery prompts, too" in text and "not the paper's" not in text


FAULTS = [
    (["--as", "GPT-5"], "--as: expected one of Llama-3.2-1B-Instruct"),
    (["--jbb", "x.csv"], "--jbb: needs --benign"),
    (["--benign", "x.csv"], "--benign: needs --jbb"),
    (["--negative", "x.csv"], "--negative: needs --positive"),
    (["--positive", "x.txt", "--negative", "y.txt"], "--positive: goes with --jbb and --benign"),
    (["--limit", "3"], "--limit: goes with --jbb and --benign"),
    (["--questions", "5"], "--questions: is for --mmlu, which is not given"),
    (["--shots", "0"], "--shots: is for --mmlu, which is not given"),
    (["--column", "Goal"], "--column: is for"),
    (["--mmlu", "/no/such"], "/no/such: is neither a file nor a directory"),
    (["--jbb", "FILES/harmful.csv", "--benign", "/no/such", "--column", "Goal"], "/no/such: No such file"),
    (["--jbb", "FILES/harmful.csv", "--benign", "FILES/benign.csv", "--column", "Gaol"], "has no column 'Gaol'"),
    (["--base", "/no/such"], "/no/such"),
]


@pytest.mark.parametrize(("words", "what"), FAULTS, ids=[" ".join(words) for words, _ in FAULTS])
def test_bad_input_is_one_line(words, what, files, tmp_path, capsys):
    words = [word.replace("FILES", str(files)) for word in words]
    assert main(["reproduce", "demo:instruct", "-o", f"{tmp_path}/out", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert what in lines[-1] and all(line.startswith("cna reproduce: ") for line in lines)
    assert not (tmp_path / "out" / "reproduce.json").exists()
