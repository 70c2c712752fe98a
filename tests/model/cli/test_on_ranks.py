"""--tensor-parallel: what it refuses; every command under two ranks gives what it gives in one process."""

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest

from cna_kernels import Circuit
from cna_kernels.model.cli import main
from cna_kernels.model.demo import world
from rank_processes import run_ranks

CIRCUIT = Circuit(tuple((layer, 100 * layer + 77 * n, 1.0) for layer in range(8) for n in range(4)), 8, 1024)
TASK = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no"]
doc_to_target: right
metric_list: [{metric: acc}]
"""
SIDES = "--positive pos.txt --negative neg.txt"
SHORT = "--dtype float32 --max-new-tokens 12"
COMMANDS = {
    "discover": f"discover demo:instruct {SIDES} --dtype float32 --top-k 20 --score norm-weighted -o OUT/c.json",
    "run": f"run demo:instruct -c c.json -m 0,3 --prompts pos.txt --json {SHORT}",
    "sample": f"run demo:instruct -p hello -p well --temperature 1 --seed 3 --json {SHORT}",
    "sweep": f"sweep demo:instruct -c c.json --harmful pos.txt --m 0,2 {SHORT}",
    "eval": (
        f"eval demo:instruct -c c.json --harmful pos.txt --benign neg.txt {SIDES} --m 0,2 {SHORT} "
        "--methods circuit,random,caa,ablation --random-draws 1 -o OUT/eval"
    ),
    "eval again": (
        f"eval demo:instruct -c c.json --harmful pos.txt --benign neg.txt {SIDES} --m 0,2 {SHORT} "
        "--methods circuit,random,caa,ablation --random-draws 1 -o OUT/eval"
    ),
    "compare": f"compare demo:base demo:instruct {SIDES} --harmful pos.txt --m 0 --no-template {SHORT} -o OUT/both",
    "matrix": f"matrix demo:instruct --behaviour refusal --m 0 --random-draws 1 --no-kl {SHORT} -o OUT/matrix",
    "reproduce": (
        f"reproduce demo:instruct --base demo:base --jbb pos.txt --benign neg.txt --random-draws 1 {SHORT} -o OUT/paper"
    ),
    "lm-eval": (
        "lm-eval --model cna --model_args pretrained=demo,circuit=c.json,multiplier=4.0,dtype=float32 --tasks choose "
        "--include_path tasks --device cpu --batch_size 5 --output_path OUT/lm"
    ),
}


def write_files(directory):
    for name, texts in (("pos", world.discovery_positive()[:8]), ("neg", world.discovery_negative()[:8])):
        (directory / f"{name}.txt").write_text("".join(text + "\n" for text in texts))
    CIRCUIT.save(directory / "c.json")
    questions = [{"question": f"is {n} more than {n * n % 7}?", "right": n % 2} for n in range(8)]
    (directory / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    for name in ("tasks", "one", "two"):
        (directory / name).mkdir()
    (directory / "tasks" / "choose.yaml").write_text(TASK.replace("DATA", str(directory / "data.jsonl")))


def run_all(out, names, *more):
    """These commands; name -> its exit code, stdout and stderr. Between the two evaluations some parts are lost."""
    from cna_kernels.model import demo_checkpoint

    found = {}
    for name in names:
        said, error = io.StringIO(), io.StringIO()
        if name == "eval again" and os.environ.get("RANK", "0") == "0":
            for part in sorted(Path(out, "eval", "parts").glob("*.json"))[::2]:
                part.unlink()
        text = (
            COMMANDS[name].replace("OUT", out).replace("pretrained=demo", f"pretrained={demo_checkpoint('instruct')}")
        )
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
            code = main([*text.split(), *more])
        found[name] = code, said.getvalue(), error.getvalue()
    return found


def same(text, out):
    """The text without what differs between two runs: directories, times, rates, dates."""
    text = re.sub(rf"\b{out}\b", "OUT", text)
    return re.sub(r"[\d.,:]+ ?(s|MiB|prompts/s|tokens/s)\b|\d+/\d+|\d+:\d\d:\d\d|━+|\d{4}-\d\d-\d\d\S*", "#", text)


GROUPS = {  # commands, and where they write samples: what CI runs; the rest, which draws pictures or imports much
    "some": (("discover", "run", "sample", "sweep", "matrix"), (), pytest.mark.exhaustive),
    "others": (
        ("eval", "eval again", "compare", "reproduce", "lm-eval"),
        ("eval", "both/instruct", "both/base", "paper"),
        pytest.mark.rare,
    ),
}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=group[2]) for name, group in GROUPS.items()])
def both(request, tmp_path_factory):
    """What every command says in one process, and on each of two ranks; where the samples are; the directory."""
    if request.param == "others":
        pytest.importorskip("lm_eval")
    names, samples, _ = GROUPS[request.param]
    directory = tmp_path_factory.mktemp("commands")
    write_files(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", "hub")
        done = run_ranks(2, __file__, *names, longest=300)
        one = run_all("one", names)
    assert [code for code, *_ in done] == [0, 0], done
    assert done[0][1] == done[1][1] == "", "all that a rank says is in the files"
    return one, [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)], samples, directory


def test_commands_say_what_they_say_in_one_process(both):
    one, (first, other), *_ = both
    for name, (code, said, error) in one.items():
        assert code == 0, error
        assert other[name] == [0, "", ""], "rank 0 speaks for all"
        code, mine, error = first[name]
        assert code == 0, error
        if name == "lm-eval":  # a table of floats
            found = [[row.split("|")[7] for row in text.splitlines() if "acc" in row] for text in (mine, said)]
            assert found[0] == found[1] != []
        else:
            assert same(mine, "two") == same(said, "one")


def test_files_are_those_of_one_process(both):
    *_, with_samples, directory = both
    files = [
        sorted(str(path.relative_to(directory / out)) for path in (directory / out).rglob("*") if path.is_file())
        for out in ("one", "two")
    ]
    one, two = ([re.sub(r"\d{4}-.*", "", name) for name in names] for names in files)  # lm-eval writes the date
    assert one == two and len(one) > 5
    for place in with_samples:
        one, two = ((directory / out / place / "samples.jsonl").read_text().splitlines() for out in ("one", "two"))
        assert [json.loads(line).get("answer") for line in two] == [json.loads(line).get("answer") for line in one]
    for name in files[0]:
        if re.fullmatch(r"c.json|.*circuit.*\.json", name):
            one, two = (json.loads((directory / out / name).read_text()) for out in ("one", "two"))
            assert [neuron[:2] for neuron in two["neurons"]] == [neuron[:2] for neuron in one["neurons"]], name
    if "eval" in with_samples:
        assert json.loads((directory / "two/eval/results.json").read_text())["environment"]["ranks"] == 2


RUN = ["run", "demo:instruct", "-p", "hi"]


@pytest.mark.parametrize(
    ("world_size", "words", "line"),
    [
        (None, RUN, "--tensor-parallel: is for the workers that torchrun starts, 2 or more"),
        ("1", RUN, "--tensor-parallel: is for the workers that torchrun starts, 2 or more"),
        ("two", RUN, "RANK, WORLD_SIZE: expected numbers, as torchrun sets them"),
        ("2", [*RUN, "--device", "cuda:1"], "--device: every worker has a GPU of its own: expected cuda or cpu"),
        ("2", ["lm-eval", "--device=cuda:0"], "--device: every worker has a GPU of its own: expected cuda or cpu"),
        ("2", ["eval", "m", "-c", "c", "--curves", "-o", "o"], "--tensor-parallel: is not for --alternatives and"),
        ("2", ["discover", "m", "-o", "o", "--run-dir", "r"], "--tensor-parallel: is not for --run-dir, --stream"),
        ("2", ["discover", "m", "-o", "o", "--batch", "auto"], "--tensor-parallel: is not for --run-dir, --stream"),
    ],
)
def test_what_is_refused(world_size, words, line, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    assert main([*words, "--tensor-parallel"]) == 2
    assert capsys.readouterr().err.startswith(f"cna {words[0]}: {line}")


if __name__ == "__main__":
    found = run_all("two", sys.argv[1:], "--tensor-parallel")
    Path(f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    sys.exit(0)
