"""attach: values, compiled models and sums, against the plain model and against scaled weights."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from attach_cases import (
    DENSE,
    MODELS,
    L,
    assert_steered,
    ids_of,
    logits,
    make,
    quietly,
    random_circuit,
    transformers,
    with_scaled_columns,
)
from cna_kernels import Circuit, InputError, attach
from cna_kernels.sums import NonFiniteActivation

# Values.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_unsteered_is_the_plain_model_to_the_bit(name, dtype):
    """On the reference backend, also with circuits in the table that no row uses; and after detach on any backend."""
    model, ids = make(name, dtype), ids_of(3, 9)
    plain = logits(model, ids)
    engine = quietly(model, backend="reference")
    assert torch.equal(logits(model, ids), plain)
    engine.set([random_circuit(engine, 0)], [0.0])
    assert torch.equal(logits(model, ids), plain)
    engine.rows([-1, -1, -1])
    assert torch.equal(logits(model, ids), plain)
    engine.rows([0, -1, -1])
    mixed = logits(model, ids)
    assert (mixed - plain)[0].abs().max() > 1e-2 * plain.abs().max()
    if name in DENSE:  # not so for experts, which compute steered and plain tokens together
        assert torch.equal(mixed[1:], plain[1:])
    engine.detach()
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", MODELS)
def test_steered_rows_are_the_scaled_weights(name, backend):
    """Four rows, with two circuits at two multipliers and a plain row, each against the row alone on edited weights."""
    model, ids = make(name), ids_of(4, 9)
    untouched = copy.deepcopy(model)
    plain = logits(model, ids)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = attach(model, backend=backend)
    said = [str(w.message) for w in caught if str(w.message).startswith("cna_kernels")]
    expected = MODELS[name][2] if backend is None else None
    assert (not said) if expected is None else (len(said) == 1 and expected in said[0])
    circuits = [random_circuit(engine, seed) for seed in range(2)]
    engine.set(circuits, [0.0, 3.0])
    engine.rows([0, 1, -1, 0])
    got = logits(model, ids)
    for row, (circuit, multiplier) in enumerate([(0, 0.0), (1, 3.0), (0, 1.0), (0, 0.0)]):
        one = ids[row : row + 1]
        alone = with_scaled_columns(untouched, circuits[circuit], multiplier, lambda m, one=one: logits(m, one))
        if multiplier == 1.0:
            assert (got[row] - plain[row]).abs().max() <= 1e-5 * plain.abs().max()
        else:
            assert_steered(got[row : row + 1], alone, plain[row : row + 1])


@pytest.mark.parametrize("how", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_experts_under_each_implementation(name, how):
    model, ids = make(name, experts_implementation=how), ids_of(2, 9)
    assert model.config._experts_implementation == how
    untouched, plain = copy.deepcopy(model), logits(model, ids)
    engine = attach(model, backend="reference")
    assert torch.equal(logits(model, ids), plain)
    circuit = random_circuit(engine, 1, size=60)
    engine.set([circuit], [-1.0])
    engine.rows(0)
    assert_steered(logits(model, ids), with_scaled_columns(untouched, circuit, -1.0, lambda m: logits(m, ids)), plain)
    model.config._experts_implementation = "deepgemm"
    with pytest.raises(InputError, match="experts_implementation: expected grouped_mm, batched_mm or eager"):
        logits(model, ids)


@pytest.mark.parametrize("name", MODELS)
def test_generate_with_padding_and_mixed_rows(name):
    """Left-padded prompts, a circuit for each row, greedy: the tokens of each prompt alone with scaled weights."""
    model = make(name, tie_word_embeddings=False)  # a random model with tied embeddings repeats its last token
    untouched = copy.deepcopy(model)
    lengths, ids = (5, 9, 7), ids_of(3, 9)
    mask = torch.stack([torch.arange(9) >= 9 - n for n in lengths]).long()
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    engine = quietly(model)
    circuits = [random_circuit(engine, seed, size=60) for seed in range(2)]
    engine.set(circuits, [-3.0, 5.0])
    engine.rows([0, -1, 1])
    got = model.generate(ids * mask, attention_mask=mask, **options)[:, 9:]
    changed = 0
    for row, (circuit, multiplier) in enumerate([(0, -3.0), (0, 1.0), (1, 5.0)]):
        one = ids[row : row + 1, 9 - lengths[row] :]

        def run(m, one=one):
            return m.generate(one, attention_mask=torch.ones_like(one), **options)[0, one.shape[1] :]

        assert torch.equal(got[row], with_scaled_columns(untouched, circuits[circuit], multiplier, run))
        changed += not torch.equal(got[row], run(untouched))
    assert changed == 2, "steering must change the answers"


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("phase", ["prompt", "answer", "window"])
def test_phases_and_positions(phase, backend):
    """Cached decoding against hooks that look at positions; the second row is padded by two on the left."""
    model, ids = make("llama"), ids_of(2, 9)
    untouched = copy.deepcopy(model)
    mask = torch.tensor([[1] * 9, [0] * 2 + [1] * 7])
    engine = attach(model, backend=backend)
    circuit = random_circuit(engine, 0)
    engine.set([circuit], [-2.0])
    if phase == "window":
        engine.rows([0, 0], start=[3, 2], stop=[6, 8])
    else:
        engine.rows(0, phase=phase)

    def steered(position, n_tokens):  # [B, S] bool
        if phase == "window":
            return (position >= torch.tensor([[3], [2]])) & (position < torch.tensor([[6], [8]]))
        return torch.full_like(position, (n_tokens > 1) == (phase == "prompt"), dtype=torch.bool)

    def run(m, hook):
        found, cache = [], transformers.DynamicCache(config=m.config)
        with torch.no_grad():
            for step in range(4):
                seen = 9 + step
                part = ids if step == 0 else ids[:, step : step + 1]
                whole = torch.cat([mask, torch.ones(2, step, dtype=torch.long)], 1)
                position = (whole.cumsum(1) - 1).clamp(min=0)[:, -part.shape[1] :]
                found.append(hook(m, steered(position, part.shape[1]), lambda m: m(
                    part, attention_mask=whole, position_ids=position, past_key_values=cache  # noqa: B023
                ).logits))  # fmt: skip
                assert seen == whole.shape[1]
        return torch.cat(found, 1)

    def by_hooks(m, where, call):
        def scale(_, arguments, members):
            act = arguments[0].clone()
            act[..., members] = torch.where(where[..., None], -2.0, 1.0) * act[..., members]
            return (act,)

        handles = [
            m.model.layers[layer].mlp.down_proj.register_forward_pre_hook(
                lambda module, arguments, members=members: scale(module, arguments, members)
            )
            for layer, members in circuit.by_layer().items()
        ]
        result = call(m)
        for handle in handles:
            handle.remove()
        return result

    plain = run(untouched, lambda m, where, call: call(m))
    got = run(model, lambda m, where, call: call(m))
    real = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1).bool()
    assert_steered(got[real], run(untouched, by_hooks)[real], plain[real])


def test_positions_without_position_ids():
    """Without position_ids, positions follow from how many tokens the cache holds."""
    model, ids = make("llama"), ids_of(1, 8)
    engine = attach(model)
    engine.set([random_circuit(engine, 0)], [-2.0])
    plain = logits(model, ids)
    engine.rows(0, start=4)
    whole = logits(model, ids)
    assert torch.allclose(whole[:, :4], plain[:, :4], atol=1e-5) and (whole - plain)[:, 4:].abs().max() > 0.1
    cache = transformers.DynamicCache(config=model.config)
    parts = [logits(model, ids[:, :3], past_key_values=cache), logits(model, ids[:, 3:], past_key_values=cache)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_rows_by_token():
    """Rows given as [B, S], for packed sequences: each token has its own circuit."""
    model, ids = make("llama"), ids_of(2, 6)
    engine = attach(model)
    circuits = [random_circuit(engine, seed) for seed in range(2)]
    engine.set(circuits, [0.0, 3.0])
    engine.rows([0, 1])
    expected = logits(model, ids)
    engine.rows([[0] * 6, [1] * 6])
    assert torch.equal(logits(model, ids), expected)
    engine.rows([[-1] * 6, [1] * 6])
    assert not torch.equal(logits(model, ids)[0], expected[0])
    with pytest.raises(InputError, match=r"rows: given for calls of \[2, 6\] tokens, this one has \[2, 5\]"):
        logits(model, ids[:, :5])


# Compiled.


# The models that are compiled every day, and those that CI compiles, too: each takes seconds. The rest are like them.
EVERYDAY = ("llama", "qwen3-moe")
OF_CI = ("llama-bias", "gemma2", "phi3", "qwen3-moe-mixed")
TWO = dict(num_hidden_layers=2)


def how_often(name):
    return () if name in EVERYDAY else pytest.mark.exhaustive if name in OF_CI else pytest.mark.rare


@pytest.mark.parametrize("name", [pytest.param(name, marks=how_often(name)) for name in MODELS])
def test_compiled_follows_the_table_without_recompiling(name):
    model, ids = make(name, **TWO), ids_of(2, 9)
    engine = quietly(model)
    circuits = [random_circuit(engine, seed, size=60) for seed in range(3)]
    engine.set(circuits[:2], [0.0, 2.0])
    engine.rows([0, 1])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first = logits(compiled, ids)
    assert torch.allclose(first, logits(model, ids), atol=1e-4)
    seen = [first]
    changes = [
        lambda: engine.table.set_multiplier(0, -3.0),
        lambda: engine.table.replace(1, circuits[2], -2.0),
        lambda: engine.rows([1, -1]),
        lambda: engine.table.remove(1),
        lambda: engine.set([circuits[1]], [4.0]),
    ]
    for number, change in enumerate(changes):
        change()
        with torch.compiler.set_stance("fail_on_recompile"):
            got = logits(compiled, ids)
        assert torch.allclose(got, logits(model, ids), atol=1e-4), number
        effect = (got - seen[-1]).abs().max()
        assert effect > 1e-2 * first.abs().max() or number == len(changes) - 1, (number, effect)
        seen.append(got)


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3-moe-mixed", marks=pytest.mark.exhaustive)])
def test_compiled_sums(name):
    """Passes with sums and passes without are two graphs, each compiled once."""
    model, ids = make(name, **TWO), ids_of(3, 9)
    engine = quietly(model)
    token_weight = torch.rand(3, 2)
    with engine.collect(token_weight, squares=True) as expected:
        logits(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for round in range(3):
        with torch.compiler.set_stance("default" if round == 0 else "fail_on_recompile"):
            with engine.collect(token_weight, squares=True) as sums:
                logits(compiled, ids)
            logits(compiled, ids)
        assert expected.total.abs().max() > 0.1
        torch.testing.assert_close(sums.total, expected.total, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sums.total_sq, expected.total_sq, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
def test_compiled_by_inductor():
    """The default backend of torch.compile: steering, sums, and a multiplier that changes."""
    model, ids = make("llama", **TWO), ids_of(2, 9)
    engine = attach(model)
    engine.set([random_circuit(engine, 0)], [-2.0])
    engine.rows([0, -1])
    with engine.collect(torch.eye(2)) as expected:
        steered = logits(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    assert torch.allclose(logits(compiled, ids), steered, atol=1e-4)
    with engine.collect(torch.eye(2)) as sums:
        logits(compiled, ids)
    torch.testing.assert_close(sums.total, expected.total, rtol=1e-4, atol=1e-5)
    engine.table.set_multiplier(0, 1.0)
    with torch.compiler.set_stance("fail_on_recompile"):
        plain = logits(compiled, ids)
    assert (plain - steered)[0].abs().max() > 0.1 and torch.allclose(plain[1], steered[1], atol=1e-4)


@pytest.mark.exhaustive
def test_compiled_with_other_lengths():
    """Dynamic shapes: a third length needs no new graph, and sums still go to each layer's own buffer."""
    model = make("llama", **TWO)
    engine = attach(model)
    engine.set([random_circuit(engine, 0)], [-2.0])
    engine.rows([0, -1])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n_tokens in (9, 11, 14, 6):
        ids = ids_of(2, n_tokens)
        with engine.collect(torch.eye(2)) as sums:
            got = logits(compiled, ids)
        with engine.collect(torch.eye(2)) as expected:
            assert torch.allclose(got, logits(model, ids), atol=1e-4)
        torch.testing.assert_close(sums.total, expected.total, rtol=1e-4, atol=1e-5)


def test_compiled_steps_in_a_static_cache():
    model, ids = make("llama", **TWO), ids_of(2, 9)
    engine = attach(model)
    engine.set([random_circuit(engine, 0), random_circuit(engine, 1)], [-2.0, 4.0])
    engine.rows([0, 1])
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")

    def decode(run):
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        logits(model, ids[:, :6], past_key_values=cache)
        found = []
        for place in (6, 7, 8):
            position = torch.full((2, 1), place)
            found.append(logits(run, ids[:, place : place + 1], past_key_values=cache, position_ids=position))
        return torch.cat(found, 1)

    expected = decode(model)
    assert torch.allclose(decode(step), expected, atol=1e-4)
    engine.table.set_multiplier(0, 1.0)
    with torch.compiler.set_stance("fail_on_recompile"):
        changed = decode(step)
    assert (changed - expected)[0].abs().max() > 0.1 and torch.allclose(changed[1], expected[1], atol=1e-4)


def test_generate_in_a_static_cache():
    model, ids = make("llama", **TWO), ids_of(2, 6)
    engine = attach(model)
    engine.set([random_circuit(engine, 0, size=60)], [-3.0])
    engine.rows([0, -1])
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    engine.rows(None)
    assert not torch.equal(model.generate(ids, **options), expected)


# Sums.


def last_token_acts(model, ids, mask):
    """[B, L, N]: the input of down_proj at each row's last token, by hooks."""
    found = []
    last = (mask * torch.arange(mask.shape[1])).argmax(1)
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, arguments: found.append(arguments[0][torch.arange(len(last)), last])
        )
        for layer in model.get_decoder().layers
    ]
    logits(model, ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return torch.stack(found, 1)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma", "phi3", "llama-bias"])
def test_sums_are_what_hooks_collect(name, side, backend):
    model, ids = make(name), ids_of(4, 9)
    lengths = torch.tensor([5, 9, 7, 2])
    places = torch.arange(9)
    mask = (places < lengths[:, None] if side == "right" else places >= 9 - lengths[:, None]).long()
    acts = last_token_acts(model, ids, mask)
    token_weight = torch.tensor([[1.0, 0], [0.5, 0], [0, 2], [1, 1]])
    engine = quietly(model, backend=backend)
    with engine.collect(token_weight) as sums:
        logits(model, ids, attention_mask=mask)
    expected = torch.einsum("bc,bln->lcn", token_weight, acts).double()
    assert (sums.total - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(sums.count, token_weight.sum(0).double())
    with engine.collect(token_weight, sums):  # adds the same sums a second time
        logits(model, ids, attention_mask=mask)
    assert (sums.total - 2 * expected).abs().max() <= 2e-5 * expected.abs().max()
    assert torch.equal(sums.count, 2 * token_weight.sum(0).double())


def test_sums_of_experts_by_token():
    """The sums of each expert's neurons are those of a plain loop over tokens and experts."""
    model, ids = make("qwen3-moe"), ids_of(2, 7)
    token_weight, found = torch.rand(2, 7, 3), []

    def note(module, arguments):
        x, index, _ = arguments
        acts = torch.zeros(len(x), 6, 24)
        for token, chosen in enumerate(index.tolist()):
            for expert in chosen:
                gate, up = (module.gate_up_proj[expert] @ x[token]).chunk(2)
                acts[token, expert] = nn.functional.silu(gate) * up
        found.append(token_weight.flatten(0, 1).T @ acts.flatten(1))

    handles = [layer.mlp.experts.register_forward_pre_hook(note) for layer in model.model.layers]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    engine = attach(model)
    assert engine.n_neurons == 6 * 24 and engine.n_experts == [6] * L
    with engine.collect(token_weight) as sums:
        logits(model, ids)
    expected = torch.stack(found).double()
    assert (sums.total - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (expected != 0).double().mean() > 0.5


def test_collect_in_generate_counts_the_prompt_alone():
    model, ids = make("llama"), ids_of(2, 6)
    engine = attach(model)
    with engine.collect(torch.eye(2)) as expected:
        logits(model, ids)
    with engine.collect(torch.eye(2)) as sums:
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(sums.total, expected.total, rtol=1e-5, atol=1e-6)


def test_selection_is_that_of_the_command_line(tmp_path):
    """The same circuit as load(...).discover(...) from the same tokens."""
    from cna_kernels.model import load
    from cna_kernels.model.prompts.files import PromptSet
    from tiny import write_language_model

    write_language_model(tmp_path)
    ours = load(tmp_path, dtype="float32")
    prompts = ["how to a", "please b?", "tell me c", "why is d", "give e", "so f"]
    expected = ours.discover(prompts[:3], prompts[3:], top_k=9, universal_prompts=False)
    tokens = [prompt.ids for prompt in ours.encode(PromptSet.of(prompts, "prompts"))]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    engine = attach(theirs)
    sums = engine.new_sums(2)
    for number, one in enumerate(tokens):
        with engine.collect(torch.tensor([[1.0, 0.0] if number < 3 else [0.0, 1.0]]), sums):
            logits(theirs, torch.tensor([one]))
    circuit = engine.select(sums, top_k=9)
    assert circuit.pairs == expected.pairs
    for ours_one, theirs_one in zip(circuit.neurons, expected.neurons, strict=True):
        assert abs(ours_one[2] - theirs_one[2]) <= 1e-5 * abs(theirs_one[2])
    assert circuit.positive_mean == pytest.approx(expected.positive_mean, rel=1e-5, abs=1e-7)
    without = engine.select(sums, top_k=9, exclude=circuit.pairs[:2], skip_layers=[0])
    assert not set(circuit.pairs[:2]) & set(without.pairs) and all(layer > 0 for layer, _ in without.pairs)
    assert engine.select(sums, fraction=0.05).k == round(0.05 * engine.n_layers * engine.n_neurons)


def test_universal_neurons():
    """Universal neurons: of four prompts, each in its own column, among the top two on three or more."""
    model = make("llama")
    engine = attach(model)
    sums = engine.new_sums(4)
    sums.count[:] = 1
    for column, largest in enumerate([(5, 9), (5, 9), (5, 7), (8, 9)]):
        sums.total[1, column] = torch.arange(48) / 100
        sums.total[1, column, list(largest)] = torch.tensor([-6.0, 5.0], dtype=torch.float64)
    assert engine.universal(sums, fraction=2 / 144, threshold=0.75).neurons == ((1, 5), (1, 9))
    assert len(engine.universal(sums, fraction=2 / 144, threshold=0.8)) == 0
    more = engine.new_sums(7)
    more.total[:, [0, 2, 3, 6]], more.count[[0, 2, 3, 6]] = sums.total, 1
    assert engine.universal(more, fraction=2 / 144, threshold=0.75).neurons == ((1, 5), (1, 9)), (
        "empty columns do not vote"
    )
    with pytest.raises(InputError, match="sums: no column counts a token"):
        engine.universal(engine.new_sums(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_circuit_says_where_it_came_from(tmp_path, dtype):
    """A circuit records filter, excluded neurons and model. The checkpoint that the model was loaded from accepts the
    circuit, in any dtype; another checkpoint refuses it."""
    from cna_kernels.model import load
    from tiny import write_language_model

    write_language_model(tmp_path / "a")
    write_language_model(tmp_path / "b", seed=1)
    engine = attach(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype).eval())
    sums, ids = engine.new_sums(2), torch.tensor([[3, 4, 5], [6, 7, 8]])
    with torch.inference_mode(), engine.collect(torch.eye(2), sums):
        engine._decoder(ids)
    universal = engine.universal(sums, fraction=0.1, threshold=0.5)
    circuit = engine.select(sums, top_k=5, universal=universal, exclude=[(0, 1)], position="last")
    circuit.save(tmp_path / "c.json")
    found = Circuit.load(tmp_path / "c.json")
    assert found == circuit
    assert found.universal["excluded"] == [list(pair) for pair in universal] != [] and found.universal["prompts"] == 2
    assert found.excluded == ((0, 1),) and found.dtype == str(dtype).removeprefix("torch.")
    assert found.versions["torch"] == torch.__version__ and found.model["name"] == "a"
    assert engine.select(sums, top_k=5, exclude=universal).universal == found.universal, "as before"
    for place in ("a", "b"):
        ours = load(tmp_path / place)
        theirs = attach(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / place, dtype=torch.float32))
        for check in (ours.check_circuit, theirs.check_circuit):
            if place == "a":
                check(found, "c.json")
                continue
            with pytest.raises(InputError, match=r"c.json: model.decoder_sha256: made for another model"):
                check(found, "c.json")
            check(found, "c.json", any_model=True)


def test_fp16_has_no_hash_rather_than_another():
    """fp16 cannot hold every small bf16 number: the hash of the rounded weights would be another model's."""
    model = make("llama").to(torch.bfloat16)
    before = attach(model)
    assert "decoder_sha256" in before.identity()
    before.detach()
    assert set(attach(model.half()).identity()) == {"name"}


def test_selection_after_the_engine_is_off():
    """Sums can be selected from after detach, and the circuit still records its model."""
    model = make("llama")
    engine = attach(model)
    sums = engine.new_sums(2)
    sums.count[:] = 1
    sums.total[1, 0, 5] = 3
    assert engine.select(sums, top_k=1).dtype == "float32"
    model.bfloat16()
    assert engine.select(sums, top_k=1).dtype == "bfloat16", "as it is now"
    model.float()
    known = engine.identity()
    engine.detach()
    circuit = engine.select(sums, top_k=1)
    assert circuit.pairs == [(1, 5)] and circuit.model == known and "decoder_sha256" in known


def test_universal_neurons_are_given_once():
    engine = attach(make("llama"))
    sums = engine.new_sums(2)
    sums.count[:] = 1
    universal = engine.universal(sums, threshold=1.0)
    with pytest.raises(InputError, match="exclude: expected"):
        engine.select(sums, universal=universal, exclude=universal)
    with pytest.raises(InputError, match=r"threshold: expected above 0 and at most 1, got 1\.5"):
        engine.universal(sums, threshold=1.5)


def test_weights_out_of_sight_have_no_hash():
    """An adapter on an MLP changes the model: its identity has no hash of neurons, rather than the base model's."""
    peft = pytest.importorskip("peft")
    model = make("llama")
    known = attach(model)
    assert set(known.identity()) == {"name", "decoder_sha256"}
    known.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"], r=2))
    assert set(attach(adapted).identity()) == {"name"}


def test_a_model_from_the_hub_has_repository_and_commit():
    """As transformers knows them: of a name and a commit, and not of a directory or a branch."""
    model, commit = make("llama"), "0123abcd" * 5
    engine = attach(model)
    for name, known, facts in (("org/name", commit, dict(repo="org/name", revision=commit)), ("org/name", None, {}),
                               ("org/name", "main", {}), (str(Path(__file__).parent), commit, {})):  # fmt: skip
        model.config._name_or_path, model.config._commit_hash = name, known
        identity = engine.identity()
        assert {field: identity.get(field) for field in ("repo", "revision") if field in identity} == facts
        assert "decoder_sha256" in identity


def test_selection_counts_only_neurons_that_are_there():
    """In a mixture with a dense layer of fewer neurons, the fraction counts only neurons that exist."""
    model, ids = make("qwen3-moe-mixed"), ids_of(2, 6)
    engine = attach(model)
    assert engine.widths == [144, 48, 144]
    with engine.collect(torch.eye(2)) as sums:
        logits(model, ids)
    circuit = engine.select(sums, fraction=1.0)
    assert circuit.k == sum(engine.widths) and all(index < engine.widths[layer] for layer, index, _ in circuit.neurons)


def test_a_failed_pass_counts_nothing():
    model, ids = make("llama"), ids_of(2, 6)
    engine = attach(model)
    with engine.collect(torch.eye(2)) as sums:
        logits(model, ids)
    before = sums.total.clone()
    with pytest.raises(RuntimeError, match="planted"), engine.collect(torch.eye(2), sums):
        logits(model, ids)
        raise RuntimeError("planted")
    with pytest.raises(InputError, match="no forward pass ran"), engine.collect(torch.eye(2), sums):
        pass
    with (
        pytest.raises(InputError, match=r"token_weight: expected \[2, 2\], got \[3, 2\]"),
        engine.collect(torch.ones(3, 2)),
    ):
        logits(model, ids)
    with engine.collect(torch.eye(2)):
        logits(model, ids)
        with pytest.raises(InputError, match="collect: is at work already"), engine.collect(torch.eye(2)):
            pass
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7] = torch.inf
    with pytest.raises(NonFiniteActivation, match="layer 1, neuron 7"), engine.collect(torch.eye(2), sums):
        logits(model, ids)
    assert torch.equal(sums.total, before)
