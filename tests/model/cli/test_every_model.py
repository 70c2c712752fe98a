"""Every command on a tiny model of every family: circuits as by hooks, steered answers as by scaled weights."""

import json
import os
import subprocess
import sys

import pytest
import torch

from cna_kernels import Circuit
from cna_kernels.model import load
from cna_kernels.model.cli import main
from cna_kernels.model.prompts.files import PromptSet
from families import FAMILIES, contrast_by_hooks, greedy, steered_by, write_family
from tiny import CHOOSE

pytest.importorskip("transformers")

POSITIVE = ["open it please", "why so", "tell me now, and more", "what is it", "go on with it", "then what"]
NEGATIVE = ["yes", "no no no no", "we will see", "ok", "fine by me, as you said", "not at all"]
PROMPTS = ["go on", "what is the matter with you then", "x"]
K, M, N = 12, -2.5, 8  # neurons of the circuit, the multiplier, tokens of an answer


class Family:
    """A checkpoint of a family with its circuit, found by `cna discover`."""

    def __init__(self, name, tmp):
        self.name, self.engine, self.tmp = name, FAMILIES[name], tmp
        self.path, self.theirs = write_family(name, tmp)
        self.circuit = tmp / "circuit.json"
        for side, texts in (("positive", POSITIVE), ("negative", NEGATIVE), ("prompts", PROMPTS)):
            (tmp / f"{side}.txt").write_text("".join(f"{text}\n" for text in texts))
        self.sides = ["--positive", f"{tmp}/positive.txt", "--negative", f"{tmp}/negative.txt"]
        self.model = [str(self.path), "--device", "cpu"]
        self.with_circuit = [*self.model, "-c", str(self.circuit)]

    def ids_of(self, texts):
        model = load(self.path, device="cpu", weights=False)
        return [prompt.ids for prompt in model.encode(PromptSet.of(texts, "texts"))], model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    made = Family(request.param, tmp_path_factory.mktemp(request.param))
    words = ["discover", *made.model, *made.sides, "--top-k", str(K), "--no-universal", "-o", str(made.circuit)]
    assert main(words) == 0
    return made


def run(words, capsys):
    """What a command prints on stdout and on stderr; its exit code must be 0."""
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def test_circuits_are_those_of_hooks(family, capsys):
    circuit = Circuit.load(family.circuit)
    (positive, model), (negative, _) = family.ids_of(POSITIVE), family.ids_of(NEGATIVE)
    delta = contrast_by_hooks(family.theirs, positive, negative)
    assert model.engine == family.engine and delta.shape == (len(model.config.widths), max(model.config.widths))
    # int8 rounds activations to 1/127 of the largest: what differs in its last bit before may differ by this after
    tolerance = 5e-2 if family.name == "int8" else 1e-4
    magnitude = delta.abs()
    last = magnitude.flatten().sort(descending=True).values[K - 1].item()
    for layer, index, contrast in circuit.neurons:
        assert contrast == pytest.approx(delta[layer, index].item(), rel=tolerance, abs=tolerance * last)
        assert magnitude[layer, index] >= last * (1 - tolerance)
    assert circuit.k == K and last > 0.1
    mixture = family.name in ("qwen3-moe", "qwen3-moe-mixed", "mixtral")
    assert (circuit.experts is not None) == mixture
    out, _ = run(["show", str(family.circuit)], capsys)
    assert ("expert" in out) == mixture


def test_steered_answers_are_those_of_scaled_weights(family, capsys, monkeypatch):
    if family.name == "int8":  # token by token the same answer needs the same bits
        monkeypatch.setenv("CNA_BACKEND", "reference")
    words = ["run", *family.with_circuit, "--prompts", f"{family.tmp}/prompts.txt", "-m", str(M), "--json"]
    out, err = run([*words, "--max-new-tokens", str(N)], capsys)
    assert ("runs on transformers, as our own" in err) == (family.engine == "transformers")
    got = [[answer["text"] for answer in result["answers"]] for result in json.loads(out)]
    ids, model = family.ids_of(PROMPTS)
    circuit = Circuit.load(family.circuit)

    def answers(other):
        return [model.tokenizer.decode(greedy(other, row, model.stop_ids, N)) for row in ids]

    plain, steered = answers(family.theirs), steered_by(family.name, family.theirs, circuit, M, answers)
    assert [list(pair) for pair in zip(plain, steered, strict=True)] == got
    assert plain != steered


@pytest.mark.exhaustive
def test_evaluations(family, capsys):
    harmful = ["--harmful", f"{family.tmp}/positive.txt", "--max-new-tokens", "4", "--m", "1,0"]
    out, _ = run(["sweep", *family.with_circuit, *harmful, "--json"], capsys)
    rows = json.loads(out)["rows"]
    assert {row["method"] for row in rows} >= {"circuit", "unsteered"}
    words = ["--benign", f"{family.tmp}/negative.txt", *family.sides, "--methods", "all", "--alternatives"]
    out, err = run(["eval", *family.with_circuit, *harmful, *words, "-o", f"{family.tmp}/eval"], capsys)
    results = json.loads((family.tmp / "eval" / "results.json").read_text())
    assert ("relp is left out" in err) == (family.engine == "transformers")
    by_name = {(row["method"], row["multiplier"]): row for row in results["rows"]}
    assert by_name["circuit", 0]["kl"]["mean"] > 0
    out, _ = run(["compare", str(family.path), *family.model, *family.sides, *harmful, "--fraction", "0.05",
                  "-o", f"{family.tmp}/compare"], capsys)  # fmt: skip
    compared = json.loads((family.tmp / "compare" / "compare.json").read_text())
    assert compared["alike"]["overlap"] == 1.0


@pytest.mark.exhaustive
def test_reproduce(family, capsys):
    words = ["--max-new-tokens", "2", "--random-draws", "1", "-o", f"{family.tmp}/reproduce"]
    run(["reproduce", *family.model, *words], capsys)
    assert json.loads((family.tmp / "reproduce" / "reproduce.json").read_text())["compared"]


def test_exports(family, capsys):
    circuit = Circuit.load(family.circuit)
    out = family.tmp / ("steered.gguf" if family.name == "gguf" else "steered")
    words = ["export", str(family.path), "-c", str(family.circuit), "-m", "0", "--to"]
    if family.name == "int8":
        assert main([*words, "checkpoint", "-o", str(out)]) == 2
        assert "is quantised (I8): scale the columns of the checkpoint that it was quan" in capsys.readouterr().err
        return
    run([*words, "checkpoint", "-o", str(out)], capsys)
    ids = torch.tensor([family.ids_of(["a text to be read by both"])[0][0]])

    def logits(model):
        with torch.inference_mode():
            return model(ids).logits

    expected = steered_by(family.name, family.theirs, circuit, 0.0, logits)
    written = load(out, device="cpu")
    torch.testing.assert_close(written(ids), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(family.theirs)).abs().max() > 1e-2
    if circuit.experts is not None:
        assert main([*words, "lora", "-o", f"{family.tmp}/lora"]) == 2
        assert "is of a mixture, whose experts an adapter does not reach" in capsys.readouterr().err
        return
    if family.name != "gguf":
        peft = pytest.importorskip("peft")
        run([*words, "lora", "-o", f"{family.tmp}/lora"], capsys)
        import copy

        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(family.theirs), family.tmp / "lora")
        torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)


def test_estimate(family, capsys):
    out, _ = run(["estimate", *family.model, "--prompts", f"{family.tmp}/positive.txt", "--json"], capsys)
    found = json.loads(out)
    files = [family.path] if family.name == "gguf" else family.path.glob("*.safetensors")
    on_disk = sum(os.path.getsize(path) for path in files)
    assert 0.8 * on_disk < found["memory_bytes"]["weights"] < 1.3 * on_disk and found["seconds"]["all"] >= 0


@pytest.mark.rare
def test_lm_eval(family):
    pytest.importorskip("lm_eval")
    tmp = family.tmp
    questions = [{"question": f"is {n} more than {n * n % 7}?", "right": n % 3} for n in range(6)]
    (tmp / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp / "choose.yaml").write_text(CHOOSE.replace("DATA", str(tmp / "data.jsonl")))
    command = [sys.executable, "-m", "cna_kernels.model", "lm-eval", "--model", "cna", "--model_args"]
    command += [f"pretrained={family.path},circuit={family.circuit},multiplier=0", "--device", "cpu"]
    command += ["--tasks", "choose", "--include_path", str(tmp), "--output_path", str(tmp / "out")]
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp / "out").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["choose"]["acc,none"] >= 0
