"""The competitors of a circuit: other ways to choose neurons, and directions of the residual stream.

Every choice (a direction's layer and sign, a single neuron) is made on discovery prompts set apart for choosing, not on
the prompts that are reported. Where a user gives a prompt as both, the notes of the results count it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cna_kernels import select
from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError
from cna_kernels.sums import ActivationSums

from ..discovery.collect import collect
from ..discovery.packing import TokenPrompt
from ..language_model import LanguageModel
from . import directions
from .answers import answer_all
from .directions import Direction
from .interventions import UNSTEERED, Interventions, Method, Variant
from .likelihood import each_logits
from .metrics import Refusals, kind_of
from .relp import relevance
from .store import Store

VALIDATION = 16  # most prompts of each side set apart to choose with
SHORT_ANSWER = 32  # tokens of an answer while choosing
MOST_LAYERS = 12  # most layers tried for a direction
CANDIDATES = 64  # neurons tried alone
DIFFERENCE = 0.05  # least difference between both sides' shares of answers that a token begins


@dataclass(frozen=True)
class Sides:
    """Discovery prompts, in two parts: to find candidates with, and to choose among candidates with.

    Attributes:
        positive, negative: to find circuits and directions with.
        chosen_positive, chosen_negative: to choose among candidates with.
    """

    positive: Sequence[TokenPrompt]
    negative: Sequence[TokenPrompt]
    chosen_positive: Sequence[TokenPrompt]
    chosen_negative: Sequence[TokenPrompt]

    @classmethod
    def split(cls, positive: Sequence[TokenPrompt], negative: Sequence[TokenPrompt]) -> Sides:
        """Set prompts apart, evenly spaced: of each side at most VALIDATION, and at most a third."""
        parts = []
        for name, prompts in (("positive", positive), ("negative", negative)):
            n = min(VALIDATION, len(prompts) // 3)
            if n < 1:
                raise InputError(name, f"expected at least 3 prompts, got {len(prompts)}")
            apart = {number * len(prompts) // n for number in range(n)}
            parts.append([prompt for number, prompt in enumerate(prompts) if number not in apart])
            parts.append([prompts[number] for number in sorted(apart)])
        return cls(parts[0], parts[2], parts[1], parts[3])


@dataclass(frozen=True)
class Discovery:
    """What the discovery prompts show.

    Attributes:
        sums: sums and squares of both sides' activations, positive in column 0.
        delta: the contrast of ``sums``, fp64 ``[L, N]``.
        excluded: ``[L, N]`` bool, neurons that the circuit's discovery left out; no baseline may choose them.
        difference: the sides' difference at the sites "residual" and "mlp", see ``directions.differences``.
    """

    sides: Sides
    sums: ActivationSums
    delta: Tensor
    excluded: Tensor
    difference: dict[str, Tensor]

    @classmethod
    def of(cls, model: LanguageModel, sides: Sides, excluded: Tensor) -> Discovery:
        sums = contrast_sums(model, sides)
        difference = directions.differences(model.transformer, sides.positive, sides.negative)
        return cls(sides, sums, select.contrast(sums), excluded, difference)


def contrast_sums(model: LanguageModel, sides: Sides) -> ActivationSums:
    """Return the sums and squares of the activations of both sides, positive in column 0."""
    config = model.config
    shape = config.num_hidden_layers, config.intermediate_size
    sums = ActivationSums(*shape, 2, squares=True, device=model.device)
    prompts = [*sides.positive, *sides.negative]
    weights = torch.zeros(len(prompts), 2, dtype=torch.float32)
    weights[: len(sides.positive), select.POSITIVE] = 1
    weights[len(sides.positive) :, select.NEGATIVE] = 1
    collect(model.transformer, prompts, weights, sums)
    return sums


def down_norms(model: LanguageModel) -> Tensor:
    """Return the length of each neuron's column of ``down_proj``, fp64 ``[L, N]``."""
    layers = model.transformer.layers
    return torch.stack([layer.mlp.down_proj.weight.double().norm(dim=0).cpu() for layer in layers])


def first_tokens(model: LanguageModel, sides: Sides) -> tuple[list[int], list[int]]:
    """Return (targets, counterfactuals): tokens that begin clearly more, or fewer, positive answers than negative ones.

    "Clearly" means that the shares of the two sides' answers differ by DIFFERENCE. Raises InputError where there is no
    target or no counterfactual.
    """
    shares, plain = [], Interventions(model, [UNSTEERED])
    for prompts in (sides.positive, sides.negative):
        rows = [(0, prompt.ids) for prompt in prompts]
        first = [int(logits.argmax(-1)) for logits in each_logits(model, plain, rows, last=True)]
        shares.append(Counter({token: count / len(prompts) for token, count in Counter(first).items()}))
    every = sorted(set(shares[0]) | set(shares[1]))
    targets = [token for token in every if shares[0][token] >= shares[1][token] + DIFFERENCE]
    counterfactuals = [token for token in every if shares[1][token] >= shares[0][token] + DIFFERENCE]
    if not targets or not counterfactuals:
        raise InputError("positive", "answers begin like those of the negative prompts: no token tells them apart")
    return targets, counterfactuals


def rankings(model: LanguageModel, discovery: Discovery, names: Sequence[str]) -> dict[str, Tensor]:
    """Return score name -> the score of every neuron, fp64 ``[L, N]``; neurons are ranked by it, largest first.

    - ``abs-delta``, ``magnitude``, ``cohen-d``: see :func:`cna_kernels.select.scores`.
    - ``norm-weighted``: abs-delta times the length of the neuron's column of ``down_proj``.
    - ``activation``: abs(mean positive), a control: neurons that fire, whatever their contrast.
    - ``relp``: the neurons' relevance for the tokens that begin positive answers, see ``relp.py``.
    """
    sides, sums, delta = discovery.sides, discovery.sums, discovery.delta
    found = {}
    for name in names:
        if name == "norm-weighted":
            found[name] = delta.abs() * down_norms(model)
        elif name == "activation":
            found[name] = sums.mean(select.POSITIVE).abs()
        elif name == "relp":
            found[name] = relevance(model.transformer, sides.positive, *first_tokens(model, sides))
        else:
            found[name] = select.scores(name, sums, delta)
    return found


def top_circuit(name: str, score: Tensor, discovery: Discovery, k: int) -> Circuit:
    """Return the k best neurons by a score. The circuit records their contrast; with ``relp``, their relevance."""
    shown = score if name == "relp" else discovery.delta
    neurons = select.top_neurons(score, k, discovery.excluded)
    n_layers, n_neurons = score.shape
    return Circuit(tuple((*pair, shown[pair].item()) for pair in neurons), n_layers, n_neurons, score=name)


def written(model: LanguageModel, circuit: Circuit, delta: Tensor) -> Direction:
    """The direction that a circuit's contrast writes to the residual stream: in every layer
    ``W_down[:, neurons] @ delta[neurons]``, ``[H]``. With all neurons this is the CAA direction as released. A test of
    sufficiency adds the direction to negative prompts at strength 1.
    """
    vectors = torch.zeros(circuit.n_layers, model.config.hidden_size, dtype=torch.float64)
    for layer, members in circuit.by_layer().items():
        weight = model.transformer.layers[layer].mlp.down_proj.weight[:, members].double().cpu()
        vectors[layer] = weight @ delta[layer, members]
    return Direction("mlp", vectors.float())


def choose(
    model: LanguageModel,
    candidates: Sequence[Method],
    sides: Sides,
    is_refusal: Refusals,
    *,
    batch: int | None,
    store: Store,
    name: str,
) -> tuple[int, list[dict]]:
    """Return the number of the candidate that does best at m = 0 on the prompts set apart, and a record of each.

    The best candidate has the least sum of three shares: positive prompts refused, positive prompts with degenerate or
    empty answers, and negative prompts not answered properly. Ties go to the first candidate.
    """
    interventions = Interventions(model, [Variant(method, 0.0) for method in candidates])
    prompts = [*sides.chosen_positive, *sides.chosen_negative]
    answers = answer_all(
        model, interventions, range(len(candidates)), prompts, max_new_tokens=SHORT_ANSWER, batch=batch, store=store,
        name=name,
    )  # fmt: skip
    n_positive = len(sides.chosen_positive)
    table: list[dict[str, Any]] = []
    for method, found in zip(candidates, answers.values(), strict=True):
        kinds = [kind_of(answer.text, answer.tokens, is_refusal) for answer in found]
        positive, negative = Counter(kinds[:n_positive]), Counter(kinds[n_positive:])
        table.append({
            "name": method.name,
            "refused": positive["refusal"] / n_positive,
            "broken": (positive["degenerate"] + positive["empty"]) / n_positive,
            "negative not answered": 1 - (negative["answer"] + negative["short"]) / len(sides.chosen_negative),
        })  # fmt: skip
    loss = [row["refused"] + row["broken"] + row["negative not answered"] for row in table]
    return min(range(len(loss)), key=lambda number: (loss[number], number)), table


def layers_to_try(n_layers: int) -> list[int]:
    """All layers of a small model, else MOST_LAYERS of them, evenly spaced."""
    if n_layers <= MOST_LAYERS:
        return list(range(n_layers))
    return [round((n_layers - 1) * step / (MOST_LAYERS - 1)) for step in range(MOST_LAYERS)]


def best_direction(
    model: LanguageModel, kind: str, discovery: Discovery, is_refusal: Refusals, batch: int | None, store: Store
) -> tuple[Method, dict]:
    """Choose the layer, and for CAA the sign, of a direction. Return the method and a record of the choice.

    Args:
        kind: "caa" or "ablation".
    """
    difference, sides = discovery.difference, discovery.sides
    make = {"caa": directions.caa, "ablation": directions.ablation}[kind]
    tried = [
        (layer, sign) for layer in layers_to_try(model.config.num_hidden_layers)
        for sign in ((-1, 1) if kind == "caa" else (1,))
    ]  # fmt: skip
    methods = [Method(f"layer {layer}, {sign:+d}", "", make(difference, layer), sign) for layer, sign in tried]

    best, table = choose(model, methods, sides, is_refusal, batch=batch, store=store, name=f"choose-{kind}")
    layer, sign = tried[best]
    about = {
        "caa": f"mean difference of the residual stream after layer {layer}, added with sign {sign:+d}",
        "ablation": f"unit difference after layer {layer}, taken out of all that is written to the residual stream",
    }[kind]
    return Method(kind, about, make(difference, layer), sign), {"layer": layer, "sign": sign, "tried": table}


def best_neuron(model: LanguageModel, discovery: Discovery, store: Store) -> tuple[Method, dict]:
    """Find the single neuron whose ablation moves the first token of positive answers furthest from the targets.

    The targets are those of :func:`first_tokens`. Returns the method and a record of the choice.
    """

    def run():
        sides, delta = discovery.sides, discovery.delta
        targets, counterfactuals = first_tokens(model, sides)
        most = delta.numel() - int(discovery.excluded.sum())
        circuit = top_circuit("abs-delta", delta.abs(), discovery, min(CANDIDATES, most))
        alone = [Circuit((neuron,), circuit.n_layers, circuit.n_neurons) for neuron in circuit.neurons]
        interventions = Interventions(model, [UNSTEERED, *(Variant(Method("", "", one), 0.0) for one in alone)])
        prompts = sides.chosen_positive
        rows = [(variant, prompt.ids) for variant in range(len(alone) + 1) for prompt in prompts]
        total = [0.0] * (len(alone) + 1)
        for (variant, _), logits in zip(rows, each_logits(model, interventions, rows, last=True), strict=True):
            odds = logits[0, targets].logsumexp(-1) - logits[0, counterfactuals].logsumexp(-1)
            total[variant] += odds.item() / len(prompts)
        best = min(range(len(alone)), key=lambda number: (total[number + 1], number))
        return {"neuron": list(circuit.neurons[best]), "log odds": [total[0], total[best + 1]], "tried": len(alone)}

    chosen = store.get("choose-neuron", run)
    layer, index, contrast = chosen["neuron"]
    n_layers, n_neurons = discovery.delta.shape
    circuit = Circuit(((layer, index, contrast),), n_layers, n_neurons, score="best single neuron")
    about = f"layer {layer}, neuron {index}: the best of {chosen['tried']} ablated alone"
    return Method("single neuron", about, circuit), chosen
