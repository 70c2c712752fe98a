"""How the cost of attribution grows: the tables of docs/scale.md.

    python bench/model/scale.py            measure on this machine, then calculate for larger machines
    python bench/model/scale.py --quick    a tenth of the prompts

Measured times serve for proportions only: every row names what its time is divided by.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shapes import MODELS

UNIT = 65536  # prompts of a unit when layers are streamed: UNIT_PROMPTS * STREAMED_UNITS of corpus.py

PROGRAM = """
import re, sys
from cna_kernels.model.cli import main
assert main(sys.argv[1:]) == 0
print("peak", re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


def table(title, header, rows):
    print(f"\n{title}\n\n| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def write_prompts(directory, n, n_words, seed=0):
    """Two files of random numbers as text, ``n_words`` (a range) each."""
    draw = random.Random(seed)
    for name, count in (("positive", n // 2), ("negative", n - n // 2)):
        with open(directory / f"{name}.txt", "w") as file:
            for _ in range(count):
                file.write(" ".join(str(draw.randrange(1000)) for _ in range(draw.randint(*n_words))) + "\n")


def discover(model, directory, *more, workers=1):
    """Run cna discover, several workers through torchrun. Return the facts of each last line, and the peak in bytes."""
    words = ["discover", model, "--positive", directory / "positive.txt", "--negative", directory / "negative.txt"]
    words += ["-o", directory / "c.json", "--log-json", "--no-universal", *more]
    command = [sys.executable, "-c", PROGRAM]
    if workers > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        command += ["-m", "cna_kernels.model"]
    done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"event": "done"')]
    peak = re.search(r"peak (\d+)", done.stdout)
    return facts, int(peak[1]) * 1024 if peak else None


def measured(scale):
    from cna_kernels.model import demo_checkpoint

    demo = demo_checkpoint("instruct")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        rows = []
        for n in (1000, int(20_000 * scale), int(200_000 * scale)):
            write_prompts(directory, n, (2, 12))
            facts, peak = discover(demo, directory)
            rows.append([f"{n:,}", f"{facts[0]['seconds'] / n * 1000:.3f}", f"{peak / 2**20:.0f}"])
        table("Prompts (bundled model, 2 threads)", ["prompts", "ms a prompt", "peak MiB"], rows)

        rows = []
        write_prompts(directory, int(20_000 * scale), (2, 12))
        base = None
        for workers in (1, 2):
            run = directory / f"run{workers}"
            facts, _ = discover(demo, directory, "--run-dir", run, "--threads", "1", workers=workers)
            seconds = max(fact["seconds"] for fact in facts)
            base = base or seconds
            rows.append([workers, f"{seconds / base:.2f}"])
        table("Workers of one thread each, on 2 cores (bundled model)", ["workers", "time / one worker"], rows)
    layer_times()


def layer_times():
    """One layer of the 125M shape of bench_attribution.py: time by tokens a prompt, and by layers."""
    from cna_kernels import ActivationSums
    from cna_kernels.model.checkpoint.config import read_config
    from cna_kernels.model.discovery.collect import collect
    from cna_kernels.model.discovery.packing import TokenPrompt
    from cna_kernels.model.transformer import Transformer

    shape = dict(
        model_type="llama", hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_key_value_heads=4,
        head_dim=64, vocab_size=1000, max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0,
        hidden_act="silu", torch_dtype="float32",
    )  # fmt: skip

    def discovery(n_layers, n_tokens, n_prompts):
        with tempfile.TemporaryDirectory() as name:
            config = shape | {"num_hidden_layers": n_layers, "tie_word_embeddings": True}
            Path(name, "config.json").write_text(json.dumps(config))
            config = read_config(name)
        torch.manual_seed(0)
        transformer = Transformer(config).eval()
        for parameter in transformer.parameters():
            parameter.requires_grad_(False)
        draw = random.Random(0)
        prompts = [TokenPrompt([draw.randrange(1000) for _ in range(n_tokens)], "p") for _ in range(n_prompts)]
        token_weight = torch.ones(n_prompts, 2)
        return lambda: collect(transformer, prompts, token_weight, ActivationSums(n_layers, 2048, 2))

    lengths = {n: discovery(4, n, 4096 // n) for n in (16, 64, 256, 1024)}  # as many tokens in each
    table("Tokens of a prompt (125M shape, 4 layers)", ["tokens", "time a token / at 16 tokens"], _shares(lengths))
    layers = {n: discovery(n, 64, 32) for n in (4, 8, 16)}
    table("Layers (125M shape, 64 tokens)", ["layers", "time / 4 layers"], _shares(layers))


def _shares(calls):
    """[name, time of the call / time of the first], each the best of interleaved rounds after one to warm up."""
    best = dict.fromkeys(calls, math.inf)
    for number in range(6):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                best[name] = min(best[name], time.perf_counter() - start)
    first = next(iter(best.values()))
    return [[name, f"{seconds / first:.2f}"] for name, seconds in best.items()]


class Machine(NamedTuple):
    """What a calculation assumes: FLOP/s of matrix products, and bytes/s from disk and over the bus."""

    name: str
    flops: float
    disk: float
    bus: float


H200 = Machine("one 141 GB GPU", 790e12 * 0.5, 6e9, 50e9)
LAYERS = {"Llama-3.2-1B": 16, "Llama-3.1-8B": 32, "Llama-3.1-70B": 80}
KV_SHARE = {"Llama-3.2-1B": 8 / 32, "Llama-3.1-8B": 8 / 32, "Llama-3.1-70B": 8 / 64}


def layer_weights(model):
    H, N = MODELS[model]
    return 3 * H * N + H * H * (2 + 2 * KV_SHARE[model])


def calculated():
    """Print times and sizes calculated from FLOP and bytes: 2 FLOP for a weight and token; a weight has 2 bytes."""
    print(
        f"\nCalculated, not measured, for {H200.name}: products at {H200.flops / 1e12:.0f} TFLOP/s, "
        f"{H200.disk / 1e9:.0f} GB/s from disk, {H200.bus / 1e9:.0f} GB/s over the bus."
    )
    rows = []
    for model, n_layers in LAYERS.items():
        H, N = MODELS[model]
        weights = layer_weights(model)
        per_token = 2 * weights * n_layers
        for n_prompts, n_tokens in ((100_000, 64), (10_000_000, 64), (1_000_000_000, 64)):
            compute = per_token * n_prompts * n_tokens / H200.flops
            unit = min(n_prompts, UNIT)
            passes = math.ceil(n_prompts / UNIT)
            read = 2 * weights * n_layers * passes / H200.disk
            moved = 2 * n_layers * n_prompts * n_tokens * H * 2 / H200.bus  # hidden states in and out of every layer
            rows.append(
                [
                    model,
                    f"{n_prompts:,}",
                    f"{per_token * n_prompts * n_tokens:.1e}",
                    duration(compute),
                    duration(compute / 8),
                    f"{2 * weights * n_layers / 1e9:.0f} GB x {passes:,}",
                    duration(max(compute + moved, read)),
                    f"{unit * n_tokens * H * 2 / 1e9:.0f} GB",
                ]
            )
    header = ["model", "prompts of 64 tokens", "FLOP", "resident, 1 GPU", "8 GPUs", "streamed: read from disk"]
    table("Layers only, no shared prefix", [*header, "streamed: time", "hidden states of a unit"], rows)
    rows = []
    for model, n_layers in LAYERS.items():
        N = MODELS[model][1]
        sizes = (2 * layer_weights(model) * 2, *(n_layers * N * 8 * sums for sums in (2 + 2, 202 + 2)))
        rows.append([model, *(f"{size / 1e6:,.0f} MB" for size in sizes)])
    header = ["model", "two layers", "a part: 2 columns, with squares", "the same with 100 replicates"]
    table("Memory when streamed, and the size of a unit's part", header, rows)


def duration(seconds):
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


if __name__ == "__main__":
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    parser = argparse.ArgumentParser(description="The tables of docs/scale.md, for this machine.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the prompts")
    measured(0.1 if parser.parse_args().quick else 1.0)
    calculated()
