"""Kills Ray's workers at random times: the circuit and every part must have the bytes that one process gives.

python tests/kill_workers.py --workers 1,2,4 --kills 10
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tiny import write_language_model

N_PROMPTS, UNIT = 4000, 20


def write_files(directory):
    """Write a model and two prompt files, whose units take a hundredth of a second."""
    write_language_model(directory, hidden_size=64, intermediate_size=800)
    for name in ("positive", "negative"):
        lines = [f"{name} {number * number} {'and so on ' * (number % 4)}" for number in range(N_PROMPTS // 2)]
        (directory / f"{name}.txt").write_text("\n".join(lines))
    return directory


def command(files, out, run, *more):
    words = [sys.executable, "-m", "cna_kernels.model", "discover", files, "-o", out, "--run-dir", run]
    words += ["--positive", files / "positive.txt", "--negative", files / "negative.txt", "--unit", UNIT]
    words += ["--top-k", 15, "--bootstrap", 5, "--no-universal", "--no-template", "--threads", 1, *more]
    return [str(word) for word in words]


def hashes(out, run):
    """The hashes of the circuit, and of all parts of its run."""
    parts = hashlib.sha256(b"".join(part.read_bytes() for part in sorted((run / "parts").glob("*.safetensors"))))
    return hashlib.sha256(out.read_bytes()).hexdigest(), parts.hexdigest()


def actors_of(pid):
    """The processes of Ray's actors that a process, or a process that it started, has started."""
    parents, names = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(entry.name)] = (entry / "cmdline").read_bytes()
        except OSError:  # the process has ended
            continue

    def belongs(child):
        while child in parents and child != pid:
            child = parents[child]
        return child == pid

    return [child for child, name in names.items() if name.startswith(b"ray::UnitActor") and belongs(child)]


def run_with_kills(words, run, n_kills, draw):
    """Run a command until it succeeds, and kill one of its actors ``n_kills`` times; return kills and starts."""
    killed = starts = 0
    n_units = -(-N_PROMPTS // UNIT)
    moments = sorted(
        draw.sample(range(n_units // 10, n_units - n_units // 10), n_kills)
    )  # each the number of parts that exist when a worker is killed
    while True:
        starts += 1
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None:
            if killed < n_kills and len(list((run / "parts").glob("*.safetensors"))) >= moments[killed]:
                time.sleep(draw.uniform(0, 0.2))
                actors = actors_of(process.pid)
                if actors and process.poll() is None:
                    os.kill(draw.choice(actors), signal.SIGKILL)
                    killed += 1
            time.sleep(0.02)
        error = process.stderr.read()
        if process.returncode == 0:
            return killed, starts
        if "workers died" not in error or starts > n_kills:
            raise AssertionError(error)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        files = write_files(place)
        subprocess.run(command(files, place / "one.json", place / "one"), check=True, capture_output=True)
        expected = hashes(place / "one.json", place / "one")
        print(f"one process: circuit {expected[0]}, parts {expected[1]}", flush=True)
        for workers in map(int, args.workers.split(",")):
            out, run, begin = place / f"{workers}.json", place / f"run{workers}", time.monotonic()
            words = command(files, out, run, "--ray", "local", "--workers", workers)
            killed, starts = run_with_kills(words, run, args.kills, random.Random(args.seed + workers))
            same = "the same" if hashes(out, run) == expected else f"OTHERS: {hashes(out, run)}"
            seconds = time.monotonic() - begin
            print(f"{workers} workers, {killed} killed, {starts} starts, {seconds:.0f} s: {same}", flush=True)
            if same != "the same":
                sys.exit(1)


if __name__ == "__main__":
    main()
