"""warm_up calls an op with every number of tokens at which it would compile something, and with no other."""

import functools

import pytest
import torch

from attach_cases import make, quietly, random_circuit
from cna_kernels import ops
from cna_kernels.extras import Extras
from cna_kernels.model import load
from cna_kernels.scale import make_scale
from cna_kernels.triton import launch, plan, repeat
from cna_kernels.triton import ops as triton_ops
from cna_kernels.warm_up import blank_extras, warm_up
from tiny import write_language_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LONGEST = 40


def variants(op, inputs, extras):
    with launch.listing() as listed:
        triton_ops.prepare(op, inputs, extras)(*inputs, *extras)
    return {repeat.variant(kernel, args, options) for kernel, _, args, options in listed}


def blank(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16, device=DEVICE)


INPUTS = {
    "gated_mlp": lambda T: (blank(T, 72), blank(272, 72), None, blank(72, 136)),
    "swiglu": lambda T: blank(T, 272).chunk(2, dim=1),
    "steer_act": lambda T: (blank(T, 136),),
    "down_proj": lambda T: (blank(T, 136), blank(72, 136)),
}


@pytest.mark.parametrize("n_columns", [0, 2])
@pytest.mark.parametrize("op", INPUTS)
def test_every_variant_is_launched_and_none_twice(monkeypatch, op, n_columns):
    called = []
    monkeypatch.setattr(ops, "call", lambda op, inputs, extras, backend: called.append(inputs[0].shape[0]))
    scale = make_scale([{}] * 3, 136, DEVICE)
    extras_of = functools.partial(blank_extras, n_neurons=136, device=DEVICE, scale=scale, n_columns=n_columns)
    assert warm_up(op, INPUTS[op], extras_of, LONGEST, "triton") == called
    launched, each = set(), {T: variants(op, INPUTS[op](T), extras_of(T)) for T in range(1, LONGEST + 1)}
    for T in called:
        assert each[T] - launched, f"nothing is new at {T} tokens"
        launched |= each[T]
    assert launched == set().union(*each.values())
    assert called[0] == 1 and len(called) < LONGEST


def test_listing_launches_nothing_and_computes_nothing():
    act = torch.full((70, 136), torch.nan, device=DEVICE)
    with launch.listing() as listed:
        y = triton_ops.prepare("down_proj", (act, act), Extras())(act, act, *Extras())
    assert y.shape == (70, 70) and plan.choose(triton_ops.call_of("down_proj", (act, act))).name == "blas"
    assert not listed
    assert not launch.is_listing()


def test_the_cpu_engine_compiles_nothing():
    assert warm_up("down_proj", lambda T: (torch.empty(T, 48), torch.empty(24, 48)), blank_extras) == []


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["llama", "gemma", "phi3"])
def test_an_engine_is_ready_after_it(monkeypatch, name):
    """Forward passes of any length, steered and summed, launch only kernels that warm_up has launched."""
    model = make(name, torch.float16)
    engine = quietly(model, backend="triton", max_circuits=3)
    launched, called = set(), ops.call

    def note(op, inputs, extras=(), backend=None):
        launched.update(variants(op, inputs, extras))
        return inputs[0].new_zeros(inputs[0].shape[0], inputs[-1].shape[0])

    monkeypatch.setattr(ops, "call", note)
    assert engine.warm_up(9, n_columns=2)
    ready = set(launched)
    engine.set([random_circuit(engine, 0)], [0.0])
    engine.rows(0)
    monkeypatch.setattr(ops, "call", called)

    def prepare(key, op, inputs, extras, backend):
        launched.update(variants(op, inputs, extras))
        return lambda *tensors: triton_ops.prepare(op, inputs, extras)(*tensors)

    monkeypatch.setattr(ops, "prepare", prepare)
    with torch.inference_mode():
        for n_tokens in (1, 3, 9):
            model(torch.ones(1, n_tokens, dtype=torch.long))
            with engine.collect(torch.ones(1, 2)):
                model(torch.ones(1, n_tokens, dtype=torch.long))
    assert launched == ready


def test_a_language_model(monkeypatch, tmp_path):
    model = load(write_language_model(tmp_path), device=DEVICE)
    assert model.warm_up(3) == ([] if DEVICE == "cpu" else [1, 2, 3])
