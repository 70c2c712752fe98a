"""Forward passes over many prompts that keep nothing but streaming sums of activations.

A transformer says in ``blocks()`` which layers are in memory together. All packs go through one block before any goes
through the next. A model in memory, or a rank's part of a model, is one block: each pack goes through all layers at
once. In a model that is read layer by layer every layer is a block, and packs wait between two layers as hidden states.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cna_kernels.errors import InputError
from cna_kernels.sums import ActivationSums, NonFiniteActivation

from ..memory import is_out_of_memory
from ..transformer import Layer, Transformer
from .packed import Packed, Past, run_layer
from .packing import Group, TokenPrompt, group_by_prefix, packs_of

if TYPE_CHECKING:
    from .streamed import HiddenStates, StreamedTransformer

Progress = Callable[[int, int], None]  # called with the prompts and tokens of a pack that is done
DEFAULT_TOKENS = {"cpu": 512, "cuda": 32768}  # tokens of one pack, by device
AUTO_TOKENS = {"cpu": (256, 512, 1024, 2048, 4096), "cuda": (4096, 8192, 16384, 32768, 65536, 131072)}
OUT_OF_MEMORY = "out of memory"


def default_tokens(device: torch.device) -> int:
    """The tokens of one pack where the caller does not set them."""
    return DEFAULT_TOKENS.get(device.type, DEFAULT_TOKENS["cpu"])


def collect(
    transformer: Transformer | StreamedTransformer,
    prompts: Sequence[TokenPrompt],
    column_weights: Tensor,
    sums: ActivationSums,
    *,
    batch: int | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
):
    """Add the activations at every prompt's counted tokens to ``sums``.

    Args:
        transformer: a Transformer, a StreamedTransformer or a ParallelTransformer. All ranks of a ParallelTransformer
            call ``collect`` with equal arguments, except ``progress``, and all get the sums of all neurons.
        column_weights: ``[P, C]`` fp32, how much each prompt counts in each column. The prompt's counted tokens share
            this weight equally.
        batch: prompts a forward pass; None fits as many as ``max_tokens`` allows.
        max_tokens: tokens a forward pass; None takes ``default_tokens``.
        progress: called with the prompts and tokens of every pack. After a block of several, it is called with the
            share of the layers that the pack has passed, rounded down.

    Raises:
        InputError: a prompt is too long for the model, is too much for the memory, or causes an activation that is not
            finite; names the prompt. With a ParallelTransformer also: memory has run out on one rank, the ranks were
            given different prompts, or a rank is gone.
    """
    max_tokens = max_tokens or default_tokens(transformer.device)
    with transformer.own_sums(sums, prompts, column_weights, batch, max_tokens) as own:
        for prompt in prompts:
            check_length(prompt, transformer.config.context_length)
        own.discard()  # drops what a pass that was broken off has left in the buffers
        kind: type[Passes] = getattr(transformer, "passes", Passes)
        passes = kind(transformer, prompts, column_weights, own, batch, max_tokens, progress)
        try:
            for block in passes.blocks():
                passes.run(block)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise InputError("batch", "out of memory for layers and hidden states; give --batch-tokens less") from None
        finally:
            passes.close()


@dataclass
class Pack:
    """Prompts that go through the layers together, each without its ``prefix`` first tokens.

    Attributes:
        rows: the numbers of the prompts.
        prefix: how many tokens at each prompt's beginning are left to the pack of the prefix.
        n_tokens: how many tokens of this pack run.
        start: how many tokens run before this pack's: where its hidden states begin.
        is_prefix: whether this pack is itself the prefix that all prompts of ``rows`` share.
        packed: the Packed tokens, kept from the first layer to the last.
    """

    rows: list[int]
    prefix: int
    n_tokens: int
    start: int
    is_prefix: bool = False
    packed: Packed | None = None


@dataclass
class Grouped:
    """Packs whose prompts share a prefix. The prefix is a pack of its own, or None."""

    prefix: Pack | None
    packs: list[Pack]


class Passes:
    """Runs all packs of one call of :func:`collect`, with its arguments, through one block of layers after another.

    A pack's sums of a block are folded when the whole block has run, and only then do the pack's hidden states change.
    So a pack that fails can run again in halves: where memory ran out, and to find the prompt whose activation is not
    finite.
    """

    PADDED = False  # whether a pack is a batch with padding, which then counts among its tokens

    def __init__(self, transformer, prompts, column_weights, sums, batch, max_tokens, progress):
        self.transformer, self.prompts, self.column_weights, self.sums = transformer, prompts, column_weights, sums
        self.limits = dict(max_prompts=batch, max_tokens=max_tokens, padded=self.PADDED)
        self.progress = progress
        self.hidden: HiddenStates | None = None  # only where the model has more than one block
        self.n_tokens = 0
        self.groups = [self._plan(group) for group in shared_prefixes(transformer, prompts)]
        self.run_so_far, self.reported = [0, 0], [0, 0]  # prompts, tokens; run_so_far: times layers

    def blocks(self):
        """The layers that are in memory together, block by block."""
        return self.transformer.blocks()

    def close(self):
        if self.hidden is not None:
            self.hidden.close()

    def _plan(self, group: Group) -> Grouped:
        prefix = None
        if group.prefix:
            prefix = Pack(group.prompts, group.prefix, group.prefix, self.n_tokens, is_prefix=True)
            self.n_tokens += group.prefix
        packs = []
        for rows in packs_of(self.prompts, group, **self.limits):
            packs.append(self._pack(rows, group.prefix, self.n_tokens))
            self.n_tokens += packs[-1].n_tokens
        return Grouped(prefix, packs)

    def _pack(self, rows, prefix, start) -> Pack:
        return Pack(rows, prefix, sum(len(self.prompts[row].ids) - prefix for row in rows), start)

    def run(self, block: list[Layer]):
        """Run all packs through these layers."""
        if self.hidden is None and not self._is_last(block):
            self.hidden = self.transformer.hidden_states(self.n_tokens)
        for group in self.groups:
            past = None
            if group.prefix is not None:
                past, failure = self._attempt(block, group.prefix, None)
                if failure == OUT_OF_MEMORY and self.hidden is None:  # the prompts then run without sharing it
                    group.packs = self._plan(Group(0, group.prefix.rows)).packs
                    group.prefix = None
                elif failure:
                    raise self._error(group.prefix, failure)
            pending, group.packs = group.packs[::-1], []
            while pending:
                pack = pending.pop()
                _, failure = self._attempt(block, pack, past)
                if not failure:
                    group.packs.append(pack)
                    self._report(pack, block)
                elif len(pack.rows) > 1:
                    pending += self._halves(pack)[::-1]
                else:
                    raise self._error(pack, failure)

    def _attempt(self, block, pack: Pack, past) -> tuple[list[Past] | None, str | None]:
        """Run a pack through a block. Return a prefix's keys and values and None; or None and why nothing was added."""
        try:
            return self._pass(block, pack, past), None
        except NonFiniteActivation as error:
            failure = f"causes a {error}; nothing was selected"
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failure = OUT_OF_MEMORY
        # this is outside the except block: its traceback would keep the tensors alive
        pack.packed = None
        self.sums.discard()
        if self.sums.act_sum.is_cuda:
            torch.cuda.empty_cache()
        if failure == OUT_OF_MEMORY and self.transformer.rank is not None:
            first, last = self.prompts[pack.rows[0]].place, self.prompts[pack.rows[-1]].place
            what = f"out of memory on rank {self.transformer.rank} with these {pack.n_tokens} tokens"
            raise InputError(first if first == last else f"{first} .. {last}", f"{what}; ask for smaller packs")
        return None, failure

    def _pass(self, block, pack: Pack, past) -> list[Past]:
        """Run a pack through a block, fold its sums, and keep its hidden states for the next block."""
        first, last = block[0].number == 0, self._is_last(block)
        if pack.packed is None:
            make = pack_prefix if pack.is_prefix else pack_prompts
            pack.packed = make(self.prompts, pack.rows, pack.prefix, self.column_weights, self.transformer.device)
        assert self.hidden is not None or (first and last), "run has made it before the first block"
        x = None
        if self.hidden is not None and not first:
            x = self.hidden.read(pack.start, pack.n_tokens).to(self.transformer.device)
        x, own = forward(self.transformer, pack.packed, past, self.sums, layers=block, x=x, keep=pack.is_prefix)
        if not last:
            x = x.cpu().contiguous()
        counted = self.column_weights[pack.rows if first and not pack.is_prefix else []]
        self.sums.fold(counted, layer=slice(block[0].number, block[-1].number + 1))
        # the totals have changed, so nothing below may fail: nothing below allocates
        if last:
            pack.packed = None
        elif self.hidden is not None:
            self.hidden.write(pack.start, x)
        return own

    @staticmethod
    def seconds(transformer, rows: Sequence[TokenPrompt], weights: Tensor, sums: ActivationSums) -> float:
        """Measure the seconds that a pass of these prompts takes, by its first two layers."""
        layers = transformer.layers[:2]
        packed = pack_prompts(rows, list(range(len(rows))), 0, weights, transformer.device)
        start = time.perf_counter()
        forward(transformer, packed, None, sums, layers=layers)
        sums.fold(weights)  # fold waits for the device
        return (time.perf_counter() - start) * transformer.config.num_hidden_layers / len(layers)

    def _is_last(self, block):
        return block[-1].number == self.transformer.config.num_hidden_layers - 1

    def _halves(self, pack: Pack) -> list[Pack]:
        half = len(pack.rows) // 2
        first = self._pack(pack.rows[:half], pack.prefix, pack.start)
        return [first, self._pack(pack.rows[half:], pack.prefix, pack.start + first.n_tokens)]

    def _error(self, pack: Pack, failure: str) -> InputError:
        """The error that names the first, or only, prompt of a pack."""
        prompt = self.prompts[pack.rows[0]]
        if failure == OUT_OF_MEMORY:
            failure += f" with this prompt alone ({len(prompt.ids)} tokens)"
        return InputError(prompt.place, failure)

    def _report(self, pack: Pack, block):
        """Call ``progress`` with whole prompts and tokens."""
        if self.progress is None:
            return
        n_layers = self.transformer.config.num_hidden_layers if block is None else len(block)
        counts = len(pack.rows), sum(len(self.prompts[row].ids) for row in pack.rows)
        self.run_so_far = [n + n_layers * count for n, count in zip(self.run_so_far, counts, strict=True)]
        now = [n // self.transformer.config.num_hidden_layers for n in self.run_so_far]
        self.progress(*(after - before for after, before in zip(now, self.reported, strict=True)))
        self.reported = now


def shared_prefixes(transformer: Transformer, prompts: Sequence[TokenPrompt]) -> list[Group]:
    """The groups of ``packing.group_by_prefix``; without a prefix where rotations depend on the prompt's length."""
    if not transformer.config.shares_beginnings(max(len(prompt.ids) for prompt in prompts)):
        return [Group(0, list(range(len(prompts))))]
    return group_by_prefix([prompt.ids for prompt in prompts])


def pack_prompts(prompts, rows: list[int], n_prefix: int, column_weights: Tensor, device) -> Packed:
    """One pack: these prompts without their first ``n_prefix`` tokens."""
    ids = [prompts[row].ids[n_prefix:] for row in rows]
    shares = torch.tensor([[1 / prompts[row].n_counted] for row in rows], dtype=torch.float32)
    counted = [min(prompts[row].n_counted, len(own)) for row, own in zip(rows, ids, strict=True)]
    return Packed(ids, counted, column_weights[rows] * shares, prefix=n_prefix, device=device)


def pack_prefix(prompts, rows: list[int], n_prefix: int, column_weights: Tensor, device) -> Packed:
    """The beginning that these prompts share, as a pack. Its tokens have the weights of all these prompts together."""
    total = prefix_weight(prompts, rows, n_prefix, column_weights)
    n_counted = n_prefix - min(min(len(prompts[row].ids) - prompts[row].n_counted for row in rows), n_prefix)
    token_weight = total[n_prefix - n_counted :].float()
    return Packed([prompts[rows[0]].ids[:n_prefix]], [n_counted], token_weight, prefix=0, device=device)


def prefix_weight(prompts, rows: Sequence[int], n_prefix: int, column_weights: Tensor) -> Tensor:
    """How much each token of a beginning counts for all prompts of ``rows`` together, ``[n_prefix, C]`` fp64."""
    total = torch.zeros(n_prefix, column_weights.shape[1], dtype=torch.float64)
    for row in rows:
        first = len(prompts[row].ids) - prompts[row].n_counted
        total[first:] += column_weights[row].double() / prompts[row].n_counted
    return total


def forward(
    transformer: Transformer | StreamedTransformer,
    packed: Packed,
    past: list[Past] | None,
    sums: ActivationSums,
    *,
    layers: Sequence[Layer],
    x: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, list[Past]]:
    """Run a pack through some layers.

    Args:
        past: the prefix's keys and values in each of the layers, or None.
        x: the hidden states before the first of the layers, ``[1, T, H]``; None embeds the tokens.
        keep: return the pack's own keys and values in each layer, too; else an empty list.
    """
    config, found = transformer.config, []
    with torch.inference_mode():
        if x is None:
            x = transformer.embed_tokens(packed.ids)[None]
        rotation = packed.rotation(transformer.rotary, x.dtype)
        for place, layer in enumerate(layers):
            x, own = run_layer(
                layer,
                packed,
                x,
                rotation,
                None if past is None else past[place],
                window=config.sliding_windows[layer.number],
                last=layer.number == config.num_hidden_layers - 1,
                **sums.layer(layer.number),
            )
            if keep:
                found.append(own)
    return x, found


def check_length(prompt: TokenPrompt, context_length: int):
    if not prompt.ids or prompt.n_counted < 1:
        raise InputError(prompt.place, "has no token" if not prompt.ids else "has no token that counts")
    if len(prompt.ids) > context_length:
        raise InputError(prompt.place, f"has {len(prompt.ids)} tokens, the model's context is {context_length}")


def measure_tokens(
    transformer: Transformer, prompts: Sequence[TokenPrompt], n_columns: int, *, squares: bool
) -> tuple[int, dict[int, float]]:
    """Measure how many tokens a forward pass should have, on copies of these prompts.

    Returns:
        the smallest size, in tokens, that comes within 3% of the best rate; and size -> tokens/s through all layers,
        for every size that fits memory.
    """
    if transformer.rank is not None:
        raise InputError("batch", "is not measured with a model that ranks share; give --batch-tokens a number")
    config, device = transformer.config, transformer.device
    kind: type[Passes] = getattr(transformer, "passes", Passes)
    sums = ActivationSums(config.num_hidden_layers, config.intermediate_size, n_columns, squares=squares, device=device)
    rates: dict[int, float] = {}
    for size in AUTO_TOKENS.get(device.type, AUTO_TOKENS["cpu"]):
        rows: list[TokenPrompt] = []
        n_tokens = 0
        for prompt in itertools.cycle(prompts):
            if rows and n_tokens + len(prompt.ids) > size:
                break
            rows.append(prompt)
            n_tokens += len(prompt.ids)
        rows.sort(key=lambda prompt: (len(prompt.ids), prompt.n_counted))
        weights = torch.ones(len(rows), n_columns, dtype=torch.float32)
        try:
            seconds = [kind.seconds(transformer, rows, weights, sums) for _ in range(3)]
        except NonFiniteActivation:
            pass  # the run itself will name the prompt
        except RuntimeError as error:
            sums.discard()
            if not is_out_of_memory(error):
                raise
            break
        rates[size] = n_tokens / min(seconds)
    if not rates:
        raise InputError("batch", "even the smallest forward pass runs out of memory")
    best = max(rates.values())
    return next(size for size, rate in rates.items() if rate >= 0.97 * best), rates
