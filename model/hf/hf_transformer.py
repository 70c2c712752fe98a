"""HfTransformer: a model of transformers with the engine attached, in the place of our own ``Transformer``.

It has the methods that the rest of the package calls: ``hidden`` and ``logits`` for whole sequences, ``begin`` and
``step`` for decoding, ``new_table`` and ``down_columns``. All of them run transformers' own code: the decoder, the
caches it makes, and the head as the model's own forward has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from cna_kernels import Engine
from cna_kernels.circuit import Circuit
from cna_kernels.engine.find import find_decoder
from cna_kernels.errors import InputError
from cna_kernels.steering import SteeringTable
from cna_kernels.sums import ActivationSums

from ..steering import Steering
from .hf_config import HfConfig
from .hf_edits import Edits
from .hf_passes import HfPasses


class HfCache:
    """What a decoder keeps of a batch's tokens, and which columns of it are padding.

    Attributes:
        length: the most tokens of a row; an ended row that goes on in the batch stays at the last.
        past: a ``Cache`` of transformers. mask: ``[B, K]`` int64: 1 for a token, 0 for padding, which is on the left.
    """

    def __init__(self, past: Any, mask: Tensor, length: int) -> None:
        if past is None:
            raise InputError("model", "its decoder hands out no cache, which answers are decoded with")
        self.past, self.mask, self.length = past, mask, length

    def keep(self, rows: Tensor) -> None:
        """Drop all rows of the batch but these ``[B']``, in this order."""
        self.past.reorder_cache(rows)  # as in beam search, of all kinds of layers; rows may become fewer, or more
        self.mask = self.mask[rows]


class HfShape:
    """The shape of a model without its weights: it checks circuits, and selects them from sums that others made."""

    rank: int | None = None
    n_ranks = 1
    answers = False

    def __init__(self, config: HfConfig, device: torch.device, dtype: torch.dtype, model_args: dict[str, Any]) -> None:
        self.config, self.device, self.dtype, self.model_args = config, device, dtype, model_args


class HfTransformer:
    """A model of transformers with the engine attached.

    Attributes:
        model: the model. engine: what ``attach`` returned for it. decoder: the part of the model that has the layers.
        config: HfConfig. model_args: the arguments of ``from_pretrained`` that were given.
        device: where token ids go, and hidden states and logits come back to.
        rank, passes: as ``discovery.collect`` asks for them.
    """

    rank: int | None = None
    n_ranks = 1
    passes = HfPasses
    answers = True

    def __init__(self, model: Any, engine: Engine, config: HfConfig, model_args: dict[str, Any]) -> None:
        self.model, self.engine, self.config, self.model_args = model, engine, config, model_args
        self.decoder: Any = find_decoder(model)
        self.device = engine.device
        self._rows: Tensor | None = None  # what the engine's rows were given by
        self._output: Any = None  # the class of what the decoder returns
        self._edits = Edits(self.decoder, engine.mlp_names)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def n_weights(self) -> int:
        """The number of weights."""
        return int(self.model.num_parameters())

    def not_fused(self) -> list[str]:
        """Which layers do not run in one op, and why."""
        return self.engine.not_fused()

    def warm_up(self, longest: int, *, n_columns: int = 2, squares: bool = False) -> list[int]:
        """As ``Transformer.warm_up``."""
        return self.engine.warm_up(longest, n_columns=n_columns, squares=squares)

    def own_sums(self, sums: ActivationSums, *_: Any) -> Any:
        """As ``Transformer.own_sums``."""
        return nullcontext(sums)

    def new_table(self, circuits: Sequence[Circuit], multipliers: Sequence[float]) -> SteeringTable:
        """Circuits at their multipliers on the devices of this model's layers, for a :class:`Steering`."""
        return self.engine.new_table(circuits, multipliers)

    def down_columns(self, layer: int, index: Sequence[int]) -> Tensor:
        """What neurons of a layer write at activation 1, ``[H, k]`` fp32; see ``Engine.down_columns``."""
        return self.engine.down_columns(layer, index)

    def cache_bytes(self, batch: int, length: int) -> int:
        """About how many bytes the keys and values of ``batch`` sequences of ``length`` tokens take."""
        widths = [
            getattr(module, "out_features", 0)
            for name, module in self.decoder.named_modules()
            if name.endswith((".k_proj", ".v_proj"))
        ]
        numbers = sum(widths) or 2 * self.config.num_hidden_layers * self.config.hidden_size  # else at most about so
        return numbers * batch * length * self.dtype.itemsize

    # Whole sequences.

    def __call__(self, input_ids: Tensor, *, steer: Steering | None = None) -> Tensor:
        """Return logits ``[B, S, V]`` for whole sequences ``[B, S]``."""
        return self.logits(self.hidden(input_ids, steer=steer))

    def hidden(self, input_ids: Tensor, *, lengths: Tensor | None = None, steer: Steering | None = None) -> Tensor:
        """Return the decoder's hidden states ``[B, S, H]`` of sequences that are padded on the right, if at all.

        ``lengths`` ``[B]`` is not needed: causal attention never looks at what follows.
        """
        with self._steered(steer):
            return self._hidden_of(self.run(input_ids))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits ``[..., V]`` of hidden states ``[..., H]``, by the model's own forward.

        Its decoder hands over these hidden states instead of running; so what a model does around its head, such as
        scaling or capping logits, is done.
        """
        rows = hidden.flatten(0, -2)[:, None]  # [n, 1, H]
        before, asked = self.decoder.__dict__.get("forward"), 0

        def hand_over(*_: Any, **__: Any) -> Any:
            nonlocal asked
            asked += 1
            return self._output(last_hidden_state=rows)

        self.decoder.forward = hand_over
        try:
            ids = torch.zeros(len(rows), 1, dtype=torch.int64, device=self.device)
            y: Tensor = self.model(input_ids=ids, use_cache=False, return_dict=True).logits
        finally:
            if before is None:
                del self.decoder.forward
            else:
                self.decoder.forward = before
        if asked != 1:
            raise InputError("model", f"{type(self.model).__name__} called its decoder {asked} times for its head")
        return y.to(self.device).view(*hidden.shape[:-1], y.shape[-1])

    # Decoding.

    def begin(
        self, input_ids: Tensor, lengths: Tensor, cache_length: int, steer: Steering | None = None
    ) -> tuple[Tensor, HfCache]:
        """Run prompts, ``[B, S]`` right-padded; return their last tokens' hidden states ``[B, H]`` and the cache.

        Inside, prompts are padded on the left: all rows then go on in the same column of the cache, and a sliding
        window, which transformers counts in columns, never counts padding that lies between tokens.
        """
        place = torch.arange(input_ids.shape[1], dtype=torch.int64, device=input_ids.device)[None]
        position = place - (input_ids.shape[1] - lengths)[:, None]  # below 0 for padding
        mask = (position >= 0).long()
        position = position.clamp(min=0)
        with self._steered(steer):
            found = self.run(input_ids.gather(1, position), mask=mask, position=position, use_cache=True)
        past = getattr(found, "past_key_values", None)
        return self._hidden_of(found)[:, -1], HfCache(past, mask, cache_length)

    def step(self, tokens: Tensor, lengths: Tensor, cache: HfCache, steer: Steering | None = None) -> Tensor:
        """Decode one token of each row, ``[B]``; return the hidden states ``[B, H]``.

        ``lengths`` ``[B]``: the tokens of each row with this one.
        """
        cache.mask = torch.cat((cache.mask, torch.ones_like(cache.mask[:, :1])), dim=1)
        position = (lengths - 1).clamp(max=cache.length - 1)[:, None]
        with self._steered(steer):
            found = self.run(tokens[:, None], mask=cache.mask, position=position, past=cache.past, use_cache=True)
        cache.past = found.past_key_values
        return self._hidden_of(found)[:, 0]

    def run(
        self,
        input_ids: Tensor,
        *,
        mask: Tensor | None = None,
        position: Tensor | None = None,
        past: Any = None,
        use_cache: bool = False,
    ) -> Any:
        """Call the decoder; returns what it returns."""
        found = self.decoder(
            input_ids=input_ids, attention_mask=mask, position_ids=position, past_key_values=past,
            use_cache=use_cache, return_dict=True,
        )  # fmt: skip
        self._output = type(found)
        return found

    def _hidden_of(self, found: Any) -> Tensor:
        hidden: Tensor = found.last_hidden_state
        return hidden.to(self.device)

    @contextlib.contextmanager
    def _steered(self, steer: Steering | None) -> Iterator[None]:
        """Steer the passes inside by a Steering: its table, its rows, its edit of the stream."""
        table, rows = (None, None) if steer is None or steer.table is None else (steer.table, steer.row_circuit)
        if table is not None and table is not self.engine.table:
            self.engine.use(table)
            self._rows = None
        if rows is not self._rows:
            self.engine.rows(rows)
            self._rows = rows
        with nullcontext() if steer is None or steer.edit is None else self._edits.made_by(steer.edit):
            yield

    def unsteered(self) -> None:
        """Let no row be steered in the passes that follow."""
        if self._rows is not None:
            self.engine.rows(None)
            self._rows = None
