"""What only a GPU shows: dependent launches that overlap, and captured graphs. Skipped without one.

The bodies of the tests are in ``bench/gpu/gpu_checks.py``. Without a GPU their logic runs on stand-ins, and on planted
faults that it must find.
"""

import pytest
import torch
import triton

import gpu_checks
from cna_kernels import ops, plans
from op_cases import FEATURES, assert_values, make_case, with_feature
from triton_cases import on_device

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N_8B, H_8B = 14336, 4096


@needs_gpu
@pytest.mark.parametrize("T", [1, 16, 64])
def test_dependent_launch_waits(T):
    gpu_checks.dependent_stress(T, N_8B, H_8B, "cuda", repeats=200)


@needs_gpu
@pytest.mark.parametrize("T", [1, 64, 128])
@pytest.mark.parametrize("op", gpu_checks.INPUTS)
def test_graph_replays_follow_calls(op, T):
    gpu_checks.replays_follow(op, T, N_8B, H_8B, "cuda")


@needs_gpu
@pytest.mark.parametrize("feature", FEATURES)
def test_fused_with_a_ring_that_wraps_and_programs_with_several_tiles(feature):
    """156 tiles on 132 multiprocessors, 12 steps through 4 stages; the shapes of test_triton.py have fewer of both."""
    case = make_case(1500, 1544, torch.bfloat16, n_hidden=712)
    extras = on_device(with_feature(case, feature))
    plans.use("gated_mlp=fused")
    y = ops.gated_mlp(*(part.to(DEVICE) for part in case.inputs("gated_mlp")), **extras, backend="triton")
    assert_values(case, "gated_mlp", y, extras)


# The bodies of these tests on stand-ins, without a GPU.


def reference_call(op="gated_mlp"):
    return lambda *inputs, **extras: getattr(ops, op)(*inputs, **extras, backend="reference")


@pytest.mark.interpreted
@pytest.mark.parametrize("T", [1, 2])
def test_dependent_stress_interpreted(T):
    assert "bit-equal" in gpu_checks.dependent_stress(T, 48, 24, DEVICE, repeats=4)


@pytest.mark.interpreted
@pytest.mark.parametrize("op", gpu_checks.INPUTS)
def test_replays_interpreted(op):
    assert "bit-equal" in gpu_checks.replays_follow(op, 2, 48, 24, DEVICE, capture=gpu_checks.capture_by_copy)


def test_dependent_stress_finds_what_is_read_too_early():
    """A fault: a call reads the activations of the call before. With equal inputs in all calls it would not show."""
    right, before, calls = reference_call(), [None], [0]

    def early(x, *weights, **extras):
        calls[0] += 1
        given = before[0] if calls[0] == 9 else x  # the first three calls give the expected results
        before[0] = x
        return right(given, *weights, **extras)

    with pytest.raises(AssertionError, match=r"T=2, call 5: y at \[0, 0\]: .* elements differ"):
        gpu_checks.dependent_stress(2, 48, 24, "cpu", repeats=12, call=early)
    assert calls[0] == 15


def test_dependent_stress_finds_wrong_sums():
    right, calls = reference_call(), [0]

    def wrong(*inputs, **extras):
        calls[0] += 1
        y = right(*inputs, **extras)
        if calls[0] == 8:
            extras["act_sumsq"][1, 3] += 1
        return y

    with pytest.raises(AssertionError, match=r"call 4: act_sumsq at \[1, 3\]"):
        gpu_checks.dependent_stress(2, 48, 24, "cpu", repeats=6, call=wrong)


def test_dependent_stress_does_not_compare_with_wrong_answers():
    with pytest.raises(AssertionError, match="the calls to compare with are off"):
        gpu_checks.dependent_stress(2, 48, 24, "cpu", repeats=3, call=lambda x, *weights, **extras: torch.ones_like(x))


def test_replays_find_a_frozen_multiplier():
    """A fault: a graph replays with the multipliers that it was captured with."""
    right, frozen = reference_call("swiglu"), []

    def call(*inputs, scale, **extras):
        if capturing:
            frozen.append(scale._replace(value=scale.value.clone()))
        return right(*inputs, scale=frozen[0] if replaying else scale, **extras)

    capturing, replaying = False, False

    def capture(run):
        nonlocal capturing, replaying
        capturing = True
        y = run().clone()
        capturing = False

        def replay():
            nonlocal replaying
            replaying = True
            y.copy_(run())
            replaying = False

        return replay, y

    with pytest.raises(AssertionError, match=r"swiglu T=2, multiplier 0.0: y at"):
        gpu_checks.replays_follow("swiglu", 2, 2100, 24, "cpu", capture=capture, call=call)


def test_replays_find_sums_that_are_not_written():
    def capture(run):
        y = run().clone()
        return (lambda: y.copy_(kept[0])), y

    right, kept = reference_call("down_proj"), []

    def call(*inputs, **extras):
        kept[:] = [right(*inputs, **extras)]
        return kept[0]

    with pytest.raises(AssertionError, match=r"down_proj T=2"):
        gpu_checks.replays_follow("down_proj", 2, 48, 24, "cpu", capture=capture, call=call)


def test_answers_to_compare_with_come_from_kernels_that_do_not_overlap():
    right, hooked = reference_call(), []
    hooks = triton.knobs.runtime.launch_enter_hook

    def call(*inputs, **extras):
        hooked.append(len(hooks.calls))
        return right(*inputs, **extras)

    before = len(hooks.calls)
    gpu_checks.dependent_stress(2, 48, 24, "cpu", repeats=4, call=call)
    assert hooked == [before + 1] * 3 + [before] * 4


def test_memory_fill_is_put_back():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with gpu_checks.memory_fill(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with gpu_checks.memory_fill(True):
        assert torch.empty(3).isnan().all()
    after = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    assert after == before
