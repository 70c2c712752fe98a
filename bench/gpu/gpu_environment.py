"""The machine that ``gpu.py`` runs on: when the process began, how the package is imported, where tools lie."""

from __future__ import annotations

import datetime
import glob
import os
import shutil
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [str(ROOT / name) for name in ("bench/gpu", "bench", "tests")]  # folders of modules in no package


def process_start() -> float:
    """When this process began, as ``time.time()`` counts. The seconds before ``main`` belong to the window, too."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        age = uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - age if 0 <= age < 600 else time.time()  # a sandbox may invent the numbers in /proc


def link_package(directory: Path) -> Path:
    """Lay out the package in the directory as an installation would, by links: ``model`` inside ``cna_kernels``.

    The directory serves as PYTHONPATH and working directory, so that nothing needs to be installed or built.
    """
    package = directory / "cna_kernels"
    package.mkdir(parents=True)
    for source in (ROOT / "cna_kernels").iterdir():
        if source.name not in ("model", "__pycache__"):
            (package / source.name).symlink_to(source)
    (package / "model").symlink_to(ROOT / "model")
    return directory


def prepare(links: Path, dry: bool):
    """Set the environment of all processes that this one will start."""
    paths = [str(links), *SOURCES, os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["PYTHONUNBUFFERED"] = "1"
    if dry:
        os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
        return
    # Once Inductor is used, it moves Triton's cache, and kernels compiled before would be compiled again.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # in each of the processes that compile side by side


TOOL_FOLDERS = (
    "{cuda}/bin",
    "{cuda}/compute-sanitizer",
    "{cuda}/nsight-compute*",
    "/usr/local/cuda*/bin",
    "/usr/local/cuda*/compute-sanitizer",
    "/usr/local/cuda*/nsight-compute*",
    "/usr/local/cuda*/extras/compute-sanitizer",
    "/opt/nvidia/nsight-compute/*",
    "/opt/nvidia/*/bin",
    "/usr/local/nvidia/bin",
)


def tool_folders() -> list[str]:
    """The existing folders, besides those of PATH, where CUDA's tools may lie."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    patterns = [p.format(cuda=home) for home in homes for p in TOOL_FOLDERS if "{cuda}" in p]
    patterns += [p for p in TOOL_FOLDERS if "{cuda}" not in p]
    return list(dict.fromkeys(folder for pattern in patterns for folder in sorted(glob.glob(pattern), reverse=True)))


def find_tool(name: str, folders=None) -> str | None:
    """The path of ncu, compute-sanitizer or another CUDA program, on PATH or in CUDA's folders."""
    folders = tool_folders() if folders is None else folders
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def first_line(*command) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0]


def facts(commit: str | None) -> dict:
    """The facts that the parent process knows: date, commit, cores, driver. A worker adds the device and versions."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    commit = commit or os.environ.get("CNA_COMMIT")
    if not commit and (ROOT / ".git").exists() and shutil.which("git"):
        commit = first_line("git", "describe", "--always", "--dirty", "--abbrev=12")
    driver = shutil.which("nvidia-smi") and first_line(
        "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    )
    return dict(date=now, commit=commit or "unknown", cores=os.cpu_count()) | (dict(driver=driver) if driver else {})
