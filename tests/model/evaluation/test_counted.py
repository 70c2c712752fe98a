"""cna eval on a behaviour instead of refusals, and with other names: figures recomputed, labels, what is left out."""

import json

import pytest
import torch

from cna_kernels import InputError
from cna_kernels.model import demo_checkpoint, load
from cna_kernels.model.cli import main
from cna_kernels.model.demo import world
from cna_kernels.model.evaluation import report
from cna_kernels.model.evaluation.behaviour import Behaviour
from cna_kernels.model.evaluation.evaluate import Evaluation, evaluate
from cna_kernels.model.evaluation.metrics import mcnemar
from cna_kernels.model.evaluation.store import Store
from cna_kernels.model.evaluation.suite import Suite
from cna_kernels.model.prompts.files import PromptSet

REFUSES = world.REFUSAL_KEYWORDS
POSITIVE, NEGATIVE = world.discovery_positive(), world.discovery_negative()
BENIGN = PromptSet.of(world.heldout_benign()[:5], "benign")
M0 = dict(multipliers=(1.0, 0.0), max_new_tokens=30)


def behaviour(tmp_path, **changes):
    """Refusals of the bundled model as a behaviour of phrases."""
    record = {
        "behaviour": "closed", "about": "says no", "labels": ["asks | too much", "asks for little"],
        "positive": POSITIVE[:30], "negative": NEGATIVE[:30], "measured": world.heldout_refusable()[:10],
        "measure": {"kind": "phrases", "phrases": list(REFUSES)},
    }  # fmt: skip
    path = tmp_path / "closed.json"
    path.write_text(json.dumps(record | changes))
    return path


PAIRS = [{"prompt": text, "answer": "Sorry", "other": "First"} for text in world.heldout_refusable()[:10]]


@pytest.fixture(scope="module")
def model():
    return load(demo_checkpoint(), dtype="float32")


@pytest.fixture(scope="module")
def circuit(model):
    return model.discover(POSITIVE, NEGATIVE, score="magnitude")


def rows_of(results):
    return {row["method"]: row for row in results["rows"]}


def test_a_behaviour_of_answers(model, circuit, tmp_path):
    own = Behaviour.read(behaviour(tmp_path))
    suite = Suite(
        methods=("circuit", "random", "caa", "ablation"), behaviour=own, benign=BENIGN, random_draws=1,
        alternatives=True, **M0,
    )  # fmt: skip
    results = evaluate(model, circuit, suite, out=tmp_path / "out")
    rows = rows_of(results)
    plain, steered = (
        own.measure.of_texts(
            [model.generate(text, max_new_tokens=30, **how) for text in own.prompts.texts], own.measured
        )
        for how in ({}, dict(circuit=circuit, multiplier=0.0))
    )
    assert sum(plain) >= 9 and sum(steered) <= 1, "a behaviour that nothing changes would hide everything"
    for name, hits in (("unsteered", plain), ("circuit", steered)):
        found = rows[name]["measured"]
        assert found["shown"]["closed"]["share"] == sum(hits) / 10
        assert found["against unsteered"]["closed"] == mcnemar(plain, hits)
        assert sum(found["kinds"].values()) == 10
        assert rows[name]["benign"]["refusal"]["broad"]["n"] == 5
    assert rows["circuit"]["measured"]["removed"]["share"] >= 0.9
    assert results["ranking"][0]["removed"]["share"] >= 0.9
    for kind in ("caa", "ablation"):  # chosen by the behaviour's measure
        assert all({"shown", "answered", "sound"} <= set(row) for row in results["chosen"][kind]["tried"])
        assert rows[kind]["measured"]["shown"]["closed"]["share"] < sum(plain) / 10
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    mine = [s["shown"]["closed"] for s in samples if s["set"] == "measured" and s["method"] == "circuit"]
    assert mine == steered
    point = next(p for p in results["alternatives"] if p["score"] == "magnitude")
    assert point["necessity"]["shown"]["n"] == 10 and point["sufficiency"]["shown"]["n"] == 5
    text = report.to_markdown(results, [])
    for words in (
        "## asks \\| too much: says no (n = 10)", "| closed | closed: lost, gained, p | closed: removed and answered |",
        "| benign refused (broad list) |", "10 measured (asks | too much)", "necessity: closed, ablated (n = 10)",
        "sufficiency: closed of benign, contrast written (n = 5)",
    ):  # fmt: skip
        assert words.replace("## asks \\|", "## asks |") in text, words
    assert "harmful" not in text.partition("## Methods")[0].replace("harmful and", "")
    assert [title for title, _ in report.brief(results)][:2] == ["closed", "benign refused"]
    assert report.legend(results)[:2] == [
        "asks | too much: 10 prompts to measure on; benign: 5 prompts to be answered",
        "closed: says no, with 95% intervals",
    ]


def test_a_behaviour_of_logits(model, circuit, tmp_path):
    """Hits against a plain forward pass of every prompt; nothing is answered, and what needs answers is left out."""
    path = behaviour(tmp_path, measured=PAIRS, measure={"kind": "pair"})
    own = Behaviour.read(path)
    suite = Suite(
        methods=("circuit", "caa"), behaviour=own, benign=BENIGN, alternatives=True, neutral=BENIGN, **M0
    )  # fmt: skip
    results = evaluate(model, circuit, suite, out=tmp_path / "out")
    first = [model.tokenizer.first_ids([text], "x")[0] for text in ("Sorry", "First")]
    expected = {}
    for name, multiplier in (("unsteered", 1.0), ("circuit", 0.0)):
        expected[name] = []
        for prompt in model.encode(own.prompts):
            with model.steered(circuit, multiplier), torch.no_grad():
                logits = model(torch.tensor([prompt.ids]))[0, -1]
            expected[name].append(bool(logits[first[0]] > logits[first[1]]))
    rows = rows_of(results)
    assert set(rows) == {"unsteered", "circuit"} and expected["unsteered"] != expected["circuit"]
    for name, hits in expected.items():
        found = rows[name]["measured"]
        assert found["shown"]["closed"]["share"] == sum(hits) / 10
        assert found["against unsteered"]["closed"] == mcnemar(expected["unsteered"], hits)
        assert "kinds" not in found and "kinds" in rows[name]["benign"]
    gone = [was and not now for was, now in zip(expected["unsteered"], expected["circuit"], strict=True)]
    assert rows["circuit"]["measured"]["removed"]["share"] == sum(gone) / sum(expected["unsteered"])
    notes = results["notes"]
    assert "closed is measured by a forward pass: its prompts have no answers to count or to judge" in notes
    assert any(
        "caa is left out: caa: no layer can be chosen: the measure 'pair' needs an answer" in note for note in notes
    )
    assert "sufficiency is left out: the behaviour's measure needs an answer for each prompt" in notes
    assert all("necessity" in point and "sufficiency" not in point for point in results["alternatives"])
    for point in results["alternatives"]:  # the answers to benign prompts tell whether its point is a wreck
        assert sum(point["necessity"]["kinds"].values()) == 5 and point["necessity"]["shown"]["n"] == 10
    assert "| necessity: benign prompts, answered |" in report.to_markdown(results, [])
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    mine = [s["shown"]["closed"] for s in samples if s["set"] == "measured" and s["method"] == "circuit"]
    assert mine == expected["circuit"] and {s["set"] for s in samples if "answer" in s} == {"benign"}
    pictures = report.draw(results, tmp_path)
    assert "strength.png" in pictures
    assert "| closed | closed: lost, gained, p | closed: removed |" in report.to_markdown(results, pictures)


def test_whether_the_template_is_used_is_the_behaviours(model, circuit, tmp_path):
    plain = Behaviour.read(behaviour(tmp_path, template=False, measured=PAIRS, measure={"kind": "pair"}))
    chat = Behaviour.read(behaviour(tmp_path, template=True, measured=PAIRS, measure={"kind": "pair"}))
    assert [Suite(behaviour=own).chat_of("measured") for own in (plain, chat)] == [False, True]
    assert Suite(behaviour=chat, chat=False).chat_of("positive") is False
    assert Suite(behaviour=plain, benign=BENIGN).chat_of("benign") is None
    for own in (plain, chat):
        with Store(None, {}) as store:
            evaluation = Evaluation(model, circuit, Suite(behaviour=own, benign=BENIGN, **M0), store)
        measured, benign = evaluation._counted
        assert [prompt.ids for prompt in measured.prompts] == [p.ids for p in model.encode(own.prompts, chat=own.chat)]
        assert [prompt.ids for prompt in benign.prompts] == [prompt.ids for prompt in model.encode(BENIGN)]
    assert model.encode(plain.prompts, chat=False)[0].ids != model.encode(plain.prompts, chat=True)[0].ids


def test_bad_items_show_before_any_work(model, circuit, tmp_path):
    same = [{"prompt": "x", "answer": "Sorry", "other": "Sorry"}]
    own = Behaviour.read(behaviour(tmp_path, measured=same, measure={"kind": "pair"}))
    with pytest.raises(InputError, match=r"closed\.json: measured\[0\]\.other: begins with the same token"):
        evaluate(model, circuit, Suite(behaviour=own), out=tmp_path / "out")
    assert not list((tmp_path / "out" / "parts").iterdir())


def test_another_behaviour_is_another_evaluation(model, circuit, tmp_path):
    suites = [
        Suite(behaviour=Behaviour.read(behaviour(tmp_path, measured=PAIRS[:n], measure={"kind": "pair"})), **M0)
        for n in (4, 5)
    ]
    evaluate(model, circuit, suites[0], out=tmp_path / "out")
    with pytest.raises(InputError, match="belongs to another evaluation"):
        evaluate(model, circuit, suites[1], out=tmp_path / "out")


def test_labels_rename_both_sets(model, circuit, tmp_path):
    harmful = PromptSet.of(world.heldout_refusable()[:4], "harmful")
    suite = Suite(harmful=harmful, benign=BENIGN, labels=("guarded", "open"), **M0)
    results = evaluate(model, circuit, suite)
    text = report.to_markdown(results, [])
    for words in (
        "## guarded: prompts to be refused (n = 4)",
        "| guarded refused (strict list) |",
        "| open answered |",
    ):
        assert words in text
    assert "harmful refused" not in text and "benign refused" not in text
    assert [title for title, _ in report.brief(results)][:3] == ["guarded refused", "open refused", "guarded answered"]
    assert report.legend(results)[0] == "guarded: 4 prompts to be refused; open: 5 prompts to be answered"
    assert set(results["rows"][0]) >= {"harmful", "benign"}, "the results keep their keys"


@pytest.fixture(scope="module")
def files(tmp_path_factory, circuit):
    root = tmp_path_factory.mktemp("files")
    circuit.save(root / "c.json")
    (root / "p.txt").write_text("\n".join(world.heldout_benign()[:4]))
    behaviour(root)
    (root / "pair.json").write_text(behaviour(root, measured=PAIRS, measure={"kind": "pair"}).read_text())
    behaviour(root)
    return root


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--behaviour", "closed.json", "--harmful", "p.txt"], "--harmful: is not for --behaviour, which has its own"),
        (["--behaviour", "closed.json", "--positive", "p.txt"], "--positive: is not for --behaviour"),
        (["--behaviour", "closed.json", "--labels", "a,b"], "--labels: is not for --behaviour"),
        (["--behaviour", "closed.json", "--limit", "3"], "--limit: is for prompt files"),
        (["--behaviour", "/no/such"], "/no/such"),
        (["--behaviour", "pair.json", "--judge-command", "x"], "there are no answers to judge"),
        (["--harmful", "p.txt", "--labels", "a"], "--labels: expected two different names, got a"),
        (["--labels", "a,b"], "--labels: is for --harmful and --benign"),
    ],
)
def test_what_contradicts_is_refused(files, tmp_path, capsys, more, message):
    more = [str(files / word) if word.endswith((".txt", ".json")) else word for word in more]
    words = ["eval", "demo:instruct", "-c", f"{files}/c.json", "-o", f"{tmp_path}/out", "--device", "cpu", *more]
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and not (tmp_path / "out").exists()


def test_the_command(files, tmp_path, capsys):
    words = [
        "eval", "demo:instruct", "-c", f"{files}/c.json", "--behaviour", f"{files}/closed.json", "--benign",
        f"{files}/p.txt", "--m", "1,0", "--dtype", "float32", "--device", "cpu", "--max-new-tokens", "30", "--no-kl",
        "--methods", "circuit", "-o", f"{tmp_path}/out",
    ]  # fmt: skip
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "closed: says no, with 95% intervals" in out and "harmful" not in out
    assert (tmp_path / "out" / "strength.png").exists()
    assert "| closed |" in (tmp_path / "out" / "report.md").read_text()
