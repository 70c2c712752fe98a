"""Attribution over many prompts: a random Llama-shaped checkpoint of about 100 million parameters, in fp32.

A1, A2: discovery against transformers with hooks, one prompt at a time and in padded batches, and against the matrix
products that every forward pass needs. A3: what the sums cost. A4: many columns. A5: bootstrap replicates. There are
1,000 prompts of 8 to 64 tokens, after a header of 30 tokens that all share. The competitors run every tenth prompt, the
matrix products every fourth; times are per prompt. The circuits are compared first.

A6 and A7 compare peaks of resident memory: of 100,000 prompts with 1,000, and of a streamed checkpoint with its size.
To try the file out, CNA_BENCH_PROMPTS=100 makes it short, and CNA_BENCH_LAYERS=2 makes the checkpoint of A7 small.
"""

import json
import os
import random
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cna_kernels import ActivationSums, select
from cna_kernels.cpu import library
from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from cna_kernels.model.discovery.collect import collect, default_tokens
from cna_kernels.model.discovery.packing import TokenPrompt, group_by_prefix, packs_of
from cna_kernels.model.prompts.columns import Columns
from cna_kernels.model.prompts.corpus import Contrast, Entry
from interleave import compare, compare_all

transformers = pytest.importorskip("transformers")
DEVICE = torch.device(os.environ.get("CNA_BENCH_DEVICE", "cpu"))
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
if DEVICE.type == "cpu" and (reason := library.missing()):
    pytest.skip(f"the CPU engine {reason}", allow_module_level=True)

SHAPE = dict(
    hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_key_value_heads=4, head_dim=64,
    vocab_size=32000, num_hidden_layers=12, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
NAME = "Llama-shaped, 125M"
N_LAYERS, N_NEURONS = SHAPE["num_hidden_layers"], SHAPE["intermediate_size"]
N_PROMPTS, HEADER, STEP, BATCH = int(os.environ.get("CNA_BENCH_PROMPTS", 1000)), 30, 10, 32
TOP = select.k_from_fraction(0.001, N_LAYERS, N_NEURONS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(our model, transformers' model) of one random checkpoint."""
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, attn_implementation="eager")).eval()
    theirs = theirs.to(DTYPE)
    theirs.save_pretrained(directory)
    config = read_config(directory)
    ours = load_transformer(directory, config, open_checkpoint(directory), dtype=DTYPE, device=DEVICE)
    return ours, theirs.to(DEVICE)


@pytest.fixture(scope="module")
def prompts():
    draw = random.Random(0)
    header = [draw.randrange(2, SHAPE["vocab_size"]) for _ in range(HEADER)]
    rows = [[draw.randrange(2, SHAPE["vocab_size"]) for _ in range(draw.randint(8, 64))] for _ in range(N_PROMPTS)]
    return [TokenPrompt([*header, *row], f"prompt {number}") for number, row in enumerate(rows)]


def two_columns(n):
    """The first half is positive, the second negative."""
    return torch.tensor([[1.0, 0.0]] * (n // 2) + [[0.0, 1.0]] * (n - n // 2))


def sums_of(transformer, prompts, weights):
    sums = ActivationSums(N_LAYERS, N_NEURONS, weights.shape[1], device=DEVICE)
    collect(transformer, prompts, weights, sums)
    return sums


def ranked(delta):
    return delta.abs().flatten().sort(descending=True, stable=True).indices[:TOP].tolist()


def hooked(theirs, batches, n_prompts):
    """Contrast ``[L, N]`` with a hook on every down_proj. A batch: rows, ids, mask or None, the rows' last places."""
    caught, sides = [], torch.zeros(2, N_LAYERS, N_NEURONS, device=DEVICE)
    last = None

    def keep(_, arguments):
        caught.append(arguments[0][torch.arange(len(last), device=DEVICE), last].float())

    handles = [layer.mlp.down_proj.register_forward_pre_hook(keep) for layer in theirs.model.layers]
    with torch.inference_mode():
        for rows, ids, mask, last in batches:  # noqa: B007
            caught.clear()
            options = {} if mask is None else dict(attention_mask=mask, logits_to_keep=1)
            theirs(ids, use_cache=False, **options)
            acts = torch.stack(caught)  # [L, B, N]
            for place, row in enumerate(rows):
                sides[int(row >= n_prompts // 2)] += acts[:, place]
    for handle in handles:
        handle.remove()
    return (sides[0] / (n_prompts // 2) - sides[1] / (n_prompts - n_prompts // 2)).cpu()  # waits for the device


def padded(prompts, order):
    batches = []
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        longest = max(len(prompts[row].ids) for row in rows)
        ids, mask = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest)
        for place, row in enumerate(rows):
            ids[place, : len(prompts[row].ids)] = torch.tensor(prompts[row].ids)
            mask[place, : len(prompts[row].ids)] = 1
        batches.append((rows, ids, mask, torch.tensor([len(prompts[row].ids) - 1 for row in rows])))
    return batches


def on_device(batches):
    return [(rows, *(part if part is None else part.to(DEVICE) for part in rest)) for rows, *rest in batches]


def test_discovery(attribution, benchmark, models, prompts):
    ours, theirs = models
    some = prompts[::STEP]
    alone = [
        ([row], torch.tensor([prompt.ids]), None, torch.tensor([len(prompt.ids) - 1]))
        for row, prompt in enumerate(some)
    ]
    in_order = list(range(len(some)))
    by_length = sorted(in_order, key=lambda row: len(some[row].ids))
    competitors = {
        ("A1 discovery", "transformers + hooks, one at a time"): (1 / 5 if DEVICE.type == "cpu" else 1 / 30, alone),
        ("A2 discovery", "transformers + hooks, padded batches of 32"): (1 / 2, padded(some, in_order)),
        ("A2 discovery", "the same, sorted by length"): (None, padded(some, by_length)),
    }
    mine = select.contrast(sums_of(ours, some, two_columns(len(some)))).cpu()
    runs = []
    for _, batches in competitors.values():
        batches = on_device(batches)
        expected = hooked(theirs, batches, len(some))
        if torch.float32 == DTYPE:
            assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert ranked(mine) == ranked(expected)
        else:  # bf16 rounds the two forward passes differently
            assert len(set(ranked(mine)) & set(ranked(expected))) >= 0.9 * TOP
        runs.append(partial(hooked, theirs, batches, len(some)))

    def run():
        return sums_of(ours, prompts, two_columns(N_PROMPTS))

    for (key, (target, _)), result in zip(competitors.items(), compare_all(run, runs, rounds=3), strict=True):
        result["ours"] /= N_PROMPTS
        result["theirs"] /= len(some)
        result["ratio"] *= len(some) / N_PROMPTS
        add(attribution, benchmark, *key, result, target)


def test_floor_of_discovery(attribution, benchmark, models, prompts):
    ours, _ = models
    some = prompts[::4]
    (group,) = group_by_prefix([prompt.ids for prompt in some])
    packs = packs_of(some, group, max_prompts=None, max_tokens=default_tokens(DEVICE))
    tokens = [sum(len(some[row].ids) - group.prefix for row in rows) for rows in packs]
    x = torch.randn(max(tokens), SHAPE["intermediate_size"], dtype=DTYPE, device=DEVICE)

    def products():
        """The products that every forward pass of these packs needs; of the last layer only keys and values."""
        with torch.inference_mode():
            for n_tokens in tokens:
                for number, layer in enumerate(ours.layers):
                    whole = [weight for weight in layer.parameters() if weight.dim() == 2]
                    keys_values = [layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]
                    for weight in whole if number < N_LAYERS - 1 else keys_values:
                        y = F.linear(x[:n_tokens, : weight.shape[1]], weight)
        return y[0, 0].item()  # waits for the device

    result = compare(lambda: sums_of(ours, some, two_columns(len(some))), products, rounds=3)
    result = result | {"ours": result["ours"] / len(some), "theirs": result["theirs"] / len(some)}
    add(attribution, benchmark, "A1 floor", "PyTorch's products of the packed tokens alone", result, None)


class NoSums:
    """In place of sums: the forward pass runs and nothing is summed."""

    def layer(self, _):
        return {}

    def fold(self, _, layer=None):
        pass

    def discard(self):
        pass


def test_cost_of_sums(attribution, benchmark, models, prompts):
    ours, _ = models
    weights = two_columns(N_PROMPTS)

    def run():
        return sums_of(ours, prompts, weights)

    result = compare(run, lambda: collect(ours, prompts, weights, NoSums()), rounds=3)
    add(attribution, benchmark, "A3 sums", "the same packed forward without sums", per_prompt(result), 1.03)


@pytest.mark.parametrize(("id", "what"), [("A4 64 columns", "columns"), ("A5 100 bootstrap replicates", "bootstrap")])
def test_many_columns(attribution, benchmark, models, prompts, id, what):
    ours, _ = models
    two = two_columns(N_PROMPTS)
    if what == "columns":
        many = (torch.rand(N_PROMPTS, 64, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    else:
        entries = [Entry("", "", ((int(row >= N_PROMPTS // 2), 1.0, row),)) for row in range(N_PROMPTS)]
        many = Columns(2, (Contrast("", 0, 1),), bootstrap=100).weights(entries, 0)[1]
        assert many.shape[1] == 202

    def run():
        return sums_of(ours, prompts, many)

    if what == "bootstrap":
        assert torch.equal(run().total[:, :2], sums_of(ours, prompts, two).total)
    result = compare(run, lambda: sums_of(ours, prompts, two), rounds=3)
    add(attribution, benchmark, id, "2 columns", per_prompt(result), 1.10)


def per_prompt(result):
    return result | {"ours": result["ours"] / N_PROMPTS, "theirs": result["theirs"] / N_PROMPTS}


def add(attribution, benchmark, id, competitor, result, target):
    row = attribution.add(
        id,
        shape=NAME,
        m=f"{HEADER}+8-64",
        dtype=str(DTYPE).removeprefix("torch."),
        competitor=competitor,
        result=result,
        target=target,
        prompts_per_s=round(1 / result["ours"], 2),
        competitor_prompts_per_s=round(1 / result["theirs"], 2),
    )
    record(benchmark, row)


def record(benchmark, row):
    """Put the row into pytest-benchmark's files. Nothing is timed here: the row was timed against its competitor."""
    benchmark.extra_info[row["competitor"]] = row
    if benchmark.extra_info.keys() == {row["competitor"]}:
        benchmark.pedantic(lambda: None, rounds=1)


# The peak of the child's own memory: ru_maxrss would start at what the parent had when it forked.
PROGRAM = """
import re, sys
from cna_kernels.model.cli import main
assert main(sys.argv[1:]) == 0
print("peak", re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_of_discover(model, prompts, directory, *more):
    """Peak resident bytes, and the facts of the last line, of `cna discover` on (positive, negative) prompts."""
    words = ["discover", model, "-o", directory / "circuit.json", "--log-json", *more]
    for name, side in zip(("positive", "negative"), prompts, strict=True):
        (directory / f"{name}.txt").write_text("\n".join(side))
        words += [f"--{name}", directory / f"{name}.txt"]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"event": "done"')]
    return int(re.search(r"peak (\d+)", done.stdout)[1]) * 1024, facts[-1]


def ragged_text(n, seed):
    draw = random.Random(seed)
    return [" ".join(str(draw.randrange(1000)) for _ in range(draw.randint(2, 12))) for _ in range(n)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_prompts(attribution, benchmark, tmp_path):
    many = 100 * N_PROMPTS
    peaks = {}
    for n in (N_PROMPTS, N_PROMPTS + 1, many):  # N_PROMPTS + 1: beside N_PROMPTS it shows the noise
        sides = ragged_text(n // 2, 1), ragged_text(n - n // 2, 2)
        peaks[n], facts = peak_of_discover("demo:instruct", sides, tmp_path)
    few, again = peaks[N_PROMPTS], peaks[N_PROMPTS + 1]
    row = attribution.add(
        "A6 peak memory",
        shape="bundled instruct model",
        m="prompts",
        dtype="bfloat16",
        competitor=f"{many:,} prompts / {N_PROMPTS:,}",
        result={"ratio": peaks[many] / few, "noise": max(few, again) / min(few, again)},
        target=round((few + (20 << 20)) / few, 4),
        peak_bytes=peaks[many],
        more_bytes=peaks[many] - few,
        prompts_per_s=facts["prompts_per_s"],
    )
    record(benchmark, row)


LARGE = dict(
    hidden_size=3072, intermediate_size=10240, num_attention_heads=24, num_key_value_heads=8, head_dim=128,
    vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=True, rope_theta=10000.0, rms_norm_eps=1e-5,
    num_hidden_layers=int(os.environ.get("CNA_BENCH_LAYERS", 25)), hidden_act="silu", torch_dtype="bfloat16",
)  # fmt: skip


def write_large(directory):
    """Write a random bf16 checkpoint, layer by layer, with the bundled model's tokenizer. Returns its size in bytes."""
    import shutil

    from safetensors.torch import save_file

    from cna_kernels.model import demo_checkpoint
    from cna_kernels.model.checkpoint.load import expected_shapes

    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **LARGE}
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_checkpoint("instruct") / name, directory / name)
    shards, weight_map = {}, {}
    for name, shape in expected_shapes(read_config(directory)).items():
        shard = "-".join(name.split(".")[:3]) if ".layers." in name else "rest"
        shards.setdefault(f"{shard}.safetensors", {})[name] = shape
    for shard, shapes in shards.items():
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[1] ** -0.5)
            for name, shape in shapes.items()
        }
        save_file(tensors, directory / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_streamed_layers(attribution, benchmark, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    torch.manual_seed(0)
    size = write_large(checkpoint)
    try:
        sides = ragged_text(32, 1), ragged_text(32, 2)
        peak, facts = peak_of_discover(checkpoint, sides, tmp_path, "--stream-layers", "--no-universal")
    finally:
        for path in checkpoint.iterdir():
            path.unlink()
    row = attribution.add(
        "A7 peak memory, streamed layers",
        shape=f"Llama-shaped, {size / 1e9:.1f} GB",
        m="64 prompts",
        dtype="bfloat16",
        competitor="the checkpoint's size",
        result={"ratio": peak / size, "noise": 1.0},
        target=0.5,
        peak_bytes=peak,
        checkpoint_bytes=size,
        seconds=facts["seconds"],
    )
    record(benchmark, row)
