"""Other scores to choose neurons by, at one or several sizes: what ablating them, or writing their contrast, does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cna_kernels.circuit import Circuit

from ..discovery.packing import TokenPrompt
from ..language_model import LanguageModel
from . import baselines, ranking
from .answers import answer_all
from .interventions import UNSTEERED, Interventions, Method, Variant
from .likelihood import divergences
from .metrics import KINDS, NOT_NEGATIVE, Refusals, kind_of, mean, share
from .store import Store, in_pieces

SCORES = ("abs-delta", "magnitude", "cohen-d", "norm-weighted", "relp")
STEPS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # the sizes of a curve, as multiples of the evaluated circuit's
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
    prompts: Mapping[str, Sequence[TokenPrompt]],
    *,
    texts: Sequence[TokenPrompt] = (),
    ignoring: float | None = None,
    curves: bool,
    is_refusal: Refusals,
    max_new_tokens: int,
    batch: int | None,
    store: Store,
) -> list[dict]:
    """Return one point for each score and size.

    A point has ``necessity`` and ``sufficiency``, each with the ``refusal`` share, the ``kinds`` of the answers, how
    many are ``answered``, ``removed`` or ``added`` refusals (see ``ranking.py``), its ``rank`` among all points by
    these, and, where there are neutral texts, the ``kl`` to the unsteered model.

    Args:
        circuit: the evaluated circuit. It gives the size, and overlaps are with it.
        ranked: score name -> its value for each neuron, see ``baselines.rankings``.
        prompts: "harmful" prompts, for necessity: refusals with the neurons ablated. "benign" prompts, for sufficiency:
            refusals with the neurons' contrast written to the residual stream.
        texts: neutral texts; ``ignoring``: see ``likelihood.ignoring``.
        curves: use the sizes of STEPS, an eighth to eight times the circuit's, instead of the circuit's size alone.
    """
    sizes = [circuit.k]
    if curves:
        most = discovery.delta.numel() - int(discovery.excluded.sum())
        sizes = sorted({min(max(round(step * circuit.k), 1), most) for step in STEPS})
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
    sides = (
        ("harmful", 1, "necessity", "removed", ranking.removed),
        ("benign", 2, "sufficiency", "added", ranking.added),
    )
    for name, first, what, value, count in sides:
        if name not in prompts:
            continue
        numbers = list(range(first, len(methods) + 1, 2))
        answers = answer_all(
            model, interventions, [0, *numbers], evenly(prompts[name], MOST_PROMPTS), max_new_tokens=max_new_tokens,
            batch=batch, store=store, name=f"alternatives-{name}",
        )  # fmt: skip
        before = [is_refusal(answer.text) for answer in answers[0]]
        for point, number in zip(points, numbers, strict=True):
            found = answers[number]
            kinds = [kind_of(answer.text, answer.tokens, is_refusal) for answer in found]
            counts = Counter(kinds)
            figures: dict[str, Any] = {
                "refusal": share(sum(is_refusal(answer.text) for answer in found), len(found)),
                "kinds": {kind: counts[kind] for kind in KINDS},
                "answered": share(counts["answer"], len(found)),
                value: count(before, kinds),
            }
            if kl:
                figures["kl"] = mean(kl[number], NOT_NEGATIVE) | {"ignoring": ignoring}
            point[what] = figures
        ranking.add_ranks(points, what, value)
    return points
