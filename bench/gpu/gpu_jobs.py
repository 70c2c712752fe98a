"""What ``bench/gpu/gpu.py`` runs: the jobs of each window in their order, each with an estimate of its seconds.

A job is ``kind/model/T``; ``gpu_worker`` has a function for each kind. A stage is a list of jobs, run one after the
other. A stage with ``seconds`` is a time in which its tests run side by side with the jobs of later stages. Each of
those jobs runs once, unmeasured, so that its kernels lie compiled in Triton's cache.

This module imports no torch, because the parent process that reads it imports none. What depends on the plans comes
from the ``catalogue`` that a worker sends: for each ``op/model/T`` the default plan and the others that could serve.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LIMITS = {"1": 330, "2": 360, "3": 300, "tune": 540}  # seconds of each window, from the start of the process
B8, B1, B70, Q7 = "Llama-3.1-8B", "Llama-3.2-1B", "Llama-3.1-70B", "Qwen2.5-7B"

# Seconds of a job by its kind, once its kernels are compiled: the most that an H100 took. A worker takes 8 seconds to
# start, which count for the first job of a window.
ESTIMATES = {
    "ceilings": 9, "dependent": 6, "host": 1, "check": 1.5, "decode": 1, "prefill": 2.5, "down": 2, "elementwise": 1.5,
    "replay": 1, "table": 1, "in_place": 4, "generate": 17, "compiled": 7, "compiled_swiglu": 1, "candidate": 2.5,
    "tune": 14, "ncu": 12, "memcheck": 7, "racecheck": 20,
}  # fmt: skip
ONCE = ("ceilings", "dependent", "host", "replay")  # kinds that need no unmeasured run before
TUNE_PARTS = 5  # processes that compile a sweep's variants
OUTSIDE = ("ncu", "memcheck", "racecheck")  # kinds that run in their own process, not in the worker


class Job(NamedTuple):
    name: str
    seconds: float  # estimate
    plan: str = ""  # "op=plan" that the job is about: where that plan has crashed, the job is left out

    @property
    def kind(self):
        return self.name.partition("/")[0]

    @property
    def limit(self):
        """Seconds after which the job is given up."""
        if self.kind == "candidate":
            return 20
        return max(55, 2.5 * self.seconds) if self.seconds >= 5 else 30


class Stage(NamedTuple):
    title: str
    jobs: list[Job]
    seconds: float = 0  # of tests and compilation side by side, for the jobs up to the next stage with seconds
    tests: tuple[str, ...] = ()  # pytest -k expressions, each with its file before a colon

    def estimate(self):
        return self.seconds + sum(job.seconds for job in self.jobs)


def job(kind, *names, plan="", seconds=None):
    return Job("/".join([kind, *map(str, names)]), ESTIMATES[kind] if seconds is None else seconds, plan)


def default_plan(catalogue, op, model, T):
    found = catalogue.get(f"{op}/{model}/{T}")
    return f"{op}={found['default']}" if found else ""


def mlp_jobs(catalogue, model, decode, prefill):
    """Jobs for correctness, then time, of the default plans; the smallest T comes first, because it matters most."""
    jobs = []
    for T in (*decode, *prefill):
        plan = default_plan(catalogue, "gated_mlp", model, T)
        jobs += [job("check", model, T, plan=plan), job("decode" if T in decode else "prefill", model, T, plan=plan)]
    for T in prefill:
        jobs.append(job("down", model, T, plan=default_plan(catalogue, "down_proj", model, T)))
    return jobs + [job("elementwise", model, T) for T in reversed(prefill)]


def candidates(catalogue, wanted):
    """A job for each plan that is not the default, for each (model, op, T) of ``wanted``, in that order. Only plans
    made for many tokens come last where T is small."""
    jobs, unlikely = [], []
    for model, op, T in wanted:
        for name in catalogue.get(f"{op}/{model}/{T}", {}).get("candidates", ()):
            made_for_many = T <= 64 and name in ("fused", "blas", "tma")
            each = job("candidate", op, name, model, T, plan=f"{op}={name}")
            (unlikely if made_for_many else jobs).append(each)
    return jobs + unlikely


def value_tests(catalogue):
    """The tests of the bf16 values of every default plan. In the tests' ids ``-`` ends a plan's name, so ``split-``
    does not select ``split_last``."""
    plans = dict.fromkeys(key.partition("/")[0] + "-" + found["default"] for key, found in catalogue.items())
    file, some = "tests/kernels/test_triton.py", "test_values and bfloat16 and (both or circuits)"
    named = [f"{file}:{some} and {plan}-" for plan in plans]
    return (*named, f"{file}:{some} and (swiglu or steer_act)", f"{file}:gated_mlp-fused", f"{file}:test_sums_in_fp64")


def first_window(catalogue):
    rows = mlp_jobs(catalogue, B8, (1, 8, 64), (512, 4096))
    # jobs that only this window has come right after the first row
    rows[2:2] = [job("host", B8, 1), job("dependent", B8), job("replay", B8)]
    tried = [(model, "gated_mlp", T) for T in (512, 1024, 256, 4096, 128) for model in (B8, B1, Q7, B70)]
    tried += [(B8, "gated_mlp", T) for T in (1, 64, 8)] + [(B8, "down_proj", 4096)]
    tried += [(B8, "down_proj", T) for T in (16, 128)] + [(B1, "gated_mlp", 1)]
    return [
        Stage("the card, its ceilings, and the tools", [job("ceilings")]),
        Stage("values of default plans, tests of launches, compilation", [], 70, (
            "tests/kernels/test_cuda.py:", "tests/vllm_plugin/test_on_cuda.py:", "tests/attach/test_batching.py:cuda",
            *value_tests(catalogue),
        )),
        Stage("default plans, 8B", rows),
        Stage("default plans, 1B", mlp_jobs(catalogue, B1, (1, 8, 64), (512, 4096))),
        Stage("down_proj with a live table of 64 circuits", [
            job("table", B8, T, plan=default_plan(catalogue, "down_proj", B8, T)) for T in (128, 256)
        ]),
        Stage("the package's own model", [], 60, ("tests/model/test_cuda_model.py:",)),
        Stage("beside an activation, as in vLLM", [
            job("in_place", model, T) for model in (B8, B1) for T in (1, 16, 64, 512, 4096)
        ]),
        Stage("a transformers model, steered", [job("generate", B8, 1), job("generate", B8, 32, seconds=12)]),
        Stage("Inductor as rival", [
            job("compiled", B8, 1), job("compiled", B8, 4096), job("compiled_swiglu", B8, 4096),
        ]),
        Stage("compilation of the candidates", [], 20),
        Stage("candidates", candidates(catalogue, tried)),
    ]  # fmt: skip


def second_window(catalogue, sweep):
    """sweep: (kernel, T) of the launch tables to try; the table whose rows lose most comes first."""
    big = []
    for model in (B70, Q7):
        big += mlp_jobs(catalogue, model, (1, 8, 64), (4096,))
    tried = [(model, "gated_mlp", T) for T in (1, 8) for model in (B8, B1, B70)]
    return [
        Stage("the card and its ceilings", [job("ceilings")]),
        Stage("compilation", [], 50),
        Stage("sweep of what loses", [job("tune", kernel, B8, T) for kernel, T in sweep[:3]]),
        Stage("hardware counters", [job("ncu")]),
        Stage("default plans, 70B and Qwen", big),
        Stage("memory checks", [job("memcheck", "defaults")]),
        Stage("races, for information", [job("racecheck", "defaults")]),
        Stage("compilation of the candidates", [], 20),
        Stage("candidates", [*candidates(catalogue, tried), job("memcheck", "candidates")]),
    ]


def third_window(catalogue):
    """What the first two windows leave out: numbers of tokens between the usual ones, most of them no multiple of a
    tile; Inductor against more default plans; and races of every default plan, with ``fused`` for many tokens."""
    between = []
    for model in (B8, B1):
        between += mlp_jobs(catalogue, model, (2, 4, 16, 32), BETWEEN)
    return [
        Stage("the card and its ceilings", [job("ceilings")]),
        Stage("tests, compilation", [], 75, ("tests/model/test_cuda_model.py:", "tests/kernels/test_cuda.py:")),
        Stage("a transformers model, steered", [job("generate", B8, 1), job("generate", B8, 32, seconds=12)]),
        Stage("Inductor as rival", [job("compiled", model, T) for T in (1, 4096) for model in (B8, B1)]),
        Stage("races", [job("racecheck", "defaults")]),
        Stage("default plans between the usual numbers of tokens", between),
    ]


def tune_window(catalogue, sweep):
    sweep = [*sweep, ("sum_fp64", 512), ("sum_fp64", 4096)]
    return [
        Stage("the card and its ceilings", [job("ceilings")]),
        Stage("compilation", [], 150),
        Stage("sweep", [job("tune", kernel, model, T) for model in (B8, B1, B70, Q7) for kernel, T in sweep]),
    ]


def window(name, catalogue, sweep=()):
    if name in ("1", "3"):
        return first_window(catalogue) if name == "1" else third_window(catalogue)
    return second_window(catalogue, sweep) if name == "2" else tune_window(catalogue, sweep)


# The shapes that a catalogue must know: those of all windows.
BETWEEN = (65, 129, 256, 513, 769, 2048)
TOKENS = {
    "gated_mlp": (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024, 4096, *BETWEEN),
    "down_proj": (16, 128, 512, 4096, *BETWEEN),
}
MODELS = (B8, B1, B70, Q7)


def chosen(stages, only="", models=""):
    """The stages with only the jobs and tests that match ``only`` and ``models``; and the names of the other jobs."""
    wanted, left_out = [], []
    for stage in stages:
        jobs = []
        for each in stage.jobs:
            model = next((name for name in MODELS if name in each.name), None)
            keep = each.kind == "ceilings" or re.search(only, each.name)
            keep = keep and not (models and model and not any(m in model for m in models.split(",")))
            (jobs if keep else left_out).append(each)
        tests = tuple(test for test in stage.tests if re.search(only, test))
        wanted.append(stage._replace(jobs=jobs, tests=tests))
    return wanted, [each.name for each in left_out]


def chunks(jobs):
    """Lists of jobs to run once before they are measured, one process for each list. Jobs that share kernels (model,
    few or many tokens) are in one list. A candidate plan has its own list, because it may crash its process. A sweep is
    cut into several lists."""
    found = {}
    for each in jobs:
        kind, *names = each.name.split("/")
        if kind in OUTSIDE:
            found[kind == "ncu", tuple(names)] = [Job("profile" if kind == "ncu" else f"every_plan/{names[0]}", 0)]
        if kind in ONCE or kind in OUTSIDE:
            continue
        if kind == "tune":
            for part in range(TUNE_PARTS):
                found[each.name, part] = [each._replace(name=f"{each.name}/{part}")]
        elif kind in ("generate", "compiled", "compiled_swiglu"):
            found[each.name, ""] = [each]
        elif kind == "candidate":
            found.setdefault((each.plan, names[-2]), []).append(each)
        else:
            family = "down_proj" if kind in ("down", "table") else "gated_mlp"
            found.setdefault((family, names[-2], int(names[-1]) <= 64), []).append(each)
    return list(found.values())


def within(stages, limit):
    """(stage, job, estimated seconds so far, whether the job fits) of every job in order; job is None for a stage's own
    seconds. A job that does not fit by the estimates still runs if others take less than estimated."""
    so_far, listed = 0.0, []
    for stage in stages:
        if stage.seconds:
            so_far += stage.seconds
            listed.append((stage, None, so_far, so_far <= limit))
        for each in stage.jobs:
            fits = so_far + each.seconds <= limit
            so_far += each.seconds if fits else 0
            listed.append((stage, each, so_far, fits))
    return listed
