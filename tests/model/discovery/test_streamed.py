"""Layer by layer from the checkpoint: the bits of the resident model, in less memory."""

import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from cna_kernels import ActivationSums, InputError
from cna_kernels.model import load
from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from cna_kernels.model.discovery import collect
from cna_kernels.model.discovery import streamed as module
from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.discovery.streamed import StreamedTransformer
from tiny import VARIANTS, ragged, write_checkpoint, write_language_model

pytest.importorskip("transformers")
POSITIVE, NEGATIVE = ["open it", "why not", "a b c"], ["close", "yes", "no no no"]


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_streamed_sums_are_the_resident_ones(variant, spilled, tmp_path, monkeypatch):
    write_checkpoint(variant, tmp_path, max_shard_size="20KB")
    config, checkpoint = read_config(tmp_path), open_checkpoint(tmp_path)
    resident = load_transformer(tmp_path, config, checkpoint)
    streamed = StreamedTransformer(tmp_path, config, checkpoint, spill=tmp_path)
    if spilled:
        monkeypatch.setattr(module, "HIDDEN_BYTES", 0)
    prompts = [TokenPrompt(ids, "p", 1 + len(ids) % 3) for ids in ragged(30, list(range(5, 17)))]
    weights = torch.rand(30, 4, generator=torch.Generator().manual_seed(1))
    found = []
    for transformer in (resident, streamed):
        sums = ActivationSums(3, 48, 4, squares=True)
        seen = []
        collect.collect(
            transformer, prompts, weights, sums, max_tokens=50, progress=lambda *now, seen=seen: seen.append(now)
        )
        found.append(sums)
        assert [sum(column) for column in zip(*seen, strict=True)] == [30, sum(len(p.ids) for p in prompts)]
    for name in ("total", "total_sq", "count"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name)), name
    assert found[0].total.abs().min() > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_discovery(tmp_path, dtype):
    write_language_model(tmp_path, dtype=torch.bfloat16)
    options = dict(top_k=20, score="cohen-d")
    resident = load(tmp_path, dtype=dtype).discover(POSITIVE, NEGATIVE, **options)
    assert load(tmp_path, dtype=dtype, stream_layers=True).discover(POSITIVE, NEGATIVE, **options) == resident


def test_a_streamed_model_gives_no_logits(tmp_path):
    model = load(write_language_model(tmp_path), stream_layers=True)
    for call in (lambda: model(torch.tensor([[1]])), lambda: model.generate("x")):
        with pytest.raises(InputError, match="model: a model whose layers are streamed or shared finds circuits"):
            call()


def test_non_finite_activations_name_the_prompt(tmp_path):
    write_language_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    culprit = load(tmp_path).tokenizer.encode("~")[-1]
    tensors["model.embed_tokens.weight"][culprit] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path, stream_layers=True)
    with pytest.raises(InputError, match=r"negative\[1\]: causes a non-finite activation in layer 0"):
        model.discover(POSITIVE, ["close", "odd ~ one", "no"], top_k=5)


def test_a_disk_without_room_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HIDDEN_BYTES", 0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = load(write_language_model(tmp_path), stream_layers=True, spill=tmp_path)
    with pytest.raises(InputError, match=r"cannot hold 0\.0 GiB of hidden states: No space left on device"):
        model.discover(POSITIVE, NEGATIVE, top_k=5)


PROGRAM = """
import re, sys
from cna_kernels.model.cli import main
assert main(sys.argv[1:]) == 0
print("peak", re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_for_two_layers_is_enough(tmp_path):
    """Streamed discovery keeps 2 of 12 layers: its peak is at least 7 layers below that of the resident model.

    Not 10 layers: both peaks hold the allocator's slack, and the last layer used may be freed a moment late.
    """
    shape = dict(hidden_size=512, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8)
    write_language_model(tmp_path, **shape)
    for name, prompts in (("positive", POSITIVE), ("negative", NEGATIVE)):
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts))
    command = ["discover", tmp_path, "--positive", tmp_path / "positive.txt", "--negative", tmp_path / "negative.txt"]
    command += ["-o", tmp_path / "c.json", "--top-k", "5"]
    peaks = []
    for more in ([], ["--stream-layers"]):
        arguments = [sys.executable, "-c", PROGRAM, *map(str, [*command, *more])]
        done = subprocess.run(arguments, check=True, capture_output=True, text=True)
        peaks.append(int(re.search(r"peak (\d+)", done.stdout)[1]) * 1024)
    layer = 4 * (3 * 512 * 4096 + 4 * 512 * 512)
    assert peaks[0] - peaks[1] > 7 * layer, peaks  # 8.4 to 9.7 layers were measured
