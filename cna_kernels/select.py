"""From sums to circuits: contrast, score, universal filter, one ranking. ``attach`` and ``load`` both select this way.

Source of the method: "Targeted Neuron Modulation via Contrastive Pair Search", arXiv 2605.12290.
Means, contrasts and scores are fp64 ``[L, N]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .circuit import Circuit
from .errors import InputError
from .fields import short, whole_number
from .sums import ActivationSums

POSITIVE, NEGATIVE = 0, 1  # the two columns of a contrast
SCORES = ("abs-delta", "magnitude", "cohen-d")
K_RULE = "nearest integer to fraction * layers * neurons, halves up, at least 1"


def k_from_fraction(fraction: float, n_layers: int, n_neurons: int) -> int:
    """Return how many neurons a fraction of all layers' neurons is, by K_RULE."""
    if not isinstance(fraction, Real) or not 0 < fraction <= 1:
        raise InputError("fraction", f"expected above 0 and at most 1, got {fraction}")
    return max(1, math.floor(fraction * n_layers * n_neurons + 0.5))


def contrast(sums: ActivationSums, rounded_to: torch.dtype | None = None) -> Tensor:
    """Return mean over positive minus mean over negative, signed, ``[L, N]``.

    ``rounded_to`` rounds both means and the difference to a dtype first, as code that averages in bf16 does.
    """
    positive, negative = sums.mean(POSITIVE), sums.mean(NEGATIVE)
    if rounded_to is not None:
        return (positive.to(rounded_to) - negative.to(rounded_to)).double()
    return positive - negative


def scores(name: str, sums: ActivationSums, delta: Tensor, norms: Tensor | None = None) -> Tensor:
    """Return the score that selection ranks neurons by, ``[L, N]``, larger first.

    - ``abs-delta``: abs(delta), the paper's rule.
    - ``magnitude``: abs(mean positive) - abs(mean negative). Leaves out neurons that fire for the negative set.
    - ``cohen-d``: abs(delta) over the pooled standard deviation, so that large activations do not win by size
      (J. Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988). Needs two prompts a side.
    - ``norm-weighted``: abs(delta) times the norm of the neuron's column of ``down_proj``, which ``norms`` ``[L, N]``
      gives: how far the contrast moves the residual stream.
    """
    if name == "norm-weighted":
        if norms is None:
            raise InputError("score", "norm-weighted needs the norms of the columns of down_proj")
        return delta.abs() * norms.to(delta)
    if name == "abs-delta":
        return delta.abs()
    if name == "magnitude":
        return sums.mean(POSITIVE).abs() - sums.mean(NEGATIVE).abs()
    if name == "cohen-d":
        n_positive, n_negative = sums.count.tolist()
        pooled = (n_positive - 1) * sums.variance(POSITIVE) + (n_negative - 1) * sums.variance(NEGATIVE)
        deviation = (pooled / (n_positive + n_negative - 2)).sqrt()
        # no spread at all: the squares of both sets were too small for fp32, and so is any difference of the means
        return torch.where(deviation > 0, delta.abs() / deviation, 0)
    raise InputError("score", f"expected one of {', '.join(SCORES)}, got {name!r}")


def top_neurons(score: Tensor, k: int, excluded: Tensor | None = None) -> list[tuple[int, int]]:
    """Return the k highest-scoring neurons of all layers as (layer, index), best first.

    Ties go to the lowest layer, then the lowest index.

    Args:
        score: ``[L, N]``, finite.
        excluded: ``[L, N]`` bool, neurons that may not be chosen.
    """
    if not torch.isfinite(score).all():
        raise ValueError("score: not finite")
    candidates = torch.ones_like(score, dtype=torch.bool) if excluded is None else ~excluded
    available = int(candidates.sum())
    if not 1 <= k <= available:
        raise InputError("top_k", f"expected 1 to {available}, the neurons that may be chosen, got {k}")
    flat = score.masked_fill(~candidates, -math.inf).flatten()
    kth = torch.topk(flat, k, sorted=False).values.min()
    enough = (flat >= kth).nonzero()[:, 0]  # k neurons, or more where scores are equal; by layer and index
    order = torch.sort(flat[enough], descending=True, stable=True).indices[:k]
    n_neurons = score.shape[1]
    return [divmod(place, n_neurons) for place in enough[order].tolist()]


def count_top(magnitude: Tensor, k: int) -> Tensor:
    """Return, for each neuron, in how many columns it is among the k largest, ``[L, N]`` int64.

    Args:
        magnitude: ``[L, C, N]``; each column is ranked over all layers by itself.
    """
    counts = torch.zeros(magnitude.shape[0], magnitude.shape[2], dtype=torch.int64)
    for column in magnitude.unbind(1):
        for layer, index in top_neurons(column, k):
            counts[layer, index] += 1
    return counts


@dataclass(frozen=True)
class UniversalNeurons:
    """Neurons that are among the largest by magnitude in most of some unrelated columns: they fire anyway.

    Attributes:
        neurons: (layer, index), in order.
        fraction: the share of the model's neurons that counted as the largest of a column.
        threshold: the share of the columns that counted as most.
        n_votes: the number of columns, without those that counted no token.
        prompts_sha256: hash of the prompts behind the columns, where it is known.
    """

    neurons: tuple[tuple[int, int], ...]
    fraction: float
    threshold: float
    n_votes: int
    prompts_sha256: str | None = None

    @classmethod
    def of(
        cls, counts: Tensor, n_votes: int, *, fraction: float, threshold: float, prompts_sha256: str | None = None
    ) -> UniversalNeurons:
        """Make it from ``counts`` ``[L, N]``: in how many of ``n_votes`` columns each neuron was among the largest."""
        if not 0 < threshold <= 1:
            raise InputError("threshold", f"expected above 0 and at most 1, got {threshold}")
        found = (counts >= votes_needed(threshold, n_votes)).nonzero().tolist()
        return cls(tuple((layer, index) for layer, index in found), fraction, threshold, n_votes, prompts_sha256)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.neurons)

    def __len__(self) -> int:
        return len(self.neurons)

    def record(self) -> dict[str, Any]:
        """What a circuit's file says of the filter."""
        return {
            "prompts": self.n_votes, "prompts_sha256": self.prompts_sha256, "fraction": self.fraction,
            "threshold": self.threshold, "excluded": [list(neuron) for neuron in self.neurons],
        }  # fmt: skip


def _listed(name: str, values: Any) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise InputError(name, f"expected a list, got {short(values)}") from None


def _neuron(pair: Any) -> tuple[int, int]:
    try:
        layer, index = pair
    except (TypeError, ValueError):
        raise InputError("exclude", f"expected (layer, index) pairs, got {short(pair)}") from None
    return whole_number("exclude", layer), whole_number("exclude", index)


class Selection:
    """Which neurons may be chosen, how many, and by what score: all checked here, before any forward pass.

    Args:
        widths: the neurons of each layer.
        fraction: the share of all neurons to take; ``top_k``, where given, wins.
        score: one of SCORES.
        skip_layers: layers to leave out.
        universal: neurons to leave out because they fire anyway.
        exclude: (layer, index) of other neurons to leave out.
        rounded_to: see :func:`contrast`.
        norms: ``[L, N]``, for the score "norm-weighted"; see :func:`scores`.
        ranking: ``[L, N]``, the score itself, where it does not come from sums; ``score`` is then its name.

    Raises:
        InputError: naming the argument: fewer neurons are left than are asked for, or a neuron does not exist.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        fraction: float | None = 0.001,
        top_k: int | None = None,
        score: str = "abs-delta",
        skip_layers: Sequence[int] = (),
        universal: UniversalNeurons | None = None,
        exclude: Iterable[tuple[int, int]] = (),
        rounded_to: torch.dtype | None = None,
        norms: Tensor | None = None,
        ranking: Tensor | None = None,
    ) -> None:
        self.n_layers, self.n_neurons = len(widths), max(widths)
        self.score, self.rounded_to, self.norms, self.ranking = score, rounded_to, norms, ranking
        if universal is not None and not isinstance(universal, UniversalNeurons):
            raise InputError("universal", f"expected what Engine.universal returns, got {short(universal)}")
        self.skip_layers = tuple(whole_number("skip_layers", layer) for layer in _listed("skip_layers", skip_layers))
        self.universal, self.exclude = universal, tuple(_neuron(pair) for pair in _listed("exclude", exclude))
        self.fraction = None if top_k is not None else fraction
        self.k_rule = K_RULE if top_k is None else "given"
        width = torch.tensor(widths, dtype=torch.int64)[:, None]
        self.excluded = mask_layers(self.n_layers, self.n_neurons, self.skip_layers)  # [L, N] bool
        self.excluded |= torch.arange(self.n_neurons, dtype=torch.int64) >= width
        for layer, index in (*self.exclude, *(universal or ())):
            if not (0 <= layer < self.n_layers and 0 <= index < widths[layer]):
                raise InputError("exclude", f"({layer}, {index}) is no neuron of this model")
            self.excluded[layer, index] = True
        if top_k is None:
            if fraction is None:
                raise InputError("fraction", "expected a number, or top_k")
            top_k = k_from_fraction(fraction, 1, sum(widths))
        self.k = whole_number("top_k", top_k)
        available = int((~self.excluded).sum())
        if not 1 <= self.k <= available:
            raise InputError("top_k", f"expected 1 to {available}, the neurons that may be chosen, got {self.k}")

    def rank(self, sums: ActivationSums) -> tuple[Tensor, list[tuple[int, int]]]:
        """Return the contrast ``[L, N]`` of sums of two columns, and the chosen (layer, index), best first."""
        if sums.count.shape[0] != 2:
            raise InputError("sums", f"expected two columns, positive and negative, got {sums.count.shape[0]}")
        delta = contrast(sums, self.rounded_to)
        score = self.ranking
        if score is None:
            score = scores(self.score, sums, delta, self.norms).cpu()
        return delta.cpu(), top_neurons(score, self.k, self.excluded)

    def circuit(self, sums: ActivationSums, **provenance: Any) -> Circuit:
        """Select a circuit. ``provenance``: further fields of :class:`Circuit`, which its file will hold."""
        delta, chosen = self.rank(sums)
        positive = sums.mean(POSITIVE).cpu()
        return Circuit(
            neurons=tuple((layer, index, delta[layer, index].item()) for layer, index in chosen),
            positive_mean=tuple(positive[layer, index].item() for layer, index in chosen),
            n_layers=self.n_layers,
            n_neurons=self.n_neurons,
            score=self.score,
            fraction=self.fraction,
            k_rule=self.k_rule,
            skipped_layers=self.skip_layers,
            universal=None if self.universal is None else self.universal.record(),
            excluded=self.exclude,
            versions=versions(),
            **provenance,
        )


def versions() -> dict[str, str]:
    """The versions that a circuit's file names."""
    return {"cna_kernels": __version__, "torch": torch.__version__}


def votes_needed(threshold: float, n_votes: int) -> float:
    """How many of ``n_votes`` a universal neuron needs: 0.55 of 100 is 55, in floating point a little more."""
    return max(threshold * n_votes - 1e-9, 1)


def mask_layers(n_layers: int, n_neurons: int, layers: Iterable[int]) -> Tensor:
    """Return ``[L, N]`` bool, True in the given layers."""
    mask = torch.zeros(n_layers, n_neurons, dtype=torch.bool)
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise InputError("skip_layers", f"expected 0 to {n_layers - 1}, got {layer}")
        mask[layer] = True
    return mask
