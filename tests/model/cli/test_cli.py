"""The command line: exit codes, one line for bad input, nothing half-written, and help that answers at once."""

import json
import os
import subprocess
import sys
import time

import pytest

from cna_kernels import Circuit
from cna_kernels.model import load
from cna_kernels.model.cli import main
from cna_kernels.model.cli.console import cell
from tiny import write_language_model

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_language_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture
def files(tmp_path, checkpoint):
    (tmp_path / "positive.txt").write_text("open it\nwhy not\nx\n")
    (tmp_path / "negative.csv").write_text("prompt,n\nclose,1\nyes,2\n")
    return tmp_path


def discover(checkpoint, files, *more, output="c.json"):
    sides = ["--positive", str(files / "positive.txt")]
    sides += [] if "--negative" in more else ["--negative", str(files / "negative.csv")]
    return main(["discover", checkpoint, *sides, "-o", str(files / output), *map(str, more)])


def test_discover_show_run(checkpoint, files, capsys):
    assert discover(checkpoint, files, "--top-k", 5) == 0
    captured = capsys.readouterr()
    assert "neurons per layer" in captured.out and "top neurons" in captured.out and "universal filter" in captured.out
    assert "29/29" in captured.err and "29 prompts in" in captured.err and "wrote" in captured.err
    circuit = Circuit.load(files / "c.json")
    assert circuit.k == 5

    assert main(["show", str(files / "c.json")]) == 0
    assert f"{circuit.neurons[0][2]:+.4f}" in capsys.readouterr().out

    run = ["run", checkpoint, "-c", str(files / "c.json"), "-m", "0,2", "-p", "hi", "-p", "you", "--json"]
    assert main([*run, "--max-new-tokens", "4"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [r["prompt"] for r in results] == ["hi", "you"]
    assert [a["multiplier"] for a in results[0]["answers"]] == [None, 0.0, 2.0]
    assert main(["run", checkpoint, "-p", "hi", "--max-new-tokens", "4"]) == 0
    assert "unsteered" in capsys.readouterr().out


def test_run_puts_every_answer_where_it_belongs(checkpoint, files, capsys):
    """Each answer is the model's answer to its prompt alone, at its multiplier."""
    model = load(checkpoint)
    circuit = Circuit(tuple((layer, index, 1.0) for layer in range(3) for index in range(0, 48, 3)), 3, 48)
    circuit.save(files / "c.json")
    prompts = ["hi", "you", "what is it"]
    words = [word for prompt in prompts for word in ("-p", prompt)]
    run = ["run", checkpoint, "-c", str(files / "c.json"), "-m", "0,4", *words, "--max-new-tokens", "6"]
    assert main([*run, "--any-model", "--json"]) == 0
    for result, prompt in zip(json.loads(capsys.readouterr().out), prompts, strict=True):
        expected = [model.generate(prompt, max_new_tokens=6)]
        expected += [model.generate(prompt, circuit=circuit, multiplier=m, max_new_tokens=6) for m in (0.0, 4.0)]
        assert result["prompt"] == prompt and [answer["text"] for answer in result["answers"]] == expected
        assert len(set(expected)) == 3, "the multipliers must show"


def test_json_output_is_the_circuit(checkpoint, files, capsys):
    assert discover(checkpoint, files, "--top-k", 5, "--json", "--score", "magnitude", "--no-universal") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((files / "c.json").read_text())


PUBLIC = {"neurons": {"5,-1,30": 0.5, "2,11,4": -2.0}, "total_logit_diff": 1.5}


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        ({"target_token": " no", "prompt": "How?\x1b[31m [red]"}, ["target token: ' no'", "[31m [red]"]),
        ({"target_token": "", "prompt": ""}, []),  # as cna export writes it
        ({"prompt": 7}, []),
        ({}, []),
    ],
)
def test_show_of_the_public_codes_json(tmp_path, capsys, more, shown):
    """The model's shape is not in the file: no total, no share of the model's neurons, and no filter is made up."""
    path = tmp_path / "public.json"
    path.write_text(json.dumps(PUBLIC | more))
    assert main(["show", str(path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "shape is not in the file; assumed is the smallest that fits, 6 layers of 31 neurons" in out
    assert "2 neurons, score abs-delta" in out and "-2.0000" in out and "universal filter: not known" in out
    assert "of 186" not in out and "filter: off" not in out and "\x1b" not in out
    assert [name in out for name in ("target token", "prompt:")] == [bool(shown)] * 2
    assert all(text in out for text in shown)

    assert main(["show", str(path), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["n_layers"] == 6
    assert "n_layers, n_neurons: not in JSON of the public code; written is the smallest that fits" in captured.err


def test_show_of_a_circuit_file_has_its_total(checkpoint, files, capsys):
    assert discover(checkpoint, files, "--top-k", 5, "--no-universal") == 0
    capsys.readouterr()
    assert main(["show", str(files / "c.json")]) == 0
    out, err = capsys.readouterr()
    assert "5 of 144 neurons (3.47%)" in out and "universal filter: off" in out and "smallest" not in out + err


def test_show_of_a_union_says_what_is_not_known(tmp_path, capsys):
    one, other = (Circuit(((0, n, 1.0),), 2, 8, model={"name": "m"}, dtype=kind) for n, kind in ((1, "a"), (2, "b")))
    (one | other).save(tmp_path / "c.json")
    assert main(["show", str(tmp_path / "c.json")]) == 0
    out = capsys.readouterr().out
    assert "union of 2 circuits\nuniversal filter: not known\nfound in 'm', dtype unknown, position: unknown" in out


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ops on cpu"] in ("reference", "cpu") and facts["backend reference on cpu"] == "available"
    assert any(name.startswith("gated_mlp on") and "gemv" in value for name, value in facts.items())
    if facts["ops on cpu"] == "cpu":
        assert "generic" in facts["CPU engine"]
        assert any("linear on cpu, bfloat16, T >= 1" in name and "csrc" in text for name, text in facts.items())


BAD = {
    "--top-k": (["--top-k", "0"], "top_k: expected 1 to 144"),
    "--top-k above": (["--top-k", "145"], "top_k: expected 1 to 144"),
    "--fraction": (["--fraction", "0"], "fraction: expected above 0 and at most 1, got 0.0"),
    "--fraction nan": (["--fraction", "nan"], "fraction: expected above 0 and at most 1"),
    "--skip-layers": (["--skip-layers", "x"], "--skip-layers: expected layers such as 0,1"),
    "--skip-layers above": (["--skip-layers", "3"], "skip_layers: expected 0 to 2, got 3"),
    "--universal-prompts": (["--universal-prompts", "nowhere.txt"], "nowhere.txt: No such file or directory"),
    "--column": (["--column", "Goal"], "negative.csv:2: has no column 'Goal'"),
    "--device": (["--device", "quantum"], "device: expected one of cpu, cuda, mps, xpu, got 'quantum'"),
    "--score": (["--score", "cohen-d", "--limit", "1"], "score: cohen-d needs at least two prompts in each set"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_2(checkpoint, files, capsys, name):
    options, message = BAD[name]
    assert discover(checkpoint, files, *options) == 2
    captured = capsys.readouterr()
    last = [line for line in captured.err.splitlines() if line.startswith("cna ")]
    assert captured.out == "" and len(last) == 1 and message in last[0], captured.err
    assert "Traceback" not in captured.err and not (files / "c.json").exists()


def test_columns_and_limits_are_for_the_files_they_fit(checkpoint, files, capsys):
    (files / "negative.csv").write_text("Goal,n\nclose,1\nyes,2\n")
    assert discover(checkpoint, files, "--column", "Goal", "--top-k", "5", "--limit", "2") == 0
    circuit = Circuit.load(files / "c.json")
    assert circuit.prompts["positive"]["count"] == 2 and circuit.universal["prompts"] == 24
    (files / "negative.csv").unlink()
    plain = ["--negative", str(files / "positive.txt"), "--column", "Goal"]
    assert discover(checkpoint, files, *plain) == 2
    assert "--column: is for .jsonl, .ndjson, .jsonlines, .json, " in capsys.readouterr().err


def test_no_file_that_is_read_is_overwritten(checkpoint, files, capsys):
    before, path = (files / "positive.txt").read_bytes(), str(files / "positive.txt")
    assert main(["discover", str(checkpoint), "--positive", path, "--negative", path, "-o", path]) == 2
    assert "--output: " in (said := capsys.readouterr().err) and "is a file that the command reads" in said
    assert (files / "positive.txt").read_bytes() == before


def test_answers_are_shown_as_they_are():
    """Spaces and joiners of all scripts stay; what could move the cursor or turn text around does not."""
    shown = {"a\tb": "a   b", "a\u00a0b\u3000c": "a\u00a0b\u3000c", "\u0928\u200d": "\u0928\u200d", "a\nb": "a\nb"}
    for text, expected in shown.items():
        assert str(cell(text)) == expected
    for character in "\x1b\x07\r\x9b\u202e\u2066\x00":
        assert str(cell(f"a{character}b")) == "a\ufffdb"


def test_negative_multipliers_need_no_equals_sign(checkpoint, files, capsys):
    assert discover(checkpoint, files, "--top-k", 5) == 0
    capsys.readouterr()
    for flag in ("-m", "--multiplier"):
        run = ["run", checkpoint, "-c", str(files / "c.json"), flag, "-1,0", "-p", "hi", "--json"]
        assert main([*run, "--max-new-tokens", "2"]) == 0
        answers = json.loads(capsys.readouterr().out)[0]["answers"]
        assert [answer["multiplier"] for answer in answers] == [None, -1.0, 0.0]


def test_text_from_a_circuit_file_is_no_markup(checkpoint, files, capsys):
    assert discover(checkpoint, files, "--top-k", 5) == 0
    record = json.loads((files / "c.json").read_text()) | {"score": "[/bold]\x1b[31m", "preset": "[red]x"}
    (files / "c.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert main(["show", str(files / "c.json")]) == 0
    out = capsys.readouterr().out
    assert "[/bold]\\x1b[31m" in out and "[red]x" in out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no full device")
def test_a_full_stdout_is_one_line(checkpoint):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "cna_kernels.model", "doctor"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "No space left" in result.stderr


def test_unwritable_output_is_refused_before_the_work(checkpoint, files, capsys):
    assert discover(checkpoint, files, output="missing/c.json") == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "missing/c.json: cannot be written: no directory" in captured.err
    assert discover(checkpoint, files, output=".") == 2
    assert "is a directory" in capsys.readouterr().err
    sides = ["--positive", str(files / "positive.txt"), "--negative", str(files / "negative.csv")]
    assert main(["discover", checkpoint, *sides, "-o", "-"]) == 2
    assert "--output: expected a file; --json prints the circuit on stdout" in capsys.readouterr().err


def test_bad_files(checkpoint, files, capsys):
    (files / "positive.txt").write_text("")
    assert discover(checkpoint, files) == 2
    assert "positive.txt: holds no prompt" in capsys.readouterr().err
    for arguments, message in (
        (["show", "nowhere.json"], "nowhere.json: No such file"),
        (["run", "nowhere", "-p", "x"], "nowhere: is neither a directory with a checkpoint nor a .gguf file"),
        (["run", checkpoint], "prompts: give either -p TEXT or --prompts FILE"),
        (["run", checkpoint, "-p", ""], "--prompt[0]: expected a prompt"),
        (["run", checkpoint, "-p", "x", "-m", "nan", "-c", "c"], "multiplier: expected a finite number, got nan"),
        (["run", checkpoint, "-p", "x", "-m", "a"], "--multiplier: expected numbers such as"),
        (["run", checkpoint, "-p", "x" * 80], "--prompt[0]: has"),
        (["run", "demo:other", "-p", "x"], "expected one of instruct, base, smollm2, got 'other'"),
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and message in captured.err, captured.err


def test_a_circuit_of_another_model(checkpoint, files, capsys, tmp_path_factory):
    assert discover(checkpoint, files, "--top-k", 5) == 0
    other = str(write_language_model(tmp_path_factory.mktemp("other"), seed=1))
    arguments = ["run", other, "-c", str(files / "c.json"), "-p", "hi", "--max-new-tokens", "2"]
    capsys.readouterr()
    assert main(arguments) == 2
    assert "sha256: made for another model: found in" in capsys.readouterr().err
    assert main([*arguments, "--any-model"]) == 0
    wider = str(write_language_model(tmp_path_factory.mktemp("wider"), intermediate_size=50))
    assert main(["run", wider, *arguments[2:], "--any-model"]) == 2
    assert "c.json: n_neurons: made for another model: expected 50, got 48" in capsys.readouterr().err


def test_absent_backend_from_the_environment(checkpoint, files, capsys, monkeypatch):
    monkeypatch.setenv("CNA_BACKEND", "gpu")
    assert discover(checkpoint, files) == 2
    assert "CNA_BACKEND: expected one of reference, cpu, triton, got 'gpu'" in capsys.readouterr().err


def test_usage_errors_are_one_line(capsys):
    for arguments in ([], ["discover"], ["nothing"], ["discover", "m", "--top-k", "x"], ["run", "m", "--batch", "0"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        captured = capsys.readouterr()
        assert caught.value.code == 2 and captured.err.count("\n") == 1 and captured.err.startswith("cna")


def test_interrupt_leaves_nothing(checkpoint, files, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cna_kernels.model.discovery.collect.forward", interrupt)
    assert discover(checkpoint, files) == 130
    assert "interrupted" in capsys.readouterr().err and not (files / "c.json").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["discover", "--help"], ["run", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    program = (
        "import sys\n"
        "from cna_kernels.model.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'triton', 'numpy', 'rich', 'tokenizers', 'jinja2'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\n"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]" and "usage: cna" in result.stdout
    assert time.perf_counter() - start < 10  # finds a hang; tests do not measure speed
    if arguments[0] == "discover":
        assert "examples:" in result.stdout


def test_import_of_the_package_is_light():
    program = "import cna_kernels, sys; print(sorted({'torch', 'triton'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    program = (
        "import cna_kernels.ops, cna_kernels.select, cna_kernels.steering, sys\n"
        "print([m for m in sys.modules if m.startswith(('transformers', 'cna_kernels.model'))])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_sign(checkpoint, files, capsys):
    """--sign steers one half of a circuit, as that half alone does."""
    assert discover(checkpoint, files, "--top-k", 6, "--no-universal") == 0
    circuit = Circuit.load(files / "c.json")
    circuit.positive().save(files / "half.json")
    assert 0 < circuit.positive().k < 6
    run = ["run", str(checkpoint), "-p", "x", "-m", "-400", "--max-new-tokens", "8", "--json"]
    capsys.readouterr()
    texts = []
    for words in (["-c", "c.json"], ["-c", "half.json"], ["-c", "c.json", "--sign", "positive"]):
        words[1] = str(files / words[1])
        assert main([*run, *words]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[2] == texts[1] != texts[0]
    assert main([*run, "-c", str(files / "half.json"), "--sign", "negative"]) == 2
    assert "half.json: sign: no neuron of the circuit has a negative contrast" in capsys.readouterr().err
