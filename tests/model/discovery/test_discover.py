"""Discovery against a plain hook implementation, batch independence, the universal filter, presets and refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cna_kernels import InputError, select
from cna_kernels.model import load
from cna_kernels.model.discovery import collect
from cna_kernels.model.discovery.settings import settings_from
from tiny import TEXT_VOCABULARY, write_checkpoint, write_text_files

transformers = pytest.importorskip("transformers")

POSITIVE = ["open it", "why not", "I would like to see the other one, please", "x", "one two three", "a b c d e f"]
NEGATIVE = ["close", "the door was left open all night", "yes", "12345", "what is this thing called", "no no no", "ok"]
NEUTRAL = ["Hello.", "How many days?", "The sky is", "List three.", "Once upon a time"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen3")
    shape = dict(num_hidden_layers=5, intermediate_size=300, vocab_size=TEXT_VOCABULARY)
    theirs = write_checkpoint("qwen3", directory, **shape)
    # Two opposite neurons with large weights: on every prompt one of them fires, so one of them is universal.
    mlp = theirs.model.layers[1].mlp
    with torch.no_grad():
        for neuron, sign in ((7, 5.0), (8, -5.0)):
            mlp.gate_proj.weight[neuron] = mlp.up_proj.weight[neuron] = sign * mlp.gate_proj.weight[0]
    theirs.save_pretrained(directory)
    write_text_files(directory)
    return directory, theirs


def hooked_activations(theirs, token_rows):
    """Input of every down_proj at the last token, one prompt at a time with forward pre-hooks: [P, L, N]."""
    caught = []

    def keep(_module, arguments):
        caught.append(arguments[0][0, -1].clone())

    handles = [layer.mlp.down_proj.register_forward_pre_hook(keep) for layer in theirs.model.layers]
    rows = []
    with torch.no_grad():
        for ids in token_rows:
            caught.clear()
            theirs(torch.tensor([ids]), use_cache=False)
            rows.append(torch.stack(caught))
    for handle in handles:
        handle.remove()
    return torch.stack(rows)


def hooked_ref_code(directory, theirs, k=200):
    """What the authors' public code computes, in plain hooks: (layer, index, delta) in rank order."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)

    def mean(prompts):
        rows = []
        for prompt in prompts:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            rows.append(tokenizer(text).input_ids)  # tokenised once more, which adds a second BOS
        return hooked_activations(theirs, rows).mean(0)

    delta = mean(POSITIVE) - mean(NEGATIVE)
    delta[:2] = 0  # layers 0 and 1 dropped
    order = delta.abs().flatten().sort(descending=True, stable=True).indices[:k].tolist()
    return [(*divmod(place, delta.shape[1]), delta.flatten()[place].item()) for place in order]


def test_ref_code_preset_equals_plain_hooks(checkpoint):
    directory, theirs = checkpoint
    circuit = load(directory).discover(POSITIVE, NEGATIVE, preset="ref-code")
    expected = hooked_ref_code(directory, theirs)
    assert circuit.k == 200 and circuit.universal is None and circuit.skipped_layers == (0, 1)
    assert circuit.pairs == [(layer, index) for layer, index, _ in expected]
    for (_, _, got), (_, _, want) in zip(circuit.neurons, expected, strict=True):
        assert abs(got - want) <= 1e-5 * abs(expected[0][2])
    assert circuit.preset == "ref-code"


def test_paper_preset_equals_plain_hooks(checkpoint):
    directory, theirs = checkpoint
    model = load(directory)
    circuit = model.discover(POSITIVE, NEGATIVE, fraction=0.02, universal_prompts=NEUTRAL, universal_threshold=0.4)

    def acts(prompts):
        return hooked_activations(theirs, model.tokenizer.encode_chat(list(prompts))).double()

    delta = acts(POSITIVE).mean(0) - acts(NEGATIVE).mean(0)
    neutral = acts(NEUTRAL).abs().flatten(1)  # [P, L * N]
    top = neutral.topk(2).indices  # 0.1% of 1500 neurons
    counts = torch.bincount(top.flatten(), minlength=1500)
    universal = counts >= 2  # 40% of 5
    assert universal.any(), "the case must have a universal neuron"
    ranked = delta.abs().flatten().masked_fill(universal, -1).sort(descending=True, stable=True).indices[:30]
    assert circuit.pairs == [divmod(place, 300) for place in ranked.tolist()]
    assert circuit.universal["excluded"] == [list(divmod(p, 300)) for p in universal.nonzero()[:, 0].tolist()]
    assert not set(map(tuple, circuit.universal["excluded"])) & set(circuit.pairs)
    means = acts(POSITIVE).mean(0)
    assert max(abs(means[pair] - delta[pair]) for pair in circuit.pairs) > 1e-3, "a contrast is no mean"
    assert circuit.positive_mean == pytest.approx([means[pair].item() for pair in circuit.pairs], rel=1e-4, abs=1e-6)
    opposite = {pair for pair in circuit.pairs if means[pair] * delta[pair] < 0}
    assert opposite and set(circuit.aligned().mirrored) == opposite


@pytest.mark.parametrize("score", select.SCORES)
def test_batches_do_not_change_the_circuit(checkpoint, score):
    model = load(checkpoint[0])
    circuits = [
        model.discover(POSITIVE, NEGATIVE, top_k=60, score=score, universal_prompts=NEUTRAL, batch=batch)
        for batch in (None, 1, 2, 7, 32)
    ]
    # cohen-d divides by a spread that fp32 rounding moves a little more
    close = 1e-3 if score == "cohen-d" else 1e-5
    for other in circuits[1:]:
        assert other.pairs == circuits[0].pairs
        for (_, _, got), (_, _, want) in zip(other.neurons, circuits[0].neurons, strict=True):
            assert abs(got - want) <= close * abs(circuits[0].neurons[0][2])
    assert len({tuple(c.pairs) for c in circuits}) == 1


def test_scores_choose_differently(checkpoint):
    model = load(checkpoint[0])
    chosen = {s: set(model.discover(POSITIVE, NEGATIVE, top_k=60, score=s).pairs) for s in select.SCORES}
    assert len({frozenset(pairs) for pairs in chosen.values()}) == 3


def test_order_of_prompts_does_not_matter(checkpoint):
    model = load(checkpoint[0])
    one = model.discover(POSITIVE, NEGATIVE, top_k=60)
    other = model.discover(POSITIVE[::-1], NEGATIVE[::-1], top_k=60)
    assert one.pairs == other.pairs and one.prompts != other.prompts


def test_runs_repeat_bit_for_bit_and_threads_do_not_change_the_circuit(checkpoint):
    """Across thread counts PyTorch's matrix products differ in the last bits: there only the neurons are equal."""
    model = load(checkpoint[0])
    before = torch.get_num_threads()
    circuits = []
    try:
        for n_threads in (1, 1, 2, 2):
            torch.set_num_threads(n_threads)
            circuits.append(model.discover(POSITIVE, NEGATIVE, top_k=60))
    finally:
        torch.set_num_threads(before)
    assert circuits[0] == circuits[1] and circuits[2] == circuits[3]
    assert circuits[0].pairs == circuits[2].pairs


def test_skipped_layers_and_full_fraction(checkpoint):
    model = load(checkpoint[0])
    circuit = model.discover(POSITIVE, NEGATIVE, top_k=900, skip_layers=[1, 4], universal_prompts=False)
    assert circuit.per_layer() == [300, 0, 300, 300, 0]
    with pytest.raises(InputError, match="top_k: expected 1 to 900, the neurons that may be chosen, got 901"):
        model.discover(POSITIVE, NEGATIVE, top_k=901, skip_layers=[1, 4], universal_prompts=False)
    assert model.discover(POSITIVE, NEGATIVE, fraction=1.0, universal_prompts=False).k == 1500


def test_provenance(checkpoint, tmp_path):
    directory, _ = checkpoint
    model = load(directory)
    circuit = model.discover(POSITIVE, NEGATIVE)
    assert circuit.k == 2 and circuit.fraction == 0.001 and circuit.k_rule == select.K_RULE
    assert circuit.model == model.identity() and circuit.tokenizer_sha256 == model.tokenizer.sha256
    assert circuit.prompts["positive"]["count"] == 6 and circuit.prompts["negative"]["count"] == 7
    assert circuit.dtype == "float32" and circuit.preset == "paper" and circuit.universal["prompts"] == 24
    circuit.save(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["neurons"] == [list(n) for n in circuit.neurons]


def test_plain_and_chat_prompts_differ(checkpoint):
    model = load(checkpoint[0])
    chat = model.discover(POSITIVE, NEGATIVE, top_k=50)
    plain = model.discover(POSITIVE, NEGATIVE, top_k=50, chat=False)
    assert chat.pairs != plain.pairs and plain.chat_template_sha256 is None


def test_non_finite_activations_name_the_prompt(checkpoint, tmp_path):
    directory, _ = checkpoint
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    culprit = load(directory).tokenizer.encode("~")[-1]
    embedding[culprit] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path)
    with pytest.raises(InputError, match=r"negative\[4\]: causes a non-finite activation in layer 0, neuron \d+"):
        model.discover(POSITIVE, [*NEGATIVE[:4], "odd ~ one", *NEGATIVE[4:]], top_k=5)
    with pytest.raises(InputError, match=r"neutral\[1\]: causes a non-finite activation"):
        model.discover(POSITIVE, NEGATIVE, top_k=5, universal_prompts=["a", "~"])
    assert (
        model.discover(POSITIVE, NEGATIVE, top_k=5).pairs == load(directory).discover(POSITIVE, NEGATIVE, top_k=5).pairs
    )


def test_out_of_memory_halves_the_pack(checkpoint, monkeypatch):
    model = load(checkpoint[0])
    expected = model.discover(POSITIVE, NEGATIVE, top_k=60, universal_prompts=False)
    whole = collect.forward
    sizes = []

    def small_memory(transformer, packed, past, sums, **options):
        n_prompts = sum(span.n_prompts for span in packed.spans)
        sizes.append(n_prompts)
        if n_prompts > limit:
            sums.act_sum += 1  # what a failed pass has added must not count
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(transformer, packed, past, sums, **options)

    monkeypatch.setattr(collect, "forward", small_memory)
    limit = 3
    got = model.discover(POSITIVE, NEGATIVE, top_k=60, universal_prompts=False, batch=13)
    assert got.pairs == expected.pairs and max(sizes) == 13 and sum(s for s in sizes if s <= 3) == 13
    limit = 0
    with pytest.raises(InputError, match=r"out of memory with this prompt alone \(\d+ tokens\)"):
        model.discover(POSITIVE, NEGATIVE, top_k=60, universal_prompts=False, batch=13)


def test_progress_counts_every_prompt_and_token(checkpoint):
    seen, model = [], load(checkpoint[0])
    model.discover(POSITIVE, NEGATIVE, batch=4, progress=lambda *facts: seen.append(facts), universal_prompts=NEUTRAL)
    tokens = sum(len(ids) for ids in model.tokenizer.encode_chat([*POSITIVE, *NEGATIVE, *NEUTRAL]))
    assert seen[-1] == (18, 18, tokens) and seen == sorted(set(seen))


def test_prompts_beyond_the_context(checkpoint):
    with pytest.raises(InputError, match=r"positive\[1\]: has 84 tokens, the model's context is 64"):
        load(checkpoint[0]).discover(["a", "b" * 80], NEGATIVE)


def test_cohen_d_of_one_prompt_is_refused_before_the_work(checkpoint):
    with pytest.raises(InputError, match="score: cohen-d needs at least two prompts in each set, and more with folds"):
        load(checkpoint[0]).discover(POSITIVE[:1], NEGATIVE, score="cohen-d")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k: expected 1 to 1500"),
        ({"top_k": 1501}, "top_k: expected 1 to 1500"),
        ({"fraction": 0.0}, "fraction: expected above 0"),
        ({"fraction": 1.5}, "fraction: expected above 0"),
        ({"fraction": float("nan")}, "fraction: expected above 0"),
        ({"score": "best"}, "score: expected one of"),
        ({"preset": "mine"}, "preset: expected one of paper, ref-code"),
        ({"skip_layers": [5]}, "skip_layers: expected 0 to 4, got 5"),
        ({"universal_prompts": []}, "neutral: holds no prompt"),
    ],
)
def test_refusals(checkpoint, options, message):
    with pytest.raises(InputError, match=message):
        load(checkpoint[0]).discover(POSITIVE, NEGATIVE, **options)


def test_settings():
    assert settings_from(None).preset == "paper"
    assert settings_from("ref-code").top_k == 200
    assert settings_from("ref-code", fraction=0.01).top_k is None
    assert settings_from("ref-code", fraction=0.01).preset == "ref-code (changed)"
    assert settings_from(None, score="magnitude").preset is None


def test_units_do_not_change_the_circuit(checkpoint, monkeypatch):
    """Units of two universal prompts, then units of about two prompts by their text's length."""
    model = load(checkpoint[0])
    options = dict(top_k=60, universal_prompts=NEUTRAL, universal_threshold=0.4)
    one = model.discover(POSITIVE, NEGATIVE, **options)
    assert one.universal["excluded"], "the case must have a universal neuron"
    for name in ("UNIT_UNIVERSAL", "UNIT_BYTES"):
        monkeypatch.setattr(f"cna_kernels.model.prompts.corpus.{name}", 2 if name == "UNIT_UNIVERSAL" else 150)
        other = model.discover(POSITIVE, NEGATIVE, **options)
        assert other.pairs == one.pairs and other.universal == one.universal
