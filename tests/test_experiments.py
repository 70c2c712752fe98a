"""The experiments of bench/experiments compile for sm_90, without spills and without notices from ptxas."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = [
    ("persistent_mlp", "8B, sums and scaling"),
    ("ws_gate_up", "8B, 1000 tokens, sums"),
    ("ws_down_proj", "8B, 1000 tokens, 256 circuits"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only")
@pytest.mark.parametrize(("name", "case"), CASES, ids=[name for name, _ in CASES])
def test_compiles(name, case):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "experiments" / f"{name}.py"), "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name}_kernel" in done.stdout and "notices none" in done.stdout and "FAIL" not in done.stdout
