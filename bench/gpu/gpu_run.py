"""The processes of ``bench/gpu/gpu.py``: workers that measure, tests, and tools, each with its own time limit.

A worker takes jobs one by one. When a worker dies or hangs, only its current job is lost: a new worker goes on with the
next job, and the plan that the lost job was about is not tried again in this run.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_environment import ROOT
from gpu_jobs import Job, chunks

WORKER = [sys.executable, str(ROOT / "bench" / "gpu" / "gpu_worker.py")]
START_SECONDS = 90  # a cold import of torch may take 30
RESERVE = 4  # seconds kept for ending processes and writing files


class Died(Exception):
    """A worker has ended, or, if ``hung``, did not answer in time."""

    def __init__(self, reason, hung):
        super().__init__(reason)
        self.hung = hung


class Worker:
    """A process that measures. ``ask`` gives the rows of one job."""

    def __init__(self, order: dict, log: Path, command=None):
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command or WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                start_new_session=True,
            )  # fmt: skip
        self.lines = queue.Queue()
        threading.Thread(target=self._pump, daemon=True).start()
        self._say(order)
        for _ in self._until("ready", START_SECONDS):
            pass

    def ask(self, name: str, seconds: float):
        self._say(dict(job=name))
        yield from self._until("done", seconds)

    def _say(self, message):
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # the process has ended; the wait for its answer raises Died

    def _until(self, key, seconds):
        """Yield the worker's rows up to the line that has ``key``."""
        deadline = time.time() + seconds
        while True:
            try:
                line = self.lines.get(timeout=max(0.1, deadline - time.time()))
            except queue.Empty:
                self.end()
                raise Died(f"no end after {seconds:.0f} s", hung=True) from None
            if line is None:
                self.end()
                raise Died(f"its process ended with status {self.process.returncode}", hung=False)
            event = json.loads(line)
            if key in event:
                return
            yield event

    def _pump(self):
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def end(self):
        end_group(self.process)


def end_group(process):
    """Kill a process and the processes that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        process.kill()
    process.wait()


class Crew:
    """The workers of one run, and the plans that have killed a worker."""

    def __init__(self, record, dry: bool, cwd: Path = ROOT, command=None):
        self.record, self.dry, self.cwd, self.command = record, dry, cwd, command
        self.worker, self.killed = None, {}
        self.failed_starts = 0

    def order(self, mode):
        return dict(mode="dry" if self.dry else mode, once=mode == "once", ceilings=self.record.ceilings)

    def measure(self, jobs: list[Job]):
        """Run jobs one after the other in the present worker, or in a new one if there is none."""
        for job in jobs:
            if why := self._why_not(job):
                self.record.leave_out(job.name, why)
                continue
            start, seconds = time.time(), min(job.limit, self.left())
            try:
                if self.worker is None:
                    self.worker = self.start_worker("time")
                for row in self.worker.ask(job.name, seconds):
                    self.record.add(row | dict(job=job.name))
            except Died as died:
                self.worker = None
                if died.hung and seconds < job.limit:
                    self.record.leave_out(job.name, f"cut off after {seconds:.0f} s, when the window ended")
                else:
                    self._note_death(job, died)
            self.record.job(job, time.time() - start)

    def once(self, jobs: list[Job], until: float):
        """Run jobs unmeasured in their own worker, beside other processes. Their rows are dropped, except that failures
        are logged and crashes noted: the same jobs are measured later."""
        worker = None
        for job in jobs:
            seconds = until - time.time()
            if seconds < 2 or job.plan in self.killed:
                break
            try:
                worker = worker or self.start_worker("once")
                for row in worker.ask(job.name, seconds):
                    if row.get("row") == "failed":
                        self.record.log(f"while compiling: {row['note']}")
            except Died as died:
                worker = None
                # beside a dozen other processes, a slow compiler or full memory proves nothing against a default plan
                if job.kind == "candidate" and not died.hung:
                    self._note_death(job, died)
                else:
                    self.record.log(f"while compiling: {job.name}: {died}")
        if worker:
            worker.end()

    def left(self):
        return self.record.left() - RESERVE

    def close(self):
        if self.worker:
            self.worker.end()

    def start_worker(self, mode):
        try:
            worker = Worker(self.order(mode), self.record.log_file, self.command)
        except Died:
            self.failed_starts += 1
            raise
        self.failed_starts = 0
        return worker

    def _why_not(self, job):
        if job.plan in self.killed:
            return f"{job.plan} took its worker with it in {self.killed[job.plan]}"
        if self.failed_starts >= 2:
            return "no worker starts here"
        if self.left() < min(job.seconds, job.limit) and not (self.dry and self.left() > 1):
            return f"{max(0, self.left()):.0f} s left, about {job.seconds:.0f} needed"
        return None

    def _note_death(self, job, died):
        self.record.add(dict(row="crashed", ours=job.plan, job=job.name, note=f"{job.name}: {died}"))
        if job.plan:
            self.killed[job.plan] = job.name


def together(tasks, n_workers):
    """Run the functions side by side, started in this order."""
    with ThreadPoolExecutor(n_workers) as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result()


def prepare(crew: Crew, stage, jobs):
    """Run a stage's tests beside the jobs to come, each job once. Ends when the stage's seconds are over."""
    seconds = min(stage.seconds if not crew.dry else 240, crew.left())
    until = time.time() + seconds
    tasks = [lambda test=test: run_test(crew, test, until) for test in stage.tests]
    once = chunks(jobs)[: 1 if crew.dry else None]  # a dry run interprets: nothing needs compiling
    tasks += [lambda chunk=chunk: crew.once(chunk, until) for chunk in once]
    start = time.time()
    together(tasks, max(1, (os.cpu_count() or 2) - 1))
    crew.record.job(Job(stage.title, stage.seconds), time.time() - start)


def pytest_arguments(test: str) -> list[str]:
    """pytest's arguments for "file:expression". They override the addopts of pyproject.toml, which leave some tests out
    and name a plugin that may be missing."""
    file, _, expression = test.partition(":")
    arguments = [str(ROOT / file), "-q", "--maxfail=3", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short"]
    return arguments + (["-k", expression] if expression else [])


def run_test(crew: Crew, test: str, until: float):
    """One pytest process for the file and expression."""
    file, _, expression = test.partition(":")
    command = [sys.executable, "-m", "pytest", *pytest_arguments(test)]
    # one thread for each test process: many run at once
    status, output = run_command(command, until - time.time(), crew.cwd, dict(OMP_NUM_THREADS="1"))
    if status == "no time left":
        crew.record.leave_out(f"{file} -k '{expression}'", status)
        return
    counts = ", ".join(re.findall(r"\d+ (?:passed|failed|errors?|skipped)", output[-300:]))
    crew.record.keep_output(f"{file} -k '{expression}': {status}", output)
    note = counts or f"status {status}"
    crew.record.add(dict(row="tests", ours=f"{file} {expression}".strip(), ok=status == 0, note=note))


def run_command(command, seconds, cwd, env=None):
    """(exit status or "timed out", output). ``python -m`` looks for modules in ``cwd`` first."""
    if seconds < 3:
        return "no time left", ""
    with tempfile.TemporaryFile("w+", errors="replace") as output:  # a pipe would wait for children of a killed process
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd=cwd,
            env=os.environ | (env or {}),
        )  # fmt: skip
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            end_group(process)
            status = "timed out"
        output.seek(0)
        return status, output.read()
