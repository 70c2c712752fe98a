"""Runs that survive: resume, torchrun, kills at any time; foreign, damaged and missing parts are refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cna_kernels import InputError
from cna_kernels.model.cli import main
from cna_kernels.model.discovery import job, parts
from cna_kernels.model.discovery.parts import merged, read_part, write_part
from cna_kernels.model.discovery.run_directory import RunDirectory
from tiny import write_language_model

pytest.importorskip("transformers")
N_PROMPTS, UNIT = 40, 4


@pytest.fixture(autouse=True)
def threads():
    """Restore the number of threads: --threads sets it for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model and two prompt files."""
    directory = tmp_path_factory.mktemp("model")
    write_language_model(directory, intermediate_size=200)
    for name in ("positive", "negative"):
        lines = [f"{name[: 1 + number % 7]} {number * number}" for number in range(N_PROMPTS // 2)]
        (directory / f"{name}.txt").write_text("\n".join(lines))
    return directory


def command(files, out, *more):
    usual = {"--positive": files / "positive.txt", "--negative": files / "negative.txt", "-o": out, "--top-k": 15}
    usual |= {"--bootstrap": 5, "--unit": UNIT, "--threads": 1}
    words = [word for pair in usual.items() if pair[0] not in more for word in pair]
    return [str(word) for word in ("discover", files, *words, "--no-universal", "--no-template", *more)]


@pytest.fixture(scope="module")
def finished(files):
    """A run that one worker has finished, and its circuit's bytes."""
    run = files / "finished"
    assert main(command(files, files / "finished.json", "--run-dir", run)) == 0
    return run, (files / "finished.json").read_bytes()


def test_a_run_gives_the_circuit_of_a_plain_discovery(files, finished, tmp_path, capsys):
    """The same neurons and facts; contrasts differ in rounding, since a run keeps squares and sums in fp64 for them."""
    assert main(command(files, tmp_path / "plain.json")) == 0
    plain, run = json.loads((tmp_path / "plain.json").read_bytes()), json.loads(finished[1])
    contrasts = [torch.tensor([contrast for *_, contrast in each.pop("neurons")]) for each in (plain, run)]
    torch.testing.assert_close(*contrasts, rtol=1e-5, atol=1e-7)
    means = [torch.tensor(each.pop("positive_mean")) for each in (plain, run)]
    torch.testing.assert_close(*means, rtol=1e-5, atol=1e-7)
    places = [
        [pair for *pair, _ in json.loads(text)["neurons"]]
        for text in ((tmp_path / "plain.json").read_bytes(), finished[1])
    ]
    assert places[0] == places[1]
    assert {name for name in plain if plain[name] != run[name]} <= {"folds"}, "the folds' shares of the contrast"
    assert main(["status", str(finished[0]), "--json"]) == 0
    output = capsys.readouterr().out
    status = json.loads(output[output.rindex('{\n  "model"') :])
    assert status["units_done"] == status["units"] == 10 and status["prompts_done"] == N_PROMPTS
    assert status["part_bytes"] == sum(part.stat().st_size for part in (finished[0] / "parts").iterdir())
    assert main(["status", str(finished[0])]) == 0
    assert "10 of 10 done" in capsys.readouterr().out


def test_status_tells_when_parts_came_and_how_fast(finished, tmp_path, capsys):
    run, now = tmp_path / "run", time.time()
    shutil.copytree(finished[0], run)
    parts = sorted((run / "parts").iterdir())
    for part in parts[4:]:
        part.unlink()
    for number, part in enumerate(parts[:4]):  # written every 10 seconds, the last one 100 seconds ago
        os.utime(part, (now - 130 + 10 * number,) * 2)
    status = RunDirectory.open(run).status()
    assert (status["units_done"], status["prompts_done"], status["prompts"]) == (4, 4 * UNIT, N_PROMPTS)
    assert status["last_part_s"] == pytest.approx(100, abs=5)
    assert (status["prompts_per_s"], status["eta_s"]) == (UNIT / 10, (N_PROMPTS - 4 * UNIT) / (UNIT / 10))
    assert main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "4 of 10 done" in shown and "0.4 prompts/s" in shown and "60 s" in shown
    for part in parts[:4]:
        part.unlink()
    status = RunDirectory.open(run).status()
    assert (status["units_done"], status["last_part_s"], status["prompts_per_s"], status["eta_s"]) == (0,) + (None,) * 3


def test_merging_again_changes_nothing_and_other_settings_need_no_new_pass(files, finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    monkeypatch.setattr("cna_kernels.model.discovery.collect.forward", None)  # nothing may run
    assert main(command(files, tmp_path / "again.json", "--run-dir", run)) == 0
    assert (tmp_path / "again.json").read_bytes() == finished[1]
    other = command(files, tmp_path / "other.json", "--run-dir", run, "--score", "magnitude", "--top-k", "3")
    assert main(other) == 0
    assert json.loads((tmp_path / "other.json").read_text())["k"] == 3


def test_missing_units_are_run_again(files, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    parts = sorted((run / "parts").iterdir())
    before = [part.read_bytes() for part in parts]
    for part in parts[::3]:
        part.unlink()
    with pytest.raises(InputError, match="4 of 10 units are not done"):
        merged(RunDirectory.open(run))
    assert main(command(files, tmp_path / "c.json", "--run-dir", run)) == 0
    assert (tmp_path / "c.json").read_bytes() == finished[1]
    assert [part.read_bytes() for part in parts] == before, "a part has the same bytes, whoever writes it"


def test_stream_layers_in_a_run(files, finished, tmp_path):
    assert main(command(files, tmp_path / "c.json", "--run-dir", tmp_path / "run", "--stream-layers")) == 0
    assert (tmp_path / "c.json").read_bytes() == finished[1]


OTHER_RUNS = [
    (["--dtype", "bfloat16"], "dtype: belongs to another run: it has 'float32', this one 'bfloat16'"),
    (["--limit", "10"], "corpus.sha256: belongs to another run"),
    (["--position", "all"], "position: belongs to another run"),
    (["--bootstrap", "6"], "bootstrap: belongs to another run: it has 5, this one 6"),
    (["--seed", "6"], "seed: belongs to another run"),
    (["--batch", "3"], "batch: belongs to another run: it has None, this one 3"),
    (["--unit", "5"], "corpus.sha256: belongs to another run"),
    (["--threads", "2"], "threads: belongs to another run: it has 1, this one 2"),
]


@pytest.mark.parametrize(("more", "message"), OTHER_RUNS, ids=lambda value: str(value[0]).strip("-"))
def test_two_runs_in_one_directory(files, finished, tmp_path, capsys, more, message):
    assert main(command(files, tmp_path / "c.json", "--run-dir", finished[0], *more)) == 2
    error = capsys.readouterr().err
    assert f"manifest.json: {message}" in error and not (tmp_path / "c.json").exists()


def test_a_run_that_was_begun_before_sums_were_fp64(files, finished, tmp_path, capsys):
    """Its parts keep squares from fp32, whose variances are not those of this version: it is not gone on with."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest.pop("sums") == "fp64"
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert main(command(files, tmp_path / "c.json", "--run-dir", run)) == 2
    assert "manifest.json: sums: belongs to another run" in capsys.readouterr().err


def test_a_manifest_of_another_model(files, finished, tmp_path, capsys):
    other = tmp_path / "other"
    write_language_model(other, intermediate_size=200, seed=7)
    words = command(files, tmp_path / "c.json", "--run-dir", finished[0])
    assert main([words[0], str(other), *words[2:]]) == 2
    assert "manifest.json: model.name: belongs to another run" in capsys.readouterr().err


def test_directories_that_are_no_run(files, tmp_path, capsys):
    for path, content, message in (
        ("nowhere", None, "is no run directory: it has no manifest.json"),
        ("empty", "", "is not JSON"),
        ("old", '{"format": 0}', "manifest.json: format: expected 1, got 0"),
        ("short", '{"format": 1}', "manifest.json: model: is missing"),
        ("other", '{"format": 1, "model": {"name": 5}}', "manifest.json: model.name: expected text, got 5"),
    ):
        if content is not None:
            (tmp_path / path).mkdir()
            (tmp_path / path / "manifest.json").write_text(content)
        assert main(["status", str(tmp_path / path)]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(command(files, tmp_path / "c.json", "--run-dir", tmp_path / "file")) == 2
    assert "file: is not a directory" in capsys.readouterr().err


BAD_MANIFESTS = {
    "threads: expected a whole number from 1 to": ("threads", 0),
    "corpus: expected a JSON object, got 3": ("corpus", 3),
    "corpus.file: expected a file beside the manifest, got '../prompts'": ("corpus.file", "../prompts"),
    "corpus.sha256: is missing": ("corpus.sha256", ...),
    "corpus.n_prompts: expected a whole number from 0 to": ("corpus.n_prompts", -1),
    "corpus.columns[1]: expected names, got 7": ("corpus.columns", ["positive", 7]),
    "corpus.units[0]: expected [first, number of prompts, offset, sha256], got [0, True, 0,": (
        "corpus.units", [[0, True, 0, "hash"]],
    ),
    "corpus.count.0: expected a whole number from 0 to": ("corpus.count", {"0": 1.5}),
    "corpus.weight.0: expected a number from 0 to 1e+300, got nan": ("corpus.weight", {"0": float("nan")}),
    "corpus.weight.1: expected a number from 0 to 1e+300, got inf": ("corpus.weight", {"1": float("inf")}),
    "corpus.weight.2: expected a number from 0 to 1e+300, got 1000": ("corpus.weight", {"2": 10**400}),
    "corpus.digests: expected a JSON object, got []": ("corpus.digests", []),
}  # fmt: skip


@pytest.mark.parametrize(("message", "change"), BAD_MANIFESTS.items())
def test_manifests_that_are_not_as_written(finished, message, change):
    manifest = json.loads((finished[0] / "manifest.json").read_text())
    *folders, name = change[0].split(".")
    record = manifest[folders[0]] if folders else manifest
    assert name in record
    del record[name]
    if change[1] is not ...:
        record[name] = change[1]
    with pytest.raises(InputError, match=re.escape(f"manifest.json: {message}")):
        RunDirectory(finished[0], manifest)


def test_damaged_and_foreign_parts_are_refused(files, finished, tmp_path):
    def refused(message):
        with pytest.raises(InputError, match=message):
            merged(RunDirectory.open(run))

    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    part = run / "parts" / "000003.safetensors"
    whole = part.read_bytes()
    for damage, message in (
        (whole[:-9], "000003.safetensors: is no part of a run"),
        (
            whole[:-9] + bytes(9),
            "000003.safetensors: is damaged.*; delete it, and the same command runs",
        ),
        (whole.replace(b'\\"n_tokens\\": ', b'\\"n_tokens\\":1'), "000003.safetensors: is damaged"),
        ((run / "parts" / "000004.safetensors").read_bytes(), "holds unit 4, its name says 3"),
        (b"", "000003.safetensors: is no part of a run"),
    ):
        assert damage != whole
        part.write_bytes(damage)
        refused(message)
    assert main(command(files, tmp_path / "c.json", "--run-dir", tmp_path / "other", "--bootstrap", "4")) == 0
    shutil.copy(tmp_path / "other" / "parts" / part.name, part)
    refused("000003.safetensors: belongs to another run than")
    part.write_bytes(whole)
    (run / "parts" / "000010.safetensors").write_bytes(whole)
    refused("000010.safetensors: is no part of this run")
    (run / "parts" / "000010.safetensors").rename(run / "parts" / ".cna-0.tmp")  # left by a killed writer
    merged(RunDirectory.open(run))


def written(path, change):
    """Write a part again with changed facts or tensors, and the hash that belongs to them."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["part"])["facts"]
    facts, tensors = change(facts, tensors) or (facts, tensors)
    record = json.dumps({"facts": facts, "sha256": parts._hash(facts, tensors)}, sort_keys=True)
    save_file(tensors, path, metadata={"part": record})


def facts(**changes):
    return lambda facts, tensors: (facts | changes, tensors)


def slot(facts):
    return next(iter(facts["counts"]))


HEADER = [  # what `cna status` sees, too
    (facts(n_prompts=3), "n_prompts: expected 4 with those skipped, as the manifest says, got 3"),
    (facts(n_prompts=10**400), "n_prompts: expected a whole number"),
    (facts(n_tokens=None), "n_tokens: expected a whole number"),
    (facts(counts=[1]), "counts: expected a JSON object"),
    (facts(counts={"x": 1.0}), "x: is no number of a sum"),
    (facts(counts={}), "is no sum of this run"),
    (facts(n_left_out={"0": -1}), "expected a whole number"),
    (facts(skipped=[1]), "skipped.0.: expected reasons"),
    (facts(n_universal=2), "'universal': is missing"),
    (lambda f, t: (f | {"counts": f["counts"] | {"77": 1.0}}, t), "'total.77': is missing"),
    (lambda f, t: (f, t | {"more": torch.zeros(1, dtype=torch.float64)}), "'more': is no sum of this run"),
    (lambda f, t: (f, {n: x.T.contiguous() for n, x in t.items()}), r"expected F64 \[3, 200\], got F64 \[200, 3\]"),
    (lambda f, t: (f, {n: x.to(torch.int64) for n, x in t.items()}), r"expected F64 \[3, 200\], got I64"),
    (lambda f, t: (f, {n: x.float() for n, x in t.items()}), "dtype: expected F64 or I64, got 'F32'"),
    (lambda f, t: (f, {n: x for n, x in t.items() if "sq" not in n}), "'total_sq.0': is missing"),
]
VALUES = [
    (lambda f, t: (f, t | {f"total.{slot(f)}": t[f"total.{slot(f)}"] * torch.nan}), "holds infinities or NaN"),
    (lambda f, t: (f | {"counts": {n: 5 * c for n, c in f["counts"].items()}}, t), "the parts count 36 for column"),
]


@pytest.mark.parametrize(
    ("change", "message"), HEADER + VALUES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_parts_are_checked_against_the_manifest(finished, tmp_path, capsys, change, message):
    """Parts that hold the hash of their contents, but not what the manifest asks for."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    written(run / "parts" / "000003.safetensors", change)
    with pytest.raises(InputError, match=message):
        merged(RunDirectory.open(run))
    assert main(["status", str(run), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    in_header = (change, message) in HEADER
    assert status["units_done"] == 10 - in_header and len(status["damaged"]) == in_header
    assert all("000003.safetensors" in text for text in status["damaged"])


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


HOSTILE = {
    "a FIFO": fifo, "a folder": folder, "a dangling link": dangling, "a terabyte of nothing": sparse,
    "empty": lambda path: path.write_bytes(b""), "random bytes": lambda path: path.write_bytes(os.urandom(300)),
    "brackets": lambda path: path.write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000),
    "a header without end": lambda path: path.write_bytes(b"\xff" * 300),
    "escapes": lambda path: path.write_bytes(b"\x1b]0;title\x07" * 20),
}  # fmt: skip


@pytest.mark.parametrize("place", ["manifest.json", "parts/000003.safetensors", "prompts"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_in_a_run_directory(files, finished, tmp_path, capfd, name, place):
    """Refused in one line that names the file; nothing hangs, and no escape sequence comes through."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    path = next(run.glob(f"{place}*"))
    HOSTILE[name](path)
    start, codes = time.monotonic(), []
    for words in (["status", str(run)], command(files, tmp_path / "c.json", "--run-dir", run)):
        codes.append(main(words))
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err and "\x1b]" not in captured.out + captured.err
        said = "".join((captured.out + captured.err).split())  # a table breaks lines
        assert path.name[:8] in said or place == "prompts"
    assert time.monotonic() - start < 30
    assert codes == {"manifest.json": [2, 2], "prompts": [0, 0]}.get(place, [0, 2])


def test_a_manifest_that_is_not_as_written(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    manifest = json.loads((run / "manifest.json").read_text())
    corpus = manifest["corpus"]
    for change in (
        {"model": "x"},
        {"threads": "4"},
        {"threads": 0},
        {"corpus": []},
        {"corpus": corpus | {"units": [["a", "b", "c", "d"]]}},
        {"corpus": corpus | {"units": [[0, -1, 0, "x"]]}},
        {"corpus": corpus | {"file": "../prompts"}},
        {"corpus": {name: value for name, value in corpus.items() if name != "columns"}},
    ):
        (run / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(InputError, match=r"manifest\.json: "):
            RunDirectory.open(run)


def test_damaged_prompts_are_refused(files, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    path = next(run.glob("prompts-*.jsonl"))
    whole = path.read_bytes()
    for damage in (whole.replace(b"negati 361", b"negati 362"), whole[:-20]):
        assert damage != whole
        path.write_bytes(damage)
        with pytest.raises(InputError, match=r"prompts-.*\.jsonl: is damaged: unit \d is not as written"):
            corpus = RunDirectory.open(run).corpus()
            for unit in range(10):
                corpus.read(unit)


def test_foreign_parts_are_refused_before_the_work(files, finished, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    parts = sorted((run / "parts").iterdir())
    parts[4].unlink()
    parts[7].write_bytes(b"")
    monkeypatch.setattr("cna_kernels.model.discovery.collect.forward", None)  # nothing may run
    assert main(command(files, tmp_path / "c.json", "--run-dir", run)) == 2
    assert "000007.safetensors: is no part of a run" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(files, finished, tmp_path, capsys, monkeypatch):
    whole = os.fsync

    def full(descriptor):
        if len(list((tmp_path / "run" / "parts").glob("0*"))) == 4:
            raise OSError(28, "No space left on device")
        whole(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert main(command(files, tmp_path / "c.json", "--run-dir", tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "parts/000004.safetensors: cannot be written: No space left on device" in error
    assert "4 of 10 units are done and kept in" in error
    monkeypatch.setattr(os, "fsync", whole)
    assert main(command(files, tmp_path / "c.json", "--run-dir", tmp_path / "run")) == 0
    assert (tmp_path / "c.json").read_bytes() == finished[1]


def test_interrupt_says_how_to_go_on(files, finished, tmp_path, capsys, monkeypatch):
    calls = []

    def interrupted(run, unit, part):
        calls.append(unit)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write_part(run, unit, part)

    monkeypatch.setattr(job, "write_part", interrupted)
    assert main(command(files, tmp_path / "c.json", "--run-dir", tmp_path / "run")) == 130
    error = capsys.readouterr().err
    assert (
        "2 of 10 units are done and kept in" in error
        and "; the same command goes on from there" in error
        and "interrupted" in error
    )
    assert calls == [0, 1, 2], "units run in their order"
    monkeypatch.setattr(job, "write_part", write_part)
    assert main(command(files, tmp_path / "c.json", "--run-dir", tmp_path / "run")) == 0
    assert (tmp_path / "c.json").read_bytes() == finished[1]


def test_the_first_part_to_arrive_stays(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    part, before = read_part(run, 4), run.part_path(4).stat()
    part.n_tokens += 1
    write_part(run, 4, part)
    assert run.part_path(4).stat() == before and read_part(run, 4).n_tokens == part.n_tokens - 1


# Forks processes that work on one run at once, and kills some, again and again until the run is done. Prints the
# circuit's hash. The parent must never use torch's threads, so that its children can.
SCHEDULES = """
import hashlib, os, pathlib, random, signal, sys, time
from cna_kernels.model.cli import main
import cna_kernels.model.cli.attribution
words, out, n_schedules, kills = sys.argv[5:], pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "kill"
def fork(run):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            code = main([*words, "-o", str(run) + f"-{os.getpid()}.json", "--run-dir", str(run)])
        finally:
            os._exit(code)
    return child
n_killed = 0
for schedule in range(n_schedules):
    random.seed(schedule)
    run = out / f"run{schedule}"
    while True:
        n = random.randint(1, 4) if kills else schedule + 1
        children = [fork(run) for _ in range(n)]
        codes = []
        if kills and random.random() < 0.7:
            time.sleep(random.uniform(0.0, 0.2))
            for child in random.sample(children, random.randint(1, n)):
                os.kill(child, signal.SIGKILL)
        for child in children:
            status = os.waitpid(child, 0)[1]
            n_killed += os.WIFSIGNALED(status)
            codes.append(status)
        if 0 in codes:
            break
    circuits = {path.read_bytes() for path in out.glob(f"run{schedule}-*.json")}
    print(*(hashlib.sha256(circuit).hexdigest() for circuit in circuits), flush=True)
print("killed", n_killed)
"""


def schedules(files, tmp_path, n, how):
    words = command(files, "unused")
    del words[words.index("-o") : words.index("-o") + 2]
    done = subprocess.run(
        [sys.executable, "-c", SCHEDULES, str(tmp_path), str(n), how, "--", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    *hashes, last = done.stdout.split("\n")[:-1]
    return hashes, int(last.split()[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_any_number_of_workers_gives_the_same_bytes(files, finished, tmp_path):
    """Processes that do not know of each other may all run the same units."""
    import hashlib

    hashes, _ = schedules(files, tmp_path, 4, "whole")
    assert hashes == [hashlib.sha256(finished[1]).hexdigest()] * 4
    parts = {tuple(part.read_bytes() for part in sorted((tmp_path / f"run{n}" / "parts").iterdir())) for n in range(4)}
    assert len(parts) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("n", [3, pytest.param(20, marks=pytest.mark.rare)])
def test_kills_at_any_time_change_nothing(files, finished, tmp_path, n):
    import hashlib

    hashes, n_killed = schedules(files, tmp_path, n, "kill")
    assert hashes == [hashlib.sha256(finished[1]).hexdigest()] * n
    assert n_killed >= n // 2


def torchrun(n, *words):
    """torchrun with ``n`` ranks, the module and its words."""
    pytest.importorskip("torch.distributed.run")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *words]
    return subprocess.run(start, capture_output=True, text=True, timeout=100)


def parts_of(run):
    return [(part.name, part.read_bytes()) for part in sorted((run / "parts").iterdir())]


@pytest.mark.exhaustive
@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.rare), 2, pytest.param(4, marks=pytest.mark.rare)])
def test_torchrun(files, finished, tmp_path, n):
    done = torchrun(n, "-m", "cna_kernels.model", *command(files, tmp_path / "c.json", "--run-dir", tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c.json").read_bytes() == finished[1] and parts_of(tmp_path / "run") == parts_of(finished[0])
    assert done.stdout.count("top neurons") == 1, "one worker reports"


# One rank is killed when it is about to write its second part; all ranks note the units that they run.
DYING = """
import os, pathlib, signal, sys
from cna_kernels.model.cli import main
from cna_kernels.model.discovery import job, parts
whole, mine, rank = job.write_part, [], os.environ["RANK"]
def write_part(run, unit, part):
    if mine and rank == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(run, unit, part)
    mine.append(unit)
    pathlib.Path(f"{run.path}-{rank}").write_text(repr(mine))
job.write_part = write_part
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.exhaustive
def test_a_rank_that_dies_ends_torchrun_and_a_rerun_goes_on(files, finished, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    words = command(files, tmp_path / "c.json", "--run-dir", tmp_path / "run")
    done = torchrun(2, tmp_path / "dying.py", "1", *words)
    assert done.returncode and not (tmp_path / "c.json").exists() and "SIGKILL" in done.stderr
    before = {part.name: part.stat().st_mtime_ns for part in (tmp_path / "run" / "parts").iterdir()}
    assert "000001.safetensors" in before and "000003.safetensors" not in before
    missing = RunDirectory.open(tmp_path / "run").missing()
    done = torchrun(2, tmp_path / "dying.py", "none", *words)
    assert done.returncode == 0, done.stderr
    ran = [(tmp_path / f"run-{rank}").read_text() for rank in range(2)]
    assert ran == [repr(missing[0::2]), repr(missing[1::2])], "shares of what was missing, in its order"
    assert all((tmp_path / "run" / "parts" / name).stat().st_mtime_ns == time for name, time in before.items())
    assert (tmp_path / "c.json").read_bytes() == finished[1]


@pytest.mark.exhaustive
def test_tensor_parallel(files, finished, tmp_path):
    """Two ranks that share the model find the neurons that one process finds."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words += ["-m", "cna_kernels.model", *command(files, tmp_path / "c.json", "--tensor-parallel")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    got, want = json.loads((tmp_path / "c.json").read_text()), json.loads(finished[1])
    assert [n[:2] for n in got["neurons"]] == [n[:2] for n in want["neurons"]]
    assert [n[2] for n in got["neurons"]] == pytest.approx([n[2] for n in want["neurons"]], rel=1e-4)
    assert got["bootstrap"] == want["bootstrap"] and done.stdout.count("top neurons") == 1


def test_torchrun_needs_a_run_directory(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(files, tmp_path / "c.json")) == 2
    assert "--run-dir: torchrun's workers need a run directory that all of them see" in capsys.readouterr().err
    for more in (["--run-dir", tmp_path / "run"], ["--stream-layers"], ["--batch", "auto"]):
        assert main(command(files, tmp_path / "c.json", "--tensor-parallel", *more)) == 2
        assert "--tensor-parallel: is not for --run-dir, --stream-layers or --batch auto" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "x")
    assert main(command(files, tmp_path / "c.json")) == 2
    assert "RANK, WORLD_SIZE: expected numbers" in capsys.readouterr().err


def test_sigterm_ends_like_ctrl_c(files, tmp_path):
    program = (
        "import sys, time, cna_kernels.model.discovery.collect as collect\n"
        "from cna_kernels.model.cli import main\n"
        "whole = collect.forward\n"
        "def slow(*a, **k):\n    print('running', flush=True); time.sleep(0.2); return whole(*a, **k)\n"
        "collect.forward = slow\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = [sys.executable, "-c", program, *command(files, tmp_path / "c.json", "--run-dir", tmp_path / "run")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(3):
        assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and re.search(
        r"\d of 10 units are done and kept in .*; the same command goes on", error
    ), error
    assert not list((tmp_path / "run" / "parts").glob(".cna-*"))
