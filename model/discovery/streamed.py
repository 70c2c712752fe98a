"""Attribution of models larger than memory: all prompts through a layer before the next layer is read.

Memory holds two layers, the one that computes and the one that is being read, and the hidden states of one unit's
prompts. Hidden states too large for memory go to a file. Only the embedding's rows of the tokens that occur are read.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from cna_kernels.errors import InputError
from cna_kernels.sums import ActivationSums

from ..checkpoint.config import ModelConfig
from ..checkpoint.load import check_entries, dtype_of, load_layer
from ..checkpoint.safetensors_file import Checkpoint
from ..rope import RotaryEmbedding
from ..transformer import Layer

HIDDEN_BYTES = 1 << 30  # the most bytes of hidden states kept in memory; more go to a file


class StreamedTransformer:
    """A checkpoint whose layers are read when their turn comes. It serves ``collect``, but gives no logits.

    Attributes:
        config, dtype, device: as in a Transformer.
        spill: the directory for hidden states that memory does not hold; None takes the system's own.
    """

    rank: int | None = None  # as in a Transformer
    answers, n_ranks = False, 1

    def __init__(self, directory, config: ModelConfig, checkpoint: Checkpoint, *, dtype=None, device="cpu", spill=None):
        check_entries(checkpoint, config, directory)
        self.config, self.device, self.spill = config, torch.device(device), spill
        self.dtype = dtype_of(config, checkpoint) if dtype is None else dtype
        self.rotary = RotaryEmbedding(config).to(self.device)
        self._checkpoint = checkpoint

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Rows of the embedding, ``[T]`` -> ``[T, H]``, straight from the file."""
        entry = self._checkpoint.entries["model.embed_tokens.weight"]
        wanted, place = ids.cpu().unique(return_inverse=True)
        rows = entry.read_rows(wanted.tolist())
        return rows[place].to(device=self.device, dtype=self.dtype)

    def blocks(self) -> Iterator[list[Layer]]:
        """Yield one layer after the other; meanwhile the next layer is read."""

        def read(number):
            if number == self.config.num_hidden_layers:
                return None
            return load_layer(self._checkpoint, self.config, number, dtype=self.dtype, device=self.device)

        with ThreadPoolExecutor(1, thread_name_prefix="read-layer") as ahead:
            following = ahead.submit(read, 0)
            for number in range(self.config.num_hidden_layers):
                block = [following.result()]
                following = ahead.submit(read, number + 1)
                yield block

    def own_sums(self, sums: ActivationSums, *_):
        """As ``Transformer.own_sums``."""
        return nullcontext(sums)

    def hidden_states(self, n_tokens: int) -> HiddenStates:
        """Room for the hidden states between two layers."""
        return HiddenStates(n_tokens, self.config.hidden_size, self.dtype, self.spill)


class HiddenStates:
    """The hidden states of all tokens that run, ``[T, H]``, in memory or in a file."""

    def __init__(self, n_tokens: int, hidden_size: int, dtype: torch.dtype, directory):
        self._hidden_size, self._dtype = hidden_size, dtype
        self._row = hidden_size * dtype.itemsize
        self._memory: Tensor | None = None
        self._file: Any = None  # a raw file, where memory has no room
        self._where = directory or tempfile.gettempdir()
        size = n_tokens * self._row
        if size <= HIDDEN_BYTES:
            self._memory = torch.empty(n_tokens, hidden_size, dtype=dtype)
            return
        try:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
            if hasattr(os, "posix_fallocate"):  # a disk that is too small is found now, not after hours
                os.posix_fallocate(self._file.fileno(), 0, size)
        except OSError as error:
            what = f"cannot hold {size / 2**30:.1f} GiB of hidden states: {error.strerror}"
            raise InputError(self._where, what) from None

    def read(self, start: int, n_tokens: int) -> Tensor:
        """Return the hidden states of ``n_tokens`` tokens from ``start`` on, ``[1, n_tokens, H]``."""
        if self._memory is not None:
            return self._memory[None, start : start + n_tokens]
        x = torch.empty(1, n_tokens, self._hidden_size, dtype=self._dtype)
        self._transfer(self._file.readinto, x, start)
        return x

    def write(self, start: int, x: Tensor):
        """Replace hidden states from token ``start`` on by ``x`` ``[1, n_tokens, H]``, contiguous and on the host."""
        if self._memory is not None:
            self._memory[start : start + x.shape[1]] = x[0]
        else:
            self._transfer(self._file.write, x, start)

    def _transfer(self, move, x, start):
        """Read or write all of ``x``; one call moves at most 2 GiB."""
        memory, place, done = x.view(torch.uint8).view(-1).numpy(), start * self._row, 0
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
        if self._file is not None:
            self._file.close()
