"""The forward pass against transformers on tiny random checkpoints of every family and variant."""

import pytest
import torch

from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.generate import generate
from tiny import write_checkpoint

pytest.importorskip("transformers")


def load(directory, **options):
    return load_transformer(directory, read_config(directory), open_checkpoint(directory), **options)


def random_ids(batch, n_tokens, seed=1):
    return torch.randint(3, 97, (batch, n_tokens), generator=torch.Generator().manual_seed(seed))


def test_logits_equal_transformers(tiny_checkpoint):
    directory, theirs = tiny_checkpoint
    ours = load(directory)
    ids = random_ids(3, 20)
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
        got = ours(ids)
    assert expected.std() > 0.1, "a flat output would hide everything"
    assert (got - expected).abs().max() <= 1e-4


def test_greedy_tokens_equal_transformers(tiny_checkpoint):
    directory, theirs = tiny_checkpoint
    ours = load(directory)
    ids = random_ids(1, 9, seed=2)
    with torch.no_grad():
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, eos_token_id=None
        )[0, 9:].tolist()
    prompt = TokenPrompt(ids[0].tolist(), "prompt")
    got = generate(ours, [prompt], max_new_tokens=32, stop_ids=frozenset())[0]
    assert len(set(expected)) > 2, "a constant answer would hide everything"
    assert got == expected


def test_a_ragged_batch_equals_one_at_a_time(tiny_checkpoint):
    directory, _ = tiny_checkpoint
    ours = load(directory)
    prompts = [TokenPrompt(random_ids(1, n, seed=n)[0].tolist(), str(n)) for n in (3, 20, 1, 11)]
    together = generate(ours, prompts, max_new_tokens=24, stop_ids=frozenset())
    alone = [generate(ours, [prompt], max_new_tokens=24, stop_ids=frozenset())[0] for prompt in prompts]
    assert together == alone


def test_padding_does_not_reach_the_hidden_states(tiny_checkpoint):
    directory, _ = tiny_checkpoint
    ours = load(directory)
    ids = random_ids(2, 20)
    lengths = torch.tensor([20, 7])
    with torch.no_grad():
        padded = ours.hidden(ids, lengths=lengths)
        other = ids.clone()
        other[1, 7:] = 5
        assert torch.equal(ours.hidden(other, lengths=lengths)[1, :7], padded[1, :7])
        alone = ours.hidden(ids[1:, :7])
    assert (padded[1, :7] - alone[0]).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints(tmp_path, dtype):
    theirs = write_checkpoint("llama", tmp_path, dtype=dtype)
    ours = load(tmp_path)
    assert ours.embed_tokens.weight.dtype == dtype
    ids = random_ids(2, 12)
    with torch.no_grad():
        exact = theirs.double()(ids, use_cache=False).logits
        ours_error = (ours(ids).double() - exact).abs().max()
        their_error = (theirs.to(dtype)(ids, use_cache=False).logits.double() - exact).abs().max()
    assert ours_error <= 2 * their_error + torch.finfo(dtype).eps * exact.abs().max()


def test_sharded_equals_single(tmp_path):
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    write_checkpoint("qwen2", single)
    write_checkpoint("qwen2", sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    ids = random_ids(2, 12)
    with torch.no_grad():
        assert torch.equal(load(single)(ids), load(sharded)(ids))


def test_context_end_stops_generation(tmp_path):
    write_checkpoint("llama", tmp_path, max_position_embeddings=24)
    ours = load(tmp_path)
    prompts = [TokenPrompt(random_ids(1, n, seed=n)[0].tolist(), str(n)) for n in (20, 5)]
    answers = generate(ours, prompts, max_new_tokens=40, stop_ids=frozenset())
    assert [len(answer) for answer in answers] == [4, 19]
    assert answers[1] == generate(ours, prompts[1:], max_new_tokens=40, stop_ids=frozenset())[0]


def test_compiled_forward_with_tap_and_steering(tmp_path):
    from cna_kernels import ActivationSums, Circuit, SteeringTable
    from cna_kernels.model.transformer import Steering, Tap

    write_checkpoint("llama", tmp_path)
    ours = load(tmp_path)
    table = SteeringTable([Circuit(((0, 3, 1.0), (2, 40, 1.0)), 3, 48)], [0.0], 3, 48)
    ids = random_ids(2, 12)
    token_weight = torch.rand(24, 2)

    def run(forward):
        sums = ActivationSums(3, 48, 2)
        with torch.no_grad():
            logits = forward(ids, tap=Tap(sums, token_weight), steer=Steering(table, table.row_circuit([0, -1])))
        return logits, sums.act_sum

    eager = run(ours)
    compiled = run(torch.compile(ours, fullgraph=True, backend="aot_eager"))
    for ours_part, theirs in zip(eager, compiled, strict=True):
        assert (ours_part - theirs).abs().max() <= 1e-5 * ours_part.abs().max()
    with torch.no_grad():
        assert (eager[0] - ours(ids))[0].abs().max() > 1e-3 > (eager[0] - ours(ids))[1].abs().max()
