"""Batched forward passes that keep nothing but streaming sums of activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cna_kernels.checks import InputError
from cna_kernels.sums import ActivationSums, NonFiniteActivation

from .memory import is_out_of_memory
from .transformer import Tap, Transformer

AUTO_TOKENS = {"cpu": 512, "cuda": 32768}  # padded tokens of one batch, by device


@dataclass(frozen=True)
class TokenPrompt:
    """One tokenised prompt; ``place`` names it in messages."""

    ids: list[int]
    place: str


Progress = Callable[[int, int], None]  # prompts done, prompts in all


def collect(
    transformer: Transformer,
    prompts: Sequence[TokenPrompt],
    column_weights: Tensor,
    sums: ActivationSums,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
):
    """Add the activations at every prompt's last token to ``sums``.

    Args:
        column_weights: ``[P, C]`` fp32, how much each prompt counts in each column.
        batch: prompts a forward pass; None fits as many as AUTO_TOKENS allows.
        progress: called after every batch.

    Raises:
        InputError: a prompt is too long for the model, or an activation it causes is not finite; names the prompt.
    """
    device = next(transformer.parameters()).device
    check_lengths(prompts, transformer.config.context_length)
    pending = plan_batches(
        [len(prompt.ids) for prompt in prompts], batch, AUTO_TOKENS.get(device.type, AUTO_TOKENS["cpu"])
    )[::-1]
    done = 0
    while pending:
        rows = pending.pop()
        members = [prompts[row] for row in rows]
        try:
            _forward(transformer, members, column_weights[rows], sums, device)
            out_of_memory = False
        except NonFiniteActivation as error:
            raise _blame(transformer, members, sums, device, error) from None
        except RuntimeError as error:
            out_of_memory = is_out_of_memory(error)
            if not out_of_memory:
                raise
        if out_of_memory:  # outside the except block, whose traceback would keep the tensors alive
            sums.discard()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if len(rows) == 1:
                raise InputError(
                    members[0].place, f"out of memory with this prompt alone ({len(members[0].ids)} tokens)"
                )
            half = len(rows) // 2
            pending += [rows[half:], rows[:half]]
            continue
        done += len(rows)
        if progress is not None:
            progress(done, len(prompts))


def plan_batches(lengths: Sequence[int], batch: int | None, max_tokens: int) -> list[list[int]]:
    """Group prompts of similar length: rows of each batch, shortest first.

    A batch holds ``batch`` prompts, or where that is None at most ``max_tokens`` tokens with padding, at least one row.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        size = len(batches[-1]) + 1 if batches else 0
        fits = size <= batch if batch is not None else size * lengths[row] <= max_tokens
        if batches and fits:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def check_lengths(prompts: Sequence[TokenPrompt], context_length: int):
    for prompt in prompts:
        if not prompt.ids:
            raise InputError(prompt.place, "has no token")
        if len(prompt.ids) > context_length:
            raise InputError(prompt.place, f"has {len(prompt.ids)} tokens, the model's context is {context_length}")


def pad(ids: Sequence[list[int]], device) -> tuple[Tensor, Tensor]:
    """Return input_ids ``[B, S]`` padded on the right with 0, and lengths ``[B]``."""
    lengths = torch.tensor([len(row) for row in ids])
    input_ids = torch.zeros(len(ids), int(lengths.max()), dtype=torch.int64)
    for number, row in enumerate(ids):
        input_ids[number, : len(row)] = torch.tensor(row)
    return input_ids.to(device), lengths.to(device)


def _forward(transformer, members, column_weights, sums, device):
    input_ids, lengths = pad([prompt.ids for prompt in members], device)
    batch, n_tokens = input_ids.shape
    weight = torch.zeros(batch, n_tokens, column_weights.shape[1], device=device)
    weight[torch.arange(batch, device=device), lengths - 1] = column_weights.to(device)
    weight = weight.flatten(0, 1)  # [B * S, C]
    with torch.inference_mode():
        transformer.hidden(input_ids, lengths=lengths, tap=Tap(sums, weight))
    sums.fold(weight)


def _blame(transformer, members, sums, device, error) -> InputError:
    """Run the prompts of a failed batch one at a time to name the one at fault."""
    n_layers, n_columns, n_neurons = sums.total.shape
    for prompt in members:
        alone = ActivationSums(n_layers, n_neurons, n_columns, device=device)
        try:
            _forward(transformer, [prompt], torch.ones(1, n_columns), alone, device)
        except NonFiniteActivation as single:
            return InputError(prompt.place, f"causes a {single}; nothing was selected")
    places = f"{members[0].place} .. {members[-1].place}"
    return InputError(places, f"together cause a {error}, none does alone; nothing was selected")
