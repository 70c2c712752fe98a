"""Answers of every variant to every prompt. Variants share batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from cna_kernels.errors import InputError

from ..discovery.packing import TokenPrompt
from ..generate import generate
from ..language_model import LanguageModel
from ..memory import in_halves, memory_of
from .interventions import Interventions
from .metrics import THOUGHT_TAGS, begun_thought
from .store import Store

MOST_ROWS = {"cpu": 256, "cuda": 1024}  # most answers decoded together, by device
_TAIL = 16  # tokens at a prompt's end that may begin a thought
MEMORY_SHARE = 4  # keys and values may take a quarter of the memory


@dataclass(frozen=True)
class Answer:
    """What a variant answered to a prompt.

    Attributes:
        variant, prompt: their numbers.
        tokens: the ids of the answer, without the stop token.
    """

    variant: int
    prompt: int
    text: str
    tokens: tuple[int, ...]


def auto_batch(model: LanguageModel, longest_prompt: int, max_new_tokens: int) -> int:
    """How many answers to decode together: as many as a quarter of the memory holds keys and values for."""
    length = min(longest_prompt + max_new_tokens, model.config.context_length)
    most = MOST_ROWS.get(model.device.type, MOST_ROWS["cpu"])
    available = memory_of(model.device)
    if available is None:
        return most
    return max(min(most, available // MEMORY_SHARE // model.transformer.cache_bytes(1, length)), 1)


def answer_all(
    model: LanguageModel,
    interventions: Interventions,
    variants: Sequence[int],
    prompts: Sequence[TokenPrompt],
    *,
    max_new_tokens: int,
    batch: int | None,
    store: Store,
    name: str,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[int, list[Answer]]:
    """Return the greedy answers of each variant to all prompts, in the order of the prompts.

    Args:
        variants: numbers of variants in ``interventions``.
        batch: answers decoded together, which are one part in the store. None takes :func:`auto_batch`, and keeps its
            number in the store.
        name: begins the names of the parts in the store.
        progress: called with (answers written, answers to write in all).
    """
    if batch is None:  # the number is kept in the store: a resumed run must cut the same parts, whatever memory is free
        longest = max((len(prompt.ids) for prompt in prompts), default=1)
        batch = store.get(f"{name}-batch", lambda: auto_batch(model, longest, max_new_tokens))
    # Prompts of about one length share a chunk, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda number: (len(prompts[number].ids), number))
    work = [(variant, number) for number in order for variant in variants]
    found: dict[int, list[Answer]] = {variant: [] for variant in variants}

    # A template may begin a thought for the model; then the text of the answer begins with what begins the thought.
    decode = partial(model.tokenizer.decode, keep=THOUGHT_TAGS)  # in some tokenizers these are special tokens
    thoughts = [begun_thought(decode(prompt.ids[-_TAIL:])) for prompt in prompts]

    def write(chunk):
        return _write(model, interventions, chunk, prompts, max_new_tokens)

    for start in range(0, len(work), batch):
        chunk = work[start : start + batch]
        lines = store.get(
            f"{name}-by-{batch}-{start // batch:05d}",
            partial(in_halves, write, chunk, model.device),
        )
        for (variant, number), tokens in zip(chunk, lines, strict=True):
            text = thoughts[number] + decode(tokens)
            found[variant].append(Answer(variant, number, text, tuple(tokens)))
        progress(min(start + batch, len(work)), len(work))
    return {variant: sorted(answers, key=lambda answer: answer.prompt) for variant, answers in found.items()}


def _write(model, interventions, chunk, prompts, max_new_tokens) -> list[list[int]]:
    """The tokens of the answers to a chunk of (variant, prompt), in one batch."""
    members = [prompts[number] for _, number in chunk]
    try:
        return generate(
            model.transformer,
            members,
            max_new_tokens=max_new_tokens,
            stop_ids=model.stop_ids,
            steer=interventions.steer([variant for variant, _ in chunk]),
        )
    except InputError as error:
        if error.where not in {prompt.place for prompt in members}:
            raise
        which = [interventions.variants[s].name for s, n in chunk if prompts[n].place == error.where]
        raise InputError(error.where, f"{error.what} (one of: {'; '.join(which)})") from None
