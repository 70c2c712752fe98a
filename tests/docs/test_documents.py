"""Every code block of README.md and docs/*.md runs as it is written, or is listed here with the reason why not.

The blocks of a document run in their order, in a directory that looks like the checkout and holds the files that the
examples name. A document's Python blocks share one namespace. All other blocks are commands for a shell.
"""

import ast
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from cna_kernels import Circuit
from cna_kernels.model import demo_checkpoint
from cna_kernels.model.cli import main
from cna_kernels.model.demo import world
from cna_kernels.model.evaluation.behaviour import Behaviour
from cna_kernels.model.prompts.corpus import Names, read_contrasts

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]

# How commands begin that are run here; and how others begin, with the reason why they are not run.
RUN = re.compile(r"(\.venv/bin/)?cna |make -C csrc|cc |export |(\w+=\S+ )?build/")
NOT_RUN = {
    "make demo": "installs; test_story.py and test_bundled.py run the demonstrations",
    "make test": "is what runs this",
    "torchrun --nproc-per-node=8": "test_lead.py, test_on_ranks.py and test_run_directory.py run up to 4 ranks",
    "cna discover --ray": "test_on_ray.py runs it, where ray is installed",
    "pip install": "needs a package index",
    "cna eval MODEL -c circuit.json --behaviour capitals": "the bundled vocabulary has no tokens for capitals",
    "cna matrix MODEL -o": "no token of the bundled model tells agreement; test_matrix.py runs other behaviours",
    "make reproduce-smollm2": "takes ten minutes; test_reproduce.py makes all tables of the bundled pair",
    "cna reproduce demo:smollm2": "takes ten minutes; test_reproduce.py makes all tables of the bundled pair",
    "cna matrix demo:smollm2": "takes minutes; test_story.py measures the same",
    ".venv/bin/cna matrix demo:smollm2": "takes minutes; test_story.py measures the same",
    ".venv/bin/cna run demo:smollm2": "needs the circuits of the command before",
    "cna lm-eval": "needs MMLU from the Hugging Face hub; test_lm_eval_model.py runs a task of its own",
    "cna run org/name": "needs the Hub; tests/model/hub run it on one of their own",
    "cna push": "needs the Hub; test_share.py runs it on one of its own",
    "cna pull": "needs the Hub; test_share.py runs it on one of its own",
    "cna discover MODEL --positive hf:": "needs the Hub; test_hub_sets.py runs it on one of its own",
    "vllm serve": "make test-engines runs it",
    "curl localhost": "needs the server; make test-engines asks it",
    "python convert_lora_to_gguf.py": "make test-engines runs it",
    "llama-server": "make test-engines runs it",
    "llama-completion": "make test-engines runs it",
    "cna export MODEL.gguf": "test_steered_gguf.py runs it",
}
# Text that stands for something of the reader's -> its replacement. MODEL and the like are files of `place`.
STANDS_FOR = {
    " ... ": " --positive p.txt --negative n.txt -o circuit.json ",
    'device="cuda"': 'device="cpu"',
}


class Block(NamedTuple):
    """A code block: its place, the word after its ``` ("" for an indented block), and its text."""

    document: str
    line: int
    language: str
    text: str

    @property
    def is_python(self):
        try:
            ast.parse(self.text)
        except SyntaxError:
            return self.language == "python"
        return self.language in ("python", "") and not self.is_json

    @property
    def is_json(self):
        return all(line.startswith("{") for line in self.text.splitlines())

    def commands(self):
        """The lines of a shell's block, continued ones joined."""
        return [line.strip() for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]


def blocks_of(document):
    lines, blocks, place = (ROOT / document).read_text(encoding="utf-8").splitlines(), [], 0
    while place < len(lines):
        start, line = place, lines[place]
        place += 1
        if line.startswith("```"):
            while lines[place] != "```":
                place += 1
            blocks.append(Block(document, start + 1, line[3:].strip(), "\n".join(lines[start + 1 : place])))
            place += 1
        elif line.startswith("    ") and (start == 0 or not lines[start - 1].strip()):
            while place < len(lines) and (lines[place].startswith("    ") or not lines[place].strip()):
                place += 1
            text = "\n".join(line[4:] for line in lines[start:place])
            blocks.append(Block(document, start + 1, "", text.rstrip()))
    return blocks


# Where the blocks run.


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The directory that csrc/Makefile builds in, shared by the documents."""
    return tmp_path_factory.mktemp("csrc")


@pytest.fixture
def place(tmp_path, library, monkeypatch):
    """A directory with what of the checkout the documents use, and every file that their examples name."""
    for name in ("cna_kernels", "model", "bench", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")  # with its files' times, by which make decides
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "csrc").symlink_to(library)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    instruct, base = demo_checkpoint("instruct"), demo_checkpoint("base")
    (tmp_path / "path" / "to").mkdir(parents=True)
    for name in ("MODEL", "INSTRUCT", "path/to/checkpoint", "Llama-3.2-1B-Instruct"):
        (tmp_path / name).symlink_to(instruct)
    for name in ("BASE", "Llama-3.2-1B"):
        (tmp_path / name).symlink_to(base)
    sides = world.discovery_positive()[:4], world.discovery_negative()[:4]
    measured = world.heldout_refusable()[:1], world.heldout_benign()[:1]
    (tmp_path / "demo-out").mkdir()
    for prompts, names in (
        (world.discovery_positive(), ["demo-out/positive.txt"]),
        (world.discovery_negative(), ["demo-out/negative.txt"]),
        (sides[0], ["refused.txt", "p.txt", "harmful-train.csv", "harmful-behaviors.csv", "all.txt"]),
        (sides[1], ["answered.txt", "n.txt", "benign-train.csv", "benign-behaviors.csv"]),
        (measured[0], ["harmful.txt", "harmful.csv"]),
        (measured[1], ["benign.csv", "harmless.txt"]),
    ):
        for name in names:
            header = "Goal\n" if name.endswith(".csv") else ""
            (tmp_path / name).write_text(header + "".join(f"{prompt}\n" for prompt in prompts))
    columns = zip(("positive", "negative"), sides, strict=True)
    records = [{"prompt": p, "columns": [f"{c}.{s}"]} for s, side in columns for p in side for c in ("refusal", "door")]
    (tmp_path / "behaviours.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    behaviour = {"behaviour": "mine", "positive": "p.txt", "negative": "n.txt", "measured": "harmful.txt"}
    (tmp_path / "mine.json").write_text(json.dumps(behaviour | {"measure": {"kind": "refusal"}}))
    (tmp_path / "wiki.txt").write_text("The lamp stands near the back door. " * 20)
    for name in ("test", "dev"):
        (tmp_path / "mmlu" / name).mkdir(parents=True)
        (tmp_path / "mmlu" / name / f"tools_{name}.csv").write_text("What polishes a lamp?,a cloth,a saw,ink,rope,A\n")
    neurons = ((3, 435, -3.6), (6, 956, 2.2), (7, 806, -1.5))
    for name in ("circuit.json", "a.json", "b.json", "c.json", "other.json"):
        Circuit(neurons, 8, 1024).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OPTIMIZE", "-O0")  # building takes a third of the time; test_csrc.py builds with optimisation
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def names_for(document):
    """The names that the Python blocks of a document use without defining them."""
    if document in ("docs/serving.md", "docs/walkthrough.md"):
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
    n_tokens, n_hidden, n_neurons = 4, 8, 16
    return {
        "input_ids": torch.arange(6).view(2, 3),
        "batch": {"input_ids": torch.arange(20, 44).view(4, 6)},
        "other": Circuit(((3, 435, -3.6), (6, 956, 2.2)), 8, 1024),
        "n_layers": 2,
        "n_neurons": n_neurons,
        "l": 1,
        "x": torch.randn(n_tokens, n_hidden),
        "w_gate_up": torch.randn(2 * n_neurons, n_hidden),
        "w_down": torch.randn(n_hidden, n_neurons),
        "token_weight": torch.rand(n_tokens, 2),
        "rows": torch.tensor([0, 1, -1, 0], dtype=torch.int32),
        "app": SimpleNamespace(middleware=lambda kind: lambda function: function),  # of FastAPI
        "circuit_a": Circuit(((0, 3, 1.0),), 2, n_neurons),
        "circuit_b": Circuit(((1, 5, 1.0),), 2, n_neurons),
    }


# How they run.


def run_command(command, exports):
    """Run a shell command. A plain `cna` command runs in this process, which has already loaded torch."""
    words = None if re.search(r"[$|<>;&`]", command) else shlex.split(command, comments=True)
    if words and words[0] in ("cna", ".venv/bin/cna"):
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed):
            try:
                status = main(words[1:])
            except SystemExit as error:
                status = error.code
        return status, printed.getvalue()
    script = "\n".join([*exports, command])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def run_block(block, names, exports):
    text = block.text
    for words, instead in STANDS_FOR.items():
        text = text.replace(words, instead)
    if block.is_python and re.search(r"^(from|import) (vllm|cna_kernels\.vllm)\b", text, re.MULTILINE):
        return  # needs vLLM: make test-engines runs these blocks
    if block.is_python:
        code = compile("\n" * block.line + text, str(ROOT / block.document), "exec")  # so that errors show its lines
        exec(code, names)
        return
    if block.language == "json":  # a behaviour: the only JSON that the documents show
        Path("behaviour.json").write_text(text)
        Behaviour.read("behaviour.json")
        return
    for command in block._replace(text=text).commands():
        if any(command.startswith(start) for start in NOT_RUN):
            continue
        assert RUN.match(command), f"{block.document}:{block.line}: run it or list it in {__file__}: {command}"
        if command.startswith("export "):
            exports.append(command)
        status, printed = run_command(command, exports)
        assert not status, f"{block.document}:{block.line}: {command}\n{printed}"


EVERYDAY = ("README.md",)  # the blocks of the other documents take minutes


@pytest.mark.parametrize(
    "document", [pytest.param(name, marks=() if name in EVERYDAY else pytest.mark.exhaustive) for name in DOCUMENTS]
)
def test_blocks_run(document, place):
    blocks = [block for block in blocks_of(document) if block.text not in SHOWN]
    shell = [command for block in blocks if not block.is_python for command in block.commands()]
    if any(re.match(r"make -C|cc ", command) for command in shell):
        missing = [name for name in ("make", "cc", "c++", "pkg-config") if not shutil.which(name)]
        if missing or "/" not in run_command("cc -print-file-name=libgomp.a", [])[1]:
            pytest.skip(f"not installed: {', '.join(missing) or 'the static OpenMP of GCC'}")
    names, exports = names_for(document), []
    for block in blocks:
        run_block(block, names, exports)


# Blocks that show text or data, and are not run.

LAYOUT, ANSWERS, RECORDS = "cna_kernels/   the ops", "prompt: ", '{"prompt": '
SHOWN = {
    block.text: block
    for document in DOCUMENTS
    for block in blocks_of(document)
    if block.text.startswith((LAYOUT, ANSWERS, RECORDS))
}


def shown(start):
    (text,) = (text for text in SHOWN if text.startswith(start))
    return text


def test_layout_names_folders_that_are_there():
    lines = [re.match(r"( *)((?:[\w/]+/ *)+)", line) for line in shown(LAYOUT).splitlines()]
    folders, parent = [], ""
    for indent, names in (line.groups() for line in lines):
        parent = parent if indent else names.split()[0]
        folders += [parent + name if indent else name for name in names.split()]
    assert len(folders) == 10 and all((ROOT / folder).is_dir() for folder in folders), folders


def test_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 180


def test_answers_of_the_demonstration_are_the_right_ones():
    prompt, plain, ablated = (line.partition(": ")[2] for line in shown(ANSWERS).splitlines())
    assert (plain, ablated) == (world.expected_refusal(prompt), world.expected_answer(prompt))


def test_records_of_the_contrast_file_are_read(tmp_path):
    (tmp_path / "shown.jsonl").write_text(shown(RECORDS) + "\n")
    entries = list(read_contrasts(tmp_path / "shown.jsonl", Names()))
    assert [[weight for _, weight, _ in entry.columns] for entry in entries] == [[1, 1], [1, 0.5]]


def test_every_reason_is_of_use():
    commands = [c for document in DOCUMENTS for block in blocks_of(document) for c in block.commands()]
    assert not [start for start in NOT_RUN if not any(command.startswith(start) for command in commands)]
