"""What the experiments share: compile the cases without a GPU, or check and time them on one.

python bench/experiments/NAME.py            registers, spills, shared memory, what ptxas says; exit code 1 if bad
python bench/experiments/NAME.py --run      each case in a process of its own, 20 s for its check, 20 for its time
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]  # bench, and the checkout where nothing is installed

LIMIT_S = 20.0
REPEATS = 20


class Trial(NamedTuple):
    """One set of inputs."""

    ours: Callable[[], dict]  # results by name; sums are added to in place
    rival: Callable[[], dict]  # the same by the default plan
    reference: Callable[[torch.dtype], dict]  # by cna_kernels.reference in this dtype, from the sums before any call


def blank(*shape, dtype=torch.bfloat16, spread=1.0):
    return torch.empty(*shape, dtype=dtype, device="meta")


def random(*shape, dtype=torch.bfloat16, spread=1.0):
    return (torch.randn(*shape, device="cuda") * spread).to(dtype)


def main(name: str, cases: dict[str, dict], make: Callable[..., Trial]) -> int:
    """make(new, **case) builds the inputs by new(*shape, dtype=, spread=)."""
    parser = argparse.ArgumentParser(description=f"The experiment {name}: see README.md beside it.")
    parser.add_argument("--run", action="store_true", help="check and time every case on the GPU")
    parser.add_argument("--case", choices=cases, help="only this one; with --run in this process")
    parser.add_argument("--out", type=Path, help="with --run: write the results there as JSON")
    args = parser.parse_args()
    if not args.run:
        return compile_all({args.case: cases[args.case]} if args.case else cases, make)
    if args.case:
        print(json.dumps(run_one(cases[args.case], make)))
        return 0
    results = {case: in_a_process(name, case) for case in cases}
    if args.out:
        facts = dict(experiment=name, device=torch.cuda.get_device_name(), torch=torch.__version__, results=results)
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if all(result.get("check") == "right" for result in results.values()) else 1


def compile_all(cases, make):
    """Compile what each case would launch for sm_90, print a line for each kernel, and say what is wrong with it."""
    import triton

    import aot
    import compile_gate

    bad = 0
    for case, options in cases.items():
        for c in aot.compile_launches(90, make(blank, **options).ours):
            row = dict(kernel=c.kernel, op=c.kernel, T=options.get("T", 1), model=options["model"], dtype="bf16")
            row |= dict(feature="plain", registers=c.registers, spill_bytes=c.spills, shared=c.shared, per_item=None)
            row |= dict(
                notices=c.notices, register_a=c.register_a, overwritten=c.overwritten, early=c.early, **c.counts
            )
            wrong = compile_gate.failures(row, 90)
            bad += bool(wrong)
            print(
                f"triton {triton.__version__}  {case}: {c.kernel}, {c.num_warps} warps, {c.registers} registers, "
                f"{c.spills} bytes spilled, {c.shared} of shared memory, {c.counts['HGMMA']} HGMMA, "
                f"notices {c.notices or 'none'}{'  FAIL ' + '; '.join(wrong) if wrong else ''}",
                flush=True,
            )
    return 1 if bad else 0


def in_a_process(name, case):
    """A case's results from a process of its own: a kernel that hangs or faults costs no other case the device."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--run", "--case", case]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        result = dict(check="not done in 90 s")
    else:
        if done.returncode == 0:
            result = json.loads(done.stdout.splitlines()[-1])
        elif done.returncode == HUNG:
            result = dict(check=f"hangs: not done in {LIMIT_S:.0f} s")
        else:
            result = dict(check=f"exit code {done.returncode}", error=done.stderr[-1000:])
    print(f"{case}: " + ", ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    return result


HUNG = 124


class Limit:
    """Ends the process if the block takes longer than LIMIT_S: nothing else stops a kernel that waits for ever."""

    def __enter__(self):
        self.timer = threading.Timer(LIMIT_S, os._exit, (HUNG,))
        self.timer.daemon = True
        self.timer.start()

    def __exit__(self, *_):
        self.timer.cancel()


def run_one(options, make):
    """Check one case, and time it if it is right."""
    torch.manual_seed(0)
    trial = make(random, **options)
    exact, plain = trial.reference(torch.float64), trial.reference(torch.bfloat16)
    with Limit():
        check = checked(trial.ours, exact, plain)
    if check != "right":
        return dict(check=check)
    sets = [trial, *(make(random, **options) for _ in range(3))]  # together larger than L2
    trial.rival()  # compiled before the clock runs
    torch.cuda.synchronize()
    with Limit():
        return dict(check=check) | timed(sets)


def checked(ours, exact, plain):
    """ "right", or what is wrong: the tolerance rule of the tests, then the same bits every time."""
    first = ours()
    torch.cuda.synchronize()
    for name, got in first.items():
        error = (got.double() - exact[name]).abs().max()
        slack, eps = (4, torch.finfo(torch.bfloat16).eps) if "sum" in name else (2, torch.finfo(got.dtype).eps)
        limit = slack * (plain[name].double() - exact[name]).abs().max() + eps * exact[name].abs().max()
        if not error <= limit:
            return f"{name} off by {error:.3e}, limit {limit:.3e}"
    y = first["y"].clone()
    for repeat in range(REPEATS):
        if not torch.equal(ours()["y"], y):
            return f"other bits in repeat {repeat}"
    return "right"


def timed(sets):
    """Microseconds of a call by ours and by the default plan, from CUDA graphs over all sets replayed in turn."""
    try:
        replays = [captured([getattr(trial, side) for trial in sets]) for side in ("ours", "rival")]
        how = "graph"
    except RuntimeError as error:  # the kernel cannot be captured: then both are launched one by one
        torch.cuda.synchronize()
        replays = [lambda side=side: [getattr(trial, side)() for trial in sets] for side in ("ours", "rival")]
        how = f"eager, no graph: {error}"[:200]
    times = ([], [])
    for _ in range(REPEATS):
        for replay, kept in zip(replays, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            kept.append(1000 * start.elapsed_time(end) / len(sets))
    ours, rival = (statistics.median(kept) for kept in times)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    return dict(ours_us=round(ours, 1), default_us=round(rival, 1), ratio=round(ratio, 3), how=how)


def captured(calls):
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay
