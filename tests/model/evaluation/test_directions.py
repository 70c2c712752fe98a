"""Directions and gradient attribution against hooks on transformers, fp32; rows of one batch against one at a time."""

import types

import pytest
import torch

from cna_kernels import InputError
from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.evaluation import directions
from cna_kernels.model.evaluation.directions import Direction, DirectionTable
from cna_kernels.model.evaluation.relp import relevance
from cna_kernels.model.generate import generate
from cna_kernels.model.prompts.files import PromptSet
from cna_kernels.model.transformer import Steer
from tiny import SHAPE, write_checkpoint

pytest.importorskip("transformers")
L, H = SHAPE["num_hidden_layers"], SHAPE["hidden_size"]


@pytest.fixture(scope="module", params=["llama", "qwen3-tied", "qwen2-sliding"])
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    theirs = write_checkpoint(request.param, directory)
    return load_transformer(directory, read_config(directory), open_checkpoint(directory)), theirs


def prompts(n, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 14, (n,), generator=generator).tolist()
    return [
        TokenPrompt(torch.randint(3, 97, (length,), generator=generator).tolist(), f"prompt {number}")
        for number, length in enumerate(lengths)
    ]


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
    a, b = prompts(9, 1), prompts(7, 2)
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
    difference = directions.differences(ours, prompts(9, 1), prompts(7, 2))
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
    ids = prompts(1, 5)[0].ids
    chosen = [-1, *range(len(found))]
    with torch.no_grad():
        batch = torch.tensor([ids] * len(chosen))
        logits = ours.logits(ours.hidden(batch, steer=Steer(None, None, table.rows(chosen))))
        plain = ours(torch.tensor([ids]))[0]
    assert (logits[0] - plain).abs().max() <= 1e-5
    for number, (direction, strength) in enumerate(found):
        expected = expected_for(theirs, direction, strength, ids)
        assert (expected - plain).abs().max() > 0.1, "a direction without effect would hide everything"
        assert (logits[number + 1] - expected).abs().max() <= 1e-4


def test_a_feature_is_as_long_as_the_difference_along_it(pair):
    ours, _ = pair
    difference = directions.differences(ours, prompts(5, 1), prompts(4, 2))
    row = torch.randn(H, generator=torch.Generator().manual_seed(3))
    vector = directions.feature(difference, 1, row).vectors
    unit = row / row.norm()
    assert vector[1] @ unit == pytest.approx(float(difference["residual"][1].float() @ unit), rel=1e-4)
    assert not vector[0].any() and (vector[1] - (vector[1] @ unit) * unit).abs().max() < 1e-5


def test_greedy_decoding_keeps_each_rows_direction(pair):
    """Rows that end are dropped from the batch: the others must keep theirs."""
    ours, _ = pair
    difference = directions.differences(ours, prompts(9, 1), prompts(7, 2))
    found = [(directions.caa(difference, 1), -2.0), (directions.ablation(difference, 1), 1.0)]
    table = DirectionTable(*zip(*found, strict=True), L, H)
    rows = [0, -1, 1, 0, -1, 1, 0, 1]
    members = prompts(len(rows), 8)
    plain = generate(ours, members, max_new_tokens=16, stop_ids=frozenset())
    stops = frozenset(row[2] for row in plain[:3])
    together = generate(ours, members, max_new_tokens=16, stop_ids=stops, steer=Steer(None, None, table.rows(rows)))
    alone = [
        generate(ours, [prompt], max_new_tokens=16, stop_ids=stops, steer=Steer(None, None, table.rows([row])))[0]
        for prompt, row in zip(members, rows, strict=True)
    ]
    assert together == alone
    assert len({len(answer) for answer in together}) > 1, "rows must end at different times"


def rule_by_rule(theirs, members, target, counterfactual):
    """Relevance by patching transformers: normalisation and sigmoid without gradient, half of a product to each."""
    total = torch.zeros(L, SHAPE["intermediate_size"], dtype=torch.float64)

    def norm(self, x):
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt().detach())

    def mlp(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        gate = gate * gate.sigmoid().detach()
        product = gate * up
        self.seen = product.detach() + (product - product.detach()) * 0.5  # the value, and half of the gradient
        self.seen.retain_grad()
        return self.down_proj(self.seen)

    kept = []
    for module in theirs.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm") or name.endswith("MLP"):
            kept.append(module)
            module.forward = types.MethodType(norm if name.endswith("RMSNorm") else mlp, module)
    for prompt in members:
        logits = theirs(torch.tensor([prompt.ids]), use_cache=False).logits[0, -1]
        (logits[target] - logits[counterfactual]).backward()
        for number, layer in enumerate(theirs.model.layers):
            seen = layer.mlp.seen
            total[number] += (seen.detach().double() * seen.grad.double())[0].sum(0) / len(members)
    for module in kept:
        del module.forward
    theirs.zero_grad()
    return total


def test_relevance_equals_patched_transformers(pair):
    ours, theirs = pair
    for members in (prompts(1, 1), prompts(5, 2)):
        expected = rule_by_rule(theirs, members, 11, 40)
        found = relevance(ours, members, [11], [40], batch=2)
        assert expected.abs().max() > 0.05
        assert (found - expected).abs().max() <= 1e-4


def test_relevance_leaves_the_model_as_it_was(pair):
    ours, _ = pair
    before = ours(torch.tensor([[5, 6, 7]]))
    relevance(ours, prompts(3, 1), [11, 12], [40])
    assert torch.equal(ours(torch.tensor([[5, 6, 7]])), before)
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in ours.parameters())


def test_relevance_of_a_language_model(tmp_path):
    from cna_kernels.model import load
    from tiny import write_language_model

    model = load(write_language_model(tmp_path))
    found = model.relevance("open it", "Sure", "no")
    tokens = [model.tokenizer.encode_answer(text)[:1] for text in ("Sure", "no")]
    assert torch.equal(found, relevance(model.transformer, model.encode(PromptSet.of(["open it"], "p")), *tokens))
    both = model.relevance(["open it", "why"], ["Sure", "Yes"], "no")
    assert both.shape == (3, 48) and not torch.equal(both, found)
    with pytest.raises(InputError, match="counterfactual: holds no token"):
        model.relevance("open it", "Sure", "")


def test_relevance_needs_tokens(pair):
    with pytest.raises(InputError, match="targets: expected at least one token"):
        relevance(pair[0], prompts(1, 1), [], [3])


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
        DirectionTable([direction], [1.0], L, H).rows([1])
    with pytest.raises(ValueError, match="site"):
        Direction("hidden", torch.ones(L, H))
