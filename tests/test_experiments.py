"""The experiments of bench/experiments compile for sm_90, without spills and without notices from ptxas.

And what runs them on a GPU knows a wrong answer, and ends a process that hangs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench" / "experiments"))

import experiment

CASES = [
    ("persistent_mlp", "8B, sums and scaling"),
    ("ws_gate_up", "8B, 1000 tokens, sums"),
    ("ws_down_proj", "8B, 1000 tokens, 256 circuits"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only")
@pytest.mark.parametrize(("name", "case"), CASES, ids=[name for name, _ in CASES])
def test_compiles(name, case):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(experiment.HERE / f"{name}.py"), "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name}_kernel" in done.stdout and "notices none" in done.stdout and "FAIL" not in done.stdout


def test_a_wrong_answer_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    exact = {"y": torch.linspace(-1, 1, 100, dtype=torch.float64), "act_sum": torch.ones(3, dtype=torch.float64)}
    plain = {name: part.bfloat16().float() for name, part in exact.items()}
    right = {"y": exact["y"].bfloat16(), "act_sum": torch.full([3], 1.001)}
    assert experiment.checked(lambda: right, exact, plain) == "right"
    for name, value in (("y", 0.5), ("y", torch.nan), ("act_sum", 1.5)):
        wrong = {key: part.clone() for key, part in right.items()}
        wrong[name][1] = value
        assert experiment.checked(lambda wrong=wrong: wrong, exact, plain).startswith(f"{name} off by")
    calls = iter(range(100))
    assert "repeat 4" in experiment.checked(
        lambda: right | {"y": (exact["y"] + 1e-3 * (next(calls) == 5)).bfloat16()}, exact, plain
    )


def test_a_kernel_that_hangs_ends_its_process_only(monkeypatch):
    hangs = "import experiment, time; experiment.LIMIT_S = 0.1\nwith experiment.Limit(): time.sleep(60)"
    run = subprocess.run
    monkeypatch.setattr(
        experiment.subprocess,
        "run",
        lambda command, **options: run([sys.executable, "-c", hangs], cwd=experiment.HERE, **options),
    )
    assert experiment.in_a_process("persistent_mlp", "8B, plain")["check"].startswith("hangs")
