"""Other scores to choose neurons by, at one or several sizes: what ablating them, or writing their contrast, does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from cna_kernels.circuit import Circuit

from ..discovery.packing import TokenPrompt
from ..language_model import LanguageModel
from . import baselines
from .answers import answer_all
from .interventions import UNSTEERED, Interventions, Method, Variant
from .metrics import KINDS, Refusals, kind_of, share
from .store import Store

SCORES = ("abs-delta", "magnitude", "cohen-d", "norm-weighted", "relp")
STEPS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # the sizes of a curve, as multiples of the evaluated circuit's
MOST_PROMPTS = 50  # of each prompt set


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
    curves: bool,
    is_refusal: Refusals,
    max_new_tokens: int,
    batch: int | None,
    store: Store,
) -> list[dict]:
    """Return one point for each score and size.

    Args:
        circuit: the evaluated circuit. It gives the size, and overlaps are with it.
        ranked: score name -> its value for each neuron, see ``baselines.rankings``.
        prompts: "harmful" prompts, for necessity: refusals with the neurons ablated. "benign" prompts, for sufficiency:
            refusals with the neurons' contrast written to the residual stream.
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
    for name, first, what in (("harmful", 1, "necessity"), ("benign", 2, "sufficiency")):
        if name not in prompts:
            continue
        numbers = list(range(first, len(methods) + 1, 2))
        answers = answer_all(
            model, interventions, numbers, evenly(prompts[name], MOST_PROMPTS), max_new_tokens=max_new_tokens,
            batch=batch, store=store, name=f"alternatives-{name}",
        )  # fmt: skip
        for point, number in zip(points, numbers, strict=True):
            found = answers[number]
            kinds = Counter(kind_of(answer.text, answer.tokens, is_refusal) for answer in found)
            point[what] = {
                "refusal": share(sum(is_refusal(answer.text) for answer in found), len(found)),
                "kinds": {kind: kinds[kind] for kind in KINDS},
            }
    return points
