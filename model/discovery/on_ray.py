"""A run on Ray: actors, each with a model, run units and write parts. Ray deals units out and restarts dead actors."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cna_kernels.errors import InputError

from ..packages import require
from ..prompts.corpus import Corpus
from .job import Job, Progress, says_what_is_kept
from .parts import write_part
from .run_directory import PATIENCE, RunDirectory

MOST_RETRIES = 5  # of a unit whose worker died, so that a unit that kills every worker is given up
MOST_RESTARTS = 100  # of a worker
LEAST_STORE = 80 << 20  # bytes of Ray's object store, the least that Ray accepts: parts go through files
MakeJob = Callable[[Corpus], Job]


class UnitActor:
    """Runs units in its own process. A call (``start``) loads the model, so that bad input is an error of that call."""

    def __init__(self, make_job: MakeJob, directory: str, threads: int, skip_bad: bool):
        self._make_job, self._directory, self._threads, self._skip_bad = make_job, directory, threads, skip_bad
        self._job: Job | None = None

    def start(self, prompts: str, record: dict):
        """Load the model, and start or join the run of these prompts."""
        self._join(Corpus.open(prompts, record))

    def run(self, unit: int) -> tuple[int, int]:
        """Write the part of a unit unless it exists. Return the unit's prompts, and the tokens that ran, as numbers."""
        job = self._job
        if job is None:  # this process replaces one that died after its start
            job = self._join(RunDirectory.open(self._directory).corpus())
        n_tokens = 0
        if not self._run.is_done(unit):
            for _, part in job.run([unit], skip_bad=self._skip_bad):
                write_part(self._run, unit, part)
                n_tokens = part.n_tokens
        return self._run.units[unit].n_prompts, n_tokens

    def _join(self, corpus) -> Job:
        torch.set_num_threads(self._threads)
        job = self._make_job(corpus)
        self._run, self._job = job.start(self._directory), job
        return job


def run_on_ray(
    address: str,
    directory: str,
    corpus: Corpus,
    make_job: MakeJob,
    *,
    workers: int | None,
    threads: int,
    use_gpus: bool,
    skip_bad: bool,
    progress: Progress,
) -> RunDirectory:
    """Run the missing units of a run directory on Ray; return when all units are done.

    Args:
        address: "local" for a Ray on this machine that ends with the call, or HOST:PORT of a running Ray.
        directory: the run directory. All machines of that Ray see it, and the model's files, under the same names.
        make_job: every worker calls it to make its job. ``make_job`` and all that it refers to are pickled.
        workers: the number of workers; None takes one for each free GPU.
        threads: of each worker on a CPU; Ray also reserves this number of its CPUs for each worker.
    """
    prompts = RunDirectory.prepare(directory, corpus)
    with connected(address, None if workers is None else workers * threads) as ray:
        gpus, cpus = (ray.cluster_resources().get(name, 0) for name in ("GPU", "CPU"))
        on_gpus = use_gpus and gpus > 0
        if workers is None and not on_gpus:
            raise InputError("--workers", "is needed where no GPUs are: every worker loads the model")
        most = int(min(gpus, cpus // threads) if on_gpus else cpus // threads)
        free = ray.available_resources().get("GPU", 0)
        n_actors = workers or max(1, min(most, int(free)))
        if n_actors > most:
            raise InputError("--workers", f"this Ray has room for {most}: {cpus:g} CPUs, {gpus:g} GPUs")
        resources = dict(num_cpus=threads, num_gpus=int(on_gpus))
        actor = ray.remote(**resources, max_restarts=MOST_RESTARTS, max_task_retries=MOST_RETRIES)(UnitActor)
        actors = [actor.remote(make_job, directory, threads, skip_bad) for _ in range(n_actors)]
        with _errors_of(ray):
            record = ray.put(corpus.record())
            ray.get([actor.start.remote(str(prompts), record) for actor in actors])
        run = RunDirectory.open(directory, PATIENCE)
        with says_what_is_kept(run), _errors_of(ray):
            missing, n_tokens = run.missing(), 0
            done = corpus.n_prompts - sum(run.units[unit].n_prompts for unit in missing)
            progress(done, corpus.n_prompts, 0)
            pool = ray.util.ActorPool(actors)
            for prompts_run, tokens_run in pool.map_unordered(lambda actor, unit: actor.run.remote(unit), missing):
                done, n_tokens = done + prompts_run, n_tokens + tokens_run
                progress(done, corpus.n_prompts, n_tokens)
    return run


@contextmanager
def connected(address: str, n_cpus: int | None) -> Iterator[Any]:
    """Yield the module ray, connected. ``n_cpus`` is the least number of CPUs that a local Ray offers."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address == "local":
        # Ray's processes listen on all addresses of this machine, whatever their options say. This run's token keeps
        # other programs out. The module ray reads the token when it is imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    require("ray")
    import ray

    options: dict[str, Any] = {}
    if address == "local":
        offered = None if n_cpus is None else max(n_cpus, os.cpu_count() or 1)
        options = dict(num_cpus=offered, include_dashboard=False, object_store_memory=LEAST_STORE)
    else:
        _check_answers(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError("--ray", f"{address!r}: {error}") from None
    signal.signal(signal.SIGTERM, on_sigterm)  # ray.init has set a handler that aborts
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address):
    """Raise InputError where nothing listens: Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError("--ray", f"expected local, or HOST:PORT of a Ray, got {address!r}: {error}") from None


@contextmanager
def _errors_of(ray):
    """Raise a worker's InputError as it was raised there; raise another InputError where workers died too often."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        raise InputError("--ray", f"workers died too often: {error}") from None
