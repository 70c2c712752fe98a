"""Sums -> circuits: the universal filter, selection, and how stable a selection is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cna_kernels import select
from cna_kernels.checks import InputError
from cna_kernels.circuit import Circuit
from cna_kernels.sums import ActivationSums

from ..prompts.columns import Columns
from ..prompts.corpus import Contrast
from .settings import POSITION_TEXT, Settings
from .units import UNIVERSAL_FRACTION, SlotSums


class Totals(Protocol):
    """The merged sums of a run: a ``units.Part``, or a run directory's ``MergedParts``."""

    universal: Tensor | None
    n_universal: int
    n_left_out: dict[int, int]

    def slot(self, number: int) -> SlotSums:
        """The sums of one column or replicate."""


def check_size(settings: Settings, n_layers: int, n_neurons: int) -> tuple[int, Tensor]:
    """Return k and the mask ``[L, N]`` of skipped layers, before any forward pass."""
    skipped = select.mask_layers(n_layers, n_neurons, settings.skip_layers)
    available = int((~skipped).sum())
    k = settings.top_k
    if k is None:
        k = select.k_from_fraction(settings.fraction, n_layers, n_neurons)
    if not 1 <= k <= available:
        raise InputError("top_k", f"expected 1 to {available}, the neurons that may be chosen, got {k}")
    return k, skipped


def check_counts(
    settings: Settings, contrasts: Sequence[Contrast], counts: dict[str, int], weights: dict[str, float]
) -> None:
    """Refuse what needs more prompts than a column has.

    Args:
        counts, weights: of each column, its prompts and the sum of their weights; see ``corpus.Corpus``.
    """
    for contrast in contrasts:
        columns = [str(column) for column in contrast[1:]]
        fewest, lightest = min(counts.get(c, 0) for c in columns), min(weights.get(c, 0.0) for c in columns)
        if fewest < 1:
            raise InputError(contrast.name, "no prompt is left in one of its two sets")
        left = 1 - 1 / settings.folds if settings.folds else 1.0
        if settings.score == "cohen-d" and (fewest < 2 or lightest * left <= 1):
            raise InputError("score", "cohen-d needs at least two prompts in each set, and more with folds")
        if settings.folds > fewest:
            raise InputError("folds", f"expected at most {fewest}, the prompts of the smaller set of {contrast.name!r}")


def find_universal(
    totals: Totals, diverse: list[Contrast], threshold: float, n_layers: int, n_neurons: int
) -> tuple[Tensor, int]:
    """Return ``[L, N]`` bool and the number of votes: neurons among the top 0.1% by magnitude on at least
    ``threshold`` of the universal prompts, or of the diverse contrasts."""
    k = select.k_from_fraction(UNIVERSAL_FRACTION, n_layers, n_neurons)
    counts, n_votes = torch.zeros(n_layers, n_neurons, dtype=torch.int64), totals.n_universal
    if totals.universal is not None:
        counts += totals.universal
    for contrast in diverse:
        delta = select.contrast(_pair(totals.slot(contrast.positive), totals.slot(contrast.negative)))
        counts += select.count_top(delta.abs()[:, None], k)
        n_votes += 1
    return counts >= select.votes_needed(threshold, n_votes), n_votes


def select_circuit(
    totals: Totals, columns: Columns, contrast: Contrast, settings: Settings, universal: Tensor, dtype: torch.dtype
) -> Circuit:
    """Select the circuit of one contrast; provenance that only the caller knows is added by it.

    Args:
        universal: ``[L, N]`` bool, neurons to leave out.
        dtype: what activations were computed in.
    """
    n_layers, n_neurons = universal.shape
    k, skipped = check_size(settings, n_layers, n_neurons)
    excluded = skipped | universal
    rounded_to = dtype if settings.round_means else None

    def ranked(sums: ActivationSums) -> tuple[Tensor, list[tuple[int, int]]]:
        delta = select.contrast(sums, rounded_to=rounded_to)
        return delta, select.top_neurons(select.scores(settings.score, sums, delta), k, excluded)

    least = 1 if settings.score == "cohen-d" else 0
    halves = [totals.slot(column) for column in contrast[1:]]
    delta, chosen = ranked(_pair(*halves))
    derived = [columns.derived(column) for column in contrast[1:]]
    pairs = [[totals.slot(slot) for slot in slots] for slots in zip(*derived, strict=True)]
    return Circuit(
        neurons=tuple((layer, index, delta[layer, index].item()) for layer, index in chosen),
        n_layers=n_layers,
        n_neurons=n_neurons,
        score=settings.score,
        fraction=settings.fraction if settings.top_k is None else None,
        k_rule=select.K_RULE if settings.top_k is None else "given",
        position=POSITION_TEXT[settings.position],
        skipped_layers=tuple(settings.skip_layers),
        dtype=str(dtype).removeprefix("torch."),
        preset=settings.preset,
        folds=_cross_validate(ranked, halves, pairs[: columns.folds], chosen),
        bootstrap=_bootstrap(ranked, pairs[columns.folds :], chosen, columns.seed, least),
    )


def _pair(positive: SlotSums, negative: SlotSums) -> ActivationSums:
    """Two slots as the two columns of a contrast."""
    squares = positive.total_sq is not None and negative.total_sq is not None
    sums = ActivationSums(positive.total.shape[0], positive.total.shape[1], 2, squares=squares)
    for column, slot in ((select.POSITIVE, positive), (select.NEGATIVE, negative)):
        sums.total[:, column], sums.count[column] = slot.total, slot.count
        if squares:
            sums.total_sq[:, column] = slot.total_sq
    return sums


def _without(whole: SlotSums, part: SlotSums) -> SlotSums:
    squares = None if whole.total_sq is None or part.total_sq is None else whole.total_sq - part.total_sq
    return SlotSums(whole.total - part.total, squares, whole.count - part.count)


def _cross_validate(ranked, halves, folds, chosen) -> dict | None:
    """Select without each fold in turn: how alike the circuits are, and the contrast on the prompts left out."""
    if not folds:
        return None
    overlaps, retained = [], []
    for pair in folds:
        delta, neurons = ranked(_pair(*(_without(half, part) for half, part in zip(halves, pair, strict=True))))
        held_out = select.contrast(_pair(*pair))
        where = tuple(torch.tensor(neurons).T)
        size = delta[where].abs().sum().item()
        retained.append((delta[where].sign() * held_out[where]).sum().item() / size if size else 0.0)
        overlaps.append(len(set(neurons) & set(chosen)) / len(chosen))
    return {"n": len(folds), "overlap": overlaps, "retained": retained}


def _bootstrap(ranked, replicates, chosen, seed, least) -> dict | None:
    """How often each neuron is selected when the prompts are drawn again.

    Of a handful of prompts a replicate may draw none; those whose sides do not count more than ``least`` are left out.
    None where fewer than two are left.
    """
    counts: Counter[tuple[int, int]] = Counter()
    n = 0
    for pair in replicates:
        if min(slot.count for slot in pair) > least:
            counts.update(ranked(_pair(*pair))[1])
            n += 1
    if n < 2:
        return None
    k, known = len(chosen), set(chosen)
    others = [(neuron, count) for neuron, count in counts.items() if neuron not in known and 2 * count >= n]
    return {
        "replicates": n,
        "seed": seed,
        "overlap": sum(counts[neuron] for neuron in chosen) / (n * k),
        "pairwise_overlap": sum(count * (count - 1) for count in counts.values()) / (n * (n - 1) * k),
        "frequency": [counts[neuron] / n for neuron in chosen],
        "others": [[*neuron, count / n] for neuron, count in sorted(others, key=lambda item: (-item[1], item[0]))],
    }
