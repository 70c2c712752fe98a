"""Attribution of models larger than memory: all prompts through a layer before the next layer is read.

Two layers are in memory, the one that computes and the one that is being read, and the hidden states of the prompts of
one unit, which go to a file where they are too many. Rows of the embedding are read as tokens ask for them.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from cna_kernels.checks import InputError
from cna_kernels.sums import ActivationSums, NonFiniteActivation

from ..checkpoint.config import DTYPES, ModelConfig
from ..checkpoint.load import check_entries, load_layer
from ..checkpoint.safetensors_file import Checkpoint
from ..memory import is_out_of_memory
from ..rope import RotaryEmbedding
from ..transformer import Layer
from .collect import Progress, check_length, default_tokens, pack_prefix, pack_prompts, shared_prefixes
from .packed import Packed, run_layer
from .packing import TokenPrompt, packs_of

HIDDEN_BYTES = 1 << 30  # hidden states that stay in memory; more go to a file


class StreamedTransformer:
    """A checkpoint whose layers are read when their turn comes. It has sums, but no logits.

    Attributes:
        config, dtype, device: as those of a Transformer.
        spill: the directory for hidden states that memory does not hold; None is the system's for temporary files.
    """

    def __init__(self, directory, config: ModelConfig, checkpoint: Checkpoint, *, dtype=None, device="cpu", spill=None):
        check_entries(checkpoint, config, directory)
        self.config, self.device, self.spill = config, torch.device(device), spill
        self.dtype = DTYPES[config.dtype] if dtype is None else dtype
        self.rotary = RotaryEmbedding(config).to(self.device)
        self._checkpoint = checkpoint

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding, ``[T]`` -> ``[T, H]``, straight from the file."""
        entry = self._checkpoint.entries["model.embed_tokens.weight"]
        wanted, place = ids.cpu().unique(return_inverse=True)
        rows = entry.read_rows(wanted.tolist())
        return rows[place].to(device=self.device, dtype=self.dtype)

    def layers(self) -> Iterator[tuple[int, Layer]]:
        """Yield (number, layer); the next one is read meanwhile."""

        def read(number):
            if number == self.config.num_hidden_layers:
                return None
            return load_layer(self._checkpoint, self.config, number, dtype=self.dtype, device=self.device)

        with ThreadPoolExecutor(1, thread_name_prefix="read-layer") as ahead:
            following = ahead.submit(read, 0)
            for number in range(self.config.num_hidden_layers):
                layer = following.result()
                following = ahead.submit(read, number + 1)
                yield number, layer


class HiddenStates:
    """The hidden states of many packs, in memory or in a file."""

    def __init__(self, sizes: Sequence[int], hidden_size: int, dtype: torch.dtype, directory):
        """``sizes``: tokens of each pack."""
        self._shape, self._dtype = (1, -1, hidden_size), dtype
        row = hidden_size * dtype.itemsize
        self._sizes = [size * row for size in sizes]
        self._starts = [sum(self._sizes[:number]) for number in range(len(sizes))]
        self._memory: dict[int, Tensor] = {}
        self._file, self._where = None, directory or tempfile.gettempdir()
        if sum(self._sizes) > HIDDEN_BYTES:
            try:
                self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
                if hasattr(os, "posix_fallocate"):  # a disk that is too small is found now, not after hours
                    os.posix_fallocate(self._file.fileno(), 0, sum(self._sizes))
            except OSError as error:
                what = f"cannot hold {sum(self._sizes) / 2**30:.1f} GiB of hidden states: {error.strerror}"
                raise InputError(self._where, what) from None

    def __getitem__(self, number: int) -> Tensor:
        """``[1, T, H]``."""
        if self._file is None:
            return self._memory[number]
        x = torch.empty(self._sizes[number], dtype=torch.uint8)
        self._transfer(self._file.readinto, x.numpy(), self._starts[number])
        return x.view(self._dtype).view(self._shape)

    def __setitem__(self, number: int, x: Tensor):
        x = x.cpu()
        if self._file is None:
            self._memory[number] = x
        else:
            self._transfer(self._file.write, _bytes(x).reshape(-1), self._starts[number])

    def _transfer(self, move, memory, place):
        """Read or write all of ``memory``; one call moves at most 2 GiB."""
        done = 0
        try:
            self._file.seek(place)
            while done < len(memory):
                moved = move(memory[done:])
                if moved == 0:
                    raise OSError(errno.EIO, "the file has become shorter")
                done += moved
        except OSError as error:
            raise InputError(self._where, f"cannot hold hidden states: {error.strerror}") from None

    def close(self):
        self._memory.clear()
        if self._file is not None:
            self._file.close()


def _bytes(x: Tensor):
    """The memory of a tensor as bytes, ``[..., bytes of a row]``."""
    return x.contiguous().view(torch.uint8).numpy()


def collect(
    transformer: StreamedTransformer,
    prompts: Sequence[TokenPrompt],
    column_weights: Tensor,
    sums: ActivationSums,
    *,
    batch: int | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
):
    """``collect.collect`` for a StreamedTransformer: the same packs, the same sums, layer by layer.

    ``progress`` counts a prompt's part in every layer, rounded down.
    """
    config, device = transformer.config, transformer.device
    for prompt in prompts:
        check_length(prompt, config.context_length)
    max_tokens = max_tokens or default_tokens(device)
    nothing = column_weights[:0]
    prefixes: list[tuple[Packed | None, list[int]]] = []  # of each group: its prefix, and its packs by number
    packs: list[Packed] = []
    rows_of: list[list[int]] = []
    for group in shared_prefixes(transformer, prompts):
        first, prefix = len(packs), None
        for rows in packs_of(prompts, group, max_prompts=batch, max_tokens=max_tokens):
            packs.append(pack_prompts(prompts, rows, group.prefix, column_weights, device))
            rows_of.append(rows)
        if group.prefix:
            prefix = pack_prefix(prompts, group.prompts, group.prefix, column_weights, device)
        prefixes.append((prefix, list(range(first, len(packs)))))
    states = [prefix for prefix, _ in prefixes if prefix] + packs
    hidden = HiddenStates(
        [state.n_tokens for state in states], config.hidden_size, transformer.dtype, transformer.spill
    )
    n_prefixes = len(states) - len(packs)
    report = _Fractions(progress, config.num_hidden_layers)
    longest, out_of_memory = max(state.n_tokens for state in states), False
    try:
        with torch.inference_mode():
            for number, state in enumerate(states):
                hidden[number] = transformer.embed(state.ids)[None]
            for number, layer in transformer.layers():
                last = number == config.num_hidden_layers - 1
                options = dict(window=config.sliding_windows[number], last=last, **sums.layer(number))
                place = 0
                for prefix, members in prefixes:
                    past = None
                    if prefix is not None:
                        x, past = _run(layer, prefix, hidden, place, transformer, None, options)
                        _fold(sums, nothing, number, x, prefix, [prompts[row] for row in rows_of[members[0]]], last)
                        place += 1
                    for member in members:
                        rows, where = rows_of[member], n_prefixes + member
                        x, _ = _run(layer, packs[member], hidden, where, transformer, past, options)
                        weights = column_weights[rows] if number == 0 else nothing
                        _fold(sums, weights, number, x, packs[member], [prompts[row] for row in rows], last)
                        report(len(rows), sum(len(prompts[row].ids) for row in rows))
    except RuntimeError as error:
        out_of_memory = is_out_of_memory(error)
        if not out_of_memory:
            raise
    finally:
        hidden.close()
    if out_of_memory:
        raise InputError("batch", f"out of memory with up to {longest} tokens a forward pass; give --batch-tokens less")


def _run(layer, packed, hidden, place, transformer, past, options):
    x = hidden[place].to(transformer.device)
    x, own = run_layer(layer, packed, x, packed.rotation(transformer.rotary, x.dtype), past, **options)
    if not options["last"]:
        hidden[place] = x
    return x, own


def _fold(sums, weights, layer, x, packed, prompts, last):
    """Fold one layer of one pack; an activation that is not finite is one prompt's, and shows in its output."""
    try:
        sums.fold(weights, layer=layer)
    except NonFiniteActivation as error:
        owners = packed.owners(last)
        bad = [owner for owner, finite in zip(owners, torch.isfinite(x[0]).all(-1).tolist(), strict=True) if not finite]
        place = prompts[bad[0]].place if bad else f"{prompts[0].place} .. {prompts[-1].place}"
        raise InputError(place, f"causes a {error}; nothing was selected") from None


class _Fractions:
    """Calls ``progress`` with whole prompts and tokens as layers are done."""

    def __init__(self, progress, n_layers):
        self._progress, self._n_layers = progress, n_layers
        self._sum, self._said = [0, 0], [0, 0]

    def __call__(self, *counts):
        if self._progress is None:
            return
        self._sum = [total + count for total, count in zip(self._sum, counts, strict=True)]
        now = [total // self._n_layers for total in self._sum]
        self._progress(*(after - before for after, before in zip(now, self._said, strict=True)))
        self._said = now
