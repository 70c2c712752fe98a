"""csrc/ builds alone, with every compiler that is here, with and without OpenMP, and its example passes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parent.parent / "csrc"
COMPILERS = {"gcc": ("gcc", "g++"), "clang": ("clang", "clang++")}
ARM = ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++")


def make(build, *arguments, **environment):
    command = ["make", "-s", "-j2", "-C", str(CSRC), f"BUILD={build}", "OPTIMIZE=-O1", *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)


def has_openmp(compiler, directory):
    source = directory / "openmp.cpp"
    source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    done = subprocess.run([compiler, "-fopenmp", str(source), "-o", str(directory / "openmp")], capture_output=True)
    return done.returncode == 0


@pytest.mark.parametrize("openmp", [1, 0])
@pytest.mark.parametrize("name", COMPILERS)
def test_example(tmp_path, name, openmp):
    compilers = COMPILERS[name]
    if not all(map(shutil.which, (*compilers, "make"))):
        pytest.skip(f"{name} is not installed")
    if openmp and not has_openmp(compilers[1], tmp_path):
        pytest.skip(f"{name} has no OpenMP here")
    done = make(tmp_path, f"CC={compilers[0]}", f"CXX={compilers[1]}", f"OPENMP={openmp}", "example")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.rstrip().endswith("passed") and ("OpenMP" in done.stdout) == bool(openmp)
    for level in ("generic", "no such level"):
        again = subprocess.run(
            [tmp_path / "example", CSRC / "example.f32"],
            capture_output=True,
            text=True,
            env={**os.environ, "CNA_CPU_ISA": level},
        )
        expected = (0, "generic, ") if level == "generic" else (1, "")
        assert (again.returncode, again.stdout[: len(expected[1])]) == expected, again.stderr


def test_example_on_arm(tmp_path):
    if not all(map(shutil.which, (*ARM, "qemu-aarch64", "make"))):
        pytest.skip("no cross compiler for 64-bit Arm, or no qemu-aarch64")
    done = make(tmp_path, f"CC={ARM[0]}", f"CXX={ARM[1]}", "LDFLAGS=-static", "RUN=qemu-aarch64", "example")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("neon, ") and done.stdout.rstrip().endswith("passed")


def test_example_data_is_what_the_definition_gives(monkeypatch):
    monkeypatch.syspath_prepend(CSRC)
    import example_data

    stored = torch.frombuffer(bytearray((CSRC / "example.f32").read_bytes()), dtype=torch.float32)
    torch.testing.assert_close(stored, torch.cat([array.flatten() for array in example_data.arrays()]))
