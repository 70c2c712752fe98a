"""The benchmark and the kernel tests on one GPU, most valuable first, within a time limit.

    python bench/gpu.py --out DIR [--minutes 9]           tests, sanitizer, all rows -> DIR/gpu.{json,md,log}, tests.log
    python bench/gpu.py --out DIR --tune [--minutes 9]    launch tables -> DIR/tune.{json,md,log}
    python bench/gpu.py --out DIR --dry                   the same code on a CPU, tiny shapes, Triton interpreted

The files are written again after every row. This process measures nothing: ``gpu_rows`` does, in a worker of its own,
so that a kernel that crashes or hangs costs the job it was in. Before the timed rows the same jobs run once, side by
side with the tests, which leaves the kernels compiled in Triton's cache.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from gpu_report import Record, cells
from shapes import MODELS

ROOT = Path(__file__).resolve().parent.parent
HANG_SECONDS = 90  # a job without a row for this long is given up; torch.compile may take 60 s


class Sizes(NamedTuple):
    """The T of each kind of job, most valuable first."""

    models: dict
    decode: tuple
    prefill: tuple
    long: tuple  # prefill that comes last
    elementwise: int
    circuits: tuple
    distinct: int
    tune: dict


FIRST = ["Llama-3.1-8B", "Llama-3.2-1B", "Llama-3.1-70B", "Qwen2.5-7B", "Qwen2.5-72B"]
TUNE = dict(gate_up_gemv=(1,), down_gemv=(1,), gate_up_flat=(16, 32, 64), down_split=(16, 32, 64), swiglu=(64, 4096))
TUNE |= dict(down_proj=(512, 4096), gate_up=(4096,))
REAL = Sizes({m: MODELS[m] for m in FIRST}, (1, 64, 16, 8), (4096, 2048, 512), (16384,), 4096, (4096, 256), 64, TUNE)
TINY_TUNE = dict(gate_up_gemv=(1,), gate_up_flat=(8,), down_split=(8,), swiglu=(70,), down_proj=(70,))
TINY = Sizes({"tiny": (64, 96)}, (1, 8), (70,), (), 70, (70,), 8, TINY_TUNE)


def row_jobs(sizes):
    """Jobs as ``kind/model/T``."""
    models, (first_T, *later_T), (first_prefill, *later_prefill) = list(sizes.models), sizes.decode, sizes.prefill
    jobs = [f"decode/{model}/{first_T}" for model in models]
    jobs += [f"prefill/{model}/{first_prefill}" for model in models]
    jobs += [f"elementwise/{models[0]}/{sizes.elementwise}", f"distinct/{models[0]}/{sizes.distinct}"]
    jobs += [f"circuits/{models[0]}/{T}" for T in sizes.circuits]
    jobs += [f"decode/{model}/{T}" for T, model in itertools.product(later_T, models)]
    jobs += [f"prefill/{model}/{T}" for T, model in itertools.product(later_prefill, models)]
    jobs += [f"elementwise/{model}/{sizes.elementwise}" for model in models[1:]]
    jobs += [f"compiled/{model}/{T}" for T in (first_T, first_prefill) for model in models[:3]]
    return jobs + [f"prefill/{model}/{T}" for T, model in itertools.product(sizes.long, models)]


def tune_jobs(sizes):
    return [f"tune/{kernel}/{m}/{T}" for m in sizes.models for kernel, each in sizes.tune.items() for T in each]


def order_text(record, jobs, mode, sizes):
    order = dict(jobs=jobs, mode=mode, deadline=record.deadline, models=sizes.models, ceilings=record.ceilings)
    return json.dumps(order)


def start_worker(log):
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)


def measure(record, jobs, mode, sizes):
    """Run the jobs in a worker; where one takes the worker with it, go on with the next one in a new worker."""
    remaining = list(jobs)
    while remaining and record.left() > 10:
        with record.log_file.open("a") as log:
            worker = start_worker(log)
        worker.stdin.write(order_text(record, remaining, mode, sizes))
        worker.stdin.close()
        lines, current, finished, reason = queue.Queue(), None, False, "the worker ended"
        threading.Thread(target=pump, args=(worker.stdout, lines), daemon=True).start()
        while not finished:
            try:
                line = lines.get(timeout=max(0.1, min(HANG_SECONDS, record.left() - 3)))
            except queue.Empty:
                reason = "no row for too long" if record.left() > 5 else "out of time"
                break
            if line is None:
                break
            event = json.loads(line)
            if "job" not in event:
                record.add(event)
            elif event["job"] is None:
                finished = True
            else:
                current = event["job"]
                del remaining[: remaining.index(current) + 1]
        worker.kill()
        status = worker.wait()
        if finished:
            break
        record.add(dict(row="crashed", note=f"{current or 'before the first job'}: {reason}, status {status}"))
        if current is None:
            break
    else:
        record.log(f"not started: {' '.join(remaining) or 'nothing'}")


def pump(stream, lines):
    for line in stream:
        lines.put(line)
    lines.put(None)


def worker():
    """Jobs from standard input, a JSON line for each row to standard output."""
    order = json.load(sys.stdin)
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints goes to the log
    import torch

    import gpu_rows
    import gpu_timing

    bench = gpu_timing.Bench(order["mode"], order["models"], order["ceilings"])
    for job in order["jobs"]:
        if time.time() > order["deadline"] - 8:
            print(json.dumps(dict(row="out of time", note=f"not started: {job} and later")), file=channel)
            break
        print(json.dumps(dict(job=job)), file=channel)
        start = time.time()
        try:
            with torch.no_grad():
                for row in gpu_rows.run(job, bench):
                    print(json.dumps(row), file=channel)
        except Exception as error:
            traceback.print_exc()
            print(json.dumps(dict(row="failed", note=f"{job}: {gpu_timing.brief(error)}")), file=channel)
            bench.synchronize()  # if it raises, the parent starts another worker for the jobs that are left
        print(f"{job}: {time.time() - start:.1f} s", file=sys.stderr)
    print(json.dumps(dict(job=None)), file=channel)


PLANS = ["swiglu", "gated_mlp-gemv", "gated_mlp-flat", "gated_mlp-gated", "gated_mlp-fused", "gated_mlp-blas"]
PLANS += ["down_proj-split", "down_proj-tma", "down_proj-blas"]
VALUES = "test_values and bfloat16 and (both or circuits)"
NOT_BY_PLAN = f"not test_values and not test_offsets and not ({' or '.join(PLANS)})"


def test_tasks(record, expressions, seconds):
    """One pytest process for each expression, as functions of the seconds that are left."""

    def task(expression):
        # addopts of pyproject.toml name a plugin that may be missing here
        pytest = [sys.executable, "-m", "pytest", "tests/test_triton.py", "-q", "--maxfail=3", "-o", "addopts="]
        command = [*pytest, "-p", "no:cacheprovider", "--tb=short", "-k", expression]

        def run(left):
            status, output = run_command(command, min(seconds, left))
            counts = ", ".join(re.findall(r"\d+ (?:passed|failed|errors?|skipped|deselected)", output[-300:]))
            keep_output(record, f"-k '{expression}': {status}", output)
            ok = None if status == "no time left" else status == 0
            record.add(dict(row="tests", ours=expression, ok=ok, note=counts or f"status {status}"))

        return run

    return [task(expression) for expression in expressions]


def sanitizer_task(record, tool):
    def run(left):
        command = [shutil.which("compute-sanitizer"), "--tool", tool, "--target-processes", "application-only"]
        command += ["--error-exitcode", "9", sys.executable, str(Path(__file__).resolve()), "--sanitize"]
        # without PyTorch's pools an access beyond a tensor is one beyond its allocation
        status, output = run_command(command, min(60, left), env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        keep_output(record, f"{tool}: {status}", output)
        last = re.findall(r"(?:ERROR|RACECHECK) SUMMARY.*", output) or output.strip().splitlines()[-1:] or [""]
        record.add(dict(row=tool, ours="every plan", ok=status == 0, note=f"status {status}; {last[-1][:150]}"))

    return run


def compile_task(record, jobs, sizes, seconds):
    """Run the jobs once, unmeasured, for Triton's cache."""

    def run(left):
        command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
        status, output = run_command(command, min(seconds, left), order_text(record, jobs, "once", sizes))
        record.log(f"ran once: {len(jobs)} jobs from {jobs[0]} on, {status}")
        keep_output(record, f"once {jobs[0]}: {status}", "\n".join(re.findall(r'.*"failed".*', output)))

    return run


def run_command(command, seconds, standard_input="", env=None):
    """(exit status or "timed out", output)"""
    if seconds < 5:
        return "no time left", ""
    with tempfile.TemporaryFile("w+", errors="replace") as output:  # a pipe would wait for children of a killed process
        common = dict(cwd=ROOT, env=os.environ | (env or {}), input=standard_input, text=True)
        try:
            status = subprocess.run(command, stdout=output, stderr=output, timeout=seconds, **common).returncode
        except subprocess.TimeoutExpired:
            status = "timed out"
        output.seek(0)
        return status, output.read()


def keep_output(record, title, output):
    with record.lock, (record.directory / "tests.log").open("a") as file:
        file.write(f"==== {title}\n{output[-20000:]}\n")


def together(record, tasks, n_workers, until):
    """Run the tasks, a few at a time, in order; each is told the seconds left until ``until`` when it starts."""
    with ThreadPoolExecutor(n_workers) as pool:
        for future in [pool.submit(lambda task=task: task(until - time.time())) for task in tasks]:
            if error := future.exception():
                record.log(f"failed: {error!r}")


def chunks(jobs):
    """Jobs that share kernels side by side: by model, and decode apart from prefill."""
    chosen = {}
    for job in jobs:
        *kind, T = job.split("/")
        if kind[0] != "compiled" and int(T) <= 4096:
            chosen.setdefault((*kind[1:], int(T) <= 64), []).append(job)
    return list(chosen.values())


def environment():
    def first_line(*command):
        with_output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return with_output.stdout.strip().partition("\n")[0]

    facts = dict(date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))
    if shutil.which("git"):
        facts["commit"] = first_line("git", "describe", "--always", "--dirty", "--abbrev=12")
    if shutil.which("nvidia-smi"):
        facts["driver"] = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {name: value for name, value in facts.items() if value}


def benchmark(record, mode, sizes):
    dry, jobs = mode == "dry", row_jobs(sizes)
    measure(record, ["ceilings"], mode, sizes)
    half = time.time() + 0.5 * record.left()
    if dry:
        tasks = test_tasks(record, ["test_values and swiglu and 1x48x24 and bfloat16 and (both or circuits)"], 60)
    else:
        tasks = test_tasks(record, [f"{VALUES} and {plan}" for plan in PLANS], 150)
        tasks += [compile_task(record, each, sizes, 200) for each in [*chunks(jobs), ["every_plan"]]]
        tasks += test_tasks(record, [f"not test_values and not test_offsets and {plan}" for plan in PLANS], 100)
        tasks += test_tasks(record, [NOT_BY_PLAN], 60)
        if shutil.which("compute-sanitizer"):
            tasks += [sanitizer_task(record, tool) for tool in ("memcheck", "racecheck")]
    together(record, tasks, 1 if dry else max(2, (os.cpu_count() or 2) - 1), half)
    measure(record, (["every_plan"] if dry else []) + jobs, mode, sizes)
    end_to_end(record, dry, "attribution", "prompts_per_s", "not memory and not streamed", CNA_BENCH_PROMPTS="20")
    some = "generation and float32 and 8" if dry else "not float32"
    end_to_end(record, dry, "embedding", "ms", some, CNA_BENCH_ROUNDS="1")
    rest = [] if dry else [f"test_values and not ({VALUES}) and {plan}" for plan in PLANS] + ["test_offsets"]
    together(record, test_tasks(record, rest, 200), os.cpu_count() or 2, record.deadline - 3)


def end_to_end(record, dry, name, rate, only, **dry_env):
    """The rows of bench_NAME.py, whose checkpoint and prompts are made on the spot. ``rate``: their field to note."""
    with tempfile.TemporaryDirectory() as results:
        env = dict(CNA_BENCH_RESULTS=results, CNA_BENCH_DEVICE="cpu" if dry else "cuda") | (dry_env if dry else {})
        command = [sys.executable, "-m", "pytest", f"bench/bench_{name}.py", "-q", "-s", "-o", "addopts="]
        command += ["-p", "no:cacheprovider", "--tb=short", "-k", only]
        status, output = run_command(command, min(180, record.left() - 10), env=env)
        keep_output(record, f"{name}: {status}", output)
        path = Path(results) / f"{name}.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for row in rows:
        facts = dict(row=row["id"], model=row["shape"], ours=row["dtype"], theirs=row["competitor"], T=row["m"])
        note = f"{row[rate]} / {row[f'competitor_{rate}']} {rate}"
        if row["target"] is not None:
            note, facts["ok"] = f"{note}; target {row['target']:.3f}", row["ratio"] <= row["target"]
        record.add(facts | dict(ratio=row["ratio"], noise=row["noise"], note=note))
    if status not in (0, 5):  # 5: transformers is not installed
        record.add(dict(row="failed", note=f"bench_{name}.py: status {status}"))


def tune(record, mode, sizes):
    jobs = tune_jobs(sizes)
    measure(record, ["ceilings"], mode, sizes)
    if mode == "time":
        tasks = [compile_task(record, each, sizes, 300) for each in chunks(jobs)]
        together(record, tasks, max(2, (os.cpu_count() or 2) - 1), time.time() + 0.55 * record.left())
    measure(record, jobs, mode, sizes)


def sanitize():
    import torch

    import gpu_rows
    import gpu_timing

    with torch.no_grad():
        for row in gpu_rows.every_plan(gpu_timing.Bench("once", {}, {})):
            print(row["note"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for the results")
    parser.add_argument("--minutes", type=float, default=9, help="time limit (9)")
    parser.add_argument("--tune", action="store_true", help="try variations of the launch tables")
    parser.add_argument("--dry", action="store_true", help="on a CPU, interpreted, tiny shapes")
    parser.add_argument("--sanitize", action="store_true", help="every plan once, for compute-sanitizer")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker()
    if args.sanitize:
        return sanitize()
    if args.out is None:
        parser.error("--out is required")
    probe = [sys.executable, "-c", "import torch; assert torch.cuda.is_available()"]
    if not args.dry and subprocess.run(probe, stderr=subprocess.DEVNULL).returncode != 0:
        print("gpu.py: PyTorch sees no GPU here; --dry runs the same code on a CPU", file=sys.stderr)
        return 2
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # workers inherit it before they import anything
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    record = Record(args.out, "tune" if args.tune else "gpu", time.time() + 60 * args.minutes)
    record.add(dict(environment=environment()))
    (tune if args.tune else benchmark)(record, "dry" if args.dry else "time", TINY if args.dry else REAL)
    for row in record.rows:
        if row["row"] == "tune":
            print(" ".join(cells(row)))
    record.log(f"{len(record.rows)} rows in {record.directory}")
    return 1 if any(map(is_wrong, record.rows)) else 0


def is_wrong(row):
    """A test that fails, wrong numbers, or a job that did not end; a missed target is none of these."""
    checks = ("tests", "memcheck", "racecheck", "N1", "N2")
    return row["row"] in ("failed", "crashed") or (row["row"] in checks and row.get("ok") is False)


if __name__ == "__main__":
    sys.exit(main())
