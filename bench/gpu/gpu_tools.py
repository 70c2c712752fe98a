"""The CUDA tools that ``bench/gpu/gpu.py`` runs: ncu for hardware counters, compute-sanitizer for faults."""

from __future__ import annotations

import csv
import re
import sys

from gpu_environment import ROOT, find_tool, first_line, tool_folders
from gpu_run import run_command

SCRIPT = [sys.executable, str(ROOT / "bench" / "gpu" / "gpu_worker.py")]
TOOLS = ("ncu", "compute-sanitizer", "nvcc", "cuobjdump")

METRICS = {  # ncu's name of a metric: its name in a row
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "moved",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessors %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active %",
    "smsp__inst_executed.sum": "instructions",
    "launch__registers_per_thread": "registers",
}
KERNELS = "regex:gate_up|down_|swiglu|fold"


def tool_rows():
    """A row for each tool: its path and version, or the folders where it was looked for."""
    folders = tool_folders()
    for name in TOOLS:
        path = find_tool(name, folders)
        if path is None:
            note = f"not in PATH nor in {', '.join(folders) or 'any folder of CUDA'}"
            yield dict(row="tool", ours=name, ok=False, note=note)
        else:
            yield dict(row="tool", ours=name, ok=True, note=f"{path}: {first_line(path, '--version')}")


def run_tool(crew, job):
    """Run a job that is a tool's run, and add its rows. If the tool is missing, the job is recorded as left out."""
    kind, _, which = job.name.partition("/")
    tool = "ncu" if kind == "ncu" else "compute-sanitizer"
    path = find_tool(tool)
    if path is None:
        crew.record.leave_out(job.name, f"{tool} not found in PATH, CUDA_HOME, /usr/local/cuda*, /opt/nvidia")
        return
    seconds = min(job.limit, crew.left())
    if seconds < min(job.seconds, 15):
        crew.record.leave_out(job.name, f"{max(0, seconds):.0f} s left, about {job.seconds:.0f} needed")
        return
    if kind == "ncu":
        command = [path, "--clock-control", "none", "--csv", "--page", "raw", "--metrics", ",".join(METRICS)]
        command += ["--kernel-name", KERNELS, *SCRIPT, "--profile"]
        status, output = run_command(command, seconds, crew.cwd)
        rows = list(ncu_rows(output))
    else:
        command = [path, "--tool", kind, "--target-processes", "application-only", "--error-exitcode", "9"]
        command += [*SCRIPT, "--every-plan", which]
        # without PyTorch's memory pools, an access beyond a tensor is also beyond its allocation
        status, output = run_command(command, seconds, crew.cwd, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        last = re.findall(r"(?:ERROR|RACECHECK) SUMMARY.*", output) or output.strip().splitlines()[-1:] or [""]
        places = sorted(set(re.findall(r"(?:access at|at) (\w+\+0x\w+ in \S+)", output)))
        note = "; ".join([f"status {status}", last[-1][:150], *places[:8]])
        rows = [dict(row=kind, ours=which, ok=status == 0, note=note)]
    crew.record.keep_output(f"{job.name}: {status}", output)
    for row in rows or [dict(row="failed", ours=job.name, note=f"{job.name}: status {status}, no figures")]:
        crew.record.add(row | dict(job=job.name))


def ncu_rows(output):
    """Rows from ncu's table: a line of names, a line of units, then a line for each launch."""
    lines = output.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return
    units, *launches = csv.DictReader(lines[first:])
    for launch in launches:
        said = [f"{name} {launch[metric]} {units[metric]}" for metric, name in METRICS.items() if launch.get(metric)]
        yield dict(row="ncu", ours=launch["Kernel Name"].strip("_"), note=", ".join(said).replace("% %", "%"))
