"""Plant fourteen bugs in the Triton kernels, one at a time, and check that a test catches each.

    python tests/kernels/canaries.py

A canary is a replacement in one source file and the test that must fail with it (and passes without it). The bugs are
planted in a copy of the repository. Exit code 1 if a test does not notice its bug.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FILES = ["tests/kernels/test_triton.py", "tests/kernels/test_repeat.py"]


class Canary(NamedTuple):
    bug: str
    file: str
    right: str
    wrong: str
    test: str  # pytest -k


CANARIES = [
    Canary(
        "unwritten tail",
        "swiglu.py",
        "n_stored = tl.where(tl.program_id(2) == 0, N, 0)",
        "n_stored = tl.where(tl.program_id(2) == 0, N // 16 * 16, 0)",
        "test_values and swiglu and 63x130x72-bfloat16-plain",
    ),
    Canary(
        "set instead of add",
        "sums.py",
        "tl.store(here, tl.load(here, mask=mask, other=0.0) + value, mask=mask)",
        "tl.store(here, value, mask=mask)",
        "test_values and flat and 16x136x200-bfloat16-sums",
    ),
    Canary(
        "dropped last token",
        "swiglu.py",
        "        t_mask = t < t_last\n        mask",
        "        t_mask = t < t_last - 1\n        mask",
        "test_values and swiglu and 16x136x200-bfloat16-plain",
    ),
    Canary(
        "wrong stride",
        "swiglu.py",
        "act = tl.load(gate_ptr + t[:, None] * stride_gate_t",
        "act = tl.load(gate_ptr + t[:, None] * N",
        "test_values and swiglu and 16x136x200-bfloat16-plain",
    ),
    Canary(
        "int32 offset",
        "swiglu.py",
        "t = (t_start + tl.arange(0, BLOCK_T)).to(tl.int64)",
        "t = t_start + tl.arange(0, BLOCK_T)",
        "test_offsets_beyond_int32 and swiglu",
    ),
    Canary(
        "row -1 scaled",
        "steer.py",
        "steered = (circuit >= 0) & (circuit < steer_args.n_circuits)",
        "steered = circuit < steer_args.n_circuits\n    circuit = tl.maximum(circuit, 0)",
        "test_multiplier_one_and_no_circuit and swiglu",
    ),
    Canary(
        "scale before the sum",
        "ops.py",
        "return launch.linear(pass_over(act, *extras), w_down)",
        "given = _keywords(extras)\n"
        "        steer = {name: given[name] for name in ('scale', 'row_circuit')}\n"
        "        return launch.linear(pass_over(steer_act(act, **steer), *extras[:3], *[None] * 4), w_down)",
        "test_sums_come_before_scaling and down_proj-blas",
    ),
    Canary(
        "wrong circuit row",
        "steer.py",
        "row = steer_args.offsets_ptr + circuit.to(tl.int64) * steer_args.stride_offsets_k",
        "row = steer_args.offsets_ptr + (circuit // 2).to(tl.int64) * steer_args.stride_offsets_k",
        "test_values and swiglu and 16x136x200-bfloat16-circuits",
    ),
    Canary(
        "split-K part lost",
        "down_decode.py",
        "    for s in range(S):\n",
        "    for s in range(S - 1):\n",
        "test_values and split and 130x1032x72-bfloat16-plain",
    ),
    Canary(
        "wrong mask",
        "gate_up_decode.py",
        "w = tl.load(w_row + k[None, :], mask=w_mask[:, None] & (k < H)[None, :], other=0.0)",
        "w = tl.load(w_row + k[None, :], mask=w_mask[:, None] & (k < H - 1)[None, :], other=0.0)",
        "test_values and flat and 16x136x200-bfloat16-plain",
    ),
    Canary(
        "summed block skipped",
        "sums.py",
        "if any_counts(token_weight_row, t_mask, c_first, C, BLOCK_C) > 0:",
        "if any_counts(token_weight_row, t_mask, c_first, C, BLOCK_C) > 1:",
        "test_values and tma and 130x1032x72-bfloat16-sums",
    ),
    Canary(
        "act left scaled",
        "steer.py",
        "_patch(act, saved, Steer(scale, row_circuit), restore=True)",
        "_patch(act, saved, Steer(scale, row_circuit), restore=False)",
        "test_down_proj_leaves_act_as_it_was and tma",
    ),
    Canary(
        "held act of the wrong neuron",
        "steer.py",
        "same = index[None, :] == n[:, None]",
        "same = index[None, :] == n[:, None] + 1",
        "test_values and gemv and 1x48x24-bfloat16-circuits",
    ),
    Canary(
        "repeat off 16 bytes",
        "repeat.py",
        "if tensors[place].data_ptr() & 15:",
        "if tensors[place].data_ptr() & 0:",
        "test_addresses_that_the_code_was_not_compiled_for",
    ),
]


def run_tests(directory, test):
    """Return pytest's exit code for the tests, run against the package in ``directory``."""
    code = (
        "import sys, importlib, cna_kernels, pytest;"
        f"assert cna_kernels.__file__.startswith({str(directory)!r}), cna_kernels.__file__;"
        f"sys.exit(pytest.main(['-x', '-q', '-p', 'no:cacheprovider', *{FILES!r}, '-m', '', '-k', {test!r}]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=directory, env=environment, capture_output=True, text=True)
    return done.returncode


def main():
    missed = 0
    for canary in CANARIES:
        with tempfile.TemporaryDirectory() as directory:
            for part in ("cna_kernels", "tests", "pyproject.toml"):
                source = ROOT / part
                (shutil.copytree if source.is_dir() else shutil.copy)(source, Path(directory, part))
            clean = run_tests(directory, canary.test)
            path = Path(directory, "cna_kernels", "triton", canary.file)
            text = path.read_text()
            assert text.count(canary.right) == 1, f"{canary.bug}: {text.count(canary.right)} places in {canary.file}"
            path.write_text(text.replace(canary.right, canary.wrong))
            planted = run_tests(directory, canary.test)
        caught = clean == 0 and planted == 1
        missed += not caught
        outcome = "caught" if caught else f"NOT CAUGHT (exit {clean} without the bug, {planted} with it)"
        print(f"{canary.bug:22s} {canary.file:20s} {outcome}: {canary.test}", flush=True)
    print(f"{len(CANARIES) - missed} of {len(CANARIES)} planted bugs caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
