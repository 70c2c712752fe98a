"""Directions against hooks on transformers, in fp32; rows of one batch against each row alone."""

import pytest
import torch

from cna_kernels import InputError
from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from cna_kernels.model.evaluation import directions
from cna_kernels.model.evaluation.directions import Direction, DirectionTable
from cna_kernels.model.generate import generate
from cna_kernels.model.transformer import Steering
from tiny import SHAPE, random_prompts, write_checkpoint

pytest.importorskip("transformers")
L, H = SHAPE["num_hidden_layers"], SHAPE["hidden_size"]


@pytest.fixture(scope="module", params=["llama", "qwen3-tied", "qwen2-sliding"])
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    theirs = write_checkpoint(request.param, directory)
    return load_transformer(directory, read_config(directory), open_checkpoint(directory)), theirs


def hooks_on(theirs, *, layer_output=None, mlp=None, attention=None, embedding=None):
    """Each argument changes what a module returns: ``(layer, x) -> x``."""
    handles = []

    def add(module, function, layer):
        def hook(_module, _arguments, output):
            first = output[0] if isinstance(output, tuple) else output
            changed = function(layer, first)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handles.append(module.register_forward_hook(hook))

    if embedding:
        add(theirs.model.embed_tokens, embedding, -1)
    for number, layer in enumerate(theirs.model.layers):
        for module, function in ((layer, layer_output), (layer.mlp, mlp), (layer.self_attn, attention)):
            if function:
                add(module, function, number)
    return handles


def hooked_logits(theirs, ids, **functions):
    handles = hooks_on(theirs, **functions)
    with torch.no_grad():
        logits = theirs(torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits


def hooked_means(theirs, members):
    seen = {"residual": torch.zeros(L, H, dtype=torch.float64), "mlp": torch.zeros(L, H, dtype=torch.float64)}

    def keep(site):
        def function(layer, x):
            seen[site][layer] += x[0, -1].double() / len(members)
            return x

        return function

    for prompt in members:
        hooked_logits(theirs, prompt.ids, layer_output=keep("residual"), mlp=keep("mlp"))
    return seen


def test_differences_equal_hooks(pair):
    ours, theirs = pair
    a, b = random_prompts(9, 1), random_prompts(7, 2)
    found = directions.differences(ours, a, b)
    left, right = hooked_means(theirs, a), hooked_means(theirs, b)
    for site in ("residual", "mlp"):
        expected = left[site] - right[site]
        assert expected.abs().max() > 0.1
        assert (found[site] - expected).abs().max() <= 1e-4


def expected_for(theirs, direction, strength, ids):
    vectors = direction.vectors

    def add(layer, x):
        return x + strength * vectors[layer]

    def take_out(_layer, x):
        return x - strength * (x @ vectors[0])[..., None] * vectors[0]

    if direction.site == "residual":
        return hooked_logits(theirs, ids, layer_output=add)
    if direction.site == "mlp":
        return hooked_logits(theirs, ids, mlp=add)
    return hooked_logits(theirs, ids, mlp=take_out, attention=take_out, embedding=take_out)


def test_rows_of_one_batch_equal_hooks_one_at_a_time(pair):
    ours, theirs = pair
    difference = directions.differences(ours, random_prompts(9, 1), random_prompts(7, 2))
    row = torch.randn(H, generator=torch.Generator().manual_seed(3))
    found = [
        (directions.caa(difference, 1), -1.0),
        (directions.caa(difference, L - 1), 2.0),
        (directions.caa_as_released(difference), 0.75),
        (directions.ablation(difference, 1), 1.0),
        (directions.ablation(difference, 0), 0.5),
        (directions.feature(difference, 1, row), -1.0),
    ]
    table = DirectionTable(*zip(*found, strict=True), L, H)
    ids = random_prompts(1, 5)[0].ids
    chosen = [-1, *range(len(found))]
    with torch.no_grad():
        batch = torch.tensor([ids] * len(chosen))
        logits = ours.logits(ours.hidden(batch, steer=Steering(None, None, table.row_direction(chosen))))
        plain = ours(torch.tensor([ids]))[0]
    assert (logits[0] - plain).abs().max() <= 1e-5
    for number, (direction, strength) in enumerate(found):
        expected = expected_for(theirs, direction, strength, ids)
        assert (expected - plain).abs().max() > 0.1, "a direction without effect would hide everything"
        assert (logits[number + 1] - expected).abs().max() <= 1e-4


def test_a_feature_is_as_long_as_the_difference_along_it(pair):
    ours, _ = pair
    difference = directions.differences(ours, random_prompts(5, 1), random_prompts(4, 2))
    row = torch.randn(H, generator=torch.Generator().manual_seed(3))
    vector = directions.feature(difference, 1, row).vectors
    unit = row / row.norm()
    assert vector[1] @ unit == pytest.approx(float(difference["residual"][1].float() @ unit), rel=1e-4)
    assert not vector[0].any() and (vector[1] - (vector[1] @ unit) * unit).abs().max() < 1e-5


def test_greedy_decoding_keeps_each_rows_direction(pair):
    """Rows that end are dropped from the batch: the other rows must keep their directions."""
    ours, _ = pair
    difference = directions.differences(ours, random_prompts(9, 1), random_prompts(7, 2))
    found = [(directions.caa(difference, 1), -2.0), (directions.ablation(difference, 1), 1.0)]
    table = DirectionTable(*zip(*found, strict=True), L, H)
    rows = [0, -1, 1, 0, -1, 1, 0, 1]
    members = random_prompts(len(rows), 8)
    plain = generate(ours, members, max_new_tokens=16, stop_ids=frozenset())
    stops = frozenset(row[2] for row in plain[:3])
    together = generate(
        ours, members, max_new_tokens=16, stop_ids=stops, steer=Steering(None, None, table.row_direction(rows))
    )
    alone = [
        generate(
            ours, [prompt], max_new_tokens=16, stop_ids=stops, steer=Steering(None, None, table.row_direction([row]))
        )[0]
        for prompt, row in zip(members, rows, strict=True)
    ]
    assert together == alone
    assert len({len(answer) for answer in together}) > 1, "rows must end at different times"


def test_decoder_rows_are_read_and_checked(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "sae.safetensors"
    decoder = torch.randn(5, H, generator=torch.Generator().manual_seed(1))
    decoder[4] = 0
    save_file({"W_dec": decoder}, path)
    assert torch.equal(directions.read_decoder_row(path, 3, H), decoder[3])
    for number, n_hidden, message in ((5, H, "features 0 to 4"), (0, H + 1, "expected"), (4, H, "row 4 is zero")):
        with pytest.raises(InputError, match=message):
            directions.read_decoder_row(path, number, n_hidden)
    save_file({"other": decoder}, path)
    with pytest.raises(InputError, match="W_dec: is missing"):
        directions.read_decoder_row(path, 0, H)
    path.write_bytes(b"no")
    with pytest.raises(InputError, match="not a safetensors file"):
        directions.read_decoder_row(path, 0, H)
    with pytest.raises(InputError, match="no such file"):
        directions.read_decoder_row(tmp_path / "none", 0, H)


def test_tables_refuse_what_does_not_fit():
    direction = Direction("residual", torch.ones(L, H))
    with pytest.raises(ValueError, match="strengths: expected 1"):
        DirectionTable([direction], [], L, H)
    with pytest.raises(ValueError, match="vectors: expected"):
        DirectionTable([direction], [1.0], L + 1, H)
    with pytest.raises(ValueError, match="direction_of_row: expected -1 to 0, got 1"):
        DirectionTable([direction], [1.0], L, H).row_direction([1])
    with pytest.raises(ValueError, match="site"):
        Direction("hidden", torch.ones(L, H))
