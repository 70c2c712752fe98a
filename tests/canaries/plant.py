"""Plant bugs, one at a time, and check that a test catches each.

    python tests/canaries/plant.py [REGEX]     only bugs whose name or file matches

The bugs are planted in a copy of the repository. Exit code 1 if a test does not notice its bug.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import in_behaviours
import in_engine
import in_files
import in_hub
import in_kernels
import in_loading
import in_models
import in_serving
import in_tables

ROOT = Path(__file__).resolve().parents[2]
CANARIES = [
    canary
    for module in (in_kernels, in_loading, in_engine, in_tables, in_files, in_behaviours, in_serving, in_hub, in_models)
    for canary in module.CANARIES
]


def run_tests(directory, canary):
    """Return pytest's exit code for the canary's test, run against the package in ``directory``."""
    code = (
        "import sys, cna_kernels, cna_kernels.model, pytest;"
        f"assert cna_kernels.__file__.startswith({str(directory)!r}), cna_kernels.__file__;"
        f"assert cna_kernels.model.__file__.startswith({str(directory)!r}), cna_kernels.model.__file__;"
        f"tests, name = {canary.tests!r}, {canary.test!r};"
        "sys.exit(pytest.main(['-x', '-q', '-p', 'no:cacheprovider', tests, '-m', '', '-k', name]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=directory, env=environment, capture_output=True, text=True)
    return done.returncode


def caught(canary):
    """Return whether the test passes without the bug and fails with it, and both exit codes."""
    with tempfile.TemporaryDirectory() as directory:
        for part in ("cna_kernels", "model", "tests", "bench", "docs", "README.md", "pyproject.toml"):
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, Path(directory, part))
        Path(directory, "cna_kernels", "model").symlink_to("../model")  # an installed package has it there
        clean = run_tests(directory, canary)
        path = Path(directory, canary.file)
        text = path.read_text()
        assert text.count(canary.right) == 1, f"{canary.bug}: {text.count(canary.right)} places in {canary.file}"
        path.write_text(text.replace(canary.right, canary.wrong))
        planted = run_tests(directory, canary)
    return clean == 0 and planted == 1, (clean, planted)


def main():
    pattern = re.compile(sys.argv[1] if len(sys.argv) > 1 else "")
    chosen = [canary for canary in CANARIES if pattern.search(f"{canary.bug} {canary.file}")]
    missed = 0
    for canary in chosen:
        noticed, codes = caught(canary)
        missed += not noticed
        outcome = "caught" if noticed else "NOT CAUGHT (exit {} without the bug, {} with it)".format(*codes)
        print(f"{canary.bug:40s} {canary.file:34s} {outcome}: {canary.test}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} planted bugs caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
