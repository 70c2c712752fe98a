"""Phases in transformers' continuous batching, against requests that run alone."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attach_cases import ids_of, make, random_circuit, transformers
from cna_kernels import InputError, attach
from cna_kernels.engine.batching import Batching


def untied():
    """A random model with tied embeddings repeats its last token."""
    return make("llama", tie_word_embeddings=False)


def batch(model, prompts, options, **sizes):
    """The answers to prompts in continuous batching. Left to itself, its cache takes most of the machine's memory."""
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("this transformers cannot be given the size of a batch")
    bounds = dict(num_blocks=16, max_batch_tokens=256)  # where one is not given, memory decides
    sizes = transformers.ContinuousBatchingConfig(**bounds | sizes)
    found = model.generate_batch(prompts, options, continuous_batching_config=sizes, progress_bar=False)
    return list(found.values())


def test_continuous_batching_of_transformers():
    """Requests of several lengths in one row: pieces of prompts, and one token of each answer."""
    options = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=96, pad_token_id=0)
    prompts = [ids_of(1, n, seed)[0].tolist() for seed, n in enumerate((5, 9, 2))]
    for phase in ("answer", "prompt"):
        packed, alone, plain = untied(), untied(), untied()
        for model in (packed, alone):
            engine = attach(model)
            engine.set([random_circuit(engine, 1, size=60)], [-3.0])
            engine.rows(0, phase=phase)
        expected, unsteered = [], []
        for model, answers in ((alone, expected), (plain, unsteered)):
            for prompt in map(torch.tensor, prompts):
                ids = prompt[None]
                answer = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)
                answers.append(answer[0, len(prompt) :].tolist())
        got = batch(packed, prompts, options)
        assert [found.generated_tokens for found in got] == expected != unsteered


# (tokens of the prompts, tokens in a batch, whether the length of a piece hides its phase)
CUT = {
    "the last token of a prompt stands alone": ((9,), 8, True),
    "two tokens stand alone": ((10,), 8, False),
    "a short prompt goes first": ((3, 6), 8, True),
}


@pytest.mark.parametrize("cut", CUT)
@pytest.mark.parametrize("phase", ["answer", "both"])
def test_a_prompt_that_continuous_batching_cuts(cut, phase):
    lengths, n_tokens, refused = CUT[cut]
    model = untied()
    engine = attach(model)
    engine.set([random_circuit(engine, 1, size=60)], [-3.0])
    engine.rows(0, phase=phase)
    options = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=96, pad_token_id=0)
    prompts = [ids_of(1, n, seed)[0].tolist() for seed, n in enumerate(lengths)]
    found = batch(model, prompts, options, max_batch_tokens=n_tokens)
    errors = [answer.error for answer in found if answer.error]
    if refused and phase != "both":
        assert errors and "the last token of a prompt that was cut cannot be told apart; give `start`" in errors[0]
    else:
        assert not errors and [len(answer.generated_tokens) for answer in found] == [3] * len(prompts)


@pytest.mark.parametrize("lengths", [(9,), (5, 9)])
def test_last_tokens_in_continuous_batching(lengths):
    """A row holds pieces of several prompts: the last token of the row is none of a prompt, or of one only."""
    model = untied()
    engine = attach(model)
    options = transformers.GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=96, pad_token_id=0)
    prompts, found = [ids_of(1, n)[0].tolist() for n in lengths], []
    with pytest.raises(InputError, match="collect: no forward pass ran"), engine.collect(torch.ones(1, 1)):
        found += batch(model, prompts, options, max_batch_tokens=8)
    assert "a row of several prompts has several last tokens; give [B, S, C]" in found[0].error


def test_pieces_whose_length_does_not_say_their_phase():
    batching = Batching(lambda: True)
    # tokens to read, of these of the prompt where an answer was evicted; position and length of the piece; what is said
    for prompt, true, start, n_tokens, said in (
        (9, 0, 0, 9, None),
        (9, 0, 4, 5, None),
        (9, 0, 8, 1, "the last token of a prompt that was cut"),
        (9, 0, 9, 1, None),
        (1, 0, 0, 1, None),
        (12, 9, 0, 12, "an answer that is read again"),
        (12, 9, 0, 9, None),
        (12, 9, 9, 3, "an answer that is read again"),
        (12, 9, 8, 1, "the last token of a prompt that was cut"),
        (12, 9, 11, 1, None),
    ):
        state = SimpleNamespace(
            request_id="a", initial_tokens=[0] * prompt, _true_initial_tokens=true, position_offset=start
        )
        piece = SimpleNamespace(state=state, query_length=n_tokens)
        if said is None:
            batching.check(piece)
        else:
            with pytest.raises(InputError, match=f"phase: request a: {said}"):
                batching.check(piece)


def test_continuous_batching_that_began_before_attach():
    with pytest.raises(InputError, match="phase: continuous batching began before attach"):
        Batching(lambda: True).of_pieces(nn.Module(), torch.tensor([0, 3]), torch.arange(3)[None])
