"""The GPU benchmark without a GPU: its jobs and their order, and what is lost when a plan fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu
import gpu_device
import gpu_environment
import gpu_jobs
import gpu_model
import gpu_record
import gpu_report
import gpu_rows
import gpu_run
import gpu_timing
import gpu_tools
import gpu_worker

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE = gpu_device.catalogue()
SWEEP = [("gate_up_gemv", 1), ("down_gemv", 1)]


def names(stages):
    return [job.name for stage in stages for job in stage.jobs]


def test_the_parent_needs_nothing_installed(tmp_path):
    """The machine with the GPU has no package of this project, and the parent imports no torch."""
    listing = [sys.executable, "-S", "-s", ROOT / "bench" / "gpu" / "gpu.py", "--help"]
    found = subprocess.run(listing, capture_output=True, text=True, env={}, cwd=tmp_path)
    assert found.returncode == 0 and "--record" in found.stdout, found.stderr


# What is run, and when.


@pytest.mark.parametrize("window", ["1", "2", "3"])
def test_the_estimates_fit_the_window(window):
    limit = gpu_jobs.LIMITS[window] - gpu.RESERVE
    listed = gpu_jobs.within(gpu_jobs.window(window, CATALOGUE, SWEEP), limit)
    assert max(so_far for _, _, so_far, _ in listed) <= limit
    waiting = [job.name for _, job, _, fits in listed if not fits]
    assert all(name.startswith(("candidate", "memcheck/candidates")) for name in waiting), waiting


def test_default_plans_come_first_and_rivals_that_compile_last():
    stages = gpu_jobs.window("1", CATALOGUE)
    order = [name.partition("/")[0] for name in names(stages)]
    last = {kind: len(order) - 1 - order[::-1].index(kind) for kind in order}
    assert order[0] == "ceilings"
    assert order.index("candidate") > max(last[kind] for kind in last if kind != "candidate")
    assert order.index("compiled") > last["generate"] > last["decode"]
    for stage in stages[:-1]:
        for job in stage.jobs:  # before the candidates every job runs a default plan
            assert not job.plan or job.plan.split("=")[1] == CATALOGUE[of_plan(job)]["default"], job


def of_plan(job):
    _, model, T = job.name.split("/")
    return f"{job.plan.partition('=')[0]}/{model}/{T}"


def test_the_first_window_has_what_decides():
    found = names(gpu_jobs.window("1", CATALOGUE))
    for model in ("Llama-3.1-8B", "Llama-3.2-1B"):
        for T in (1, 8, 64):
            assert f"check/{model}/{T}" in found and f"decode/{model}/{T}" in found
        for kind in ("check", "prefill", "down", "elementwise"):
            assert {f"{kind}/{model}/512", f"{kind}/{model}/4096"} <= set(found)
    assert {"table/Llama-3.1-8B/128", "table/Llama-3.1-8B/256", "generate/Llama-3.1-8B/32"} <= set(found)
    assert not any("70B" in name or "Qwen" in name for name in found)


def test_every_candidate_has_a_job_of_its_own():
    jobs = gpu_jobs.window("1", CATALOGUE)[-1].jobs
    for op, T in (("gated_mlp", 1), ("gated_mlp", 64), ("down_proj", 4096)):
        wanted = CATALOGUE[f"{op}/Llama-3.1-8B/{T}"]["candidates"]
        assert {f"candidate/{op}/{name}/Llama-3.1-8B/{T}" for name in wanted} <= {job.name for job in jobs}
    chunks = gpu_jobs.chunks(jobs)
    assert len(chunks) > 5 and all(len({job.plan for job in chunk}) == 1 for chunk in chunks)


def test_values_are_tested_of_default_plans_alone():
    tests = gpu_jobs.value_tests({"down_proj/m/1": dict(default="split", candidates=["blas"])})
    assert tests[0].endswith("and down_proj-split-") and "down_proj-blas" not in " ".join(tests)


# Prints how many tests each list of arguments selects where there is a GPU.
SELECT = """
import json, sys, pytest, torch
torch.cuda.is_available = lambda: True  # nothing is run
counts = []
class Counts:
    def pytest_collection_finish(self, session):
        counts.append(len(session.items))
for arguments in json.loads(sys.argv[1]):
    pytest.main([*arguments, "--collect-only", "-q"], [Counts()])
print("selected:", json.dumps(counts))
"""


@pytest.mark.exhaustive
def test_every_expression_selects_tests():
    """An expression for a plan's values selects all these tests, not only those of every day."""
    tests = {test for window in gpu_jobs.LIMITS for stage in gpu_jobs.window(window, CATALOGUE) for test in stage.tests}
    tests = sorted(tests)
    command = [sys.executable, "-c", SELECT, json.dumps([gpu_run.pytest_arguments(test) for test in tests])]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    counts = dict(zip(tests, json.loads(done.stdout.rpartition("selected:")[2]), strict=True))
    assert len(counts) > 8 and all(counts.values()), counts
    of_values = {test: n for test, n in counts.items() if "test_values and" in test and "swiglu" not in test}
    assert min(of_values.values()) >= 2, counts


def test_only_and_models():
    stages = gpu_jobs.window("1", CATALOGUE)
    some, rest = gpu_jobs.chosen(stages, "decode/|candidate/.*fused", "1B")
    assert names(some)[:4] == ["ceilings", *(f"decode/Llama-3.2-1B/{T}" for T in (1, 8, 64))]
    assert all("1B" in name for name in names(some)[1:])
    assert sorted(names(some) + rest) == sorted(names(stages))
    assert some[1].tests == ()


def test_compiling_beside_each_other_takes_every_job_that_needs_it():
    jobs = [job for stage in gpu_jobs.window("2", CATALOGUE, SWEEP) for job in stage.jobs]
    once = {job.name for chunk in gpu_jobs.chunks(jobs) for job in chunk}
    for job in jobs:
        assert job.kind in gpu_jobs.ONCE + gpu_jobs.OUTSIDE or job.name in once or f"{job.name}/0" in once, job
    assert {"profile", "every_plan/defaults", "every_plan/candidates"} <= once


def test_the_sweep_is_of_what_loses_most():
    def row(plan, share, T=1, model="Llama-3.1-8B"):
        return dict(plan=plan, share=share, T=T, model=model)

    rows = [row("gated_mlp=gemv", 0.86), row("swiglu", 0.7, 4096), row("down_proj=tma", 0.9, 4096)]
    rows += [row("gated_mlp=gemv", 0.1, model="Llama-3.2-1B"), dict(row="N1")]
    assert gpu_record.losing(rows)[:3] == [("swiglu", 4096), ("swiglu_plain", 4096), ("gate_up_gemv", 1)]
    assert gpu_record.losing([]) == SWEEP


# Where it runs.


def test_the_clock_starts_with_the_process():
    code = "import time; time.sleep(0.5); import gpu_environment as e; print(time.time() - e.process_start())"
    took = float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT / "bench" / "gpu", text=True))
    assert 0.5 <= took < 30


def test_the_package_is_importable_without_installation(tmp_path):
    """From a copy without .git and without the compiled library; -S leaves out what this environment has installed."""
    links = gpu_environment.link_package(tmp_path / "links")
    code = "import cna_kernels.model as m, cna_kernels.files as f; print(m.__file__, f.__file__)"
    paths = os.pathsep.join([str(links), *(p for p in sys.path if p.endswith("site-packages"))])
    env = dict(os.environ, PYTHONPATH=paths)
    found = subprocess.check_output([sys.executable, "-S", "-c", code], cwd=tmp_path, env=env, text=True).split()
    assert found == [str(links / "cna_kernels" / "model" / "__init__.py"), str(links / "cna_kernels" / "files.py")]


def test_tools_are_found_outside_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    tool = tmp_path / "compute-sanitizer" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert gpu_environment.find_tool("compute-sanitizer") == str(tool)
    assert gpu_environment.find_tool("ncu", gpu_environment.tool_folders()[:1]) is None


def test_a_missing_tool_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tools, "find_tool", lambda name, folders=None: None)
    record = gpu_report.Record(tmp_path, "gpu", time.time() + 60)
    gpu_tools.run_tool(gpu_run.Crew(record, dry=False), gpu_jobs.job("memcheck", "defaults"))
    assert record.left_out[0]["why"].startswith("compute-sanitizer not found in PATH")
    assert [row["ok"] for row in gpu_tools.tool_rows()] == [False] * len(gpu_tools.TOOLS)


def test_commit_is_passed_in(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_environment, "ROOT", tmp_path)  # no .git here
    monkeypatch.delenv("CNA_COMMIT", raising=False)
    assert gpu_environment.facts("")["commit"] == "unknown"
    monkeypatch.setenv("CNA_COMMIT", "abc123")
    assert gpu_environment.facts("")["commit"] == "abc123" and gpu_environment.facts("def")["commit"] == "def"


# Rows.


def times(failures=(), **measured):
    device = gpu_device.device_of("NVIDIA H100 80GB HBM3", {})[0]
    work = gpu_device.mlp_work(1, 14336, 4096)
    return gpu_timing.Times(measured, dict(failures), next(iter(measured.values())), work, device)


def test_a_failure_adds_to_the_note():
    row = times({"theirs": "OutOfMemoryError: no"}, ours=[1.0]).row("P7", "m", 1, "ours", "theirs", note="differs by 0")
    assert row["note"] == "differs by 0; theirs: OutOfMemoryError: no" and "ratio" not in row
    row = times(ours=[1.0], theirs=[2.0]).row("P7", "m", 1, "ours", "theirs", note="differs by 0")
    assert row["note"] == "differs by 0" and row["ratio"] == 0.5


def test_share_of_the_ceiling_that_binds():
    row = times(ours=[200e-6], theirs=[1.0]).row("D1", "Llama-3.1-8B", 1, "ours", "theirs")
    n_bytes = 2 * (3 * 14336 * 4096 + 2 * 4096)
    assert (row["bytes"], row["flop"], row["bound"]) == (n_bytes, 6 * 14336 * 4096, "memory")
    assert row["share"] == pytest.approx(n_bytes / 3.0e12 / 200e-6)
    assert row["rate"] == f"{n_bytes / 200e-6 / 1e9:.0f} GB/s"
    device = gpu_device.device_of("NVIDIA H100", {})[0]
    many = gpu_timing.share_of(gpu_device.mlp_work(4096, 14336, 4096), 2e-3, device)
    assert many["bound"] == "matrix" and many["share"] == pytest.approx(6 * 4096 * 14336 * 4096 / 790e12 / 2e-3)


def test_predictions_take_the_ceilings_of_this_run():
    device, assumed = gpu_device.device_of("NVIDIA H200", {"read": 4.5e12, "bf16 matmul": 700e12, "copy": 4e12})
    assert (device.bytes_per_s, device.flop_per_s) == (4.5e12, 700e12) and assumed.endswith(": ")
    device, assumed = gpu_device.device_of("NVIDIA H100 80GB HBM3", {"read": 2.9e12})
    assert (device.bytes_per_s, device.flop_per_s) == (2.9e12, 790e12) and assumed.endswith("matrix 790 TFLOP/s")
    assert gpu_device.device_of("NVIDIA H200", {})[0].bytes_per_s == 4.3e12


def test_a_steered_late_layer_has_52_neurons_in_an_8b_model():
    assert gpu_device.late(14336) == 52 and gpu_device.even(14336) == 14


def test_rows_are_named_in_words(tmp_path):
    record = gpu_report.Record(tmp_path, "gpu", time.time() + 60, "1")
    record.add(times(ours=[2.0], eager=[1.0]).row("D1", "Llama-3.1-8B", 1, "ours", "eager", best=True))
    text = (tmp_path / "gpu.md").read_text()
    assert "| decode MLP, 1 token, sums and steering | Llama-3.1-8B | ours | PyTorch, eager | 2.000 |" in text
    saved = json.loads((tmp_path / "gpu.json").read_text())["rows"][0]
    assert saved["what"] == "decode MLP, 1 token, sums and steering" and saved["ok"] is False
    record.leave_out("candidate/x", "4 s left, about 9 needed")
    assert "- candidate/x: 4 s left, about 9 needed" in (tmp_path / "gpu.md").read_text()
    assert "4 s left, about 9 needed: candidate/x" in record.summary()


def test_every_row_has_words():
    assert set(gpu_report.TARGETS) <= set(gpu_report.WORDS)


def test_ncu_output_becomes_rows():
    metrics = list(gpu_tools.METRICS)
    header = ",".join(f'"{name}"' for name in ["ID", "Kernel Name", *metrics])
    units = ",".join(['""'] * 2 + ['"us"', '"Mbyte"'] + ['"%"'] * 3 + ['"inst"', '"register/thread"'])
    line = ",".join(f'"{value}"' for value in ["0", "_down_gemv_kernel", 12.5, 117, 85, 20, 40, 1000, 64])
    rows = list(gpu_tools.ncu_rows(f"==PROF== Connected\n{header}\n{units}\n{line}\n"))
    assert len(rows) == 1 and rows[0]["ours"] == "down_gemv_kernel"
    assert rows[0]["note"].startswith("time 12.5 us, moved 117 Mbyte, memory % 85")
    assert list(gpu_tools.ncu_rows("no table here")) == []


# Code that usually needs a GPU, run with stand-ins for CUDA's classes.


class Stream:
    """Stands for a stream, a graph, an event and their contexts. A captured call runs at once, and only once."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_stream(self, _):
        pass

    def replay(self):
        pass

    def record(self):
        pass

    def elapsed_time(self, _):
        return 100.0


class OnStandIns(gpu_device.Bench):
    """A Bench that acts as on a GPU, but runs on a CPU with tiny shapes."""

    def __init__(self):
        super().__init__("dry", dict(read=1e12, copy=1e12))
        self.mode = "time"

    def shape(self, model):
        return (64, 96)

    def tokens(self, T):
        return min(T, 66)

    def layers(self, model, T=1):
        if self._layers[0] != model:
            made = gpu_device.Layer(self.random(192, 64), self.random(64, 96), self.random(2, 96, dtype=torch.float32))
            self._layers = (model, [made])
        return self._layers[1]


@pytest.fixture
def stand_ins(monkeypatch):
    for name in ("CUDAGraph", "graph", "Event", "Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return OnStandIns()


@pytest.mark.interpreted
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize(
    "kind",
    [
        "decode/{}/8",
        pytest.param("down/{}/512", marks=pytest.mark.exhaustive),
        "table/{}/128",
        pytest.param("host/{}/1", marks=pytest.mark.exhaustive),
        "generate/{}/2",
    ],
)
def test_timed_rows_on_stand_ins(stand_ins, monkeypatch, kind):
    monkeypatch.setitem(gpu_model.SHAPES, "Llama-3.1-8B", (2, 4, 2, 99))
    for module, name in (
        (gpu_model, "STEPS"),
        (gpu_model, "ROUNDS"),
        (gpu_rows, "HOST_ROUNDS"),
        (gpu_rows, "HOST_CALLS"),
    ):
        monkeypatch.setattr(module, name, 1)
    with torch.no_grad():
        rows = list(gpu_worker.run(kind.format("Llama-3.1-8B"), stand_ins))
    assert rows and not [row for row in rows if "Error" in row.get("note", "")], rows
    timed = [row for row in rows if "ratio" in row and row["row"] != "N2"]
    assert timed and all(json.dumps(row) for row in rows)
    if kind.startswith(("decode", "down")):
        assert all(row["ratio"] == 1 and row["ours_us"] > 0 and row["bound"] for row in timed if row["row"] != "D5")
        assert all(row["predicted_us"] > 0 for row in timed if row["row"] in ("D2", "P7"))


# What is committed.


def test_windows_merge_by_row(tmp_path):
    def window(number, rows, device="NVIDIA H100 80GB HBM3"):
        facts = dict(window=number, date="2026-12-01 10:00 UTC", commit="abc", device=device)
        directory = tmp_path / f"out{number}{device[-1]}"
        directory.mkdir(exist_ok=True)
        found = dict(environment=facts, ceilings=dict(read=3e12), rows=rows)
        (directory / "gpu.json").write_text(json.dumps(found))
        return gpu_record.record(directory, tmp_path / "results")

    d1, d2 = (dict(row=row, model="Llama-3.1-8B", T=1, ours="ours", theirs="eager", ratio=0.9) for row in ("D1", "D2"))
    crashed = dict(row="crashed", ours="a=x", job="decode/m/1", note="decode/m/1: its process ended")
    assert window("1", [d1, d2, crashed]).name == "gpu-h100.json"
    path = window("2", [d1 | dict(ratio=0.8, job="decode/m/1")])
    merged = json.loads(path.read_text())
    assert {row["row"]: (row["ratio"], row["run"][:8]) for row in merged["rows"]} == {
        "D1": (0.8, "window 2"),
        "D2": (0.9, "window 1"),
    }
    assert [run["window"] for run in merged["runs"]] == ["1", "2"] and merged["runs"][0]["ceilings"] == dict(read=3e12)
    assert "window 1" in path.with_suffix(".md").read_text()
    assert window("1", [d1], "NVIDIA H200").name == "gpu-h200.json"


# A plan that fails.

PLANTED = """
import os, signal, sys, time
sys.path[:0] = {sources!r}
import gpu_device, gpu_worker
from cna_kernels import plans

def use(text):
    if text == "gated_mlp=blas":
        raise RuntimeError("out of resource: planted")
    if text == "down_proj=tma":
        os.kill(os.getpid(), signal.SIGKILL)
    plans.use(text)

gpu_device.use_plans = use
gpu_worker.main()
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A dry run in which one candidate raises and another kills its worker, each at several T."""
    directory = tmp_path_factory.mktemp("planted")
    script = directory / "worker.py"
    script.write_text(PLANTED.format(sources=gpu_environment.SOURCES))
    only = "decode/Llama-3.1-8B/1|candidate/gated_mlp/(flat|blas)/Llama-3.1-8B/(1|8)$|candidate/down_proj/tma/|none"
    arguments = ["--window", "1", "--dry", "--only", only, "--out", str(directory / "out"), "--models", "8B"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_run, "WORKER", [sys.executable, str(script)])
        for name in ("PYTHONPATH", "TRITON_INTERPRET", "OMP_NUM_THREADS", "PYTHONUNBUFFERED"):
            patch.setenv(name, os.environ.get(name, ""))  # put back afterwards
        status = gpu.main(arguments)
    return status, json.loads((directory / "out" / "gpu.json").read_text())


def rows_of(found, **wanted):
    return [row for row in found["rows"] if all(row.get(name) == value for name, value in wanted.items())]


@pytest.mark.interpreted
@pytest.mark.exhaustive
def test_a_candidate_that_raises_loses_only_its_rows(planted):
    _, found = planted
    assert len(rows_of(found, row="failed")) == 2  # once at each T: after a failed shape the other is still tried
    assert all(
        "planted" in row["note"] and "candidate/gated_mlp/blas" in row["note"] for row in rows_of(found, row="failed")
    )
    assert rows_of(found, row="D1") and rows_of(found, row="plan", ours="flat") and rows_of(found, row="D5")


@pytest.mark.interpreted
@pytest.mark.exhaustive
def test_a_candidate_that_kills_its_worker_is_not_tried_again(planted):
    _, found = planted
    crashed = rows_of(found, row="crashed")
    assert len(crashed) == 1 and crashed[0]["ours"] == "down_proj=tma" and "status -9" in crashed[0]["note"]
    skipped = [each for each in found["left_out"] if "tma" in each["job"]]
    assert len(skipped) >= 1 and all("took its worker with it" in each["why"] for each in skipped)
    assert not rows_of(found, row="plan", ours="tma")


@pytest.mark.interpreted
@pytest.mark.exhaustive
def test_a_failing_candidate_does_not_fail_the_run(planted):
    status, found = planted
    assert status == 0
    assert any("not asked for" in each["why"] for each in found["left_out"])


def test_a_worker_that_hangs_is_given_up(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("import time, json; print(json.dumps(dict(ready=1)), flush=True); time.sleep(60)")
    record = gpu_report.Record(tmp_path, "gpu", time.time() + 60)
    crew = gpu_run.Crew(record, dry=True, command=[sys.executable, str(script)])
    jobs = [gpu_jobs.Job("candidate/a/x/m/1", 1, "a=x"), gpu_jobs.Job("candidate/a/x/m/8", 1, "a=x")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_jobs.Job, "limit", property(lambda job: 0.5))
        crew.measure(jobs)
    assert [row["note"] for row in record.rows] == ["candidate/a/x/m/1: no end after 0 s"]
    assert record.left_out == [dict(job="candidate/a/x/m/8", why="a=x took its worker with it in candidate/a/x/m/1")]


def test_what_the_window_has_no_time_for_is_said(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("import time, json; print(json.dumps(dict(ready=1)), flush=True); time.sleep(60)")
    record = gpu_report.Record(tmp_path, "gpu", time.time() + gpu_run.RESERVE + 2)
    crew = gpu_run.Crew(record, dry=False, command=[sys.executable, str(script)])
    crew.measure([gpu_jobs.Job("decode/m/1", 1, "a=x"), gpu_jobs.Job("generate/m/1", 20), gpu_jobs.Job("host/m/1", 2)])
    reasons = [each["why"] for each in record.left_out]
    assert reasons[0].startswith("cut off after 2 s") and reasons[1].endswith("0 s left, about 20 needed")
    assert len(reasons) == 3 and not record.rows and not crew.killed, "the end of the window is no fault of a plan"


def test_a_default_plan_that_dies_fails_the_run():
    assert gpu_report.is_wrong(dict(row="crashed", ours="gated_mlp=gemv", job="decode/m/1"))
    assert gpu_report.is_wrong(dict(row="N2", ok=False, default=True))
    assert not gpu_report.is_wrong(dict(row="N2", ok=False, default=False))
    assert not gpu_report.is_wrong(dict(row="crashed", ours="gated_mlp=fused", job="candidate/gated_mlp/fused/m/1"))
    assert not gpu_report.is_wrong(dict(row="crashed", ours="", job="compiled/m/1")), (
        "a rival that compiles for too long"
    )


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PYTHONPATH", "TRITON_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS", "PYTHONUNBUFFERED"):
            patch.setenv(name, os.environ.get(name, ""))
        assert gpu.main(["--window", "1", "--out", str(tmp_path / "out")]) == 2
    assert "no worker starts" in capsys.readouterr().err
