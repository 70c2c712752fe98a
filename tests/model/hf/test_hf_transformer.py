"""A model that transformers runs, in batches: each row as alone, prefixes shared, failures named, layers offloaded."""

import pytest
import torch

from attach_cases import make
from cna_kernels import Circuit, InputError
from cna_kernels.model import load
from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.prompts.files import PromptSet
from cna_kernels.model.steering import Steering
from cna_kernels.sums import ActivationSums
from families import SIZES, contrast_by_hooks, greedy, write_family
from tiny import SHAPE, write_text_files

pytest.importorskip("transformers")

PROMPTS = ["go on", "what is the matter with you then, and since when", "x", "and so on and so forth until the end"]


@pytest.fixture(scope="module", params=["gemma3", "mixtral", "mistral"])
def pair(request, tmp_path_factory):
    """A model on transformers, and transformers' own; those of two families have sliding windows."""
    directory = tmp_path_factory.mktemp(request.param)
    window = {"gemma3": dict(sliding_window=9), "mistral": dict(sliding_window=9)}.get(request.param, {})
    theirs = make(request.param, seed=20, **SIZES, **window)
    theirs.save_pretrained(directory)
    write_text_files(directory)
    model = load(directory, engine="transformers", device="cpu")
    if request.param == "gemma3":  # most of its answers end at once
        model.stop_ids = frozenset()
    return model, theirs


def ids_of(model, texts=PROMPTS):
    return [prompt.ids for prompt in model.encode(PromptSet.of(texts, "p"))]


def test_every_row_of_a_batch_is_answered_as_alone(pair):
    """Rows of other lengths, some of which end early: padding is never seen, nor counted by a sliding window."""
    model, theirs = pair
    expected = [model.tokenizer.decode(greedy(theirs, ids, model.stop_ids, 16)) for ids in ids_of(model)]
    assert model.generate(PROMPTS, max_new_tokens=16) == expected
    assert model.generate(PROMPTS, max_new_tokens=16, batch=1) == expected
    assert max(map(len, ids_of(model))) > 9 and len(set(expected)) > 1


def test_rows_have_circuits_of_their_own(pair):
    model, _ = pair
    config = model.config
    one, two = (
        Circuit(tuple((layer, index, 1.0) for layer in range(3) for index in chosen), 3, config.intermediate_size)
        for chosen in ((1, 5, 20, 40), (2, 6, 30, 50))
    )
    given, multipliers = [one, None, two, one], [0.0, 0.0, -2.0, 3.0]
    together = model.generate(PROMPTS, circuit=given, multiplier=multipliers, max_new_tokens=10)
    alone = [
        model.generate(prompt, circuit=circuit and [circuit], multiplier=[m], max_new_tokens=10)
        for prompt, circuit, m in zip(PROMPTS, given, multipliers, strict=True)
    ]
    assert together == alone
    plain = model.generate(PROMPTS, max_new_tokens=10)
    assert [a == b for a, b in zip(together, plain, strict=True)][1] and together != plain
    assert model.generate(PROMPTS, max_new_tokens=10) == plain, "nothing stays steered"


def test_a_prefix_is_computed_once(pair, monkeypatch):
    """Prompts that begin alike share a cache; the sums are those of each prompt alone, to the tokens that count."""
    model, theirs = pair
    header = list(range(10, 60))
    draw = torch.Generator().manual_seed(0)
    own = [torch.randint(70, 200, (n,), generator=draw).tolist() for n in (3, 9, 5, 12, 1, 2, 7, 4)]
    prompts = [TokenPrompt([*header, *ids], f"prompt {number}") for number, ids in enumerate(own)]
    weights = torch.zeros(len(prompts), 2)
    weights[:4, 0] = weights[4:, 1] = 1
    passes, run = [], model.transformer.run
    monkeypatch.setattr(model.transformer, "run", lambda ids, **how: passes.append(tuple(ids.shape)) or run(ids, **how))
    from cna_kernels.model.discovery.collect import collect

    sums = ActivationSums(3, model.config.intermediate_size, 2)
    collect(model.transformer, prompts, weights, sums, max_tokens=40)
    assert passes[0] == (1, 50) and sum(rows for rows, _ in passes[1:]) == 8 and len(passes) > 2
    assert all(rows * longest <= 40 for rows, longest in passes[1:])
    expected = contrast_by_hooks(theirs, [p.ids for p in prompts[:4]], [p.ids for p in prompts[4:]])
    torch.testing.assert_close(sums.mean(0) - sums.mean(1), expected, rtol=1e-4, atol=1e-4)
    assert sums.count.tolist() == [4, 4]


def test_all_tokens_of_a_prompt_share_its_weight(pair):
    model, theirs = pair
    header = list(range(10, 90))
    prompts = [TokenPrompt([*header, *ids], "p", n) for ids, n in (([91, 92, 93], 60), ([94], 3), ([95, 96], 82))]
    weights = torch.ones(3, 1)
    from cna_kernels.model.discovery.collect import collect
    from families import watched

    sums = ActivationSums(3, model.config.intermediate_size, 1)
    collect(model.transformer, prompts, weights, sums)
    total = torch.zeros(3, model.config.intermediate_size, dtype=torch.float64)
    for prompt in prompts:

        def seen(layer, act, n=prompt.n_counted):
            total[layer] += act[-n:].double().mean(0) / 3

        with watched(theirs, seen), torch.inference_mode():
            theirs(torch.tensor([prompt.ids]))
    torch.testing.assert_close(sums.mean(0), total, rtol=1e-4, atol=1e-4)
    assert sums.count.tolist() == [3]


def test_the_prompt_that_overflows_is_named(tmp_path):
    import transformers

    path, theirs = write_family("gemma3", tmp_path)
    with torch.no_grad():
        theirs.get_input_embeddings().weight[150] = float("inf")
    theirs.save_pretrained(path)
    model = load(path, device="cpu")
    prompts = [TokenPrompt([5, 6, 7, n], f"prompt {n}") for n in (148, 149, 150, 151)]
    sums = ActivationSums(3, model.config.intermediate_size, 1)
    from cna_kernels.model.discovery.collect import collect

    with pytest.raises(InputError, match="prompt 150: causes a non-finite activation"):
        collect(model.transformer, prompts, torch.ones(4, 1), sums)
    assert not sums.act_sum.any()
    assert isinstance(theirs, transformers.PreTrainedModel)


def test_memory_that_runs_out_halves_a_pack(pair, monkeypatch):
    model, theirs = pair
    prompts = [TokenPrompt([5, 6, 7 + n], f"prompt {n}") for n in range(5)]
    run, passes = model.transformer.run, []

    def limited(ids, **how):
        if len(ids) > 2:
            raise torch.OutOfMemoryError("out of memory")
        passes.append(len(ids))
        return run(ids, **how)

    monkeypatch.setattr(model.transformer, "run", limited)
    from cna_kernels.model.discovery.collect import collect

    sums = ActivationSums(3, model.config.intermediate_size, 1)
    collect(model.transformer, prompts, torch.ones(5, 1), sums)
    assert sum(passes) == 5 and max(passes) == 2 and sums.count.tolist() == [5]
    expected = contrast_by_hooks(theirs, [prompt.ids for prompt in prompts], [])
    torch.testing.assert_close(sums.mean(0), expected, rtol=1e-4, atol=1e-4)


def test_discovery_during_steering_sums_the_unsteered_model(pair):
    model, _ = pair
    circuit = Circuit(((0, 3, 1.0), (1, 7, 1.0)), 3, model.config.intermediate_size)
    plain = model.discover(["a", "bc"], ["d", "ef"], top_k=5, universal_prompts=False)
    model.generate("hello", circuit=circuit, multiplier=5.0, max_new_tokens=2)
    assert model.discover(["a", "bc"], ["d", "ef"], top_k=5, universal_prompts=False) == plain


def test_logits_of_the_models_own_head(tmp_path):
    """Gemma 2 caps its logits: the head is what the model's own forward does with hidden states."""
    theirs = make("gemma2", final_logit_softcapping=2.0, **SIZES)
    theirs.save_pretrained(tmp_path)
    write_text_files(tmp_path)
    model, ids = load(tmp_path, device="cpu"), torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        logits = model(ids)
        expected = theirs(ids).logits
        torch.testing.assert_close(model.transformer.logits(model.transformer.hidden(ids)[0, 2:]), logits[0, 2:])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert 1.5 < expected.abs().max() < 2


def test_layers_in_memory_of_another_device(tmp_path):
    """Layers that accelerate offloads are loaded when their turn comes; sums, steering and columns are the same."""
    pytest.importorskip("accelerate")
    path, _ = write_family("phi3", tmp_path)
    whole = load(path, device="cpu")
    circuit = whole.discover(PROMPTS[:2], PROMPTS[2:], top_k=6, universal_prompts=False)
    spread = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread |= {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(3)}
    model = load(path, device="cpu", device_map=spread, model_args={"offload_folder": str(tmp_path / "offload")})
    assert any(parameter.is_meta for parameter in model.transformer.model.parameters())
    found = model.discover(PROMPTS[:2], PROMPTS[2:], top_k=6, universal_prompts=False)
    assert found.pairs == circuit.pairs
    steered = [m.generate(PROMPTS, circuit=circuit, multiplier=-2.0, max_new_tokens=6) for m in (whole, model)]
    assert steered[0] == steered[1]
    columns = [m.transformer.down_columns(1, [3, 9]) for m in (whole, model)]
    torch.testing.assert_close(*columns)


def test_steering_that_is_not_of_this_model(pair):
    model, _ = pair
    table = model.transformer.new_table([Circuit(((0, 3, 1.0),), 3, model.config.intermediate_size)], [0.0])
    steer = Steering(table, table.row_circuit([0, -1]))
    with pytest.raises(InputError, match="rows: expected 3, one for each row of the batch, got 2"):
        model.transformer.hidden(torch.tensor([[5, 6]] * 3), steer=steer)


LONGROPE = dict(
    rope_parameters=dict(
        rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 8, long_factor=[4.0] * 8, factor=4.0,
        original_max_position_embeddings=24,
    ),
    original_max_position_embeddings=24, max_position_embeddings=96,
)  # fmt: skip


def test_longrope_ends_where_transformers_looks_at_the_whole_batch(tmp_path):
    """Beyond the first length, rows would be rotated by the longest row of their batch."""
    theirs = make("phi3", **SIZES | LONGROPE)
    theirs.save_pretrained(tmp_path)
    write_text_files(tmp_path)
    model = load(tmp_path, device="cpu")
    model.stop_ids = frozenset()
    assert model.config.context_length == 24
    prompts = ["abc", "a longer prompt x", "de"]
    found = model.generate(prompts, max_new_tokens=40)
    for prompt, ids in zip(prompts, ids_of(model, prompts), strict=True):
        answer = model.tokenizer.decode(greedy(theirs, ids, (), 24 - len(ids)))
        assert found[prompts.index(prompt)] == answer
    with pytest.raises(InputError, match="tokens, the model's context is 24"):
        model.generate("a prompt of more than twenty-four tokens", max_new_tokens=2)


@pytest.mark.parametrize("stem", ["Qwen3Next", "FalconH1"])
def test_states_of_linear_attention_follow_their_rows(stem, tmp_path):
    import transformers

    small = dict(
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, head_dim=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"], mlp_only_layers=[0, 1, 2],
    )  # fmt: skip
    if stem == "FalconH1":
        small = dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, head_dim=16)
    kind = getattr(transformers, f"{stem}Config", None)
    if kind is None:
        pytest.skip(f"this transformers has no {stem}")
    torch.manual_seed(3)
    theirs = getattr(transformers, f"{stem}ForCausalLM")(kind(**SHAPE | SIZES | small)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    theirs.save_pretrained(tmp_path)
    write_text_files(tmp_path)
    model = load(tmp_path, device="cpu")
    rows = ids_of(model)
    model.stop_ids = model.stop_ids | {greedy(theirs, ids, (), 2)[-1] for ids in rows[:2]}  # half of the rows end early
    expected = [model.tokenizer.decode(greedy(theirs, ids, model.stop_ids, 12)) for ids in rows]
    assert model.generate(PROMPTS, max_new_tokens=12) == expected and len(set(map(len, expected))) > 1
    prompts = [TokenPrompt([*range(10, 90), *ids], "p") for ids in ([91, 92, 93], [94], [95, 96])]
    from cna_kernels.model.discovery.collect import collect

    sums = ActivationSums(3, model.config.intermediate_size, 1)
    collect(model.transformer, prompts, torch.ones(3, 1), sums)
    expected = contrast_by_hooks(theirs, [prompt.ids for prompt in prompts], [])
    torch.testing.assert_close(sums.mean(0), expected, rtol=1e-3, atol=1e-3)


def test_a_window_that_the_class_does_not_have(tmp_path):
    """Caches of transformers would drop tokens that Llama's attention sees."""
    import json

    theirs = make("llama", **SIZES)
    theirs.save_pretrained(tmp_path)
    write_text_files(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text()) | {"sliding_window": 9}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="sliding_window: is no setting of LlamaConfig, and is passed over"):
        model = load(tmp_path, engine="transformers", device="cpu")
    own = load(tmp_path, engine="own", device="cpu")
    answers = [m.generate(PROMPTS, max_new_tokens=16) for m in (model, own)]
    assert answers[0] == answers[1]
    header = "the same beginning of all prompts, which is long enough to run once, and so on: "
    circuits = [m.discover([header + "a", header + "bc"], [header + "d"], top_k=9, universal_prompts=False)
                for m in (model, own)]  # fmt: skip
    assert circuits[0].pairs == circuits[1].pairs


def test_a_table_of_another_model_is_refused(pair, tmp_path):
    model, _ = pair
    other = load(write_family("phi3" if "phi3" not in str(model.directory) else "llama", tmp_path)[0], device="cpu")
    table = other.transformer.new_table([], [])
    if table.n_neurons == model.config.intermediate_size and model.config.experts is None:
        table = type(table)([], [], 2, table.n_neurons)
    before = model.transformer.engine.table
    with pytest.raises(InputError, match="table: is of another model"):
        model.transformer.engine.use(table)
    assert model.transformer.engine.table is before
