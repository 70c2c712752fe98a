"""cna eval and cna sweep on the bundled instruct model, with files in the layouts of JBB-Behaviors and MMLU."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cna_kernels import Circuit
from cna_kernels.model import demo_checkpoint, load
from cna_kernels.model.cli import main
from cna_kernels.model.cli.evaluation import _show as show
from cna_kernels.model.demo import world
from cna_kernels.model.evaluation.report import brief, legend
from tiny import write_mmlu

SETS = {
    "harmful": world.heldout_refusable()[:12],
    "benign": world.heldout_benign()[:8],
    "positive": world.discovery_positive()[:40],
    "negative": world.discovery_negative()[:40],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with every file that the commands read, and a circuit."""
    root = tmp_path_factory.mktemp("files")
    for name in ("harmful", "benign"):
        with open(root / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["Index", "Goal", "Target", "Behavior", "Category", "Source"])
            writer.writerows([n, text, "Sure", "b", "c", "Original"] for n, text in enumerate(SETS[name]))
    for name in ("positive", "negative"):
        (root / f"{name}.txt").write_text("\n".join(SETS[name]))
    (root / "text.txt").write_text(" ".join(world.expected_answer(prompt) for prompt in SETS["benign"]))
    write_mmlu(root / "mmlu", n=3)
    model = load(demo_checkpoint(), dtype="float32")
    model.discover(world.discovery_positive(), world.discovery_negative(), score="magnitude").save(root / "c.json")
    return root


def words(command, files, *more):
    """The words of a command: options that most tests give alike, but for those among ``more``."""
    usual = {
        "--dtype": "float32", "--device": "cpu", "-c": f"{files}/c.json", "--harmful": f"{files}/harmful.csv",
        "--benign": f"{files}/benign.csv", "--column": "Goal", "--max-new-tokens": "40",
    }  # fmt: skip
    return [command, "demo:instruct", *(w for pair in usual.items() if pair[0] not in more for w in pair), *more]


@pytest.mark.rare
def test_eval_writes_everything(files, tmp_path, capsys):
    more = [
        "--positive", f"{files}/positive.txt", "--negative", f"{files}/negative.txt", "--mmlu", f"{files}/mmlu",
        "--shots", "1", "--text", f"{files}/text.txt", "--methods", "all", "--m", "1,0", "--random-draws", "1",
        "--curves", "-o", f"{tmp_path}/out",
    ]  # fmt: skip
    assert main(words("eval", files, *more)) == 0
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    pictures = {"strength.png", "mmlu.png", "layers.png", "ranks.png", "size.png"}
    assert {"results.json", "samples.jsonl", "report.md", "manifest.json"} | pictures <= names
    report = (out / "report.md").read_text()
    for text in (
        "| harmful refused (strict list) |", "| benign refused (broad list) |", "| harmful answered |",
        "| benign: degenerate, empty, short answers |", "| harmful: same answer as unsteered |",
        "| KL to unsteered, nats a token |", "| perplexity of the text |", "| multiple choice right, by likelihood |",
        "| necessity: harmful refused, ablated (n = 12) |", "| sufficiency: benign refused, contrast written (n = 8) |",
        "caa-released", "Sufficiency", "size.png",
    ):  # fmt: skip
        assert text in report
    titles = [line for line in report.splitlines() if line.startswith(("| method |", "| score |"))]
    alone = {"refused", "refusal", "answered", "quality", "token quality", "unchanged", "broken", "KL", "overlap"}
    assert len(titles) == 4 and not alone & {title for line in titles for title in line.strip("| ").split(" | ")}
    results = json.loads((out / "results.json").read_text())
    assert results["facts"]["suite"]["prompts"]["harmful"]["count"] == 12
    rows = {(row["method"], row["multiplier"]): row for row in results["rows"]}
    assert {method for method, _ in rows} == {
        "unsteered", "circuit", "random 1", "top activation", "single neuron", "caa", "caa-released", "ablation",
    }  # fmt: skip
    refused = {key: row["harmful"]["refusal"]["strict"]["share"] for key, row in rows.items()}
    assert refused["unsteered", 1.0] == 1 and refused["circuit", 0.0] <= 0.1 and refused["random 1", 0.0] == 1
    assert rows["circuit", 0.0]["perplexity"]["mean"] < 1.1 * rows["unsteered", 1.0]["perplexity"]["mean"]
    assert all({"kl", "perplexity", "mmlu"} <= set(row) for row in rows.values())
    mmlu = rows["circuit", 0.0]["mmlu"]
    assert {subject: found["n"] for subject, found in mmlu["subjects"].items()} == {
        "abstract_algebra": 3,
        "virology": 3,
    }
    for name in ("likelihood", "generated"):
        p = mmlu[name]["share"]
        assert p == sum(found[name] for found in mmlu["subjects"].values()) / 6
        assert mmlu[name]["stderr"] == pytest.approx((p * (1 - p) / 6) ** 0.5)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 20 * len(rows)
    for sample in samples:
        if sample["method"] == "unsteered" and sample["set"] == "harmful":
            assert sample["answer"] == world.expected_refusal(sample["prompt"])
    assert "caa-released" in capsys.readouterr().out


def test_sweep_prints_a_table(files, capsys):
    assert main(words("sweep", files, "--m", "-1,0,1", "--json")) == 0
    results = json.loads(capsys.readouterr().out)
    assert [row["multiplier"] for row in results["rows"]] == [1.0, -1.0, 0.0]
    assert set(results["rows"][0]) == {"method", "multiplier", "strength", "harmful", "benign"}
    show(results)
    out = capsys.readouterr().out
    assert all(line in out for line in LEGEND)
    head = [title for title, _ in brief(results)]
    assert head == ["harmful refused", "benign refused", "harmful answered", "harmful token quality"]
    ends = {"share": 1.0, "mean": 12345.678, "low": 0.0, "high": 1.0}
    for row in results["rows"]:
        row |= {"kl": ends, "perplexity": ends, "mmlu": {"generated": ends}}
        row["harmful"]["refusal"]["broad"] = row["benign"]["refusal"]["broad"] = {"share": 1.0, "low": 1.0, "high": 1.0}
    show(results)
    out = capsys.readouterr().out
    words_shown = {"unsteered,", "perplexity", "choice", "quality", "answered", "12345.6780", "1.235e+04"}
    assert words_shown <= set(out.split()) and "\u2026" not in out and out.count("100% 100-100") == 6
    first = {key: results["rows"][0][key] for key in ("method", "multiplier")}
    results["rows"] = [first | {"kl": ends}]
    assert [title for title, _ in brief(results)] == ["KL to unsteered, nats"] and legend(results) == []


LEGEND = [
    "harmful: 12 prompts to be refused; benign: 8 prompts to be answered",
    "refused: answers with a phrase of the broad list, with 95% intervals",
    "answered: neither refused nor empty, degenerate or short",
    "*: p < 0.05, McNemar's exact test against unsteered on the same prompts",
]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--column", "Gaol"], "harmful.csv:2: has no column 'Gaol' (it has Index, Goal"),
        (["--m", "0,x"], "--m: expected numbers"),
        (["--mmlu", "/no/such"], "/no/such: is neither a file nor a directory"),
        (["--mmlu", "FILES/mmlu", "--subjects", "astrology"], "has no subject 'astrology'; it has abstract_algebra"),
        (["--sae-layer", "3"], "--sae: needs a file"),
        (["--methods", "caa"], "discovery prompts are needed for caa"),
        (["--methods", "magic"], "methods: expected some of circuit, random"),
        (["--stride", "8"], "--stride: is for --text, which is not given"),
        (["--shots", "-1"], "--shots: expected 0 to 100"),
        (["--refusals", "/no/such"], "/no/such"),
        (["--text", "FILES/latin.txt"], "latin.txt: is not UTF-8 text"),
        (["--benign", "FILES/empty.csv"], "empty.csv: holds no prompt"),
        (["--judge-command", "/no/such/judge", "--m", "1"], "--judge-command: cannot be run"),
        (["--control", "FILES/c.json", "--control", "c=FILES/d.json"], "--control: two are called 'c'"),
        (["--control", "caa=FILES/c.json"], "--control: 'caa' is the name of a method"),
        (["--control", "other=/no/such"], "/no/such"),
    ],
)
def test_bad_input_is_one_line(files, tmp_path, capsys, more, message):
    (files / "latin.txt").write_bytes("gr\xfcn".encode("latin-1"))
    (files / "empty.csv").write_text("Index,Goal\n")
    more = [word.replace("FILES", str(files)) for word in more]
    assert main(words("eval", files, "-o", f"{tmp_path}/out", "--no-kl", *more)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("cna eval: ") and message in lines[-1]
    assert all(line.startswith("cna eval: ") for line in lines)


def test_controls_by_name(files, tmp_path, capsys):
    """Beside the circuit, at its multipliers: shared neurons, and paired tests in the report."""
    circuit = Circuit.load(files / "c.json")
    half = Circuit(circuit.neurons[: circuit.k // 2], circuit.n_layers, circuit.n_neurons)
    half.save(tmp_path / "half.json")
    circuit.random_like(5).save(tmp_path / "x.json")
    more = [
        "--control",
        f"{tmp_path}/half.json",
        "--control",
        f"a|b={tmp_path}/x.json",
        "--control",
        f"far={tmp_path}/x.json",
    ]
    out = f"{tmp_path}/out"
    command = words("eval", files, "--methods", "circuit,random", "--m", "1,0", "--no-kl", "-o", out, "--any-model")
    assert main([*command, *more[:2], *more[4:]]) == 0
    shown = capsys.readouterr().out
    n, k = circuit.k, half.k
    assert f"circuit and half share {k} neurons, {n - k} are only in the first, 0 in the second" in shown
    assert f"circuit and far share 0 neurons, {n} are only in the first, {n} in the second" in shown
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"| circuit and half | {k} | {n - k} | 0 |" in report and f"| half and far | 0 | {k} | {n} |" in report
    assert "| circuit | 0 | 0% [0, 24] | 12, 0, p 0.0005 |" in report
    assert "| far | 0 | 100% [76, 100] | 0, 0, p 1 |" in report
    against = report.partition("## The circuit against the other methods")[2]
    assert "| far | 0 | 12, 0, p 0.0005 |" in against and "| random, 3 draws | 0 | 12, 0, p 0.0005 |" in against
    assert main([*command, *more[4:], *more[:2]]) == 2, "another order would read the parts of another circuit"
    assert "suite.others: belongs to another evaluation" in capsys.readouterr().err


@pytest.mark.rare
def test_killed_and_started_again(files, tmp_path):
    """After SIGKILL and the same command again, the files are those of a run that was not killed."""
    command = [sys.executable, "-m", "cna_kernels.model", *words("eval", files, "--m", "1,0", "--batch", "8")]
    whole = subprocess.run([*command, "-o", str(tmp_path / "whole")], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    running = subprocess.Popen([*command, "-o", str(tmp_path / "out")], stderr=subprocess.DEVNULL)
    parts = tmp_path / "out" / "parts"
    while len(list(parts.glob("answers-*.json")) if parts.exists() else []) < 2:
        assert running.poll() is None
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "out" / "results.json").exists()
    done = subprocess.run([*command, "-o", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "out")]
    for result in results:
        result["environment"].pop("seconds")
    assert results[0] == results[1]
