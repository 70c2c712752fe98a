"""Requests in transformers' continuous batching, against requests that run alone in models with scaled weights."""

import functools
import gc
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from attach_cases import ids_of, make, random_circuit, transformers, with_scaled_columns
from cna_kernels import InputError, attach
from cna_kernels.engine import managers
from cna_kernels.engine.batching import TOKENS

if not hasattr(transformers, "ContinuousBatchingConfig"):
    pytest.skip("this transformers cannot be given the size of a batch", allow_module_level=True)

SIZES = transformers.ContinuousBatchingConfig.__dataclass_fields__
FOREVER = 2**31 - 1
MULTIPLIERS = (-3.0, 0.0)
HEADER = ids_of(1, 12, seed=50)[0].tolist()


def untied(seed=3):
    """A random model with tied embeddings repeats its last token."""
    return make("llama", tie_word_embeddings=False, seed=seed)


def options(n_tokens=6, n_answers=1):
    """Greedy, also where several answers must be sampled."""
    sampled = dict(do_sample=True, top_k=1, num_return_sequences=n_answers) if n_answers > 1 else dict(do_sample=False)
    return transformers.GenerationConfig(max_new_tokens=n_tokens, eos_token_id=96, pad_token_id=0, **sampled)


def sizes(**changes):
    """Left to itself, a cache takes most of the machine's memory. Pages of 4 tokens have beginnings to share."""
    page = "page_size" if "page_size" in SIZES else "block_size"
    given = {"num_blocks": 64, page: 4, "max_batch_tokens": 128, "return_logprobs": True} | changes
    return transformers.ContinuousBatchingConfig(**given)


def prompts_of(*lengths):
    return [ids_of(1, n, seed)[0].tolist() for seed, n in enumerate(lengths)]


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def attached(request):
    """A plain model, an attached one with two circuits, and the engine."""
    plain, model = untied(), untied().to(request.param)
    engine = attach(model)
    circuits = [random_circuit(engine, seed, size=60) for seed in (1, 2)]
    engine.set(circuits, MULTIPLIERS)
    return SimpleNamespace(plain=plain, model=model, engine=engine, circuits=circuits)


@torch.no_grad()
def alone(attached, prompt, circuit, multiplier=None, phase="both", start=0, stop=FOREVER, n_tokens=6):
    """The answer to one prompt and its log-probabilities. Plain and scaled models take turns on one cache."""
    if circuit != -1:
        multiplier = MULTIPLIERS[circuit] if multiplier is None else multiplier
        scaled = with_scaled_columns(attached.plain, attached.circuits[circuit], multiplier, lambda model: model)
    else:
        scaled = attached.plain
    start = max(start, len(prompt)) if phase == "answer" else start
    stop = min(stop, len(prompt)) if phase == "prompt" else stop
    cache, tokens, logprobs = transformers.DynamicCache(), list(prompt), []
    while len(logprobs) < n_tokens and tokens[-1] != 96:
        while (seen := cache.get_seq_length()) < len(tokens):
            steered = start <= seen < stop
            upto = min(edge for edge in (start, stop, len(tokens)) if edge > seen)
            model = scaled if steered else attached.plain
            scores = model(torch.tensor([tokens[seen:upto]]), past_key_values=cache).logits[0, -1]
        best = scores.log_softmax(-1).max(-1)
        tokens.append(int(best.indices))
        logprobs.append(float(best.values))
    return tokens[len(prompt) :], torch.tensor(logprobs)


def assert_alone(attached, found, prompts, ways, differ=True, n_tokens=6):
    """Each request gives what it gives alone, and what is steered gives something else than the plain model."""
    assert [one.error for one in found] == [None] * len(prompts)
    for one, prompt, way in zip(found, prompts, ways, strict=True):
        tokens, logprobs = alone(attached, prompt, n_tokens=n_tokens, **way)
        assert one.generated_tokens == tokens, way
        torch.testing.assert_close(torch.tensor(one.logprobs), logprobs, atol=1e-4, rtol=0)
        if way["circuit"] != -1 and differ:
            plain, of_plain = alone(attached, prompt, -1, n_tokens=n_tokens)
            assert plain != tokens or (of_plain - logprobs).abs().max() > 1e-2, way


@contextmanager
def running(model, generation=None, **changes):
    manager = model.init_continuous_batching(generation or options(), sizes(**changes))
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True)


def results_of(manager, *request_ids):
    found = {}
    stop = time.monotonic() + 60
    while not set(request_ids) <= set(found) and time.monotonic() < stop:
        one = manager.get_result(timeout=0.1)
        if one is not None and one.is_finished():
            found[one.request_id] = one
    return [found[request_id] for request_id in request_ids]


def wait_until(so):
    stop = time.monotonic() + 30
    while not so() and time.monotonic() < stop:
        time.sleep(0.01)
    assert so()


@contextmanager
def counted(monkeypatch, owner, name):
    """What calls of a method returned, in the ``with``."""
    own, returned = getattr(owner, name), []

    @functools.wraps(own)
    def method(*args, **kwargs):
        returned.append(own(*args, **kwargs))
        return returned[-1]

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, method)
        yield returned


# What each request is steered by, and how small the batch or the cache is.
REQUESTS = {
    "circuits": ([dict(circuit=c) for c in (0, -1, 1, 0, 1)], dict()),
    "phases": ([dict(circuit=0, phase=p) for p in ("prompt", "answer", "both")] + [dict(circuit=-1)], dict()),
    "positions": ([dict(circuit=0, start=2, stop=7), dict(circuit=1, start=6), dict(circuit=1, stop=3)], dict()),
    "chunks": ([dict(circuit=0, phase="answer"), dict(circuit=1, phase="prompt"), dict(circuit=0)], dict(T=8)),
    "last token alone": ([dict(circuit=0, phase="answer"), dict(circuit=0, phase="prompt")], dict(T=8)),
    "read again": ([dict(circuit=c, phase=p) for c in (0, 1) for p in ("answer", "prompt", "both")], dict(blocks=12)),
    "positions read again": ([dict(circuit=c, start=4, stop=11) for c in (0, 1, 0, 1)], dict(blocks=12)),
    "no sharing": ([dict(circuit=c) for c in (0, 1, -1)], dict(shared=False)),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_requests_by_name(attached, case, monkeypatch):
    """Everything that a request can be given, for each of several in one batch."""
    from transformers.generation.continuous_batching.requests import RequestState

    ways, how = REQUESTS[case]
    prompts = prompts_of(9, 5, 11, 6, 8, 10)[: len(ways)]
    limits = dict(max_batch_tokens=how.get("T", 128), num_blocks=how.get("blocks", 64))
    with (
        counted(monkeypatch, RequestState, "create_equivalent_initial_request") as again,
        running(attached.model, allow_block_sharing=how.get("shared", True), **limits) as manager,
    ):
        for number, way in enumerate(ways):
            given = {name: value for name, value in way.items() if name != "circuit"}
            attached.engine.requests({f"r{number}": way["circuit"]}, **given)
        for number, prompt in enumerate(prompts):
            manager.add_request(prompt, request_id=f"r{number}")
        found = results_of(manager, *(f"r{number}" for number in range(len(ways))))
        assert bool(again) == ("blocks" in how)
        assert_alone(attached, found, prompts, ways)


@pytest.mark.parametrize("phase", ["both", "prompt", "answer"])
@pytest.mark.parametrize("rows", [0, [0, -1, 1, 1]], ids=["all", "each"])
def test_rows_go_by_inputs(attached, rows, phase):
    """Inputs are sorted before they are added; rows are in the order in which they were given."""
    prompts = prompts_of(5, 9, 1, 7)
    attached.engine.rows(rows, phase=phase)
    found = attached.model.generate_batch(prompts, options(), continuous_batching_config=sizes())
    circuits = rows if isinstance(rows, list) else [rows] * 4
    assert_alone(attached, list(found.values()), prompts, [dict(circuit=c, phase=phase) for c in circuits])


def test_requests_that_begin_alike_share_what_was_steered_alike(attached, monkeypatch):
    """Prompts with the same beginning, one after the other on a cache that keeps it."""
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    prompts = [[*HEADER, *tail] for tail in prompts_of(3, 4, 2, 3, 4, 2, 5, 3, 3, 3)]
    ways = [dict(circuit=c) for c in (0, -1, 1, 0, -1, 1)]
    ways += [dict(circuit=0, phase="answer"), dict(circuit=0, start=8), dict(circuit=0, start=10), dict(circuit=1)]
    # of the 12 tokens that are alike, those that are found: pages of 4 that were steered alike, up to the first other
    expected = [0, 0, 0, 12, 12, 12, 12, 8, 8, 0]
    with (
        counted(monkeypatch, PagedAttentionCache, "search_prefix_match") as found,
        running(attached.model) as manager,
    ):
        for number, (prompt, way) in enumerate(zip(prompts, ways, strict=True)):
            if number == len(ways) - 1:
                attached.engine.table.set_multiplier(1, 0.5)
                way["multiplier"] = 0.5
            given = {name: value for name, value in way.items() if name not in ("circuit", "multiplier")}
            attached.engine.requests({f"r{number}": way["circuit"]}, **given)
            manager.add_request(prompt, request_id=f"r{number}")
            assert_alone(attached, results_of(manager, f"r{number}"), [prompt], [way], differ=number < 9)
    assert found == expected


def test_a_kept_cache_follows_multipliers(attached):
    """A manager that is kept keeps its cache, too, from one multiplier to the next and to none."""
    prompts = [[*HEADER, *tail] for tail in prompts_of(3, 4)]
    for circuit, multiplier in ((0, -3.0), (0, 2.0), (-1, None), (0, -3.0)):
        attached.engine.rows(circuit)
        if multiplier is not None:
            attached.engine.table.set_multiplier(0, multiplier)
        found = attached.model.generate_batch(
            prompts, options(), continuous_batching_config=sizes(), persistent_manager=True
        )
        ways = [dict(circuit=circuit, multiplier=multiplier)] * 2
        assert_alone(attached, list(found.values()), prompts, ways)
    attached.model.destroy_cached_continuous_batching_manager()


@pytest.mark.skipif("page_size" not in SIZES, reason="this transformers returns one of several answers")
@pytest.mark.parametrize("blocks", [64, 8])
def test_several_answers_have_the_circuit_of_their_request(attached, blocks, monkeypatch):
    """Answers are copies of their request, or begin anew where the cache has no room for a copy."""
    from transformers.generation.continuous_batching.requests import RequestState

    prompts = prompts_of(9, 6)
    attached.engine.rows([1, 0], phase="answer")
    with counted(monkeypatch, RequestState, "create_equivalent_initial_request") as again:
        found = attached.model.generate_batch(
            prompts, options(n_answers=3), continuous_batching_config=sizes(num_blocks=blocks)
        )
    assert bool(again) == (blocks == 8) and len(found) == 6
    for number, one in enumerate(found.values()):
        prompt, circuit = prompts[number // 3], 1 - number // 3
        assert one.generated_tokens == alone(attached, prompt, circuit, phase="answer")[0]
        assert one.generated_tokens != alone(attached, prompt, -1)[0]


def test_requests_come_and_go_while_others_run(attached):
    """One is added, one is cancelled, and none of it is remembered."""
    engine, prompts = attached.engine, prompts_of(9, 5, 7, 6)
    with running(attached.model, options(40)) as manager:
        engine.requests({"long": 0, "cancelled": 1, "late": 1})
        manager.add_request(prompts[0], request_id="long")
        manager.add_request(prompts[1], request_id="cancelled")
        wait_until(lambda: getattr(manager, "current_batch", 0) > 3)
        manager.cancel_request("cancelled")
        manager.add_request(prompts[2], request_id="late", max_new_tokens=6)
        manager.add_request(prompts[3], request_id="unnamed", max_new_tokens=6)
        found = results_of(manager, "late", "unnamed")
        assert_alone(attached, found, prompts[2:], [dict(circuit=1), dict(circuit=-1)])
        found = results_of(manager, "long")
        assert_alone(attached, found, prompts[:1], [dict(circuit=0)], n_tokens=40)

        wait_until(lambda: not engine._rows.requests_steer)
        assert not engine._batching.named
        manager.add_request(prompts[0], request_id="long", max_new_tokens=6)  # the same name, and nothing said of it
        assert_alone(attached, results_of(manager, "long"), prompts[:1], [dict(circuit=-1)])


def test_numbers_of_requests_in_flight_are_kept(attached):
    engine = attached.engine
    engine.table.max_circuits = 3  # one number is free
    with running(attached.model, options(60)) as manager:
        engine.requests({"a": 1})
        manager.add_request(prompts_of(9)[0], request_id="a")
        wait_until(lambda: getattr(manager, "current_batch", 0) > 3)
        engine.table.remove(1)
        assert engine.table.add(attached.circuits[1], 0.0) == 2
        engine.table.remove(2)
        engine.table.remove(0)
        assert [engine.table.add(attached.circuits[1], 0.0) for _ in range(2)] == [2, 0]
        results_of(manager, "a")
        wait_until(lambda: not engine._rows.requests_steer)
        gc.collect()
        assert engine.table.add(attached.circuits[1], 0.0) == 1


def test_a_multiplier_and_a_circuit_that_change_between_two_steps(attached):
    """Tokens from then on have the new one, and no block of the mixture serves another request."""
    engine, prompt = attached.engine, prompts_of(2)[0]  # so that a page of 4 tokens has something of both
    changed = {}

    def change(manager, at, what):
        """Change something before the launch of a step."""
        processor = manager._create_batch_processor()
        own = processor.prepare_next_batch

        def prepare():
            more = own()
            position = max([start for _, start, _ in watched.pieces], default=0)
            if position == at and at not in changed:
                changed[at] = what()
            return more

        watched = next(one for one in engine._batching._watched if one.manager() is manager)
        processor.prepare_next_batch = prepare
        manager.batch_processor = processor

    for at, what, before, after in (
        (3, lambda: engine.table.set_multiplier(0, 2.0), (0, -3.0), (0, 2.0)),
        (2, lambda: engine.requests({"a": 1}, phase="answer"), (0, -3.0), (1, 0.0)),
    ):
        engine.table.set_multiplier(0, -3.0)
        manager = attached.model.init_continuous_batching(options(12), sizes())
        change(manager, at, what)
        manager.start()
        engine.requests({"a": 0})
        manager.add_request(prompt, request_id="a")
        (one,) = results_of(manager, "a")
        models = [
            with_scaled_columns(attached.plain, attached.circuits[circuit], multiplier, lambda model: model)
            for circuit, multiplier in (before, after)
        ]
        cache, tokens = transformers.DynamicCache(), list(prompt)
        with torch.no_grad():
            while len(tokens) < len(prompt) + 12:
                model = models[cache.get_seq_length() >= at]
                ids = torch.tensor([tokens[cache.get_seq_length() :]])
                tokens.append(int(model(ids, past_key_values=cache).logits[0, -1].argmax()))
        assert one.generated_tokens == tokens[len(prompt) :] and at in changed
        assert one.generated_tokens != alone(attached, prompt, 0, before[1], n_tokens=12)[0]

        again = tokens[:12]  # its blocks were marked
        for circuit, multiplier in (after, before):
            engine.table.set_multiplier(circuit, multiplier)
            engine.requests({"b": circuit})
            manager.add_request(again, request_id="b", max_new_tokens=6)
            way = dict(circuit=circuit, multiplier=multiplier)
            assert_alone(attached, results_of(manager, "b"), [again], [way])
        manager.stop(block=True)


@pytest.mark.exhaustive
def test_a_compiled_decoder_follows_requests(attached):
    """The batch is padded then; what steers it is read from the same buffer."""
    prompts = prompts_of(9, 5)
    attached.model.model.compile(backend="eager", dynamic=False)
    for rows in ([0, -1], [1, 0]):
        attached.engine.rows(rows)
        found = attached.model.generate_batch(prompts, options(3), continuous_batching_config=sizes())
        assert_alone(attached, list(found.values()), prompts, [dict(circuit=c) for c in rows], n_tokens=3)


# What is refused: what is said, and what is done.
REFUSED = {
    "rows: expected 3, one for each request of continuous batching, got 2": lambda at: (
        at.engine.rows([0, 1]),
        at.model.generate_batch(prompts_of(3, 4, 5), options(), continuous_batching_config=sizes()),
    ),
    r"rows: expected 1, one for each request of continuous batching, got \[1, 4\]": lambda at: (
        at.engine.rows([[0, 0, 0, -1]]),
        at.model.generate_batch(prompts_of(4), options(), continuous_batching_config=sizes()),
    ),
    "rows: given one by one, and request x has none of them; name it with Engine.requests": lambda at: (
        at.engine.rows([0, 1]),
        at.model.init_continuous_batching(options(), sizes()).add_request([3, 4], request_id="x"),
    ),
    "row_circuit: request a: expected -1 or one of 0, 1, got 7": lambda at: at.engine.requests({"a": 7}),
    "row_circuit: expected a circuit's number by request id, got list": lambda at: at.engine.requests([0]),
    "row_circuit: every answer to a request has the request's circuit": lambda at: at.engine.requests(
        {"a__child#0": 0}
    ),
    "phase: expected one of both, prompt, answer, got 'all'": lambda at: at.engine.requests({"a": 0}, phase="all"),
    "start: expected positions from 0 on, got -1": lambda at: at.engine.requests({"a": 0}, start=-1),
    "stop: expected one position, or one for each of the requests": lambda at: at.engine.requests(
        {"a": 0}, stop={"b": 3}
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_refused(attached, said):
    with pytest.raises(InputError, match=said):
        REFUSED[said](attached)


def test_rows_given_one_by_one_while_others_run(attached):
    """Which row the running requests have cannot be known."""
    with running(attached.model, options(60)) as manager:
        manager.add_request(prompts_of(9)[0], request_id="a")
        wait_until(lambda: getattr(manager, "current_batch", 0) > 3)
        attached.engine.rows([0, 1])
        (one,) = results_of(manager, "a")
    assert "rows: given one by one, and request a has none of them" in one.error


def test_continuous_batching_that_began_before_attach():
    model = untied()
    manager = model.init_continuous_batching(options(), sizes())
    engine = attach(model)
    engine.set([random_circuit(engine, 1, size=60)], [-3.0])
    engine.rows(0)
    manager.start()
    manager.add_request([5, 6, 7], request_id="a")
    (one,) = results_of(manager, "a")
    manager.stop(block=True)
    assert "rows: continuous batching began before attach, or is of another kind; make it anew" in one.error

    model = untied()
    model.generate_batch([[5, 6, 7]], options(), continuous_batching_config=sizes(), persistent_manager=True)
    engine = attach(model)
    with pytest.raises(InputError, match="init_continuous_batching: this manager began before attach"):
        model.generate_batch([[5, 6, 7]], options(), continuous_batching_config=sizes())
    model.destroy_cached_continuous_batching_manager()


def test_detach(attached):
    """A running manager is in the way; one that was kept begins anew, as the plain model's."""
    model, engine, prompt = attached.model, attached.engine, prompts_of(9)
    with (
        running(model, options(60)) as manager,
        pytest.raises(InputError, match="detach: continuous batching is running; stop its manager first"),
    ):
        wait_until(lambda: manager.batch_processor is not None)
        engine.detach()
    engine.rows(0)
    model.generate_batch(prompt, options(), continuous_batching_config=sizes(), persistent_manager=True)
    manager = model._cached_continuous_batching_manager
    cache = manager.batch_processor.cache
    assert hasattr(cache, TOKENS)
    engine.detach()
    assert not hasattr(cache, TOKENS) and "add_request" not in vars(manager)
    found = model.generate_batch(prompt, options(), continuous_batching_config=sizes())
    assert_alone(attached, list(found.values()), prompt, [dict(circuit=-1)])
    model.destroy_cached_continuous_batching_manager()


@pytest.mark.parametrize("kind, name", [("PagedAttentionCache", "search_prefix_match"), ("RequestState", None)])
def test_a_transformers_that_is_built_otherwise(attached, kind, name, monkeypatch):
    from transformers.generation.continuous_batching import continuous_api

    if name is None:
        monkeypatch.setattr(managers, "FIELDS", (*managers.FIELDS, "renamed"))
    else:
        monkeypatch.delattr(getattr(continuous_api, kind), name)
    with pytest.raises(InputError, match=f"has no {kind}.{name or 'renamed'}, by which requests are told apart"):
        attached.model.init_continuous_batching(options(), sizes())


@pytest.mark.parametrize("lengths", [(9,), (5, 9)])
def test_last_tokens_in_continuous_batching(lengths):
    """A row holds pieces of several prompts: the last token of the row is none of a prompt, or of one only."""
    model = untied()
    engine = attach(model)
    prompts, found = prompts_of(*lengths), {}
    with pytest.raises(InputError, match="collect: no forward pass ran"), engine.collect(torch.ones(1, 1)):
        found = model.generate_batch(prompts, options(1), continuous_batching_config=sizes(max_batch_tokens=8))
    assert "a row of several prompts has several last tokens; give [B, S, C]" in next(iter(found.values())).error
