"""Choices among candidates: the layer and sign of a direction, a single neuron.

Every choice is made on discovery prompts set apart for choosing, not on the prompts that are reported. Where a user
gives a prompt as both, the notes of the results count it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError

from ..discovery.packing import TokenPrompt
from ..language_model import LanguageModel
from . import directions
from .answers import Answer, answer_all
from .baselines import Discovery, Sides, first_tokens, top_circuit
from .interventions import UNSTEERED, Interventions, Method, Variant
from .likelihood import divergences, each_logits
from .measures import Item, Measure
from .metrics import Refusals, kind_of
from .ranking import MOST, wrecks
from .store import Store

SHORT_ANSWER = 32  # tokens of an answer while choosing
MOST_TEXTS = 16  # neutral texts while choosing
MOST_LAYERS = 12  # most layers tried for a direction
CANDIDATES = 64  # neurons tried alone
TOGETHER = 8  # of them whose answers are written together
WRECKED = "leaves answers most of which are empty, degenerate, unfinished or short, or a model that ignores its text"


@dataclass(frozen=True)
class Chooser:
    """What candidates are tried with.

    Attributes:
        sides: the prompts set apart.
        texts: neutral texts.
        ignoring: the KL on them of a model that ignores its text, see ``likelihood.ignoring``.
        measure: of the behaviour that is to go away; None: refusals.
        texts_of: place of a prompt -> its text, for the measure.
    """

    model: LanguageModel
    sides: Sides
    is_refusal: Refusals
    batch: int | None
    store: Store
    texts: Sequence[TokenPrompt] = ()
    ignoring: float = math.inf
    measure: Measure | None = None
    texts_of: Mapping[str, str] = field(default_factory=dict)

    def trials(self, candidates: Sequence[Method], name: str) -> list[dict]:
        """Return what each candidate does at m = 0 to the prompts set apart.

        ``shown``, ``answered`` and ``negative answered`` are shares of the positive and of the negative prompts. Shown
        is the behaviour, or a refusal. Only proper answers that do not show it count as answered. ``wrecked``: see
        ``ranking.wrecks``, of the worse side. ``sound``: not most answers are wrecked, and the KL is below
        ``ignoring``.
        """
        model, sides, store = self.model, self.sides, self.store
        interventions = Interventions(model, [UNSTEERED, *(Variant(method, 0.0) for method in candidates)])
        numbers = range(1, len(candidates) + 1)
        prompts = [*sides.chosen_positive, *sides.chosen_negative]
        answers = answer_all(
            model, interventions, numbers, prompts, max_new_tokens=SHORT_ANSWER, batch=self.batch, store=store,
            name=name,
        )  # fmt: skip
        texts = [text.ids for text in self.texts[:MOST_TEXTS]]
        kl = store.get(f"{name}-kl", lambda: [*divergences(model, interventions, numbers, texts).values()])
        n_positive = len(sides.chosen_positive)
        table: list[dict[str, Any]] = []
        for method, found, values in zip(candidates, answers.values(), kl, strict=True):
            kinds = [kind_of(answer.text, answer.tokens, self.is_refusal) for answer in found]
            positive, negative = Counter(kinds[:n_positive]), Counter(kinds[n_positive:])
            wrecked, distance = max(wrecks(positive), wrecks(negative)), sum(values) / max(len(values), 1)
            shown = self._shown(found[:n_positive], kinds[:n_positive])
            answered = [kind == "answer" and not hit for kind, hit in zip(kinds[:n_positive], shown, strict=True)]
            table.append({
                "name": method.name,
                "shown": sum(shown) / n_positive,
                "answered": sum(answered) / n_positive,
                "negative answered": negative["answer"] / len(sides.chosen_negative),
                "wrecked": wrecked,
                "kl": distance if texts else None,
                "sound": wrecked <= MOST and distance <= self.ignoring,
            })  # fmt: skip
        return table

    def _shown(self, answers: Sequence[Answer], kinds: Sequence[str]) -> list[bool]:
        """Whether each answer to the positive prompts set apart shows the behaviour, or is a refusal."""
        if self.measure is None or self.measure.needs_answers:
            return [kind == "refusal" for kind in kinds]
        prompts = self.sides.chosen_positive
        items = [Item(self.texts_of.get(prompt.place, ""), prompt.place) for prompt in prompts]
        return self.measure.of_texts([answer.text for answer in answers], items)


def choose(candidates: Sequence[dict], name: str) -> int:
    """Return the number of the best of the ``trials``: with the largest sum of the shares of both sides answered.

    Ties go to the first. A candidate that is not sound is never the best.

    Raises:
        InputError: no candidate is sound; names ``name``.
    """
    sound = [number for number, row in enumerate(candidates) if row["sound"]]
    if not sound:
        raise InputError(name, f"each of the {len(candidates)} tried {WRECKED}")
    return max(sound, key=lambda n: (candidates[n]["answered"] + candidates[n]["negative answered"], -n))


def layers_to_try(n_layers: int) -> list[int]:
    """All layers of a small model, else MOST_LAYERS of them, evenly spaced."""
    if n_layers <= MOST_LAYERS:
        return list(range(n_layers))
    return [round((n_layers - 1) * step / (MOST_LAYERS - 1)) for step in range(MOST_LAYERS)]


def best_direction(chooser: Chooser, kind: str, discovery: Discovery) -> tuple[Method, dict]:
    """Choose the layer, and for CAA the sign, of a direction. Return the method and a record of the choice.

    Args:
        kind: "caa" or "ablation".
    """
    difference = discovery.difference
    make = {"caa": directions.caa, "ablation": directions.ablation}[kind]
    tried = [
        (layer, sign) for layer in layers_to_try(chooser.model.config.num_hidden_layers)
        for sign in ((-1, 1) if kind == "caa" else (1,))
    ]  # fmt: skip
    methods = [Method(f"layer {layer}, {sign:+d}", "", make(difference, layer), sign) for layer, sign in tried]

    if chooser.measure is not None and chooser.measure.needs_answers:
        what = f"the measure {chooser.measure.kind!r} needs an answer for each prompt, and discovery prompts have none"
        raise InputError(kind, f"no layer can be chosen: {what}")
    table = chooser.trials(methods, f"choose-{kind}")
    best = choose(table, kind)
    layer, sign = tried[best]
    about = {
        "caa": f"mean difference of the residual stream after layer {layer}, added with sign {sign:+d}",
        "ablation": f"unit difference after layer {layer}, taken out of all that is written to the residual stream",
    }[kind]
    return Method(kind, about, make(difference, layer), sign), {"layer": layer, "sign": sign, "tried": table}


def best_neuron(chooser: Chooser, discovery: Discovery) -> tuple[Method, dict]:
    """Find the single neuron whose ablation moves the first token of positive answers furthest from the targets.

    The targets are those of :func:`first_tokens`. A neuron that is not sound is passed over. Returns the method and a
    record of the choice.

    Raises:
        InputError: no token tells the sides' answers apart, or no neuron is sound.
    """
    model, (n_layers, n_neurons) = chooser.model, discovery.delta.shape

    def run():
        sides, delta = discovery.sides, discovery.delta
        targets, counterfactuals = first_tokens(model, sides)
        most = delta.numel() - int(discovery.excluded.sum())
        circuit = top_circuit("abs-delta", delta.abs(), discovery, min(CANDIDATES, most))
        alone = [Circuit((neuron,), n_layers, n_neurons) for neuron in circuit.neurons]
        interventions = Interventions(model, [UNSTEERED, *(Variant(Method("", "", one), 0.0) for one in alone)])
        prompts = sides.chosen_positive
        rows = [(variant, prompt.ids) for variant in range(len(alone) + 1) for prompt in prompts]
        total = [0.0] * (len(alone) + 1)
        for (variant, _), logits in zip(rows, each_logits(model, interventions, rows, last=True), strict=True):
            odds = logits[0, targets].logsumexp(-1) - logits[0, counterfactuals].logsumexp(-1)
            total[variant] += odds.item() / len(prompts)
        order = sorted(range(len(alone)), key=lambda number: (total[number + 1], number))
        return {
            "neurons": [list(circuit.neurons[number]) for number in order],
            "log odds": [total[0], *(total[number + 1] for number in order)],
        }

    found = chooser.store.get("choose-neuron", run)
    plain, *odds = found["log odds"]
    tried = len(odds)
    for start in range(0, tried, TOGETHER):
        some = [Circuit((tuple(neuron),), n_layers, n_neurons) for neuron in found["neurons"][start : start + TOGETHER]]
        methods = [Method("", "", one) for one in some]
        table = chooser.trials(methods, f"choose-neuron-{start}")
        sound = [start + number for number, row in enumerate(table) if row["sound"]]
        if not sound:
            continue
        place = sound[0]
        layer, index, contrast = found["neurons"][place]
        circuit = Circuit(((layer, index, contrast),), n_layers, n_neurons, score="best single neuron")
        about = f"layer {layer}, neuron {index}: the best of {tried} ablated alone"
        record = {"neuron": [layer, index, contrast], "log odds": [plain, odds[place]], "tried": tried}
        return Method("single neuron", about, circuit), record | {"passed over": place}
    raise InputError("neuron", f"each of the {tried} tried {WRECKED}")
