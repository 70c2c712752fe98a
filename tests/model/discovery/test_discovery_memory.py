"""Discovery's memory does not grow with the number of prompts, and with the replicates as their sums do."""

import os
import subprocess
import sys

import pytest

from cna_kernels.cpu import library
from cna_kernels.model.demo import world

# The peak of the child's own memory: ru_maxrss would start at what the parent had when it forked.
PROGRAM = """
import re, sys
from cna_kernels.model.cli import main
assert main(sys.argv[1:]) == 0
print("peak", re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_of_discover(tmp_path, n_prompts, *more):
    """Peak resident bytes of `cna discover` on the bundled instruct model with ``n_prompts`` prompts."""
    positive, negative = world.discovery_positive(), world.discovery_negative()
    for name, prompts in (("positive", positive), ("negative", negative)):
        lines = [f"{prompts[number % len(prompts)]} {number}" for number in range(n_prompts // 2)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    arguments = ["discover", "demo:instruct", "--positive", tmp_path / "positive.txt", "--negative"]
    arguments += [tmp_path / "negative.txt", "-o", tmp_path / "circuit.json"]
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments), *more]
    environment = {**os.environ}
    if not library.missing() and library.isa() == "amx":  # there PyTorch's products, not ours, keep memory for
        environment["CNA_CPU_ISA"] = "avx512_bf16"  # each shape of a pack: docs/limits.md says so
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return int(output.split()[-1]) * 1024


@pytest.mark.rare
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_10000_prompts_need_no_more_memory_than_1000(tmp_path):
    few, many = peak_of_discover(tmp_path, 1000), peak_of_discover(tmp_path, 10_000)
    assert many - few < 20 << 20, f"{(many - few) / 2**20:.1f} MiB more"


@pytest.mark.rare
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_replicates_need_little_more_than_their_sums(tmp_path):
    """fp64 sums and sums of squares, and the buffers of the ops, as large again: four times the sums alone."""
    n_replicates = 1000
    few, many = (
        peak_of_discover(tmp_path, 660, "--score", "cohen-d", "--bootstrap", n) for n in ("2", str(n_replicates))
    )
    totals = 2 * n_replicates * 8 * 8192  # of all neurons of the model, both halves, fp64
    assert totals < many - few < 5.4 * totals, f"{(many - few) / totals:.2f} times the sums"
