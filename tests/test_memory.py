"""Discovery's memory does not grow with the number of prompts."""

import os
import subprocess
import sys

import pytest

from cna_kernels.model.demo import world

pytest.importorskip("resource", reason="peak memory of a child is read with a POSIX call")


def peak_of_discover(tmp_path, n_prompts):
    """Peak resident bytes of `cna discover` on the bundled instruct model with so many prompts."""
    positive, negative = world.discovery_positive(), world.discovery_negative()
    for name, prompts in (("positive", positive), ("negative", negative)):
        (tmp_path / f"{name}.txt").write_text("\n".join((prompts * n_prompts)[: n_prompts // 2]))
    arguments = ["discover", "demo:instruct", "--positive", tmp_path / "positive.txt", "--negative"]
    arguments += [tmp_path / "negative.txt", "-o", tmp_path / "circuit.json"]
    command = [sys.executable, "-m", "cna_kernels.model.cli", *map(str, arguments)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_2000_prompts_need_no_more_memory_than_200(tmp_path):
    few, many = peak_of_discover(tmp_path, 200), peak_of_discover(tmp_path, 2000)
    assert many - few < 20 << 20, f"{(many - few) / 2**20:.1f} MiB more"
