"""Which token is a prompt's last, by every mask that transformers takes, against hooks on the plain model."""

import copy

import pytest
import torch

from attach_cases import ids_of, logits, make, transformers
from cna_kernels import InputError, attach, ops

B, S = 2, 7
RIGHT = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])  # padded on the right
LEFT = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
HOLES = torch.tensor([[1, 0, 1, 1, 0, 1, 0], [1] * 7])


def by_pair(mask, dtype=torch.bool, hidden=None):
    """``[B, 1, S, S]``: causal, and no token sees one that the mask hides; a row without any sees itself."""
    sees = torch.ones(S, S, dtype=torch.bool).tril() & (mask != 0)[:, None, None]
    if dtype == torch.bool:
        return sees
    return torch.where(sees, 0.0, torch.finfo(dtype).min if hidden is None else hidden).to(dtype)


# name: (the mask, the place of each row's last token or the refusal)
MASKS = {
    "none": (None, [6, 6]),
    "ones": (torch.ones(B, S, dtype=torch.int64), [6, 6]),
    "padded on the right": (RIGHT, [6, 4]),
    "padded on the left": (LEFT, [6, 6]),
    "holes": (HOLES, [5, 6]),
    "int32": (RIGHT.int(), [6, 4]),
    "int8": (RIGHT.to(torch.int8), [6, 4]),
    "uint8 of 255": (RIGHT.to(torch.uint8) * 255, [6, 4]),
    "bool": (RIGHT.bool(), [6, 4]),
    "fp32": (RIGHT.float(), [6, 4]),
    "bf16": (RIGHT.bfloat16(), [6, 4]),
    "fp16 of 0.5": (RIGHT.half() * 0.5, [6, 4]),
    "fp64": (RIGHT.double(), [6, 4]),
    "below 0": (-RIGHT, [6, 4]),
    "segments": (torch.tensor([[5, 5, 5, 5, 1, 1, 1], [1, 1, 2, 2, 2, 0, 0]]), [6, 4]),
    "falling segments": (torch.tensor([[3, 3, 2, 2, 1, 1, 1], [9, 8, 7, 6, 5, 4, 3]]), [6, 6]),
    "longer than the input": (torch.cat([RIGHT, torch.zeros(B, 9, dtype=torch.int64)], 1), [6, 4]),
    "ones behind the input": (torch.cat([RIGHT, torch.ones(B, 9, dtype=torch.int64)], 1), [6, 4]),
    "by pair, bool": (by_pair(RIGHT), [6, 4]),
    "by pair, padded on the left": (by_pair(LEFT), [6, 6]),
    "by pair, fp32": (by_pair(RIGHT, torch.float32), [6, 4]),
    "by pair, -1e9": (by_pair(RIGHT, torch.float32, -1e9), [6, 4]),
    "by pair, -inf": (by_pair(RIGHT, torch.float32, -torch.inf), [6, 4]),
    "by pair, one for all rows": (by_pair(torch.ones(1, S)), [6, 6]),
    "by pair, of each head": (by_pair(RIGHT).expand(B, 4, S, S), [6, 4]),
    "by pair, other bias": (by_pair(RIGHT, torch.float32) - 3.5, [6, 4]),
    "of layer types": ({"full_attention": by_pair(RIGHT), "sliding_attention": by_pair(RIGHT)}, [6, 4]),
    "of layer types, none": ({"full_attention": None}, [6, 6]),
    "shorter than the input": (RIGHT[:, :5], "attention_mask: expected 2 rows and a column for each of 7 tokens"),
    "one row": (RIGHT[:1], "attention_mask: expected 2 rows"),
    "by pair, int64": (by_pair(RIGHT).long(), "token_weight: [B, C] needs an attention mask"),
    "three axes": (by_pair(RIGHT)[:, 0], "token_weight: [B, C] needs an attention mask"),
    "by pair, too few queries": (by_pair(RIGHT)[:, :, :5], "attention_mask: expected 2 rows"),
    "a row without a token": (torch.tensor([[0] * 7, [1] * 7]), "attention_mask: row 0 has no last token"),
    "by pair, a row without one": (
        by_pair(torch.tensor([[1] * 7, [0] * 7])), "attention_mask: row 1 has no last token",
    ),
}  # fmt: skip


def last_acts(model, ids, places, **more):
    """``[L, B, N]``: the inputs of every down_proj at these places, by hooks on a copy."""
    model, found = copy.deepcopy(model), []
    for layer in model.get_decoder().layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    logits(model, ids, **more)
    return torch.stack([act[torch.arange(len(ids)), places] for act in found]).double()


@pytest.mark.parametrize("name", MASKS)
def test_the_last_token(name):
    mask, last = MASKS[name]
    model, ids = make("llama"), ids_of(B, S)
    engine = attach(model)
    by_type = isinstance(mask, dict)
    call = (lambda m, **more: m.model(ids, **more)) if by_type else (lambda m, **more: m(ids, **more))
    more = dict(attention_mask=mask)
    if "the input" in name and "shorter" not in name:
        more["past_key_values"] = transformers.StaticCache(config=model.config, max_cache_len=16)
    if isinstance(last, str):
        with pytest.raises(InputError) as refused, engine.collect(torch.eye(B)) as sums, torch.no_grad():
            call(model, **more)
        assert str(refused.value).startswith(last)
        return
    with engine.collect(torch.eye(B)) as sums, torch.no_grad():
        if by_type:
            more["attention_mask"] = mask["full_attention"]  # Llama takes one; the dict goes to the engine alone
            begin = engine._passes.begin
            engine._passes.begin = lambda shape, device, given: begin(shape, device, given | dict(attention_mask=mask))
        call(model, **more)
    plain = {"none": None}.get(name, (RIGHT if last == [6, 4] else LEFT if "left" in name else None))
    if name in ("holes", "falling segments", "segments"):
        plain = (mask != 0).long()
    right = last_acts(model, ids, torch.tensor(last), attention_mask=plain)
    assert (sums.total - right).abs().max() <= 1e-5 * right.abs().max()
    assert sums.count.tolist() == [1, 1]


@pytest.mark.parametrize("n_tokens", [257, 262, 514, 2050])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_places_that_a_mask_of_few_bits_cannot_count(n_tokens, dtype):
    model, ids = make("llama", max_position_embeddings=4096), ids_of(1, n_tokens)
    engine = attach(model)
    with engine.collect(torch.eye(1)) as sums:
        logits(model, ids, attention_mask=torch.ones(1, n_tokens, dtype=dtype))
    with engine.collect(torch.eye(1)) as expected:
        logits(model, ids)
    torch.testing.assert_close(sums.total, expected.total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [9, 16], ids=["as many as seen", "as the static cache"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_holds_tokens(kind, columns):
    """The mask has columns for the tokens in the cache, and maybe for those to come."""
    model, ids = make("llama"), ids_of(B, 9)
    whole = torch.tensor([[1] * 9 + [0] * 7, [0] * 2 + [1] * 6 + [0] * 8])[:, :columns]
    right = last_acts(model, ids, torch.tensor([8, 7]), attention_mask=whole[:, :9])
    engine = attach(model)
    cache = dict(
        dynamic=lambda: transformers.DynamicCache(config=model.config),
        static=lambda: transformers.StaticCache(config=model.config, max_cache_len=16),
    )[kind]()
    logits(model, ids[:, :5], attention_mask=whole[:, :5], past_key_values=cache)
    with engine.collect(torch.eye(B)) as sums:
        logits(model, ids[:, 5:], attention_mask=whole, past_key_values=cache)
    assert (sums.total - right).abs().max() <= 1e-5 * right.abs().max()
    cache = transformers.DynamicCache(config=model.config)
    logits(model, ids[:, :5], past_key_values=cache)
    refused = pytest.raises(InputError, match="a column for each of 9 tokens, those in the cache too")
    with refused, engine.collect(torch.eye(B)):
        logits(model, ids[:, 5:], attention_mask=whole[:, 5:9], past_key_values=cache)


def test_a_row_without_a_token_may_have_no_weight():
    model, ids = make("llama"), ids_of(B, S)
    engine = attach(model)
    with engine.collect(torch.tensor([[1.0], [0.0]])) as sums:
        logits(model, ids, attention_mask=torch.tensor([[1] * 7, [0] * 7]))
    assert sums.count.tolist() == [1]
    before = sums.total.clone()
    with pytest.raises(InputError, match="row 1 has no last token"), engine.collect(torch.ones(2, 1), sums):
        logits(model, ids, attention_mask=torch.tensor([[1] * 7, [0] * 7]))
    assert torch.equal(sums.total, before) and sums.count.tolist() == [1], "nothing of the pass was counted"


def test_pictures():
    """Gemma 3 with pictures gives its decoder a dict of masks."""
    text = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=128, sliding_window=4)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | dict(patch_size=8), mm_tokens_per_image=4, image_token_index=90,
        boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = transformers.Gemma3ForConditionalGeneration(config).eval(), ids_of(B, S) % 80 + 3
    for mask, last in ((LEFT, [6, 6]), (RIGHT, [6, 4]), (None, [6, 6])):
        right = last_acts(model, ids, torch.tensor(last), attention_mask=mask)
        engine = attach(model)
        with engine.collect(torch.eye(B)) as sums:
            logits(model, ids, attention_mask=mask)
        assert (sums.total - right).abs().max() <= 1e-5 * right.abs().max()
        engine.detach()


def test_buffers_are_given_back():
    """A pass of many columns leaves no buffer of its size behind."""
    model, ids = make("llama"), ids_of(B, S)
    engine = attach(model)
    with engine.collect(torch.ones(B, 500)):
        logits(model, ids)
        assert engine._mlps[0].sums["act_sum"].shape[0] == 500
    assert engine._passes.collecting is None and not any(mlp.sums for mlp in engine._mlps)


@pytest.mark.parametrize("how", ["eager", "checkpointed", "compiled"])
def test_a_training_pass(how):
    """Sums of a pass with gradients are statistics: the gradients are those without them, and no graph is kept."""
    model, ids = make("llama", num_hidden_layers=2), ids_of(B, S)
    engine, token_weight = attach(model), torch.eye(B)
    with engine.collect(token_weight, squares=True) as expected:
        logits(model, ids)

    def gradient(run):
        model.zero_grad()
        run(ids).logits.square().mean().backward()
        return model.model.layers[0].mlp.up_proj.weight.grad.clone()

    plain = gradient(model)
    if how == "checkpointed":
        model.train()
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    run = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    with engine.collect(token_weight, squares=True) as sums:
        got = gradient(run)
    assert torch.allclose(got, plain, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sums.total, expected.total, rtol=1e-5, atol=1e-6)
    assert not sums.total.requires_grad and not sums.act_sum.requires_grad


def test_weights_are_copied():
    model, ids, token_weight = make("llama"), ids_of(2, 5), torch.ones(2, 1)
    engine = attach(model)
    with engine.collect(token_weight) as sums:
        logits(model, ids)
        token_weight[:] = 5
    assert sums.count.item() == 2


def test_a_refused_pass_leaves_the_gradients_of_sums():
    """Passes that are summed keep gradients from their sums; an op of its own after a refused one does not."""
    model, ids = make("llama"), ids_of(2, 6)
    engine = attach(model)

    def carries_gradients():
        act, act_sum = torch.ones(2, 8, requires_grad=True), torch.zeros(1, 8)
        ops.steer_act(act * 1, token_weight=torch.ones(2, 1), act_sum=act_sum)
        return act_sum.requires_grad

    assert carries_gradients()
    with pytest.raises(InputError, match="attention_mask: expected 2 rows"), engine.collect(torch.eye(2)):
        model(ids, attention_mask=torch.ones(2, 3, dtype=torch.int64), use_cache=False)
    assert carries_gradients()
