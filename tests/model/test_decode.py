"""A step of decoding in one call of the CPU engine against the plain forward pass, its definition."""

import ctypes

import pytest
import torch

from cna_kernels import ActivationSums, Circuit, plans
from cna_kernels.cpu import library
from cna_kernels.model import decode
from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from cna_kernels.model.transformer import Edit, KVCache, Steering, Tap
from cna_kernels.steering import SteeringTable
from tiny import VARIANTS, write_checkpoint

pytest.importorskip("transformers")
if reason := library.missing():
    pytest.skip(f"the CPU engine {reason}", allow_module_level=True)

PROMPT, STEPS, ROWS = 9, 6, 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    write_checkpoint(request.param, directory)
    return load_transformer(directory, read_config(directory), open_checkpoint(directory))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    write_checkpoint("llama-bias", directory)
    return load_transformer(directory, read_config(directory), open_checkpoint(directory))


@pytest.fixture(autouse=True)
def plans_as_before():
    yield
    plans.use(None)


def steps(transformer, plan, *, rows=ROWS, steer=None, tap=None, lengths=None):
    """The hidden states of STEPS tokens after a prompt, ``[B, STEPS, H]``, and the cache."""
    plans.use(plan)
    ids = torch.randint(3, 90, (ROWS, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))[:rows]
    lengths = torch.full((rows,), PROMPT) if lengths is None else lengths
    cache = KVCache(transformer.config, rows, PROMPT + STEPS, transformer.dtype, "cpu")
    found = []
    with torch.inference_mode():
        transformer.hidden(ids[:, :PROMPT], lengths=lengths, cache=cache, steer=steer)
        for step in range(STEPS):
            positions = (lengths + step)[:, None]
            arguments = dict(lengths=lengths + step + 1, positions=positions, cache=cache, steer=steer, tap=tap)
            found.append(transformer.hidden(ids.gather(1, positions), **arguments)[:, 0])
    assert (cache._step is not None) == (plan == "decode=csrc"), "it must be the step that is tested"
    return torch.stack(found, dim=1), cache


def steering(config, rows):
    n_layers, n_neurons = config.num_hidden_layers, config.intermediate_size
    places = [[(layer, n) for layer in range(n_layers) for n in range(first, n_neurons, 5)] for first in (0, 2)]
    circuits = [Circuit(tuple((*place, 1.0) for place in each), n_layers, n_neurons) for each in places]
    table = SteeringTable(circuits, [0.0, 2.5], n_layers, n_neurons, device="cpu")
    return Steering(table, torch.tensor([0, -1, 1][:rows], dtype=torch.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_family_is_as_the_plain_forward(model, dtype):
    """Rows of different lengths, steered and not; in fp32 to a few roundings, and closer to fp32 than twice PyTorch."""
    if model.config.mlp_bias:
        return
    lengths = torch.tensor([9, 4, 7])
    exact = model.float()
    answer = steps(exact, "decode=torch", lengths=lengths, steer=steering(model.config, ROWS))[0]
    plain = steps(exact, "decode=torch", lengths=lengths)[0]
    assert (answer - plain).norm() > 0.05 * plain.norm(), "the circuits must change something"
    transformer = model.to(dtype)
    steer = steering(model.config, ROWS)
    theirs = steps(transformer, "decode=torch", lengths=lengths, steer=steer)[0].float()
    ours = steps(transformer, "decode=csrc", lengths=lengths, steer=steer)[0].float()
    error, theirs_error = (ours - answer).abs().max(), (theirs - answer).abs().max()
    assert error <= 2 * theirs_error + 1e-5 * answer.abs().max(), f"{error:.2e}, PyTorch {theirs_error:.2e}"
    model.float()


def test_the_cache_is_the_same(llama):
    (_, ours), (_, theirs) = (steps(llama, f"decode={plan}") for plan in ("csrc", "torch"))
    for one, two in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        assert (two[:, :, :, -1] != 0).any()


def test_sums_ride_along(llama):
    found = []
    for plan in ("csrc", "torch"):
        config = llama.config
        sums = ActivationSums(config.num_hidden_layers, config.intermediate_size, 2, squares=True)
        weight = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.0]])
        steps(llama, f"decode={plan}", tap=Tap(sums, weight), steer=steering(config, ROWS))
        sums.fold(torch.ones(1, 2))
        found.append((sums.total, sums.total_sq))
    for one, two in zip(*found, strict=True):
        assert two.abs().max() > 0.1
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_sums_and_circuits_change_between_steps(llama):
    """On one cache: other sums, another table, new circuits in it, other rows, other weights, and nothing at all."""
    config, found = llama.config, []
    for plan in ("csrc", "torch"):
        plans.use(f"decode={plan}")
        shape = config.num_hidden_layers, config.intermediate_size
        sums = [ActivationSums(*shape, 2), ActivationSums(*shape, 2), ActivationSums(*shape, 1)]
        first, second = steering(config, ROWS), steering(config, ROWS)
        second.row_circuit = torch.tensor([1, 1, -1], dtype=torch.int32)
        second.table.set_multiplier(1, -1.5)
        weights = [torch.rand(ROWS, 2, generator=torch.Generator().manual_seed(n)) for n in range(3)]
        settings = [
            (Tap(sums[0], weights[0]), None), (Tap(sums[0], weights[1]), first), (Tap(sums[1], weights[1]), first),
            (None, second), (None, first), (None, None), (Tap(sums[2], weights[2][:, :1]), second),
            (Tap(sums[2], torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(4))[:, 1:2]), first),
            (None, Steering(first.table, second.row_circuit)), (Tap(sums[1], weights[0]), first),
        ]  # fmt: skip
        cache, hidden = KVCache(config, ROWS, PROMPT + len(settings), llama.dtype, "cpu"), []
        ids = torch.randint(3, 90, (ROWS, PROMPT + len(settings)), generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            llama.hidden(ids[:, :PROMPT], cache=cache)
            for at, (tap, steer) in enumerate(settings, PROMPT):
                if at == PROMPT + 8:
                    first.table.replace(0, Circuit(((0, 1, 1.0), (1, 7, 1.0)), *shape), 3.0)
                positions = torch.full((ROWS, 1), at)
                arguments = dict(positions=positions, lengths=positions[:, 0] + 1, cache=cache, steer=steer, tap=tap)
                hidden.append(llama.hidden(ids[:, at : at + 1], **arguments))
        found.append((torch.cat(hidden), *(each.act_sum for each in sums)))
    for one, two in zip(*found, strict=True):
        assert two.abs().max() > 0.1
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_rows_threads_and_circuits_leave_other_rows_alone(llama):
    """The same bits for any number of threads, for a row alone, and for a row that no circuit steers beside others."""
    whole = steps(llama, "decode=csrc")[0]
    before = torch.get_num_threads()
    for n_threads in (1, 2, 4):
        torch.set_num_threads(n_threads)
        assert torch.equal(steps(llama, "decode=csrc")[0], whole)
    torch.set_num_threads(before)
    steered = steps(llama, "decode=csrc", steer=steering(llama.config, ROWS))[0]
    assert torch.equal(steered[1], whole[1]) and not torch.equal(steered[0], whole[0])


def test_what_the_step_does_not_serve(llama, monkeypatch):
    assert not decode.serves(llama, 1), "gradients are on"
    with torch.inference_mode():
        assert decode.serves(llama, 1)
        for plan in ("decode=torch", "linear=torch", "gated_mlp=torch"):
            plans.use(plan)
            assert not decode.serves(llama, 1)
        plans.use("linear=torch,decode=csrc")
        assert decode.serves(llama, 1), "asked for by name"
        plans.use(None)
        with torch.autograd.profiler.profile():
            assert not decode.serves(llama, 1)
        monkeypatch.setenv("CNA_BACKEND", "reference")
        plans.forget()
        assert not decode.serves(llama, 1)
        monkeypatch.undo()
        plans.forget()
        cache = KVCache(llama.config, 1, 4, llama.dtype, "cpu")
        llama.hidden(torch.tensor([[3, 4]]), cache=cache)
        step = dict(positions=torch.tensor([[2]]), lengths=torch.tensor([3]), cache=cache)
        llama.hidden(torch.tensor([[5]]), steer=Steering(None, None, Edit()), **step)
        assert cache._step is None, "an edit sees the stream of every layer"
        llama.hidden(torch.tensor([[5]]), **step)
        first = cache._step
        cache.keep(torch.tensor([0, 0]))
        twice = dict(positions=torch.tensor([[3], [3]]), lengths=torch.tensor([4, 4]), cache=cache)
        llama.hidden(torch.tensor([[5], [6]]), **twice)
        assert first is not None and cache._step is not first, "a cache that moved needs a new step"


# A field of cna_decoder or cna_layer, a wrong value, and the status.
WRONG = [
    ("version", 2, 1), ("layers", None, 2), ("norm", None, 2), ("n_layers", -1, 3), ("H", -1, 3), ("H", 2**40, 3),
    ("n_kv_heads", 0, 3), ("n_kv_heads", 3, 3), ("D", 7, 3), ("D", 0, 3), ("length", 0, 3), ("cache_row", 3, 4),
    ("cache_head", 3, 4), ("layer.input_norm", None, 2), ("layer.keys", None, 2), ("layer.window", -1, 3),
    ("layer.w_q.type", 99, 11), ("layer.w_down.at", None, 2), ("layer.w_o.row_bytes", 4, 4), ("layer.b_q", 1, 5),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "status"), WRONG)
def test_wrong_arguments_are_refused(llama, field, value, status):
    cache = KVCache(llama.config, 2, 8, llama.dtype, "cpu")
    step = decode.DecodeStep(llama, cache)
    *path, name = field.split(".")
    owner = step.decoder
    for part in path:
        owner = step.layers[1] if part == "layer" else getattr(owner, part)
    setattr(owner, name, value)
    x, rotation = torch.full((2, 1, 32), 0.5), torch.ones(2, 1, 1, 8)
    out, position = torch.full((2, 32), 7.0), torch.zeros(2, dtype=torch.int64)

    def call():
        return step.function(
            out.data_ptr(), x.data_ptr(), ctypes.addressof(step.decoder), position.data_ptr(), rotation.data_ptr(),
            rotation.data_ptr(), None, 2, 32, 32, 8, 1,
        )  # fmt: skip

    assert call() == status
    assert (out == 7).all() and not cache.keys.any(), "written in spite of the error"


@pytest.mark.parametrize("position", [-1, 8, 2**62])
def test_positions_outside_the_cache_are_refused(llama, position):
    cache = KVCache(llama.config, 1, 8, llama.dtype, "cpu")
    x, rotation = torch.full((1, 1, 32), 0.5), torch.ones(1, 1, 1, 8)
    with pytest.raises(ValueError, match="cna_decode_fp32: a size is negative"):
        decode.DecodeStep(llama, cache)(x, rotation, rotation, torch.tensor([[position]]), None, None, None)
