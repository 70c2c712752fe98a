"""Questions that make no sense: the same prompts on both sides, sides that do not differ, a handful of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError
from cna_kernels.fields import short

from ..prompts.corpus import SKETCH, Contrast, Corpus
from .units import SlotSums

FEW = 10  # prompts of a side, below which a circuit says more about the prompts than about the behaviour
_NOISE = 4  # rounding steps of a mean within which a difference is no difference


def notes_on(corpus: Corpus, contrasts: Sequence[Contrast]) -> list[str]:
    """What a user should hear about the prompts of these contrasts, a line each.

    Raises:
        InputError: both sides of a contrast hold the same prompts, in whatever order.
    """
    notes = []
    for contrast in contrasts:
        sides = [str(column) for column in contrast[1:]]
        counts = [corpus.count.get(side, 0) for side in sides]
        sketches = [corpus.sketches.get(side, []) for side in sides]
        where = "positive, negative" if contrast.name == "circuit" else contrast.name
        shared = set(sketches[0]) & set(sketches[1])
        if shared and set(sketches[0]) == set(sketches[1]):
            raise InputError(where, "both sets hold the same prompts, so no neuron can differ")
        if shared:
            # The smallest hashes of both together are a sample of all prompts, of all of them in small sets.
            sample = sorted(set(sketches[0]) | set(sketches[1]))[:SKETCH]
            share = len(shared & set(sample)) / len(sample)
            notes.append(f"{where}: {100 * share:.2g}% of the prompts are shared by both sets; they cancel each other")
        if 0 < min(counts) < FEW:
            few = f"{counts[0]} and {counts[1]} prompts, fewer than {FEW} on a side"
            notes.append(f"{where}: {few}: the circuit may fit these prompts alone")
    return notes


def check_differs(circuit: Circuit, name: str, halves: Sequence[SlotSums], dtype: torch.dtype) -> None:
    """Raise InputError where the circuit's neurons differ between the sides by no more than rounding.

    Args:
        halves: the sums of both sides.
        dtype: of the activations.
    """
    if not circuit.neurons:
        return
    layers, indices, values = zip(*circuit.neurons, strict=True)
    means = [half.total[list(layers), list(indices)] / half.count for half in halves]
    size = torch.maximum(means[0].abs(), means[1].abs())
    delta = (means[0] - means[1]).abs()
    if bool((delta <= _NOISE * torch.finfo(dtype).eps * size).all()):
        where = "positive, negative" if name == "circuit" else name
        what = f"the sides differ by no more than rounding: the largest contrast is {short(max(map(abs, values)))}"
        raise InputError(where, what)
