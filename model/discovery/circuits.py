"""Sums -> circuits: the universal filter, selection, and how stable a selection is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from cna_kernels import select
from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError
from cna_kernels.select import Selection, UniversalNeurons
from cna_kernels.sums import ActivationSums

from ..prompts.columns import Columns
from ..prompts.corpus import Contrast
from .settings import Settings
from .units import UNIVERSAL_FRACTION, SlotSums


class Totals(Protocol):
    """The merged sums of a run, as ``units.Part`` holds them."""

    universal: Tensor | None
    n_universal: int
    n_left_out: dict[int, int]

    def slot(self, number: int) -> SlotSums:
        """The sums of one slot: a column, a fold or a replicate; see ``prompts/columns.py``."""


def selection_of(
    settings: Settings,
    widths: Sequence[int],
    universal: UniversalNeurons | None = None,
    dtype: torch.dtype | None = None,
    *,
    norms: Tensor | None = None,
    ranking: Tensor | None = None,
) -> Selection:
    """The selection that the settings ask for in a model whose layers have ``widths`` neurons, computed in ``dtype``.

    ``norms`` and ``ranking``: what the scores "norm-weighted" and "relp" need besides sums, see :class:`Selection`.
    """
    return Selection(
        widths,
        fraction=settings.fraction,
        top_k=settings.top_k,
        score=settings.score,
        skip_layers=settings.skip_layers,
        universal=universal,
        rounded_to=dtype if settings.round_means else None,
        norms=norms,
        ranking=ranking,
    )


def check_counts(
    settings: Settings, contrasts: Sequence[Contrast], counts: dict[str, int], weights: dict[str, float]
) -> None:
    """Raise InputError where the settings need more prompts than a column of a contrast has.

    Args:
        counts, weights: column number as text -> its number of prompts, and the sum of their weights; see
            ``corpus.Corpus``.
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
    totals: Totals, diverse: Sequence[Contrast], threshold: float, widths: Sequence[int], prompts_sha256: str
) -> UniversalNeurons:
    """Return the universal neurons of a model whose layers have ``widths`` neurons.

    These are among the top 0.1% by magnitude on at least ``threshold`` of all votes. Each universal prompt and each
    diverse contrast is one vote.
    """
    k = select.k_from_fraction(UNIVERSAL_FRACTION, 1, sum(widths))
    counts, n_votes = torch.zeros(len(widths), max(widths), dtype=torch.int64), totals.n_universal
    if totals.universal is not None:
        counts += totals.universal
    for contrast in diverse:
        delta = select.contrast(_pair(totals.slot(contrast.positive), totals.slot(contrast.negative)))
        counts += select.count_top(delta.abs()[:, None], k)
        n_votes += 1
    return UniversalNeurons.of(
        counts, n_votes, fraction=UNIVERSAL_FRACTION, threshold=threshold, prompts_sha256=prompts_sha256
    )


def select_circuit(
    totals: Totals, columns: Columns, contrast: Contrast, selection: Selection, **provenance: Any
) -> Circuit:
    """Select the circuit of one contrast, and say how stable the selection is.

    Args:
        provenance: fields of :class:`Circuit` that say what it was found with.
    """
    least = 1 if selection.score == "cohen-d" else 0
    halves = [totals.slot(column) for column in contrast[1:]]
    derived = [columns.derived(column) for column in contrast[1:]]
    pairs = [[totals.slot(slot) for slot in slots] for slots in zip(*derived, strict=True)]
    circuit = selection.circuit(_pair(*halves), **provenance)
    return replace(
        circuit,
        folds=_cross_validate(selection, halves, pairs[: columns.folds], circuit.pairs),
        bootstrap=_bootstrap(selection, pairs[columns.folds :], circuit.pairs, columns.seed, least),
    )


def _pair(positive: SlotSums, negative: SlotSums) -> ActivationSums:
    """ActivationSums whose two columns are these two slots, as ``select`` takes the halves of a contrast."""
    squares = positive.total_sq is not None and negative.total_sq is not None
    sums = ActivationSums(positive.total.shape[0], positive.total.shape[1], 2, squares=squares)
    for column, slot in ((select.POSITIVE, positive), (select.NEGATIVE, negative)):
        sums.total[:, column], sums.count[column] = slot.total, slot.count
        if sums.total_sq is not None and slot.total_sq is not None:
            sums.total_sq[:, column] = slot.total_sq
    return sums


def _without(whole: SlotSums, part: SlotSums) -> SlotSums:
    squares = None if whole.total_sq is None or part.total_sq is None else whole.total_sq - part.total_sq
    return SlotSums(whole.total - part.total, squares, whole.count - part.count)


def _cross_validate(selection, halves, folds, chosen) -> dict | None:
    """Select without each fold in turn: the overlap of each selection with ``chosen``, and how much of its contrast the
    prompts of the left-out fold show."""
    if not folds:
        return None
    overlaps, retained = [], []
    for pair in folds:
        delta, neurons = selection.rank(_pair(*(_without(half, part) for half, part in zip(halves, pair, strict=True))))
        held_out = select.contrast(_pair(*pair))
        where = tuple(torch.tensor(neurons, dtype=torch.int64).T)
        size = delta[where].abs().sum().item()
        retained.append((delta[where].sign() * held_out[where]).sum().item() / size if size else 0.0)
        overlaps.append(len(set(neurons) & set(chosen)) / len(chosen))
    return {"n": len(folds), "overlap": overlaps, "retained": retained}


def _bootstrap(selection, replicates, chosen, seed, least) -> dict | None:
    """How often each neuron is selected when the prompts are drawn again.

    A replicate counts only where both its sides have a count above ``least``: of a handful of prompts a replicate may
    draw none. The result is None where fewer than two replicates count.
    """
    counts: Counter[tuple[int, int]] = Counter()
    n = 0
    for pair in replicates:
        if min(slot.count for slot in pair) > least:
            counts.update(selection.rank(_pair(*pair))[1])
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
