"""Attribution of a corpus, unit by unit: tokenised ahead in the background, summed, and handed over as parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from safetensors.torch import save
from torch import Tensor

from cna_kernels import select
from cna_kernels.errors import InputError
from cna_kernels.files import write_bytes
from cna_kernels.sums import ActivationSums, slot_variance

from ..prompts.columns import Columns
from ..prompts.corpus import Entry
from ..transformer import Transformer
from .collect import check_length, collect
from .packing import TokenPrompt
from .streamed import StreamedTransformer

UNIVERSAL_FRACTION = 0.001  # of all neurons, by magnitude, on one prompt
POSITIONS = ("last", "all", "answer")
MOST_REASONS = 10  # reasons that a part keeps for the prompts it left out


@dataclass
class SlotSums:
    """One streaming sum: ``total`` and ``total_sq`` (or None), ``[L, N]`` fp64 on the host; ``count`` is its weight.

    It is no ActivationSums, which holds all columns in one tensor, beside the ops' fp32 buffers. A unit has only some
    columns of a run, and with those buffers the totals would take half as much memory again.
    """

    total: Tensor
    total_sq: Tensor | None
    count: float

    def __iadd__(self, other: SlotSums) -> SlotSums:
        if self.total_sq is not None:
            if other.total_sq is None:
                raise ValueError("other: kept no squares, these sums have them")
            self.total_sq += other.total_sq
        self.total += other.total
        self.count += other.count
        return self


@dataclass
class Part:
    """What one unit of work adds.

    Attributes:
        slots: slot number (see ``prompts/columns.py``) -> its sums; only slots that count a prompt of the unit.
        universal: ``[L, N]`` int64, on how many universal prompts a neuron is among the top 0.1% by magnitude.
        n_universal, n_prompts, n_tokens: the numbers of universal prompts, prompts and tokens that ran. A shared prefix
            counts in ``n_tokens`` once for every prompt.
        n_skipped, skipped: the number of prompts left out; and the reasons, for the first MOST_REASONS of them.
        n_left_out: column -> how many of the prompts left out it would have counted.
    """

    slots: dict[int, SlotSums] = field(default_factory=dict)
    universal: Tensor | None = None
    n_universal: int = 0
    n_prompts: int = 0
    n_tokens: int = 0
    n_skipped: int = 0
    skipped: list[str] = field(default_factory=list)
    n_left_out: dict[int, int] = field(default_factory=dict)

    def skip(self, entry: Entry, reason: str):
        """Count an entry as left out."""
        self.n_skipped += 1
        self.skipped = [*self.skipped, reason][:MOST_REASONS]
        for column, _, _ in entry.columns:
            self.n_left_out[column] = self.n_left_out.get(column, 0) + 1

    def slot(self, number: int) -> SlotSums:
        return self.slots[number]

    def __iadd__(self, other: Part) -> Part:
        """Add another unit's part. Units are added in their order, so the bits do not depend on who ran which."""
        for number, sums in other.slots.items():
            if number in self.slots:
                self.slots[number] += sums
            else:
                self.slots[number] = SlotSums(sums.total.clone(), _clone(sums.total_sq), sums.count)
        if other.universal is not None:
            self.universal = other.universal + (0 if self.universal is None else self.universal)
        self.n_universal += other.n_universal
        self.n_prompts += other.n_prompts
        self.n_tokens += other.n_tokens
        self.n_skipped += other.n_skipped
        self.skipped = [*self.skipped, *other.skipped][:MOST_REASONS]
        for column, count in other.n_left_out.items():
            self.n_left_out[column] = self.n_left_out.get(column, 0) + count
        return self


@dataclass(frozen=True)
class Pass:
    """How activations are computed: what a part's bits depend on besides model and prompts.

    Attributes:
        squares: whether the columns keep sums of squares.
        derived_squares: whether folds and replicates keep sums of squares, too.
        batch, max_tokens: the most prompts, or tokens, of a pack; see ``collect``.
    """

    columns: Columns
    squares: bool = False
    derived_squares: bool = False
    batch: int | None = None
    max_tokens: int | None = None


Encode = Callable[[Sequence[Entry]], list[TokenPrompt]]


def encode_ahead(
    units: Iterable[tuple[int, Sequence[Entry]]], encode: Encode
) -> Iterator[tuple[int, Sequence[Entry], list[TokenPrompt]]]:
    """Yield (first, entries, tokens of the entries) for every unit; meanwhile the next unit is read and tokenised."""
    pending = iter(units)

    def prepare():
        for first, entries in pending:
            return first, entries, encode(entries)
        return None

    ahead = ThreadPoolExecutor(1, thread_name_prefix="tokenise")
    try:
        following = ahead.submit(prepare)
        while (ready := following.result()) is not None:
            following = ahead.submit(prepare)
            yield ready
    finally:
        ahead.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nobody waits for the next unit's tokens


def run_unit(
    transformer: Transformer | StreamedTransformer,
    entries: Sequence[Entry],
    prompts: Sequence[TokenPrompt],
    first: int,
    how: Pass,
    *,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Part:
    """Run the prompts of one unit.

    Args:
        prompts: ``entries``, tokenised.
        first: the number of the first entry in the corpus.
        skip_bad: leave out prompts that are too long for the model, instead of an error.
        progress: called with the (prompts, tokens) of every pack.
    """
    config = transformer.config
    n_layers, n_neurons = config.num_hidden_layers, config.intermediate_size
    slots, weights = how.columns.weights(entries, first)
    alone = [row for row, entry in enumerate(entries) if entry.universal]
    own = torch.zeros(len(entries), len(alone), dtype=torch.float32)  # a column for every universal prompt
    own[alone, torch.arange(len(alone), dtype=torch.int64)] = 1
    weights = torch.cat((weights, own), dim=1)
    part = Part()
    kept = []
    for row, prompt in enumerate(prompts):
        try:
            check_length(prompt, config.context_length)
            kept.append(row)
        except InputError as error:
            if not skip_bad:
                raise
            part.skip(entries[row], str(error))
    sums = ActivationSums(n_layers, n_neurons, weights.shape[1], squares=how.squares, device=transformer.device)
    prompts = [prompts[row] for row in kept]
    if prompts:
        limits = dict(batch=how.batch, max_tokens=how.max_tokens)
        collect(transformer, prompts, weights[kept], sums, **limits, progress=progress)
    total, total_sq = sums.total.cpu(), None if sums.total_sq is None else sums.total_sq.cpu()
    count = sums.count
    del sums  # and with it the buffers of the ops
    with_squares = [how.squares and (slot < how.columns.n_columns or how.derived_squares) for slot in slots]
    for place, slot in enumerate(slots):
        squares = None
        if with_squares[place] and total_sq is not None:
            squares = _column(total_sq, place, sum(with_squares))
        part.slots[slot] = SlotSums(_column(total, place, len(slots)), squares, count[place].item())
    ran = count[len(slots) :] > 0
    if alone:
        k = select.k_from_fraction(UNIVERSAL_FRACTION, 1, sum(config.widths))
        part.universal = select.count_top(total[:, len(slots) :][:, ran].abs(), k)
        part.n_universal = int(ran.sum())
    part.n_prompts = len(prompts)
    part.n_tokens = sum(len(prompt.ids) for prompt in prompts)
    return part


def save_columns(path, names: Sequence[str], totals, *, variance: bool):
    """Write mean, variance and count of every column, ``NAME/mean`` ``[L, N]`` fp64 and so on.

    A column with count 0 gets no mean. A column with count 1 or less gets no variance; without ``variance`` none does.
    """
    tensors = {}
    for column, name in enumerate(names):
        slot = totals.slot(column)
        tensors[f"{name}/count"] = torch.tensor([slot.count], dtype=torch.float64)
        if slot.count > 0:
            tensors[f"{name}/mean"] = slot.total / slot.count
        if slot.count > 1 and variance:
            tensors[f"{name}/variance"] = slot_variance(slot.total, slot.total_sq, slot.count)
    write_bytes(path, save(tensors))


def _column(total: Tensor, place: int, n_kept: int) -> Tensor:
    """Column ``place`` of ``[L, C, N]``: a part of the tensor if at least half of its columns are kept, else a copy."""
    column = total[:, place]
    return column if 2 * n_kept >= total.shape[1] else column.clone()


def _clone(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()
