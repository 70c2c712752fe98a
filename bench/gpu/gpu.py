"""The kernels on one GPU: tests and benchmark rows in windows of a few minutes, most valuable first.

    python bench/gpu/gpu.py --window 1 --out DIR       default plans, a steered model, rivals, candidates: 330 s
    python bench/gpu/gpu.py --window 2 --out DIR       sweep of what loses, hardware counters, 70B, memory checks: 360 s
    python bench/gpu/gpu.py --window 3 --out DIR       other numbers of tokens, Inductor, races: 300 s
    python bench/gpu/gpu.py --window tune --out DIR    all launch tables
    python bench/gpu/gpu.py --window 1 --list          every job in its order, with an estimate of its seconds
    python bench/gpu/gpu.py --window 1 --out DIR --dry the same jobs on a CPU: tiny shapes, Triton interpreted
    python bench/gpu/gpu.py --record DIR               merge DIR/gpu.json into bench/results/gpu-<device>.json

Nothing is installed or built: the package is linked together for PYTHONPATH. DIR/gpu.{json,md,log} are written again
after every row. This process measures nothing and imports no torch: ``gpu_run`` starts workers, and a kernel that
crashes or hangs costs the job it was in. The clock runs from the start of the process. ``gpu_jobs`` has the windows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # shapes.py
import gpu_environment
import gpu_jobs
import gpu_record
import gpu_run
import gpu_tools
from gpu_report import Record, is_wrong

RESERVE = 6  # seconds of a window that are kept for writing results
DRY_SECONDS = 900


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", choices=gpu_jobs.LIMITS, default="1", help="1, 2, 3 or tune (1)")
    parser.add_argument("--out", type=Path, help="directory for the results")
    parser.add_argument("--seconds", type=float, help="time limit, default that of the window")
    parser.add_argument("--only", default="", metavar="REGEX", help="only jobs and tests whose name it finds")
    parser.add_argument("--models", default="", help="only jobs of these models, e.g. 8B,70B")
    parser.add_argument("--results", type=Path, help="gpu.json to choose the sweep by (bench/results/gpu-*.json)")
    parser.add_argument("--commit", default="", help="what is measured, where there is no .git (CNA_COMMIT)")
    parser.add_argument("--list", action="store_true", help="print the jobs and stop")
    parser.add_argument("--dry", action="store_true", help="on a CPU, interpreted, tiny shapes")
    parser.add_argument("--record", type=Path, metavar="DIR", help="merge DIR/gpu.json into bench/results/ and stop")
    args = parser.parse_args(arguments)
    if not (args.out or args.list or args.record):
        parser.error("--out, --list or --record is required")
    return args


def stages_of(args, catalogue):
    """The stages to run, and the names of the jobs that the command line left out."""
    sweep = gpu_record.losing(gpu_record.last_rows(args.results))
    return gpu_jobs.chosen(gpu_jobs.window(args.window, catalogue, sweep), args.only, args.models)


def listing(stages, limit) -> str:
    """Every job in its order, with its estimated seconds and whether it fits the limit."""
    listed, lines, last = gpu_jobs.within(stages, limit), [], None
    for stage, job, so_far, fits in listed:
        if stage is not last:
            lines.append(f"{stage.title}: {stage.estimate():.0f} s")
            last = stage
        if job:
            lines.append(f"  {job.seconds:5.1f} s  {'at ' + format(so_far, '3.0f') if fits else 'if time'}  {job.name}")
        lines += [f"            {test}" for test in stage.tests if job is None]
    fitting = [job for _, job, _, fits in listed if fits]
    total = max((so_far for _, _, so_far, fits in listed if fits), default=0)
    lines.append(f"{len(fitting)} of {len(listed)} entries, {total:.0f} s by the estimate, limit {limit:.0f} s")
    return "\n".join(lines)


def run_stages(crew, stages):
    """Run the stages in order. A stage that compiles does so for the stages up to the next stage that compiles."""
    for number, stage in enumerate(stages):
        if stage.seconds:
            ahead = []
            for later in stages[number + 1 :]:
                if later.seconds:
                    break
                ahead += later.jobs
            if ahead or stage.tests:
                gpu_run.prepare(crew, stage, ahead)
        for job in stage.jobs:
            if job.kind in gpu_jobs.OUTSIDE:
                start = time.time()
                gpu_tools.run_tool(crew, job)
                crew.record.job(job, time.time() - start)
            else:
                crew.measure([job])


def ask_catalogue(crew):
    """Ask a worker for the catalogue of plans. The worker goes on to measure afterwards."""
    crew.worker = crew.worker or crew.start_worker("time")
    return next(event["catalogue"] for event in list(crew.worker.ask("catalogue", 60)))


def main(arguments=None):
    start = gpu_environment.process_start() if arguments is None else time.time()
    args = parse(arguments)
    if args.record:
        print(gpu_record.record(args.record))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        links = gpu_environment.link_package(Path(scratch, "links"))
        dry = args.dry or args.list
        gpu_environment.prepare(links, dry)
        limit = args.seconds or gpu_jobs.LIMITS[args.window]
        deadline = start + (DRY_SECONDS if dry else limit - RESERVE)
        record = Record(args.out or Path(scratch), "gpu", deadline, args.window)
        crew = gpu_run.Crew(record, dry, links)
        try:
            return run(args, crew, limit)
        finally:
            crew.close()


def run(args, crew, limit):
    record = crew.record
    try:
        stages, not_asked_for = stages_of(args, ask_catalogue(crew))
    except gpu_run.Died as died:
        print(f"gpu.py: no worker starts: {died}; its words are in {record.log_file}", file=sys.stderr)
        print(subprocess.run(["tail", "-5", record.log_file], capture_output=True, text=True).stdout, file=sys.stderr)
        return 2
    if args.list or args.dry:
        print(listing(stages, limit - RESERVE), flush=True)
    if args.list:
        return 0
    record.add(dict(environment=gpu_environment.facts(args.commit)))
    for row in gpu_tools.tool_rows():
        record.add(row)
    run_stages(crew, stages)
    if not_asked_for:
        record.left_out.append(dict(job=f"{len(not_asked_for)} jobs", why="not asked for by --only and --models"))
    record.write()
    print(record.summary())
    return 1 if any(map(is_wrong, record.rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
