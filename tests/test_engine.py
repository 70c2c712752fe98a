"""attach: the engine on transformers models, against the plain model, hooks, and scaled weights."""

import copy
import gc
import pickle
import random
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from cna_kernels import Circuit, InputError, attach, attached
from cna_kernels.sums import NonFiniteActivation
from tiny import SHAPE

transformers = pytest.importorskip("transformers")

MOE = dict(head_dim=8, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
# name: (class stem, what differs from SHAPE, what is said not to be fused)
MODELS = {
    "llama": ("Llama", {}, None),
    "llama-bias": ("Llama", dict(mlp_bias=True), "gate_proj has a bias, a hook or an unusual weight"),
    "qwen2": ("Qwen2", {}, None),
    "qwen3": ("Qwen3", dict(head_dim=16), None),
    "mistral": ("Mistral", dict(sliding_window=7), None),
    "gemma": ("Gemma", dict(head_dim=8), "the activation is GELUTanh"),
    "gemma2": ("Gemma2", dict(head_dim=8), "the activation is GELUTanh"),
    "gemma3": ("Gemma3", dict(head_dim=8), "the activation is GELUTanh"),
    "phi3": ("Phi3", {}, None),
    "qwen3-moe": ("Qwen3Moe", MOE, None),
    "qwen3-moe-mixed": ("Qwen3Moe", MOE | dict(mlp_only_layers=[1]), None),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2), None),
}
DENSE = [name for name in MODELS if "moe" not in name and name != "mixtral"]
L = SHAPE["num_hidden_layers"]


def make(name, dtype=torch.float32, seed=3, **changes):
    stem, of_variant, _ = MODELS[name]
    config = getattr(transformers, "Gemma3TextConfig" if stem == "Gemma3" else f"{stem}Config")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{stem}ForCausalLM")(config(**(SHAPE | of_variant | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 and "gemma" not in name else 0.0, 0.2)
    return model.to(dtype).eval()


def quietly(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attach(model, **options)


def ids_of(n_rows, n_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SHAPE["vocab_size"], (n_rows, n_tokens), generator=generator)


def random_circuit(engine, seed, size=24):
    rng = random.Random(seed)
    places = [(layer, index) for layer in range(engine.n_layers) for index in range(engine.widths[layer])]
    return Circuit(tuple((*pair, 1.0) for pair in rng.sample(places, size)), engine.n_layers, engine.n_neurons)


@torch.no_grad()
def logits(model, ids, **more):
    return model(ids, **more).logits


@torch.no_grad()
def with_scaled_columns(model, circuit, multiplier, run):
    """What ``run`` gives on a copy whose down_proj columns are multiplied: the definition, without our code."""
    edited = copy.deepcopy(model)
    for layer, members in circuit.by_layer().items():
        mlp = edited.get_decoder().layers[layer].mlp
        weight = mlp.experts.down_proj if hasattr(mlp, "experts") else mlp.down_proj.weight
        for index in members:
            if weight.dim() == 3:
                weight[index // weight.shape[2], :, index % weight.shape[2]] *= multiplier
            else:
                weight[:, index] *= multiplier
    return run(edited)


def hooked(model, circuit, multiplier, run, rows=slice(None)):
    """What ``run`` gives with a hook on every down_proj that multiplies the circuit's neurons in these rows."""
    handles = []
    for layer, members in circuit.by_layer().items():

        def scale(_, arguments, members=members):
            act = arguments[0].clone()
            act[rows, ..., members] *= multiplier
            return (act,)

        handles.append(model.get_decoder().layers[layer].mlp.down_proj.register_forward_pre_hook(scale))
    try:
        return run(model)
    finally:
        for handle in handles:
            handle.remove()


def assert_steered(got, expected, plain, tolerance=1e-5):
    """As expected, and the effect is much larger than the difference."""
    scale = plain.abs().max()
    assert (got - expected).abs().max() <= tolerance * scale
    assert (expected - plain).abs().max() > 1e-2 * scale


# Values.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_unsteered_is_the_plain_model_to_the_bit(name, dtype):
    """On the reference backend, with circuits in the table that no row uses; and after detach on any."""
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
    if name in DENSE:  # experts compute their tokens together, steered or not
        assert torch.equal(mixed[1:], plain[1:])
    engine.detach()
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", MODELS)
def test_steered_rows_are_the_scaled_weights(name, backend):
    """Four rows, two circuits at two multipliers and a plain row, against each one alone on edited weights."""
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
    """Left-padded prompts, a circuit a row, greedy: token for token each prompt alone with scaled weights."""
    model = make(name, tie_word_embeddings=False)  # tied and random, a model repeats its last token
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
    """The cache says how many tokens came before."""
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
    """[B, S] rows: packed sequences, each token with its own circuit."""
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


@pytest.mark.parametrize("name", MODELS)
def test_compiled_follows_the_table_without_recompiling(name):
    model, ids = make(name), ids_of(2, 9)
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


@pytest.mark.parametrize("name", ["llama", "qwen3-moe-mixed"])
def test_compiled_sums(name):
    """Passes with sums and without are two graphs, each compiled once."""
    model, ids = make(name), ids_of(3, 9)
    engine = quietly(model)
    weight = torch.rand(3, 2)
    with engine.collect(weight, squares=True) as expected:
        logits(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for round in range(3):
        with torch.compiler.set_stance("default" if round == 0 else "fail_on_recompile"):
            with engine.collect(weight, squares=True) as sums:
                logits(compiled, ids)
            logits(compiled, ids)
        assert expected.total.abs().max() > 0.1
        torch.testing.assert_close(sums.total, expected.total, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sums.total_sq, expected.total_sq, rtol=1e-4, atol=1e-5)


def test_compiled_by_inductor():
    """The default backend of torch.compile: steering, sums, and a multiplier that changes."""
    model, ids = make("llama"), ids_of(2, 9)
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


def test_compiled_with_other_lengths():
    """Dynamic shapes: a third length is no new graph, and sums still go to the layer's own buffer."""
    model = make("llama")
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
    model, ids = make("llama"), ids_of(2, 9)
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
    model, ids = make("llama"), ids_of(2, 6)
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
    weight = torch.tensor([[1.0, 0], [0.5, 0], [0, 2], [1, 1]])
    engine = quietly(model, backend=backend)
    with engine.collect(weight) as sums:
        logits(model, ids, attention_mask=mask)
    expected = torch.einsum("bc,bln->lcn", weight, acts).double()
    assert (sums.total - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(sums.count, weight.sum(0).double())
    with engine.collect(weight, sums):  # more of the same
        logits(model, ids, attention_mask=mask)
    assert (sums.total - 2 * expected).abs().max() <= 2e-5 * expected.abs().max()
    assert torch.equal(sums.count, 2 * weight.sum(0).double())


def test_sums_of_experts_by_token():
    """Each expert's neurons get what its tokens gave, by a plain loop over the experts."""
    model, ids = make("qwen3-moe"), ids_of(2, 7)
    weight, found = torch.rand(2, 7, 3), []

    def note(module, arguments):
        x, index, _ = arguments
        acts = torch.zeros(len(x), 6, 24)
        for token, chosen in enumerate(index.tolist()):
            for expert in chosen:
                gate, up = (module.gate_up_proj[expert] @ x[token]).chunk(2)
                acts[token, expert] = nn.functional.silu(gate) * up
        found.append(weight.flatten(0, 1).T @ acts.flatten(1))

    handles = [layer.mlp.experts.register_forward_pre_hook(note) for layer in model.model.layers]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    engine = attach(model)
    assert engine.n_neurons == 6 * 24 and engine.n_experts == [6] * L
    with engine.collect(weight) as sums:
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
    from cna_kernels.model.prompts import PromptSet
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
    without = engine.select(sums, top_k=9, exclude=circuit.pairs[:2], skip_layers=[0])
    assert not set(circuit.pairs[:2]) & set(without.pairs) and all(layer > 0 for layer, _ in without.pairs)
    assert engine.select(sums, fraction=0.05).k == round(0.05 * engine.n_layers * engine.n_neurons)


def test_universal_neurons():
    """Of four prompts, each a column: those among the top two in three or more."""
    model = make("llama")
    engine = attach(model)
    sums = engine.new_sums(4)
    for column, largest in enumerate([(5, 9), (5, 9), (5, 7), (8, 9)]):
        sums.total[1, column] = torch.arange(48) / 100
        sums.total[1, column, list(largest)] = torch.tensor([-6.0, 5.0], dtype=torch.float64)
    assert engine.universal(sums, fraction=2 / 144, threshold=0.75) == [(1, 5), (1, 9)]
    assert engine.universal(sums, fraction=2 / 144, threshold=0.8) == []


def test_selection_counts_only_neurons_that_are_there():
    """In a mixture with a dense layer of fewer neurons, the fraction is of those that exist."""
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
    with pytest.raises(InputError, match=r"weight: expected \[2, 2\], got \[3, 2\]"), engine.collect(torch.ones(3, 2)):
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


# In company.


def lora(model, targets):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return wrapped.eval()


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("targets", [["down_proj"], ["gate_proj", "q_proj"], ["up_proj", "down_proj"]])
def test_adapters_of_peft(targets, attach_first):
    torch.manual_seed(0)
    model, ids = make("llama"), ids_of(2, 9)
    if attach_first:
        engine = attach(model)
        wrapped = lora(model, targets)
    else:
        wrapped = lora(model, targets)
        with pytest.warns(UserWarning, match=r"layers 0-2: \w+_proj is peft\.Linear"):
            engine = attach(wrapped)
    assert attached(wrapped) is engine
    circuit = random_circuit(engine, 0)
    engine.set([circuit], [-2.0])
    engine.rows(0)
    got = logits(wrapped, ids)
    engine.detach()
    plain = logits(wrapped, ids)
    # the definition: the adapter sees the steered act, too
    expected = hooked(wrapped.get_base_model(), circuit, -2.0, lambda _: logits(wrapped, ids))
    assert_steered(got, expected, plain)


class Int8Linear(nn.Module):
    """A quantised layer of the usual kind: int8 weights, one scale a row, its own forward."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize("names", [["down_proj"], ["gate_proj", "up_proj", "down_proj"]])
@pytest.mark.parametrize("model_name", ["llama", "gemma"])
def test_quantised_layers(model_name, names):
    model, ids = make(model_name), ids_of(2, 9)
    for layer in model.model.layers:
        for name in names:
            setattr(layer.mlp, name, Int8Linear(getattr(layer.mlp, name)))
    plain = logits(model, ids)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.warns(UserWarning, match=r"layers 0-2: .*down_proj is test_engine\.Int8Linear"):
        engine = attach(model)
    circuit = random_circuit(engine, 0)
    engine.set([circuit], [-2.0])
    engine.rows(0)
    assert_steered(logits(model, ids), hooked(model_of(model), circuit, -2.0, lambda m: logits(m, ids)), plain)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits):
    bnb = pytest.importorskip("bitsandbytes")
    model, ids = make("llama", hidden_size=64, intermediate_size=128), ids_of(2, 9)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, name)
            sizes, weight = (linear.in_features, linear.out_features), linear.weight.data.clone()
            if bits == 8:
                ours = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                ours.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            else:
                ours = bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4")
                ours.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            setattr(layer.mlp, name, ours.to("cpu"))
    plain = logits(model, ids)
    with pytest.warns(UserWarning, match=r"layers 0-2: .*down_proj is bitsandbytes\.Linear"):
        engine = attach(model)
    assert torch.allclose(logits(model, ids), plain, atol=1e-4)
    circuit = random_circuit(engine, 0)
    engine.set([circuit], [-2.0])
    engine.rows(0)
    got = logits(model, ids)
    engine.detach()
    assert_steered(got, hooked(model, circuit, -2.0, lambda m: logits(m, ids)), plain)


def test_layers_without_parameters():
    """PyTorch's own dynamic quantisation packs weights out of sight."""
    model, ids = make("llama"), ids_of(2, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    plain, engine = logits(model, ids), quietly(model)
    circuit = random_circuit(engine, 0)
    engine.set([circuit], [-2.0])
    engine.rows(0)
    got = logits(model, ids)
    engine.detach()
    assert_steered(got, hooked(model, circuit, -2.0, lambda m: logits(m, ids)), plain, tolerance=0.02)


def model_of(model):
    """A plain copy: copies of attached models are plain."""
    plain = copy.deepcopy(model)
    assert attached(plain) is None
    return plain


@pytest.mark.parametrize("how", ["offload", "device_map"])
def test_accelerate(how, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, ids = make("llama"), ids_of(2, 9)
    plain = logits(model, ids)
    circuit = Circuit(tuple((layer, index, 1.0) for layer in range(L) for index in (1, 5, 9)), L, 48)
    expected = hooked(copy.deepcopy(model), circuit, -2.0, lambda m: logits(m, ids))
    if how == "offload":
        model = accelerate.cpu_offload(model, execution_device="cpu")
        assert next(model.model.layers[0].mlp.down_proj.parameters()).is_meta
    else:
        model.save_pretrained(tmp_path)
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(L)}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=places, offload_folder=tmp_path / "offload"
        ).eval()
    forward = model.model.layers[1].mlp.__dict__.get("forward")
    engine = quietly(model)
    assert engine.not_fused()
    engine.set([circuit], [-2.0])
    engine.rows(0)
    assert_steered(logits(model, ids), expected, plain)
    engine.rows(None)
    assert torch.allclose(logits(model, ids), plain, atol=1e-5)
    engine.detach()
    assert model.model.layers[1].mlp.__dict__.get("forward") == forward
    assert torch.allclose(logits(model, ids), plain, atol=1e-5)


def test_hooks_of_others_still_run():
    """On layers inside the MLP, put there before or after; they see and change what they would see without us."""
    model, ids = make("llama"), ids_of(2, 9)
    seen = []

    def put_hooks(m):
        m.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        m.model.layers[1].mlp.gate_proj.register_forward_hook(lambda *_: 2 * _[2])
        m.model.layers[2].mlp.register_forward_hook(lambda *_: 0.5 * _[2])

    other = copy.deepcopy(model)
    put_hooks(other)
    expected = logits(other, ids)
    engine = attach(model)
    put_hooks(model)
    seen.clear()
    assert torch.allclose(logits(model, ids), expected, atol=1e-5) and len(seen) == 1
    assert engine.not_fused() == [
        "layer 0: down_proj has a bias, a hook or an unusual weight",
        "layer 1: gate_proj has a bias, a hook or an unusual weight",
    ]
    assert not torch.allclose(expected, logits(make("llama"), ids), atol=1e-2)


def test_training_through_an_attached_model():
    model, ids = make("llama"), ids_of(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    engine = attach(model)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    engine.set([random_circuit(engine, 0)], [-2.0])
    engine.rows(0)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    name = "model.layers.0.mlp.gate_proj.weight"
    assert (dict(model.named_parameters())[name].grad - expected[name]).abs().max() > 1e-3


def test_autocast():
    model, ids = make("llama"), ids_of(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = logits(model, ids).float()
        engine = attach(model)
        assert (logits(model, ids).float() - plain).abs().max() <= 0.03 * plain.abs().max()
        engine.set([random_circuit(engine, 0)], [-2.0])
        engine.rows(0)
        assert (logits(model, ids).float() - plain).abs().max() > 0.1 * plain.abs().max()


def test_many_circuits_while_others_come_and_go():
    """A loop of forward passes while another thread adds, replaces and removes: every pass sees one state."""
    model, ids = make("llama"), ids_of(8, 4)
    engine = attach(model, max_circuits=40, max_entries=1000)
    kept = [random_circuit(engine, seed) for seed in range(8)]
    engine.set(kept, -2.0)
    engine.rows(range(8))
    expected = logits(model, ids)
    stop, rounds = threading.Event(), [0]

    def churn():
        rng, own = random.Random(0), []
        while not stop.is_set():
            if own and rng.random() < 0.5:
                engine.table.remove(own.pop(rng.randrange(len(own))))
            elif len(own) < 30:
                own.append(engine.table.add(random_circuit(engine, rng.randrange(1000), size=8), 0.0))
            rounds[0] += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(60):
            assert torch.equal(logits(model, ids), expected)
    finally:
        stop.set()
        thread.join()
    assert rounds[0] > 20


def test_1024_circuits_in_one_batch():
    model, ids = make("llama"), ids_of(1024, 2)
    engine = attach(model, max_circuits=1024, max_entries=1024 * 4)
    circuits = [random_circuit(engine, seed, size=4) for seed in range(1024)]
    engine.set(circuits, [-2.0 - 0.001 * seed for seed in range(1024)])
    engine.rows(range(1024))
    got = logits(model, ids)
    for row in (0, 511, 1023):
        engine.rows(row)
        assert torch.allclose(logits(model, ids[row : row + 1])[0], got[row], atol=1e-4)
    engine.rows(None)
    assert ((logits(model, ids) - got).abs().amax((1, 2)) > 1e-3).double().mean() > 0.9


# Coming and going.


def traces(model):
    return {name: sorted(module.__dict__) for name, module in model.named_modules()}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_and_nothing_is_saved(name, tmp_path):
    model = make(name)
    before, parameters = traces(model), [id(x) for x in model.parameters()]
    model.save_pretrained(tmp_path / "plain")
    engine = quietly(model)
    engine.set([random_circuit(engine, 0)], [0.0])
    engine.rows(0)
    model.save_pretrained(tmp_path / "attached")
    for file in sorted((tmp_path / "plain").iterdir()):
        assert (tmp_path / "attached" / file.name).read_bytes() == file.read_bytes()
    engine.detach()
    assert traces(model) == before and [id(x) for x in model.parameters()] == parameters
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None, "detached, nothing may hold it"


def test_copies_are_plain():
    model, ids = make("llama"), ids_of(1, 5)
    plain = logits(model, ids)
    engine = attach(model, backend="reference")
    engine.set([random_circuit(engine, 0)], [0.0])
    engine.rows(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert attached(other) is None and torch.equal(logits(other, ids), plain)
        again = attach(other, backend="reference")
        assert torch.equal(logits(other, ids), plain)
        again.detach()
    assert not torch.equal(logits(model, ids), plain)


def test_detaching_in_another_order():
    model, ids = make("llama"), ids_of(1, 5)
    engine = attach(model)
    mlp = model.model.layers[1].mlp
    ours = mlp.forward
    mlp.forward = lambda x: 2 * ours(x)
    with pytest.raises(InputError, match=r"the forward of layers\[1\]'s MLP was replaced after attach; take that off"):
        engine.detach()
    assert attached(model) is engine
    mlp.forward = ours
    engine.detach()
    mlp.forward = lambda x: x
    with pytest.raises(InputError, match=r"the forward of layers\[1\]'s MLP was replaced by something else"):
        attach(model)
    assert logits(model, ids) is not None and attached(model) is None


def test_a_detached_engine_says_so():
    model = make("llama")
    old = attach(model)
    old.detach()
    new = attach(model)
    for call in (old.detach, lambda: old.rows(None), lambda: old.collect(torch.eye(2)).__enter__()):
        with pytest.raises(InputError, match="engine: was detached from its model"):
            call()
    assert attached(model) is new


def test_attach_to_the_decoder_or_a_compiled_model():
    model, ids = make("llama"), ids_of(1, 5)
    engine = attach(model.model)
    assert attached(model) is engine
    engine.detach()
    compiled = torch.compile(model, backend="eager")
    engine = attach(compiled)
    assert attached(model) is engine and logits(compiled, ids).shape == (1, 5, SHAPE["vocab_size"])


def test_refusals():
    model, ids = make("llama"), ids_of(2, 5)
    engine = attach(model, max_circuits=2, max_entries=50, max_rows=3)
    circuit = random_circuit(engine, 0)
    other = Circuit(((0, 1, 1.0),), L, 50)
    for message, call in {
        "model: an engine is attached already": lambda: attach(model),
        "circuit: n_neurons: made for another model: expected 48, got 50": lambda: engine.set([other], [0.0]),
        "table: holds 2 circuits already; see max_circuits": lambda: engine.set([circuit] * 3, 0.0),
        "table: has room for 50 neurons, 24 are in use": lambda: engine.set([circuit, random_circuit(engine, 1, 30)]),
        "multiplier: expected a finite number": lambda: engine.set([circuit], [float("nan")]),
        "multipliers: expected 1, one for each circuit, got 2": lambda: engine.set([circuit], [0.0, 1.0]),
        "row_circuit: row 0: expected -1 or one of none, got 0": lambda: engine.rows(0),
        "row_circuit: 4 rows, attached with max_rows=3": lambda: engine.rows([-1] * 4),
        "row_circuit: expected whole numbers": lambda: engine.rows([0.5]),
        "phase: expected one of both, prompt, answer, got 'prefill'": lambda: engine.rows(None, phase="prefill"),
        "start: expected one position, or one for each of 2 rows": lambda: engine.rows([-1, -1], start=[1, 2, 3]),
        "rows: the batch has 4, attached with max_rows=3": lambda: logits(model, ids_of(4, 5)),
        "exclude: (0, 48) is no neuron": lambda: engine.select(engine.new_sums(2), exclude=[(0, 48)]),
        "max_rows: expected 1 to": lambda: attach(make("qwen2"), max_rows=0),
        "backend: expected one of": lambda: attach(make("qwen2"), backend="cuda"),
    }.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(message), str(caught.value)
        assert engine.table.n_circuits == 0
    engine.set([circuit], [0.0])
    engine.rows([0, -1, 0])
    with pytest.raises(InputError, match="rows: expected 2, one for each row of the batch, got 3"):
        logits(model, ids)
    with pytest.raises(InputError, match="an MLP ran outside its model's forward pass"):
        model.model.layers[0].mlp(torch.zeros(1, 1, 32))


def test_unknown_architectures_name_what_was_looked_for():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)
    with pytest.raises(InputError, match=r"GPT2LMHeadModel has no decoder with `layers`; supported: Llama, .*Mixtral"):
        attach(transformers.GPT2LMHeadModel(config))
    config = transformers.PhiConfig(**SHAPE)
    with pytest.raises(InputError, match=r"layers\[0\], a PhiDecoderLayer, has no MLP that is known \(gate_proj or"):
        attach(transformers.PhiForCausalLM(config))
    config = transformers.Qwen2MoeConfig(
        **SHAPE, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24, num_experts_per_tok=2
    )
    with pytest.raises(InputError, match=r"layers\[0\], a Qwen2MoeDecoderLayer, has several MLPs"):
        attach(transformers.Qwen2MoeForCausalLM(config))


def test_the_package_gives_attach_whatever_was_imported_first():
    import cna_kernels.engine

    assert callable(cna_kernels.attach) and cna_kernels.attach is attach


# What would be silently wrong, or break what works without an engine.


def test_an_mlp_replaced_after_attach_is_noticed():
    ids = ids_of(2, 5)
    for replace in (
        lambda layer: setattr(layer.mlp, "forward", type(layer.mlp).forward.__get__(layer.mlp)),
        lambda layer: setattr(layer, "mlp", copy.deepcopy(layer.mlp)),
    ):
        model = make("llama")
        attach(model)
        logits(model, ids)
        replace(model.model.layers[1])
        with pytest.raises(InputError, match="was replaced after attach"):
            logits(model, ids)


def test_an_activation_that_is_hooked_or_replaced():
    ids = ids_of(2, 5)
    for name in ("llama", "qwen3-moe"):
        for change in (
            lambda mlp: mlp.act_fn.register_forward_hook(lambda _, arguments, y: 2 * y),
            lambda mlp: setattr(mlp, "act_fn", nn.GELU()),
        ):
            model = make(name)
            plain, engine = logits(model, ids), attach(model)
            mlp = model.model.layers[1].mlp
            change(mlp.experts if hasattr(mlp, "experts") else mlp)
            assert "layer 1: the activation" in engine.not_fused()[0]
            got = logits(model, ids)
            engine.detach()
            expected = logits(model, ids)
            assert torch.allclose(got, expected, atol=1e-5) and (expected - plain).abs().max() > 0.05


def test_experts_with_a_gate_of_their_own_are_refused():
    model = make("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0]
    with pytest.raises(InputError, match=r"layers\[1\]: experts with a gate of their own"):
        attach(model)


def test_layers_that_share_an_mlp_are_refused():
    model = make("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(InputError, match="two of its layers share an MLP"):
        attach(model)


def test_an_mlp_beside_another_is_refused():
    config = transformers.GraniteMoeSharedConfig(**SHAPE, num_local_experts=4, shared_intermediate_size=24)
    with pytest.raises(InputError, match=r"layers\[0\], a GraniteMoeSharedDecoderLayer, has"):
        attach(transformers.GraniteMoeSharedForCausalLM(config))


def test_weights_that_were_split_are_refused():
    """As tensor parallelism leaves them: every rank has some of the neurons."""
    model, ids = make("llama"), ids_of(2, 5)
    attach(model)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            getattr(layer.mlp, name).weight.data = getattr(layer.mlp, name).weight.data[:24]
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, :24].contiguous()
    with pytest.raises(InputError, match="down_proj takes 24 neurons here, 48 were expected; a model whose MLPs are"):
        logits(model, ids)


def test_masks_that_do_not_show_the_last_token():
    model, ids = make("llama"), ids_of(2, 5)
    engine = attach(model)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    refused = pytest.raises(InputError, match=r"weight: \[B, C\] needs an attention mask \[B, S\], or none")
    with refused, engine.collect(torch.eye(2)):
        logits(model, ids, attention_mask=mask)
    with engine.collect(torch.eye(2)) as expected:
        logits(model, ids)
    weight = torch.zeros(2, 5, 2)
    weight[:, -1] = torch.eye(2)
    with engine.collect(weight) as sums:
        logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(sums.total, expected.total, rtol=1e-4, atol=1e-5)


def test_a_pass_that_failed_may_be_tried_again():
    model, ids = make("llama"), ids_of(2, 5)
    engine = attach(model)
    with engine.collect(torch.eye(2)) as expected:
        logits(model, ids)
    failing = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with engine.collect(torch.eye(2)) as sums:
        with pytest.raises(ZeroDivisionError):
            logits(model, ids)
        failing.remove()
        logits(model, ids)
    assert torch.equal(sums.total, expected.total) and torch.equal(sums.count, expected.count)


def test_large_numbers_do_not_wrap():
    model, ids = make("llama"), ids_of(2, 5)
    engine = attach(model)
    plain = logits(model, ids)
    engine.set([random_circuit(engine, 0)], [-2.0])
    engine.rows(0)
    steered = logits(model, ids)
    engine.rows(0, stop=2**63 - 1)
    assert torch.equal(logits(model, ids), steered)
    engine.rows(0, start=2**40)
    assert torch.allclose(logits(model, ids), plain, atol=1e-5) and (steered - plain).abs().max() > 0.1
    with pytest.raises(InputError, match="row_circuit: row 1: expected -1 or one of 0, got 4294967296"):
        engine.rows([-1, 2**32])


def test_accelerate_after_attach():
    accelerate = pytest.importorskip("accelerate")
    model, ids = make("llama"), ids_of(2, 5)
    engine = attach(model)
    engine.set([random_circuit(engine, 0)], [-2.0])
    engine.rows(0)
    steered = logits(model, ids)
    model = accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.allclose(logits(model, ids), steered, atol=1e-5)
    engine.detach()
    assert torch.allclose(logits(model, ids), logits(make("llama"), ids), atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, ids = make("llama").train(), ids_of(2, 5)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    engine = attach(model)
    engine.set([random_circuit(engine, 0)], [-2.0])
    engine.rows([0, -1])
    model(ids, labels=ids, use_cache=False).loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_disable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_layers_compiled_one_by_one():
    """Regional compilation: one graph serves every layer, and follows the table."""
    model, ids = make("llama", num_hidden_layers=12), ids_of(2, 5)
    engine = attach(model)
    engine.set([random_circuit(engine, 0, size=60)], [-2.0])
    engine.rows([0, -1])
    steered, plain = logits(model, ids), logits(make("llama", num_hidden_layers=12), ids)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=counter)
    assert torch.allclose(logits(model, ids, use_cache=False), steered, atol=1e-4)
    assert counter.frame_count <= 2
    engine.table.set_multiplier(0, 1.0)
    assert torch.allclose(logits(model, ids, use_cache=False), plain, atol=1e-4)
    assert counter.frame_count <= 2


def test_batches_of_many_sizes_share_a_graph():
    model = make("llama")
    engine = attach(model)
    engine.set([random_circuit(engine, 0)], [-2.0])
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for n_rows in range(2, 14):
        ids = ids_of(n_rows, 5)
        engine.rows([0, *[-1] * (n_rows - 1)])
        assert torch.allclose(logits(compiled, ids, use_cache=False), logits(model, ids, use_cache=False), atol=1e-4)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("backend", ["reference", None])
def test_float64_pruned_and_strided_weights(backend):
    ids = ids_of(2, 5)
    for change in (
        lambda model: model.double(),
        lambda model: prune.l1_unstructured(model.model.layers[1].mlp.down_proj, "weight", 0.3),
        lambda model: setattr(
            model.model.layers[0].mlp.up_proj, "weight",
            nn.Parameter(model.model.layers[0].mlp.up_proj.weight.detach().T.contiguous().T),
        ),
    ):  # fmt: skip
        model = make("llama")
        change(model)
        plain, engine = logits(model, ids), quietly(model, backend=backend)
        assert torch.allclose(logits(model, ids), plain, atol=1e-5)
        circuit = random_circuit(engine, 0)
        engine.set([circuit], [-2.0])
        engine.rows(0)
        got = logits(model, ids)
        engine.detach()
        assert_steered(got, hooked(model, circuit, -2.0, lambda m: logits(m, ids)), plain)


def test_nothing_is_kept_alive():
    model = make("llama")
    engine = attach(model)
    logits(model, ids_of(2, 5))
    engine.detach()
    freed = weakref.ref(model.model.layers[0].mlp.down_proj.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert freed() is None and engine.table is not None
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_follows_the_table():
    """A captured decoding step: another multiplier, circuit or row changes what a replay gives."""
    model, ids = make("llama", torch.bfloat16).cuda(), ids_of(2, 9).cuda()
    engine = attach(model)
    engine.set([random_circuit(engine, 0), random_circuit(engine, 1)], [-2.0, 4.0])
    engine.rows([0, 1])
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(ids, use_cache=False).logits
    seen = []
    for change in (
        lambda: None,
        lambda: engine.table.set_multiplier(0, 0.0),
        lambda: engine.table.replace(1, random_circuit(engine, 2), -2.0),
        lambda: engine.rows([1, 0]),
    ):
        change()
        graph.replay()
        got = out.float().clone()
        assert torch.allclose(got, logits(model, ids, use_cache=False).float(), atol=0.05)
        assert not seen or (got - seen[-1]).abs().max() > 0.1
        seen.append(got)
