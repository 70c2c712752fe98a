"""Behaviours against circuits: what each circuit does to every behaviour, and what it costs besides.

A circuit is specific where it changes its own behaviour, other circuits of as many neurons do not, and it leaves other
behaviours alone. A cell is one behaviour under one variant: a circuit at a multiplier, random neurons of the same
layers, or nothing. It has the share of prompts that show the behaviour with its 95% interval, a paired test against the
unsteered model on the same prompts, and, where prompts are answered, how many answers are answers at all. A variant
has its KL to the unsteered model on neutral text, and how many harmless prompts it answers.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError

from ..language_model import LanguageModel
from ..prompts.files import PromptSet
from .answers import Answer, answer_all
from .behaviour import Behaviour
from .interventions import UNSTEERED, Interventions, Method, Variant
from .likelihood import divergences, each_logits
from .metrics import KINDS, Refusals, kind_of, mcnemar, mean, share
from .store import Store

Say = Callable[[str], None]


def matrix(
    model: LanguageModel,
    behaviours: Sequence[Behaviour],
    circuits: Mapping[str, Circuit],
    *,
    multipliers: Sequence[float] | Mapping[str, Sequence[float]] = (0.0, 2.0),
    random_draws: int | Mapping[str, int] = 2,
    neutral: PromptSet | None = None,
    harmless: PromptSet | None = None,
    max_new_tokens: int = 60,
    batch: int | None = None,
    store: Store | None = None,
    say: Say = lambda text: None,
) -> dict:
    """Measure every behaviour under every circuit. Returns JSON values.

    Args:
        circuits: name -> circuit. One with the name of a behaviour is taken to be its own.
        multipliers: of every circuit, or of each by its name; 1 is left out, as the unsteered model has it.
        random_draws: likewise, how many random controls a circuit has, each at all of its multipliers.
        neutral: texts for the KL of the next token. harmless: prompts that any steered model should still answer.

    Returns:
        ``variants``: one record each, the unsteered model first, with ``k`` neurons, of an aligned circuit how many
        are ``mirrored``, ``kl`` and ``answered``; ``cells``: behaviour ->
        one record for each variant, with the ``hits`` on each prompt; ``overlap``: shared and own neurons of each pair
        of circuits.
    """
    names = [behaviour.name for behaviour in behaviours]
    if len(set(names)) != len(names):
        raise InputError("behaviours", f"two have one name: {', '.join(names)}")
    store = store or Store(None, {})
    variants = [UNSTEERED]
    records: list[dict] = [{"circuit": None, "multiplier": 1.0, "random": None, "k": 0, "mirrored": None}]
    for name, circuit in circuits.items():
        asked = multipliers[name] if isinstance(multipliers, Mapping) else multipliers
        steps = [multiplier for multiplier in asked if multiplier != 1]  # at 1 the circuit changes nothing
        size = {"k": circuit.k, "mirrored": None if circuit.mirrored is None else len(circuit.mirrored)}
        for multiplier in steps:
            variants.append(Variant(Method(name, f"{circuit.k} neurons", circuit), multiplier))
            records.append({"circuit": name, "multiplier": multiplier, "random": None, **size})
        for draw in range(random_draws[name] if isinstance(random_draws, Mapping) else random_draws):
            control = Method(f"random like {name}, {draw}", f"{circuit.k} neurons", circuit.random_like(draw))
            for multiplier in steps:
                variants.append(Variant(control, multiplier))
                records.append({"circuit": name, "multiplier": multiplier, "random": draw, **size})
    interventions = Interventions(model, variants)
    numbers = range(len(variants))
    refuses = Refusals.bundled("broad")

    def answers_to(prompts: PromptSet, chat: bool | None, name: str) -> dict[int, list[Answer]]:
        return answer_all(
            model, interventions, numbers, model.encode(prompts, chat=chat), max_new_tokens=max_new_tokens,
            batch=batch, store=store, name=name, progress=lambda n, of: say(f"{name}: {n} of {of} answers"),
        )  # fmt: skip

    def kinds_of(answers: Sequence[Answer]) -> dict[str, int]:
        counts = Counter(kind_of(answer.text, answer.tokens, refuses) for answer in answers)
        return {kind: counts[kind] for kind in KINDS}

    cells: dict[str, list[dict]] = {}
    samples: dict[str, list[list[str]]] = {}
    for behaviour in behaviours:
        kinds: list[dict | None] = [None] * len(variants)
        if behaviour.measure.from_logits:
            say(f"{behaviour.name}: {len(behaviour.measured)} prompts")
            hits = store.get(f"{behaviour.name}-hits", partial(_next_tokens, model, interventions, behaviour))
        else:
            found = answers_to(behaviour.prompts, behaviour.chat, behaviour.name)
            texts = [[answer.text for answer in found[number]] for number in numbers]
            hits = [behaviour.measure.of_texts(row, behaviour.measured) for row in texts]
            kinds = [kinds_of(found[number]) for number in numbers]
            samples[behaviour.name] = texts
        cells[behaviour.name] = [
            {
                **share(sum(row), len(row)),
                "against unsteered": mcnemar(hits[0], row),
                "kinds": counts,
                "hits": [int(hit) for hit in row],
            }
            for row, counts in zip(hits, kinds, strict=True)
        ]
    if neutral is not None:
        say(f"KL on {len(neutral)} neutral texts")
        ids = [prompt.ids for prompt in model.encode(neutral, chat=False)]
        kl = store.get("kl", lambda: [*divergences(model, interventions, numbers, ids).values()])
        for record, values in zip(records, kl, strict=True):
            record["kl"] = mean(values, (0.0, math.inf))
    if harmless is not None:
        found = answers_to(harmless, None, "harmless")
        for number, record in enumerate(records):
            record["kinds"] = kinds_of(found[number])
            record["answered"] = share(record["kinds"]["answer"], len(harmless))
        samples["harmless"] = [[answer.text for answer in found[number]] for number in numbers]
    about = {
        behaviour.name: {"about": behaviour.about, "labels": list(behaviour.labels), "sha256": behaviour.sha256}
        for behaviour in behaviours
    }
    return {
        "behaviours": about, "variants": records, "cells": cells, "overlap": overlaps(circuits), "samples": samples,
    }  # fmt: skip


def _next_tokens(model: LanguageModel, interventions: Interventions, behaviour: Behaviour) -> list[list[bool]]:
    """For each variant, whether each prompt shows a behaviour that one forward pass measures."""
    numbers = range(len(interventions.variants))
    prompts = model.encode(behaviour.prompts, chat=behaviour.chat)
    rows = [(number, prompt.ids) for prompt in prompts for number in numbers]
    owners = [(number, item) for item in behaviour.measured for number in numbers]
    hits: list[list[bool]] = [[] for _ in numbers]
    for (number, item), logits in zip(owners, each_logits(model, interventions, rows, last=True), strict=True):
        hits[number].append(behaviour.measure.of_logits(logits[0], item, model.tokenizer))
    return hits


def overlaps(circuits: Mapping[str, Circuit]) -> list[dict]:
    """The neurons that each pair of circuits shares, and those of each that the other lacks."""
    found = []
    for one, other in itertools.combinations(circuits, 2):
        here, there = (set(circuits[name].pairs) for name in (one, other))
        record = {"circuits": [one, other], "shared": len(here & there), "own": [len(here - there), len(there - here)]}
        found.append(record | {"jaccard": len(here & there) / len(here | there) if here | there else None})
    return found
