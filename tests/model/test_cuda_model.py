"""On a GPU, discovery, steering and generation with the bundled model agree with the CPU. Skipped without a GPU."""

import pytest
import torch

from cna_kernels.model import load
from cna_kernels.model.demo import world
from cna_kernels.model.demo.checkpoint import demo_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
POSITIVE, NEGATIVE = world.discovery_positive(), world.discovery_negative()
HELD_OUT = world.heldout_refusable()[:40]


def load_demo(device, dtype):
    return load(demo_checkpoint("instruct"), device=device, dtype=dtype)


def neurons(circuit):
    return [(layer, neuron) for layer, neuron, _ in circuit.neurons]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # bf16 packs go through the flash kernel
def test_discovery_finds_the_neurons_of_the_cpu(dtype):
    expected = load_demo("cpu", "float32").discover(POSITIVE, NEGATIVE, top_k=8)
    found = load_demo("cuda", dtype).discover(POSITIVE, NEGATIVE, top_k=8)
    if dtype == "float32":
        assert neurons(found) == neurons(expected)
    else:
        assert len({*neurons(found)} & {*neurons(expected)}) >= 7
    wanted, got = ({n[:2]: n[2] for n in circuit.neurons} for circuit in (expected, found))
    for place in wanted.keys() & got.keys():
        assert got[place] == pytest.approx(wanted[place], rel=1e-3 if dtype == "float32" else 5e-2)


def test_answers_are_those_of_the_cpu():
    cpu, gpu = load_demo("cpu", "float32"), load_demo("cuda", "float32")
    circuit = cpu.discover(POSITIVE, NEGATIVE, top_k=8)
    plain = [model.generate(HELD_OUT, max_new_tokens=24) for model in (cpu, gpu)]
    steered = [model.generate(HELD_OUT, circuit=circuit, multiplier=0.0, max_new_tokens=24) for model in (cpu, gpu)]
    same = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in (plain, steered)]
    assert min(same) >= len(HELD_OUT) - 1, "greedy tokens may part where two logits are equal to rounding"
    assert sum(map(world.is_refusal, plain[1])) >= 38 and sum(map(world.is_refusal, steered[1])) <= 8


def test_bf16_answers_with_many_circuits_in_one_batch():
    gpu = load_demo("cuda", "bfloat16")
    circuit = gpu.discover(POSITIVE, NEGATIVE, top_k=8)
    assert gpu.warm_up(64)
    circuits = [circuit, None] * 20
    answers = gpu.generate(HELD_OUT, circuit=circuits, multiplier=0.0, max_new_tokens=24)
    assert sum(map(world.is_refusal, answers[::2])) <= 7, "steered"
    assert sum(map(world.is_refusal, answers[1::2])) >= 18, "not steered"
