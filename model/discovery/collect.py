"""Forward passes over many prompts that keep nothing but streaming sums of activations."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cna_kernels.checks import InputError
from cna_kernels.sums import ActivationSums, NonFiniteActivation

from ..memory import is_out_of_memory
from ..transformer import Transformer
from .packed import Packed, Past, run_layer
from .packing import Group, TokenPrompt, group_by_prefix, packs_of

Progress = Callable[[int, int], None]  # prompts and tokens of a pack that is done
DEFAULT_TOKENS = {"cpu": 512, "cuda": 32768}  # of one pack, by device
AUTO_TOKENS = {"cpu": (256, 512, 1024, 2048, 4096), "cuda": (4096, 8192, 16384, 32768, 65536, 131072)}


def default_tokens(device: torch.device) -> int:
    """Tokens of one pack, where nobody says how many."""
    return DEFAULT_TOKENS.get(device.type, DEFAULT_TOKENS["cpu"])


def collect(
    transformer: Transformer,
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
        column_weights: ``[P, C]`` fp32, how much each prompt counts in each column; its counted tokens share it.
        batch: prompts a forward pass; None fits as many as ``max_tokens`` allows.
        max_tokens: tokens a forward pass; None takes ``default_tokens``.
        progress: called after every pack.

    Raises:
        InputError: a prompt is too long for the model, or an activation it causes is not finite; names the prompt.
    """
    device = transformer.device
    for prompt in prompts:
        check_length(prompt, transformer.config.context_length)
    max_tokens = max_tokens or default_tokens(device)
    groups = shared_prefixes(transformer, prompts)[::-1]
    while groups:
        group = groups.pop()
        past = None
        if group.prefix:
            packed = pack_prefix(prompts, group.prompts, group.prefix, column_weights, device)
            sharing = [prompts[row] for row in group.prompts]
            past = _run(transformer, packed, None, sums, column_weights[:0], sharing, keep=True)
            if past is None:  # without sharing
                groups.append(Group(0, group.prompts))
                continue
        pending = packs_of(prompts, group, max_prompts=batch, max_tokens=max_tokens)[::-1]
        while pending:
            rows = pending.pop()
            members = [prompts[row] for row in rows]
            packed = pack_prompts(prompts, rows, group.prefix, column_weights, device)
            if _run(transformer, packed, past, sums, column_weights[rows], members) is None:
                if len(rows) == 1:
                    what = f"out of memory with this prompt alone ({len(members[0].ids)} tokens)"
                    raise InputError(members[0].place, what)
                half = len(rows) // 2
                pending += [rows[half:], rows[:half]]
            elif progress is not None:
                progress(len(rows), sum(len(prompt.ids) for prompt in members))


def _run(
    transformer, packed: Packed, past, sums: ActivationSums, weights: Tensor, prompts: list[TokenPrompt], *, keep=False
) -> list[Past] | None:
    """:func:`forward`, and fold what it adds; None where memory runs out, and nothing has been added.

    ``prompts``: those of the pack, or those whose beginning it is.
    """
    try:
        found = forward(transformer, packed, past, sums, keep=keep)
        sums.fold(weights)
        return found
    except NonFiniteActivation as error:
        raise _blame(transformer, prompts, sums, error) from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    _free(sums)  # outside the except block, whose traceback would keep the tensors alive
    return None


def _free(sums: ActivationSums):
    """After an allocation failed: drop what was half done, and what PyTorch keeps for later."""
    sums.discard()
    if sums.act_sum.is_cuda:
        torch.cuda.empty_cache()


def shared_prefixes(transformer: Transformer, prompts: Sequence[TokenPrompt]) -> list[Group]:
    """The groups of ``packing.group_by_prefix``, without a prefix where a token's place depends on its prompt's end."""
    longest = max(len(prompt.ids) for prompt in prompts)
    if transformer.config.rope.kind == "dynamic" and longest > transformer.config.max_position_embeddings:
        return [Group(0, list(range(len(prompts))))]
    return group_by_prefix([prompt.ids for prompt in prompts])


def pack_prompts(prompts, rows: list[int], n_prefix: int, column_weights: Tensor, device) -> Packed:
    """One pack: these prompts without their first ``n_prefix`` tokens."""
    ids = [prompts[row].ids[n_prefix:] for row in rows]
    shares = torch.tensor([[1 / prompts[row].n_counted] for row in rows])
    counted = [min(prompts[row].n_counted, len(own)) for row, own in zip(rows, ids, strict=True)]
    return Packed(ids, counted, column_weights[rows] * shares, prefix=n_prefix, device=device)


def pack_prefix(prompts, rows: list[int], n_prefix: int, column_weights: Tensor, device) -> Packed:
    """The beginning that these prompts share, as a pack. What it counts, it counts for all of them."""
    total = torch.zeros(n_prefix, column_weights.shape[1], dtype=torch.float64)
    for row in rows:
        first = len(prompts[row].ids) - prompts[row].n_counted
        total[first:] += column_weights[row].double() / prompts[row].n_counted
    n_counted = n_prefix - min(min(len(prompts[row].ids) - prompts[row].n_counted for row in rows), n_prefix)
    weight = total[n_prefix - n_counted :].float()
    return Packed([prompts[rows[0]].ids[:n_prefix]], [n_counted], weight, prefix=0, device=device)


def forward(
    transformer: Transformer,
    packed: Packed,
    past: list[Past] | None,
    sums: ActivationSums | None,
    *,
    keep: bool = False,
    n_layers: int | None = None,
) -> list[Past]:
    """Run a pack through the layers; with ``keep`` return its keys and values in each, else nothing.

    ``n_layers``: run only the first so many, to see how long they take.
    """
    found = []
    with torch.inference_mode():
        x = transformer.embed_tokens(packed.ids)[None]
        rotation = packed.rotation(transformer.rotary, x.dtype)
        for number, layer in enumerate(transformer.layers[:n_layers]):
            x, own = run_layer(
                layer,
                packed,
                x,
                rotation,
                None if past is None else past[number],
                window=transformer.config.sliding_windows[number],
                last=number == len(transformer.layers) - 1,
                **({} if sums is None else sums.layer(number)),
            )
            if keep:
                found.append(own)
    return found


def check_length(prompt: TokenPrompt, context_length: int):
    if not prompt.ids or prompt.n_counted < 1:
        raise InputError(prompt.place, "has no token" if not prompt.ids else "has no token that counts")
    if len(prompt.ids) > context_length:
        raise InputError(prompt.place, f"has {len(prompt.ids)} tokens, the model's context is {context_length}")


def measure_tokens(
    transformer: Transformer, prompts: Sequence[TokenPrompt], n_columns: int, *, squares: bool
) -> tuple[int, dict[int, float]]:
    """Measure once how many tokens a forward pass should have, on the first layers and prompts like these.

    Returns:
        the fewest tokens that come within 3% of the best rate, and the tokens/s of every size that fits memory, for
        all layers.
    """
    config, device = transformer.config, transformer.device
    n_layers = min(2, config.num_hidden_layers)
    sums = ActivationSums(config.num_hidden_layers, config.intermediate_size, n_columns, squares=squares, device=device)
    rates: dict[int, float] = {}
    for size in AUTO_TOKENS.get(device.type, AUTO_TOKENS["cpu"]):
        rows, n_tokens = [], 0
        for prompt in itertools.cycle(prompts):
            if rows and n_tokens + len(prompt.ids) > size:
                break
            rows.append(prompt)
            n_tokens += len(prompt.ids)
        rows.sort(key=lambda prompt: (len(prompt.ids), prompt.n_counted))
        weights = torch.ones(len(rows), n_columns)
        try:
            packed, seconds = pack_prompts(rows, list(range(len(rows))), 0, weights, device), []
            for _ in range(3):
                start = time.perf_counter()
                forward(transformer, packed, None, sums, n_layers=n_layers)
                sums.fold(weights)  # waits for the device
                seconds.append(time.perf_counter() - start)
        except NonFiniteActivation:
            pass  # the run itself will name the prompt
        except RuntimeError as error:
            sums.discard()
            if not is_out_of_memory(error):
                raise
            break
        rates[size] = n_tokens / min(seconds) * n_layers / config.num_hidden_layers
    if not rates:
        raise InputError("batch", "even the smallest forward pass runs out of memory")
    best = max(rates.values())
    return next(size for size, rate in rates.items() if rate >= 0.97 * best), rates


def _blame(transformer, members, sums, error) -> InputError:
    """Run the prompts of a failed pack one at a time to name the one at fault."""
    n_layers, n_columns, n_neurons = sums.total.shape
    device = sums.act_sum.device
    for prompt in members:
        alone = ActivationSums(n_layers, n_neurons, n_columns, device=device)
        one = torch.ones(1, n_columns)
        try:
            forward(transformer, pack_prompts([prompt], [0], 0, one, device), None, alone)
            alone.fold(one)
        except NonFiniteActivation as single:
            return InputError(prompt.place, f"causes a {single}; nothing was selected")
    places = f"{members[0].place} .. {members[-1].place}"
    return InputError(places, f"together cause a {error}, none does alone; nothing was selected")
