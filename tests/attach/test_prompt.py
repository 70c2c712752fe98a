"""Phases and last tokens by the prompt that ``generate`` was given, against hooks that go by position."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch

from attach_cases import ids_of, logits, make, quietly, random_circuit, transformers
from cna_kernels import InputError, attach

GREEDY = dict(do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=6, min_new_tokens=6)
REPEATING = ids_of(1, 5).repeat(1, 3)  # prompt lookup finds drafts in it
PADDED = torch.tensor([[1] * 9, [0] * 2 + [1] * 7])


def untied(name="llama", **changes):
    """A random model with tied embeddings repeats its last token."""
    return make(name, tie_word_embeddings=False, **changes)


def static_cache(model):
    return transformers.StaticCache(config=model.config, max_cache_len=32)


def of_a_prefix(model, ids, n_tokens, **options):
    """A cache that holds the first tokens of the prompts. An engine that is on the model does not steer them."""
    cache, plain = transformers.DynamicCache(config=model.config), copy.deepcopy(model)
    with torch.no_grad():
        plain(ids[:, :n_tokens], past_key_values=cache, use_cache=True, **options)
    return cache


def given_embeddings(model):
    """Have the decoder get embeddings in place of ids, as that of a model with pictures does."""

    def embed(_, args, kwargs):
        return args, kwargs | dict(inputs_embeds=model.get_input_embeddings()(kwargs["input_ids"]), input_ids=None)

    model.get_decoder().register_forward_pre_hook(embed, with_kwargs=True)
    return {}


# name: (the model, the prompts, their mask or None, options of generate for a model and prompts)
WAYS = {
    "plain": ("llama", ids_of(2, 9), None, lambda m, ids: {}),
    "padded": ("llama", ids_of(2, 9), PADDED, lambda m, ids: {}),
    "one token": ("llama", ids_of(2, 1), None, lambda m, ids: {}),
    "no cache": ("llama", ids_of(2, 9), None, lambda m, ids: dict(use_cache=False)),
    "no cache, padded": ("llama", ids_of(2, 9), PADDED, lambda m, ids: dict(use_cache=False)),
    "prompt lookup": ("llama", REPEATING, None, lambda m, ids: dict(prompt_lookup_num_tokens=3)),
    "assisted": ("llama", ids_of(1, 9), None, lambda m, ids: dict(assistant_model=untied(seed=7))),
    "assisted by a copy": ("llama", ids_of(1, 9), None, lambda m, ids: dict(assistant_model=untied())),
    "chunks of 3": ("llama", ids_of(2, 9), None, lambda m, ids: dict(prefill_chunk_size=3)),
    "chunks, the last of 1": ("llama", ids_of(2, 9), PADDED, lambda m, ids: dict(prefill_chunk_size=4)),
    "chunks of 1": ("llama", ids_of(2, 9), None, lambda m, ids: dict(prefill_chunk_size=1)),
    "static cache": ("llama", ids_of(2, 9), PADDED, lambda m, ids: dict(cache_implementation="static")),
    "a given static cache": ("llama", ids_of(2, 9), None, lambda m, ids: dict(past_key_values=static_cache(m))),
    "sliding window": ("mistral", ids_of(2, 9), PADDED, lambda m, ids: {}),
    "static sliding window": ("mistral", ids_of(2, 9), None, lambda m, ids: dict(cache_implementation="static")),
    "sliding chunks": ("mistral", ids_of(2, 9), None, lambda m, ids: dict(prefill_chunk_size=4)),
    "beams": ("llama", ids_of(2, 9), PADDED, lambda m, ids: dict(num_beams=3)),
    "beams without a cache": ("llama", ids_of(2, 9), None, lambda m, ids: dict(num_beams=2, use_cache=False)),
    "a cached prefix": ("llama", ids_of(2, 9), None, lambda m, ids: dict(past_key_values=of_a_prefix(m, ids, 4))),
    "all but one token cached": (
        "llama", ids_of(2, 9), None, lambda m, ids: dict(past_key_values=of_a_prefix(m, ids, 8)),
    ),
    "a cached prefix, in chunks": (
        "llama", ids_of(2, 9), None, lambda m, ids: dict(past_key_values=of_a_prefix(m, ids, 4), prefill_chunk_size=2),
    ),
    "embeddings": ("llama", ids_of(2, 9), None, lambda m, ids: dict(inputs_embeds=m.get_input_embeddings()(ids))),
    "a cached prefix that is not repeated": (
        "llama", ids_of(2, 9), None, lambda m, ids: dict(inputs=ids[:, 4:], past_key_values=of_a_prefix(m, ids, 4)),
    ),
    "a cached prefix that is not repeated, prompt lookup": (
        "llama", REPEATING, None,
        lambda m, ids: dict(inputs=ids[:, 4:], past_key_values=of_a_prefix(m, ids, 4), prompt_lookup_num_tokens=10),
    ),
    "embeddings within, prompt lookup": (
        "llama", REPEATING, None, lambda m, ids: given_embeddings(m) | dict(prompt_lookup_num_tokens=3),
    ),
    "moe": ("qwen3-moe", ids_of(2, 9), PADDED, lambda m, ids: {}),
}  # fmt: skip


def check_transformers(way):
    """Skip what this transformers itself answers otherwise: 5.17 with a cached prefix, in chunks and with drafts."""
    name, ids, mask, options = WAYS[way]
    if "cached" in way:
        answers = [generate(untied(name), ids, mask, more)[:, -6:] for more in (options, lambda *_: {})]
        if not torch.equal(*answers):
            pytest.skip("this transformers itself answers otherwise without the cached prefix")


def generate(model, ids, mask, options):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more = options(model, ids)
        given = {} if {"inputs_embeds", "inputs"} & {*more} else dict(inputs=ids)
        mask = torch.ones_like(ids) if mask is None else mask
        return model.generate(**given, attention_mask=mask, **{**GREEDY, **more})


def by_position(model, circuit, multiplier, steered):
    """Hooks that multiply a circuit's neurons where ``steered(position_ids, number of rows)`` says."""
    call = {}

    def note(_, args, kwargs):
        call["position"] = kwargs.get("position_ids")
        if call["position"] is None:  # of guidance's calls
            ids, past = args[0] if args else kwargs["input_ids"], kwargs["past_key_values"]
            call["position"] = torch.arange(ids.shape[1])[None] + (past.get_seq_length() if past is not None else 0)

    model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    for layer, members in circuit.by_layer().items():

        def scale(_, args, members=members):
            act = args[0].clone()
            act[..., members] *= torch.where(steered(call["position"], len(act)), multiplier, 1.0)[..., None]
            return (act,)

        model.get_decoder().layers[layer].mlp.down_proj.register_forward_pre_hook(scale)


@pytest.mark.parametrize("phase", ["prompt", "answer"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "moe"])
def test_phases_are_those_of_positions(way, phase):
    check_transformers(way)
    name, ids, mask, options = WAYS[way]
    attached, hooked, plain = (untied(name) for _ in range(3))
    engine = attach(attached)
    circuit = random_circuit(engine, 1, size=60)
    engine.set([circuit], [-3.0])
    engine.rows(0, phase=phase)
    lengths = (torch.ones_like(ids) if mask is None else mask).sum(1)

    def steered(position, n_rows):
        behind = position >= lengths.repeat_interleave(n_rows // len(lengths))[:, None]
        return behind if phase == "answer" else ~behind

    by_position(hooked, circuit, -3.0, steered)
    if "cached" not in way:  # the prefix of the hooked model must be the plain one, too
        expected = generate(hooked, ids, mask, options)
    else:
        more = options(plain, ids)
        expected = generate(hooked, ids, mask, lambda m, ids: more)
    assert torch.equal(generate(attached, ids, mask, options), expected)
    if way != "one token" or phase == "answer":
        assert not torch.equal(generate(plain, ids, mask, options), expected), "steering must change the answers"
    assert engine._prompt.n_tokens is None


@pytest.mark.parametrize("way", WAYS)
def test_collect_counts_the_last_token_of_the_prompt(way):
    check_transformers(way)
    name, ids, mask, options = WAYS[way]
    model, rows = untied(name), len(ids)
    token_weight = torch.eye(rows)
    if "beams" in way:
        token_weight = token_weight.repeat_interleave(2 if "without" in way else 3, 0)
    engine = attach(model)
    with engine.collect(torch.eye(rows)) as expected:  # of the whole prompt at once: test_engine.py has it by hooks
        logits(model, ids, attention_mask=mask)
    with engine.collect(token_weight) as sums:
        generate(model, ids, mask, options)
    total = sums.total / (token_weight.shape[0] // rows)
    assert (total - expected.total).abs().max() <= 1e-5 * expected.total.abs().max()


@pytest.mark.parametrize("n_prompt", [1, 3])
def test_the_prompt_of_an_encoder_decoder_is_the_decoders(n_prompt):
    """The ids that generate gets are the encoder's; the decoder's prompt is its start token, or what is given."""
    pytest.importorskip("transformers.models.t5gemma")
    shape = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=97, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    part = transformers.T5GemmaModuleConfig
    decoder = part(**shape, is_decoder=True, cross_attention_hidden_size=32)
    torch.manual_seed(0)
    config = transformers.T5GemmaConfig(encoder=part(**shape), decoder=decoder, vocab_size=97)
    model = transformers.T5GemmaForConditionalGeneration(config).eval()
    engine, rows, acts = quietly(model), [], []
    decoder = model.get_decoder()
    note = decoder.layers[0].register_forward_pre_hook(lambda *_: rows.append(engine._now.state.tokens.tolist()))
    act = decoder.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: acts.append(args[0][:, -1]))
    more = GREEDY | dict(decoder_start_token_id=2, bos_token_id=2, max_new_tokens=4, min_new_tokens=4)
    if n_prompt > 1:
        more["decoder_input_ids"] = torch.tensor([[2, *range(5, 4 + n_prompt)]])
    engine.set([random_circuit(engine, 1)], [-3.0])
    for phase, expected in (("prompt", [0] * n_prompt + [-1] * 3), ("answer", [-1] * n_prompt + [0] * 3)):
        engine.rows(0, phase=phase)
        model.generate(ids_of(1, 6), **more)
        assert [row for call in rows for row in call] == expected
        rows.clear()
    acts.clear()
    with torch.no_grad(), engine.collect(torch.ones(1, 1)) as sums:
        model.generate(ids_of(1, 6), **more)
    note.remove()
    act.remove()
    assert torch.allclose(sums.total[0].float(), acts[0], atol=1e-5)


@pytest.mark.parametrize("phase", ["prompt", "answer"])
def test_a_generate_within_generate_has_a_prompt_of_its_own(phase):
    model, rows = untied(), []
    engine = attach(model)
    engine.set([random_circuit(engine, 1)], [-3.0])
    engine.rows(0, phase=phase)
    depth = [0]

    class Judge(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **_):
            depth[0] += 1
            if depth[0] == 1:
                model.generate(ids_of(1, 9, 3), **GREEDY)
            depth[0] -= 1
            return torch.zeros(ids.shape[0], dtype=torch.bool)

    model.model.layers[0].register_forward_pre_hook(
        lambda *_: rows.append((depth[0], engine._now.state.tokens.tolist()))
    )
    model.generate(ids_of(1, 6), stopping_criteria=[Judge()], **GREEDY)
    first, then = (0, -1) if phase == "prompt" else (-1, 0)
    inner = [found for level, found in rows if level == 1]
    outer = [found for level, found in rows if level == 0]
    assert outer == [[first] * 6, *[[then]] * 5]
    assert inner == [[first] * 9, *[[then]] * 5] * 6
    assert engine._prompt.n_tokens is None and engine._prompt.cache is None


@pytest.mark.parametrize("n_tokens", [None, 14, 4], ids=lambda n: f"negative prompt of {n}")
@pytest.mark.parametrize("phase", ["prompt", "answer"])
def test_guidance_has_a_prompt_of_its_own(phase, n_tokens):
    """Without a negative prompt guidance goes from the last token of the prompt on."""
    ids, more = ids_of(1, 9), dict(guidance_scale=1.5, output_scores=True, return_dict_in_generate=True)
    if n_tokens is not None:
        more["negative_prompt_ids"] = ids_of(1, n_tokens, 5)
    attached, hooked, plain = untied(), untied(), untied()
    engine = attach(attached)
    circuit = random_circuit(engine, 1, size=60)
    engine.set([circuit], [-3.0])
    engine.rows(0, phase=phase)
    caches, call = [], {}

    def note(_, args, kwargs):
        caches.append(kwargs["past_key_values"])
        call["prompt"] = 9 if caches[-1] is caches[0] else n_tokens or 1

    hooked.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    before = (lambda position: position < call["prompt"]) if phase == "prompt" else lambda p: p >= call["prompt"]
    by_position(hooked, circuit, -3.0, lambda position, _: before(position))
    scores = [torch.cat(generate(model, ids, None, lambda *_: more).scores) for model in (attached, hooked, plain)]
    assert (scores[0] - scores[1]).abs().max() <= 1e-5 * scores[1].abs().max()
    assert (scores[1] - scores[2]).abs().max() > 1e-2 * scores[1].abs().max()


def test_guidance_without_a_cache():
    model = untied()
    engine = attach(model)
    engine.set([random_circuit(engine, 1)], [-3.0])
    engine.rows(0, phase="answer")
    with pytest.raises(InputError, match="phase: without a cache, whose prompt a call has cannot be known"):
        generate(model, ids_of(1, 9), None, lambda *_: dict(guidance_scale=1.5, use_cache=False))
    guide = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor

    def called_by(processor):
        return lambda *_: dict(logits_processor=[processor], use_cache=False)

    for n_tokens in (2, 9, 10, 12):
        processor = guide(1.5, model, unconditional_ids=ids_of(1, n_tokens, 4), use_cache=False)
        for each in (processor, lambda ids, scores, processor=processor: processor(ids, scores)):
            with pytest.raises(InputError, match="phase: without a cache, whose prompt a call has cannot be known"):
                generate(model, ids_of(1, 9), None, called_by(each))


@pytest.mark.parametrize("n_tokens", [4, 9, 12])
def test_embeddings_beside_ids(n_tokens):
    """The model gets the embeddings; their number is the prompt's."""
    ids, models, answers = ids_of(1, 9), (untied(), untied(), untied()), []
    engine = attach(models[0])
    circuit = random_circuit(engine, 1, size=60)
    engine.set([circuit], [-3.0])
    engine.rows(0, phase="answer")
    by_position(models[1], circuit, -3.0, lambda position, _: position >= n_tokens)
    for model in models:
        with torch.no_grad():
            given = model.get_input_embeddings()(ids_of(1, n_tokens, 3))
            answers.append(model.generate(ids, inputs_embeds=given, attention_mask=torch.ones(1, n_tokens), **GREEDY))
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[1], answers[2])


@pytest.mark.parametrize("phase", ["prompt", "answer"])
def test_a_compiled_call_of_several_tokens_on_a_static_cache(phase):
    model, ids = untied(), ids_of(1, 4)
    engine, cache = attach(model), static_cache(model)
    engine.set([random_circuit(engine, 1)], [-3.0])
    engine.rows(0, phase=phase)
    run = torch.compile(model, backend="eager")
    empty = logits(run, ids, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(empty, logits(model, ids, past_key_values=static_cache(model), use_cache=True))
    with pytest.raises(InputError, match=r"phase: (compiled, )?4 tokens on a .*cache.* may be prompt or answer"):
        logits(run, ids, past_key_values=cache, use_cache=True)


# Calls outside generate: (the calls' tokens, with a cache, what is said)
LOOPS = {
    "a prompt, then its answer": ([7, 1, 1], True, None),
    "a prompt of one token": ([1, 1, 1], True, None),
    "several tokens on a full cache": ([4, 3], True, "phase: 3 tokens on a cache of 4 may be prompt or answer"),
    "no cache": ([4], False, "phase: a call without a cache does not say where its prompt ends"),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_calls_outside_generate(loop):
    pieces, cached, refusal = LOOPS[loop]
    model, ids = untied(), ids_of(2, sum(pieces))
    engine = attach(model)
    engine.set([random_circuit(engine, 1)], [-3.0])
    everywhere = {}
    for rows in (dict(row_circuit=-1), dict(row_circuit=0, phase="prompt"), dict(row_circuit=0, phase="answer")):
        engine.rows(**rows)
        cache, found, start = transformers.DynamicCache(config=model.config), [], 0
        try:
            for n in pieces:
                more = dict(past_key_values=cache) if cached else dict(use_cache=False)
                found.append(logits(model, ids[:, start : start + n], **more))
                start += n
        except InputError as error:
            assert refusal is not None and refusal in str(error) and "start" in str(error)
            assert "phase" in rows
            continue
        assert refusal is None or "phase" not in rows
        everywhere[rows.get("phase")] = torch.cat(found, 1)
    if refusal is None:
        first, answer = pieces[0], everywhere["answer"]
        assert torch.equal(answer[:, :first], everywhere[None][:, :first])
        assert (answer - everywhere[None])[:, first:].abs().max() > 0.1
        assert (everywhere["prompt"] - everywhere[None])[:, :first].abs().max() > 0.1


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompts_of_peft(kind):
    """Tokens that an adapter puts before the prompt: the answer begins where generate's does."""
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    torch.manual_seed(0)
    model, ids = peft.get_peft_model(untied(), config).eval(), ids_of(2, 9)
    engine, ends = quietly(model), []
    decoder = model.get_base_model().model
    before = decoder.layers[0].register_forward_pre_hook(lambda *_: ends.append(engine._prompt.end))
    engine.rows(-1, phase="answer")
    with torch.no_grad():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
    before.remove()
    assert set(ends) == {13}


def test_generate_is_put_back():
    model, ids = untied(), ids_of(1, 5)
    plain, signature = GREEDY | dict(inputs=ids), inspect.signature(model.generate)
    expected = model.generate(**plain)
    engine = attach(model)
    assert inspect.signature(model.generate) == signature
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert torch.equal(other.generate(**plain), expected)
    engine.detach()
    assert "generate" not in model.__dict__ and not [name for name in model.__dict__ if name.startswith("_cna")]
    own = model.generate
    model.generate = lambda *args, **kwargs: own(*args, **kwargs)
    mine = model.generate
    engine = attach(model)
    assert torch.equal(model.generate(**plain), expected)
    engine.detach()
    assert model.generate is mine


def test_an_answer_that_failed_leaves_nothing_behind():
    model, ids = untied(), ids_of(1, 5)
    engine = attach(model)
    with pytest.raises(ValueError, match="max_length"):
        model.generate(ids, max_length=2, do_sample=False, pad_token_id=0)
    assert engine._prompt.n_tokens is None and engine._prompt.end is None
