"""Prompt sets on a Hub on loopback: rows, columns and configurations; how little is downloaded; what errors say."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cna_kernels import Circuit
from cna_kernels.errors import InputError
from cna_kernels.model.prompts.files import file_and_column, read_prompts
from cna_kernels.model.prompts.formats import format_of
from cna_kernels.model.prompts.hub_sets import HubSet, hub_set
from hub_stub import ROOT, commands, running
from tiny import write_language_model

pytest.importorskip("datasets")
CONFIGS = """---
configs:
- config_name: a
  data_files: a.csv
- config_name: b
  data_files: b.csv
---
"""
SETS = {
    "hf:org/set:train": dict(split="train"),
    "hf:org/set:train:400": dict(split="train", rows=400),
    "hf:org/set:train:prompt": dict(split="train", column="prompt"),
    "hf:org/set:train:7:a b,2c": dict(split="train", rows=7, column="a b,2c"),
    "hf:org/set/en.v1:test": dict(split="test", config="en.v1"),
    "hf:org/set/en@v2:test:3": dict(split="test", config="en", revision="v2", rows=3),
    "hf:org/set@refs/convert/parquet:x": dict(split="x", revision="refs/convert/parquet"),
}
# Reads sets in one process and prints, for each, the texts and places, or the error.
CHILD = """
import json, sys
from cna_kernels.errors import InputError
from cna_kernels.model.prompts.files import iter_prompts, Label
results = []
for path, options in json.loads(sys.argv[1]):
    if "label" in options:
        options["label"] = Label.parse(options["label"])
    try:
        results.append(list(iter_prompts(path, **options)))
    except InputError as error:
        results.append(str(error))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub():
    rows = [json.dumps({"prompt": f"q{n}", "goal": f"g{n}", "toxic": n % 2}) for n in range(1000)]
    with running() as hub:
        hub.add("org/lines", {"train.jsonl": "\n".join(rows).encode()}, "datasets")
        configs = {"a.csv": b"prompt\na1\na2\n", "b.csv": b"prompt\nb1\n", "README.md": CONFIGS.encode()}
        hub.add("org/configs", configs, "datasets")
        parts = {f"data/train-0000{n}-of-00003.parquet": parquet(n * 1000) for n in range(3)}
        hub.add("org/parquet", parts, "datasets")
        hub.add("org/gated", {"train.csv": b"prompt\na\n"}, "datasets", files_fault=(403, "GatedRepo"))
        hub.add("org/code", {"code.py": b"raise SystemExit('run')"}, "datasets")
        yield hub


def parquet(start):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pq.write_table(pa.table({"text": [f"t{n}" for n in range(start, start + 1000)]}), file)
    return file.getvalue()


def child(hub, home, code, *arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    kept |= dict(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
    kept |= dict(no_proxy="*", PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**kept, **environment}, cwd=home, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1] if done.stdout else ""


def read(hub, home, *wanted, **environment):
    """What iter_prompts makes of (path, options)."""
    return json.loads(child(hub, home, CHILD, json.dumps(wanted), **environment))


@pytest.mark.parametrize("text", SETS)
def test_names_of_sets(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = hub_set(text)
    assert found == HubSet("org/set", **SETS[text])
    assert text.startswith(str(found)) and hub_set(str(found)).split == found.split
    assert hub_set(Path(text)) == found and format_of(text) == "hub"
    assert file_and_column(text) == (Path(text), SETS[text].get("column"))
    Path("hf:org").mkdir()
    for part in ("p.txt", "hf:org", "org/set:train", "./hf:org/set:train"):
        assert hub_set(part) is None
    if "/" not in text.removeprefix("hf:org/"):
        Path(text).write_text("a local file\n")  # what exists is a file
        assert hub_set(text) is None and read_prompts(text).texts == ("a local file",)


OTHER_FORMS = ["hf:set:train", "hf:org/set", "hf:org/set:", "hf:org/set:train[:4]", "hf:a/b/c/d:train", "hf:/etc/x:y"]
OTHER_FORMS += [f"hf:org/set:train:{end}" for end in ("0", "4:5", "4:5:6", "a:4", "")]


@pytest.mark.parametrize("text", OTHER_FORMS)
def test_names_of_another_form(text):
    with pytest.raises(InputError, match=r"expected hf:org/set:split, hf:org/set/config:split or"):
        read_prompts(text)


def test_rows(hub, tmp_path):
    """Columns, labels, configurations and rows; every prompt has its place; of several files the first is read."""
    hub.requests.clear()
    first, goal, own, toxic, other, limited, config, piece = read(
        hub, tmp_path, ("hf:org/lines:train:3", {}), ("hf:org/lines:train:2", {"column": "goal"}),
        ("hf:org/lines:train:1:goal", {"column": "prompt"}),
        ("hf:org/lines:train:4:prompt", {"label": "toxic"}), ("hf:org/lines:train:4:prompt", {"label": "toxic=0"}),
        ("hf:org/lines:train", {"limit": 2}), ("hf:org/configs/b:train", {}), ("hf:org/parquet:train:400", {}),
    )  # fmt: skip
    assert first == [[f"q{n}", f"hf:org/lines:train: row {n}: prompt"] for n in range(3)]
    assert [text for text, _ in goal] == ["g0", "g1"] and [text for text, _ in own] == ["g0"]
    assert [text for text, _ in toxic] == ["q1", "q3"] and [text for text, _ in other] == ["q0", "q2"]
    assert toxic[1][1] == "hf:org/lines:train: row 3: prompt"
    assert [text for text, _ in limited] == ["q0", "q1"]
    assert config == [["b1", "hf:org/configs/b:train: row 0: prompt"]]
    assert [text for text, _ in piece] == [f"t{n}" for n in range(400)]
    assert {name for name in hub.downloaded if name.endswith("parquet")} == {"train-00000-of-00003.parquet"}


@pytest.mark.exhaustive
def test_errors(hub, tmp_path):
    (tmp_path / "org" / "local").mkdir(parents=True)
    wanted = {
        "hf:org/configs:train": "pick one among the available configs: ['a', 'b']; name one: hf:org/set/config:split",
        "hf:org/configs/c:train": "'c' not found. Available: ['a', 'b']",
        "hf:org/lines:valid": "Available splits: ['train']",
        "hf:org/lines@nowhere:train": "Revision 'nowhere' doesn't exist",
        "hf:org/none:train": "doesn't exist on the Hub or cannot be accessed. A private or gated one takes a login",
        "hf:org/gated:train": "is a gated dataset",
        "hf:org/code:train": "Dataset scripts are no longer supported",
        "hf:org/local:train": "the folder org/local here would be read in its place",
        "hf:org/lines:train:2:nothing": "row 0: has no column 'nothing' (it has prompt, goal, toxic)",
    }
    found = read(hub, tmp_path, *((path, {}) for path in wanted))
    for (path, said), error in zip(wanted.items(), found, strict=True):
        name = path.removesuffix(":2:nothing")
        assert isinstance(error, str) and error.startswith(f"{name}: ") and said in error and "\n" not in error, error
    (lost,) = read(hub, tmp_path, ("hf:org/lines:train", {}), HF_ENDPOINT="http://127.0.0.1:9")
    assert isinstance(lost, str) and lost.startswith("hf:org/lines:train: "), lost


def test_offline_the_prepared_copy_is_read(hub, tmp_path):
    wanted = ("hf:org/lines:train:2", {}), ("hf:org/lines@main:train", {})
    fresh, _ = read(hub, tmp_path, *wanted, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set, and there is no prepared copy; datasets.load_dataset('org/lines') online" in fresh
    child(hub, tmp_path, "import datasets; datasets.load_dataset('org/lines')")
    hub.requests.clear()
    found, pinned = read(hub, tmp_path, *wanted, HF_HUB_OFFLINE="1")
    assert [text for text, _ in found] == ["q0", "q1"] and not hub.requests
    assert pinned == "hf:org/lines@main:train: HF_HUB_OFFLINE is set, and offline the revision of a copy is not known"


def test_a_discovery_on_two_sets(hub, tmp_path):
    """The command line: --column, and one line where a set is none; the circuit has counts and hashes as for files."""
    write_language_model(tmp_path / "m")
    sets = ["--positive", "hf:org/lines:train:8", "--negative", "hf:org/parquet:train:9:text", "--column", "goal"]
    done, bad = commands(
        hub, tmp_path, ["discover", "m", *sets, "--no-universal", "--top-k", "5", "-o", "c.json"],
        ["run", "m", "--prompts", "hf:org/none:train", "--column", "x"],
    )  # fmt: skip
    assert done[0] == 0, done
    prompts = Circuit.load(tmp_path / "c.json").prompts
    assert (prompts["positive"]["count"], prompts["negative"]["count"]) == (8, 9)
    assert bad[0] == 2 and bad[2].startswith("cna run: hf:org/none:train: Dataset 'org/none' doesn't exist")


def test_without_datasets(monkeypatch):
    monkeypatch.setattr("cna_kernels.model.packages.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'datasets: not installed: pip install "cna-kernels\[datasets\]"'):
        read_prompts("hf:org/set:train")


def test_versions_that_run_code_are_refused(monkeypatch):
    monkeypatch.setattr("datasets.__version__", "3.6.0")
    with pytest.raises(InputError, match=r"datasets: datasets 3.6.0 may run code of a data set; 4 and later run none"):
        read_prompts("hf:org/set:train")
