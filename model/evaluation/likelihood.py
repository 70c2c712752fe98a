"""Likelihoods: how far a variant's next tokens diverge from the unsteered model's, and the perplexity of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cna_kernels.errors import InputError

from ..generate import pad
from ..language_model import LanguageModel
from ..memory import in_halves
from .interventions import UNSTEERED, Interventions
from .metrics import Z

WINDOW = 1024  # tokens that a model sees together for the perplexity, where its context has room
NUMBERS = 1 << 26  # logits that one forward pass may hold: 256 MiB of fp32
FEW = 100  # tokens from which a mean distribution is made
TOKENS = 4096, 65536  # tokens that one forward pass may have, on CPUs and on GPUs


def each_logits(
    model: LanguageModel, interventions: Interventions, rows: Sequence[tuple[int, list[int]]], *, last: bool = False
) -> Iterator[Tensor]:
    """Yield the logits of every row in turn, fp32 ``[S, V]``; with ``last`` only of its last token, ``[1, V]``.

    Args:
        rows: (number of a variant, token ids).

    Raises:
        InputError: a logit is not finite; names the variant.
    """

    def run(chunk):
        return _logits(model, interventions, chunk, last)

    for chunk in _chunks(rows, NUMBERS // model.config.vocab_size, TOKENS[model.device.type == "cuda"], last):
        for (variant, _), logits in zip(chunk, in_halves(run, chunk, model.device), strict=True):
            if not torch.isfinite(logits).all():
                name = interventions.variants[variant].name
                raise InputError(name, "the logits are not finite; is the multiplier too large?")
            yield logits


def _logits(model, interventions, chunk, last) -> list[Tensor]:
    """The logits of each row of a chunk, in one batch."""
    input_ids, lengths = pad([ids for _, ids in chunk], model.device)
    with torch.inference_mode():
        steer = interventions.steer([variant for variant, _ in chunk])
        hidden = model.transformer.hidden(input_ids, lengths=lengths, steer=steer)  # [B, S, H]
        if last:
            hidden = hidden[torch.arange(len(chunk), dtype=torch.int64, device=model.device), lengths - 1][:, None]
        logits = model.transformer.logits(hidden).float()
    return [row if last else row[: len(ids)] for row, (_, ids) in zip(logits, chunk, strict=True)]


def _chunks(rows, most_logits: int, most_tokens: int, last: bool) -> Iterator[list]:
    """Yield chunks of rows, in their order: as many rows as keep to both limits, with padding; at least one."""
    chunk: list = []
    longest = 0
    for row in rows:
        size = max(longest, len(row[1]))
        n_rows = len(chunk) + 1
        if chunk and (n_rows * size > most_tokens or n_rows * (1 if last else size) > most_logits):
            yield chunk
            chunk, size = [], len(row[1])
        chunk.append(row)
        longest = size
    if chunk:
        yield chunk


def divergences(
    model: LanguageModel, interventions: Interventions, variants: Sequence[int], texts: Sequence[list[int]]
) -> dict[int, list[float]]:
    """Return KL(unsteered || variant) of the next token, in nats, the mean over the tokens of each text.

    Args:
        variants: numbers in ``interventions``; the unsteered model is variant 0.
    """
    steered = [variant for variant in variants if variant != 0]
    rows = [(variant, ids) for ids in texts for variant in (0, *steered)]
    found: dict[int, list[float]] = {variant: [] for variant in variants}
    plain = torch.empty(0, dtype=torch.float32)
    for (variant, _), logits in zip(rows, each_logits(model, interventions, rows), strict=True):
        log_p = logits.log_softmax(-1)
        if variant == 0:
            plain = log_p
            continue
        kl = F.kl_div(log_p, plain, log_target=True, reduction="none").sum(-1)  # [S]
        found[variant].append(max(kl.cpu().double().mean().item(), 0.0))
    if 0 in found:
        found[0] = [0.0] * len(texts)
    return found


def ignoring(model: LanguageModel, texts: Sequence[list[int]]) -> float | None:
    """Return KL(unsteered || its own mean) of the next token, in nats: how far a model is that ignores its text.

    The mean is over all tokens of the texts: the model's guess of a token where it does not see what stands before. A
    steered model that is further away has lost what its text tells. None for fewer than FEW tokens, whose mean says
    little.
    """
    mean, entropy, n = torch.zeros(0, dtype=torch.float64), 0.0, 0
    rows = [(0, ids) for ids in texts]
    for logits in each_logits(model, Interventions(model, [UNSTEERED]), rows):
        log_p = logits.double().log_softmax(-1)
        total = log_p.exp().sum(0)
        mean = total if n == 0 else mean + total
        entropy, n = entropy - (log_p.exp() * log_p).sum().item(), n + len(log_p)
    if n < FEW:
        return None
    return max(torch.special.entr(mean / n).sum().item() - entropy / n, 0.0)


class Window(NamedTuple):
    """Tokens of a text that a model sees together, and how many of them, the last, are scored in this window."""

    ids: list[int]
    n_scored: int


def perplexities(
    model: LanguageModel, interventions: Interventions, variants: Sequence[int], windows: Sequence[Window]
) -> dict[int, list[tuple[float, int]]]:
    """Return, for each variant and window, (negative log likelihood in nats, number) of the tokens that are scored."""
    rows = [(variant, window) for window in windows for variant in variants]
    found: dict[int, list[tuple[float, int]]] = {variant: [] for variant in variants}
    each = each_logits(model, interventions, [(variant, window.ids) for variant, window in rows])
    for (variant, (ids, n)), logits in zip(rows, each, strict=True):
        target = torch.tensor(ids[-n:], dtype=torch.int64, device=logits.device)
        loss = F.cross_entropy(logits[-n - 1 : -1], target, reduction="none").cpu().double().sum().item()
        found[variant].append((loss, n))
    return found


def windows_of(model: LanguageModel, text: str, length: int = WINDOW, stride: int | None = None) -> list[Window]:
    """Cut a text into windows of at most ``length`` tokens, each with a BOS in front where plain text gets one.

    Every token is scored once; without a BOS all but the text's first, which nothing predicts. A window after the first
    begins so that the first token it scores has ``length - stride`` tokens before it, a BOS counted, and at least one.

    Args:
        stride: tokens by which a window moves; None puts windows side by side, as ``length`` does.

    Raises:
        InputError: the stride is below 1 or above the window.
    """
    ids = model.tokenizer.encode_answer(text)
    bos = model.tokenizer.bos_id if model.tokenizer.adds_bos else None
    front = [] if bos is None else [bos]
    length = min(length, model.config.context_length)
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise InputError("stride", f"expected 1 to {length}, the tokens of a window, got {stride}")
    stride = min(stride, length - 1)  # a window's first token is not predicted in it
    windows: list[Window] = []
    done, end = 1 - len(front), length - len(front)  # the tokens before ``done`` are scored
    while done < len(ids):
        end = min(end, len(ids))
        start = max(done - (length - stride - len(front)), 0)
        windows.append(Window([*front, *ids[start:end]], end - done))
        done, end = end, end + stride
    return windows


def perplexity(losses: Sequence[tuple[float, int]]) -> dict:
    """Return ``{"mean", "low", "high", "n"}``: the perplexity over all windows, its 95% interval, and n tokens.

    Perplexity is exp(negative log likelihood a token). The interval takes windows to be independent (ratio estimator);
    a single window gives no interval.
    """
    n, n_windows = sum(count for _, count in losses), len(losses)
    rate = math.fsum(loss for loss, _ in losses) / n
    spread = math.fsum((loss - rate * count) ** 2 for loss, count in losses)
    if n_windows < 2:
        return {"mean": _exp(rate), "low": None, "high": None, "n": n}
    error = math.sqrt(n_windows * spread / (n_windows - 1)) / n
    low = max(rate - Z * error, 0.0)  # no perplexity is below 1
    return {"mean": _exp(rate), "low": _exp(low), "high": _exp(rate + Z * error), "n": n}


def _exp(rate: float) -> float:
    return math.exp(min(rate, 700.0))
