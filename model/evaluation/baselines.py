"""The competitors of a circuit: other ways to choose neurons, and directions of the residual stream.

What has to be chosen among candidates is chosen in ``choosing.py``, on discovery prompts set apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cna_kernels import select
from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError
from cna_kernels.sums import ActivationSums

from ..discovery.collect import collect
from ..discovery.packing import TokenPrompt
from ..discovery.weights import down_norms
from ..language_model import LanguageModel
from . import directions, relp
from .directions import Direction

VALIDATION = 16  # most prompts of each side set apart to choose with


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


def first_tokens(model: LanguageModel, sides: Sides) -> tuple[list[int], list[int]]:
    """See ``relp.first_tokens``, of the prompts that are not set apart."""
    return relp.first_tokens(model.transformer, sides.positive, sides.negative)


def rankings(model: LanguageModel, discovery: Discovery, names: Sequence[str]) -> dict[str, Tensor]:
    """Return score name -> the score of every neuron, fp64 ``[L, N]``; neurons are ranked by it, largest first.

    - ``abs-delta``, ``magnitude``, ``cohen-d``, ``norm-weighted``: see :func:`cna_kernels.select.scores`.
    - ``activation``: abs(mean positive), a control: neurons that fire, whatever their contrast.
    - ``relp``: the neurons' relevance for the tokens that begin positive answers, see ``relp.py``.
    """
    sides, sums, delta = discovery.sides, discovery.sums, discovery.delta
    found = {}
    for name in names:
        if name == "activation":
            found[name] = sums.mean(select.POSITIVE).abs()
        elif name == "relp":
            found[name] = relp.relevance(model.transformer, sides.positive, *first_tokens(model, sides))
        else:
            found[name] = select.scores(name, sums, delta, down_norms(model) if name == "norm-weighted" else None)
    return found


def top_circuit(name: str, score: Tensor, discovery: Discovery, k: int) -> Circuit:
    """Return the k best neurons by a score. The circuit records their contrast; with ``relp``, their relevance."""
    shown = score if name == "relp" else discovery.delta
    neurons = select.top_neurons(score, k, discovery.excluded)
    n_layers, n_neurons = score.shape
    positive = None if name == "relp" else discovery.sums.mean(select.POSITIVE)  # a relevance is no contrast
    return Circuit(
        tuple((*pair, shown[pair].item()) for pair in neurons), n_layers, n_neurons, score=name,
        positive_mean=None if positive is None else tuple(positive[pair].item() for pair in neurons),
    )  # fmt: skip


def written(model: LanguageModel, circuit: Circuit, delta: Tensor) -> Direction:
    """The direction that a circuit's contrast writes to the residual stream: in every layer
    ``W_down[:, neurons] @ delta[neurons]``, ``[H]``. With all neurons this is the CAA direction as released. A test of
    sufficiency adds the direction to negative prompts at strength 1.
    """
    vectors = torch.zeros(circuit.n_layers, model.config.hidden_size, dtype=torch.float64)
    for layer, members in circuit.by_layer().items():
        columns = model.transformer.down_columns(layer, members)
        vectors[layer] = columns.double().cpu() @ delta[layer, members]
    return Direction("mlp", vectors.float())


def rank_curve(score: Tensor, points: int = 200) -> list[list]:
    """Up to ``points`` pairs [rank, score], from the best to the last neuron, evenly spaced on a logarithmic axis."""
    ordered = score.flatten().sort(descending=True).values
    ranks = sorted({round(len(ordered) ** (step / (points - 1))) for step in range(points)})
    return [[rank, ordered[rank - 1].item()] for rank in ranks]
