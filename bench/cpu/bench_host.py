"""The host's time for a call whose device work takes no time: what Python costs between a model's MLP and the kernel.

H1: an op of the CPU engine on a tiny MLP, against PyTorch's five operations for that MLP. H2: only the two launches of
the Triton backend's decode pair, and H3: the whole op that makes these launches, both against Triton's own launcher, on
a driver that does nothing. H4: what an attached MLP does beside its op, against the whole MLP of transformers. Times in
microseconds are medians of interleaved rounds; targets are microseconds on a machine of this kind.

    make bench-host     writes bench/results/host.json
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cna_kernels import attach, make_scale, ops
from cna_kernels.cpu import library
from cna_kernels.engine.passes import State
from interleave import compare

CALLS, ROUNDS = 500, 15
HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def many(call):
    def run():
        for _ in range(CALLS):
            call()

    return run


def add(host, id, *, competitor, result, target_us, calls=CALLS, **more):
    microseconds = {"us": result["ours"], "competitor_us": result["theirs"]}
    microseconds = {name: round(value / calls * 1e6, 2) for name, value in microseconds.items()}
    row = host.add(id, competitor=competitor, result=result, target_us=target_us, **microseconds, **more)
    print(f"    {row['us']:.1f} us, target {target_us}; {competitor}: {row['competitor_us']:.1f} us", flush=True)


@pytest.mark.parametrize(("feature", "target_us"), [("plain", 25), ("sums and steering", 40)])
def test_an_op_on_cpus(benchmark, host, feature, target_us):
    if reason := library.missing():
        pytest.skip(f"the CPU engine {reason}")
    T, H, N = 1, 16, 32
    generator = torch.Generator().manual_seed(0)
    x, w_gate, w_up, w_down = (torch.randn(*s, generator=generator) for s in ((T, H), (N, H), (N, H), (H, N)))
    w_gate_up, extras = torch.cat([w_gate, w_up]), {}
    if feature != "plain":
        extras = dict(token_weight=torch.ones(T, 2), act_sum=torch.zeros(2, N))
        extras |= dict(scale=make_scale([{3: 0.5}], N), row_circuit=torch.zeros(T, dtype=torch.int32))

    def ours():
        return ops.gated_mlp(x, w_gate_up, w_down, **extras)

    def torch_ops():
        return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)

    if feature == "plain":
        torch.testing.assert_close(ours(), torch_ops())
    result = compare(many(ours), many(torch_ops), rounds=ROUNDS)
    add(
        host, "H1", shape=f"H={H} N={N}, {feature}", m=T, dtype="float32", competitor="PyTorch's five operations",
        result=result, target_us=target_us,
    )  # fmt: skip
    benchmark.pedantic(ours, rounds=100)


def test_launches_of_the_triton_backend(benchmark, host, tmp_path):
    pytest.importorskip("triton")
    library_path = tmp_path / "libcuda.so.1"
    build = ["cc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library_path, HERE / "stub_cuda.c"]
    subprocess.run(build, check=True)
    (tmp_path / "libcuda.so").symlink_to(library_path)
    environment = dict(
        os.environ, TRITON_LIBCUDA_PATH=str(tmp_path), LD_LIBRARY_PATH=str(tmp_path), TRITON_INTERPRET="0",
        PYTHONPATH=os.pathsep.join([str(HERE.parent), str(HERE.parent / "gate"), os.environ.get("PYTHONPATH", "")]),
    )  # fmt: skip
    command = [sys.executable, str(HERE / "host_triton.py")]
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    for row in map(json.loads, done.stdout.splitlines()):
        below = row["call"] != "ops.gated_mlp"
        target_us = (10 if below else 25) if row["feature"] != "plain" else None
        add(
            host, "H2" if below else "H3", shape=f"{row['call']}, {row['feature']}", m=1, dtype="bfloat16",
            competitor="launched by Triton", result=row, target_us=target_us, calls=1e6,
        )  # fmt: skip
    benchmark.pedantic(lambda: None, rounds=1)


def test_an_attached_mlp(benchmark, host, monkeypatch):
    transformers = pytest.importorskip("transformers")
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    model, plain = (transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval() for _ in range(2))
    engine, x, y = attach(model), torch.zeros(1, 1, 64), torch.zeros(1, 64)
    monkeypatch.setattr(ops, "gated_mlp", lambda *_, **__: y)
    engine._now.state = State(torch.zeros(1, dtype=torch.int32))
    ours, theirs = model.model.layers[0].mlp, plain.model.layers[0].mlp
    result = compare(many(lambda: ours(x)), many(lambda: theirs(x)), rounds=ROUNDS)
    add(
        host, "H4", shape="an attached MLP without its op", m=1, dtype="float32",
        competitor="transformers' MLP, H=64 N=128", result=result, target_us=8,
    )  # fmt: skip
    benchmark.pedantic(lambda: ours(x), rounds=100)
