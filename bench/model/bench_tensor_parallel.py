"""Decoding on two ranks of one thread each against one process: a random checkpoint of Llama-3.2-1B's shape.

T1: answers of 16 tokens to one prompt and to 8 together, bf16 and fp32, beside one process with one thread, and with
two: what the machine's two cores can do. This file starts itself as two ranks. Rank 0 has the whole model, too, and
runs all sides in turn; the other rank waits while rank 0 runs alone. That the logits are the same is checked first.
On a machine whose cores others use as well, ranks wait for each other. So every row has the processor time of rank 0
over that of the other side, too: what the ratio would be if nobody waited.
CNA_BENCH_LAYERS is 8 by default, half of the model's layers, with the whole vocabulary: 9 GB in fp32.
"""

import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from cna_kernels.cpu import library
from cna_kernels.model.checkpoint.config import DTYPES, read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.generate import generate
from cna_kernels.model.parallel.lead import run_led
from interleave import compare_all
from rank_processes import run_ranks

if reason := library.missing():
    pytest.skip(f"the CPU engine {reason}", allow_module_level=True)

LAYERS = int(os.environ.get("CNA_BENCH_LAYERS", 8))
SHAPE = dict(
    hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
    vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=True, num_hidden_layers=LAYERS,
    bos_token_id=0, eos_token_id=1,
)  # fmt: skip
RANKS, PROMPT, NEW, ROUNDS = 2, 8, 16, 5
BATCHES = (1, 8)
COMPETITORS = {"one process, 1 thread": 0.65, "one process, 2 threads": None}  # and the targets
TOLERANCE = {"bfloat16": 0.05, "float32": 1e-4}  # share of the largest logit: the sides add in different orders


def prompts(n):
    ids = torch.randint(2, SHAPE["vocab_size"], (n, PROMPT), generator=torch.Generator().manual_seed(n))
    return [TokenPrompt(row, f"prompt {number}") for number, row in enumerate(ids.tolist())]


def decode(model, given, n_threads=1):
    torch.set_num_threads(n_threads)
    return generate(model, given, max_new_tokens=NEW, stop_ids=frozenset())


def processor_seconds(run):
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(directory, dtype):
    """All sides on rank 0, in turn. Prints batch -> the results of ``compare_all``."""
    torch.set_num_threads(1)

    def work(lead):
        files = read_config(directory), open_checkpoint(directory)
        led = lead.load(directory, *files, dtype=DTYPES[dtype])
        whole = load_transformer(directory, *files, dtype=DTYPES[dtype])
        found = {}
        with torch.inference_mode():
            for batch in BATCHES:
                given = prompts(batch)
                ids = torch.tensor([prompt.ids for prompt in given])
                mine, other = (model.logits(model.hidden(ids)[:, -1]).float() for model in (led, whole))
                assert (mine - other).abs().max() < TOLERANCE[dtype] * other.abs().max()
                ours, *others = (partial(decode, *side) for side in ((led, given), (whole, given), (whole, given, 2)))
                found[batch] = compare_all(ours, others, rounds=ROUNDS)
                spent = [[processor_seconds(run) for run in (ours, *others)] for _ in range(3)]
                for side, result in enumerate(found[batch], 1):
                    result["processor"] = statistics.median(row[0] / row[side] for row in spent)
        return found

    found = run_led(work)
    if found is not None:
        print(json.dumps(found))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(directory)
    yield directory
    for path in directory.iterdir():  # 2 GB
        path.unlink()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decode(parallel, directory, dtype):
    done = run_ranks(RANKS, __file__, directory, dtype, longest=1800)
    assert [code for code, *_ in done] == [0] * RANKS, done
    for batch, results in json.loads(done[0][1]).items():
        for (competitor, target), result in zip(COMPETITORS.items(), results, strict=True):
            rates = [round(int(batch) * NEW / result[side], 2) for side in ("ours", "theirs")]
            parallel.add(
                "T1 decode", shape=f"Llama-3.2-1B, {LAYERS} layers", m=batch, dtype=dtype, competitor=competitor,
                result=result, target=target, per_s=rates[0], competitor_per_s=rates[1],
                processor_ratio=round(result["processor"], 3),
            )  # fmt: skip


if __name__ == "__main__":
    measure(Path(sys.argv[1]), sys.argv[2])
