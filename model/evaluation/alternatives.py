"""Other scores to choose neurons by, at one or several sizes: what ablating them, or writing their contrast, does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from cna_kernels.circuit import Circuit

from ..discovery.packing import TokenPrompt
from ..language_model import LanguageModel
from . import baselines, ranking
from .answers import answer_all
from .counted import Counted, kinds_of
from .interventions import UNSTEERED, Interventions, Method, Variant
from .likelihood import divergences
from .metrics import KINDS, NOT_NEGATIVE, Refusals, mean, share
from .store import Store, in_pieces

SCORES = ("abs-delta", "magnitude", "cohen-d", "norm-weighted", "relp")
MOST_PROMPTS = 50  # of each prompt set, and of the neutral texts


def evenly(prompts: Sequence[TokenPrompt], most: int) -> list[TokenPrompt]:
    """At most ``most`` of the prompts, evenly spaced, because files are often sorted by subject."""
    n = min(most, len(prompts))
    return [prompts[number * len(prompts) // n] for number in range(n)]


def alternatives(
    model: LanguageModel,
    circuit: Circuit,
    ranked: dict[str, Tensor],
    discovery: baselines.Discovery,
    prompts: Mapping[str, Counted],
    *,
    texts: Sequence[TokenPrompt] = (),
    ignoring: float | None = None,
    steps: Sequence[float],
    is_refusal: Refusals,
    max_new_tokens: int,
    batch: int | None,
    store: Store,
) -> list[dict]:
    """Return one point for each score and size.

    A point has ``necessity`` and ``sufficiency``, each with the share of hits (``refusal``, or ``shown`` of a
    behaviour), ``removed`` or ``added`` hits (see ``ranking.py``), its ``rank`` among all points by these, and, where
    prompts are answered, the ``kinds`` of the answers and how many are ``answered``; where there are neutral texts, the
    ``kl`` to the unsteered model.

    Args:
        circuit: the evaluated circuit. It gives the size, and overlaps are with it.
        ranked: score name -> its value for each neuron, see ``baselines.rankings``.
        prompts: "necessity": the prompts whose hits are counted with the neurons ablated. "sufficiency": those whose
            hits are counted with the neurons' contrast written to the residual stream. "answered": prompts that are
            answered beside those of a behaviour that is measured from logits, to tell wrecks.
        texts: neutral texts; ``ignoring``: see ``likelihood.ignoring``.
        steps: the sizes, as multiples of the evaluated circuit's.
    """
    most = discovery.delta.numel() - int(discovery.excluded.sum())
    sizes = sorted({min(max(round(step * circuit.k), 1), most) for step in steps})
    methods, points = [], []
    for name, score in ranked.items():
        for k in sizes:
            other = baselines.top_circuit(name, score, discovery, k)
            overlap = len(set(other.pairs) & set(circuit.pairs)) / max(min(k, circuit.k), 1)
            points.append({"score": name, "k": k, "overlap": overlap, "per_layer": other.per_layer()})
            written = baselines.written(model, other, discovery.delta)
            methods += [Method(f"{name} {k}", "", other), Method(f"{name} {k} written", "", written, 1)]
    interventions = Interventions(model, [UNSTEERED, *(Variant(method, 0.0) for method in methods)])
    kl: list[list[float]] = []
    if texts:

        def diverge(piece, numbers):
            return divergences(model, interventions, numbers, [text.ids for text in piece])

        few = evenly(texts, MOST_PROMPTS)
        kl = in_pieces(store, "alternatives-kl", range(len(methods) + 1), few, diverge)
    sides = ((1, "necessity", "removed", ranking.removed), (2, "sufficiency", "added", ranking.added))
    for first, what, value, count in sides:
        if what not in prompts:
            continue
        counted, numbers = prompts[what].evenly(MOST_PROMPTS), [0, *range(first, len(methods) + 1, 2)]
        name = f"alternatives-{counted.name}"
        kinds: list[list[str] | None] = [None] * len(numbers)
        if counted.from_logits:
            work = partial(counted.hits_by_logits, model, interventions)
            hits = in_pieces(store, name, numbers, range(len(counted.prompts)), work)
            if "answered" in prompts:
                others = prompts["answered"].evenly(MOST_PROMPTS).prompts
                answers = answer_all(
                    model, interventions, numbers, others, max_new_tokens=max_new_tokens, batch=batch, store=store,
                    name="alternatives-answered",
                )  # fmt: skip
                kinds = [kinds_of(answers[number], is_refusal) for number in numbers]
        else:
            answers = answer_all(
                model, interventions, numbers, counted.prompts, max_new_tokens=max_new_tokens, batch=batch,
                store=store, name=name,
            )  # fmt: skip
            every = [counted.hits([answer.text for answer in answers[number]]) for number in numbers]
            hits = [next(iter(checks.values())) for checks in every]
            kinds = [kinds_of(answers[number], is_refusal) for number in numbers]
        for point, number, mine, kind in zip(points, numbers[1:], hits[1:], kinds[1:], strict=True):
            own = None if counted.from_logits else kind  # else the kinds are those of other prompts' answers
            figures: dict[str, Any] = {counted.field: share(sum(mine), len(mine)), value: count(hits[0], mine, own)}
            if kind is not None:
                figures["kinds"] = {name: kind.count(name) for name in KINDS}
                figures["answered"] = share(kind.count("answer"), len(kind))
            if kl:
                figures["kl"] = mean(kl[number], NOT_NEGATIVE) | {"ignoring": ignoring}
            point[what] = figures
        ranking.add_ranks(points, what, value)
    return points
