"""``collect`` over models in memory, read layer by layer, and shared by ranks: equal sums, each pack counted once.

test_tensor_parallel.py tests several ranks together; here a mesh has one rank.
"""

import pytest
import torch
import torch.distributed as dist

from cna_kernels import ActivationSums, InputError, ops
from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from cna_kernels.model.discovery import collect, streamed
from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.parallel import tensor_parallel
from tiny import ragged, write_checkpoint

pytest.importorskip("transformers")
N_PROMPTS, N_COLUMNS, POISON = 14, 3, 2  # POISON: a token whose embedding is NaN, and which no prompt has
RUNNERS = ("resident", "streamed", "streamed to a file", "one rank")
PREFIX = 30  # tokens that all prompts begin with; the prefix runs before all other packs


@pytest.fixture(scope="module")
def mesh():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield tensor_parallel.open_mesh("cpu")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    model = write_checkpoint("llama", directory)
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = torch.nan
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def load(directory, mesh, monkeypatch):
    def load(runner):
        config, checkpoint = read_config(directory), open_checkpoint(directory)
        if runner == "one rank":
            return tensor_parallel.load_parallel(directory, config, checkpoint, mesh=mesh)
        if runner == "resident":
            return load_transformer(directory, config, checkpoint)
        monkeypatch.setattr(streamed, "HIDDEN_BYTES", 0 if runner == "streamed to a file" else 1 << 30)
        return streamed.StreamedTransformer(directory, config, checkpoint)

    return load


def prompts(shared=True):
    rows = ragged(N_PROMPTS, range(5, 5 + PREFIX) if shared else ())
    return [TokenPrompt(ids, f"p{row}", min(1 + row % 3, len(ids))) for row, ids in enumerate(rows)]


def started():
    """Sums that hold totals and a count already."""
    sums = ActivationSums(3, 48, N_COLUMNS, squares=True)
    sums.total += 1
    sums.total_sq += 2
    sums.count += 3
    sums.act_sum += 5  # left in the buffers by a pass that was broken off
    return sums


def sums_of(transformer, given, sums=None, **options):
    sums = started() if sums is None else sums
    weights = torch.rand(N_PROMPTS, N_COLUMNS, generator=torch.Generator().manual_seed(1)) + 0.1
    collect.collect(transformer, given, weights, sums, **({"batch": 4} | options))
    return sums


def assert_equal(found, expected, tolerance):
    for name in ("total", "total_sq", "count"):
        x, y = getattr(found, name), getattr(expected, name)
        assert (x - y).abs().max() <= tolerance * y.abs().max(), name


def failing(whole, fails, calls):
    """``whole``, which runs out of memory after its work in the calls that ``fails`` names; ``calls`` gets all."""

    def run(*args, **kwargs):
        result = whole(*args, **kwargs)
        calls.append(args)
        if fails(len(calls) - 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    return run


# the function that fails, and how many of its calls are for the prefix where layers are read one by one
POINTS = {
    "the op": (ops, "gated_mlp", 3),
    "a layer": (collect, "run_layer", 3),
    "the last layer": (collect, "forward", 3),
    "packing": (collect, "pack_prompts", 0),
    "packing a prefix": (collect, "pack_prefix", 1),
    "a copy to the host": (torch.Tensor, "cpu", 6),
    "the check of the sums": (ActivationSums, "_require_finite", 3),
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_out_of_memory_anywhere_counts_nothing_twice(runner, point, load, monkeypatch):
    """For every call, of every layer, pack and prefix: this one call fails."""
    transformer, given, (owner, name, of_prefix) = load(runner), prompts(), POINTS[point]
    whole, refused = getattr(owner, name), 0
    monkeypatch.setattr(owner, name, failing(whole, lambda call: False, undisturbed := []))
    expected = sums_of(transformer, given)
    for number in range(len(undisturbed)):
        monkeypatch.setattr(owner, name, failing(whole, lambda call, number=number: call == number, []))
        sums = started()
        try:
            sums_of(transformer, given, sums)
        except InputError as error:
            refused += 1
            if runner == "one rank":
                assert "out of memory on rank 0 with these" in str(error)
                assert_equal(sums, started(), 0)
            else:
                assert str(error) == f"p0: out of memory with this prompt alone ({len(given[0].ids)} tokens)"
        else:
            assert_equal(sums, expected, 1e-6)
    assert undisturbed, "the point is never reached"
    # where the prefix fails, a model in memory runs without it; ranks raise an error
    assert refused == {"resident": 0, "one rank": len(undisturbed)}.get(runner, of_prefix)


@pytest.mark.parametrize("shared", [True, False])
def test_halves_give_the_same_bits_in_memory_and_streamed(shared, load, monkeypatch):
    """Packs of more than three prompts never fit here; in memory and streamed, the same packs are halved."""
    given, found, whole = prompts(shared), [], collect.forward

    def small_memory(transformer, packed, *rest, **options):
        if sum(span.n_prompts for span in packed.spans) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(transformer, packed, *rest, **options)

    plain = sums_of(load("resident"), given, batch=N_PROMPTS)
    monkeypatch.setattr(collect, "forward", small_memory)
    for runner in ("resident", "streamed", "streamed to a file"):
        seen = []
        sums = started()
        sums_of(load(runner), given, sums, batch=N_PROMPTS, progress=lambda *now, seen=seen: seen.append(now))
        found.append(sums)
        assert [sum(counts) for counts in zip(*seen, strict=True)] == [N_PROMPTS, sum(len(p.ids) for p in given)]
        assert_equal(found[-1], found[0], 0)
    assert_equal(found[0], plain, 1e-6)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_prompt_that_is_not_finite_is_named(runner, shared, load):
    transformer = load(runner)
    for culprit in (0, 6, N_PROMPTS - 1):
        given = prompts(shared)
        given[culprit].ids[-1] = POISON
        message = rf"^p{culprit}: causes a non-finite activation in layer 0, neuron 0; nothing was selected$"
        with pytest.raises(InputError, match=message):
            sums_of(transformer, given, batch=N_PROMPTS)
    given = prompts(shared=True)
    for prompt in given:
        prompt.ids[3] = POISON
    with pytest.raises(InputError, match=r"^p0: causes a non-finite activation in layer 0"):
        sums_of(transformer, given)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_prompt_that_is_too_long_is_named(runner, load):
    given = prompts()
    given[5].ids.extend([7] * 60)
    with pytest.raises(InputError, match=r"^p5: has \d+ tokens, the model's context is 64$"):
        sums_of(load(runner), given)


def test_a_layer_that_does_not_fit_beside_the_packs(load, monkeypatch):
    monkeypatch.setattr(streamed, "load_layer", failing(streamed.load_layer, lambda call: call == 1, []))
    with pytest.raises(InputError, match=r"^batch: out of memory .* give --batch-tokens less$"):
        sums_of(load("streamed"), prompts())
