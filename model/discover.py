"""Discovery: two prompt sets -> circuit. One pass over the prompts, last token of each, streaming sums."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cna_kernels import __version__, select
from cna_kernels.checks import InputError
from cna_kernels.circuit import Circuit
from cna_kernels.files import sha256
from cna_kernels.sums import ActivationSums

from .collect import Progress, TokenPrompt, collect
from .transformer import Transformer

UNIVERSAL_FRACTION = 0.001  # of all neurons, by magnitude, on one prompt
UNIVERSAL_COLUMNS = 16  # prompts ranked at a time, which bounds memory


@dataclass(frozen=True)
class Settings:
    """How to select. ``preset`` names where the values came from.

    Attributes:
        fraction: of all layers' neurons; ``top_k``, where given, wins.
        score: one of select.SCORES.
        skip_layers: layers whose neurons are not candidates.
        universal: whether the universal filter runs.
        universal_threshold: a neuron is universal when it is among the top 0.1% on this share of the neutral prompts.
        double_bos: tokenise the rendered chat once more, which puts a second BOS in front for Llama.
        round_means: round both means to the model's dtype before subtracting.
    """

    fraction: float | None = 0.001
    top_k: int | None = None
    score: str = "abs-delta"
    skip_layers: tuple[int, ...] = ()
    universal: bool = True
    universal_threshold: float = 0.8
    double_bos: bool = False
    round_means: bool = False
    preset: str | None = None


PRESETS = {
    # arXiv 2605.12290: 0.1% of all neurons by abs(delta), universal neurons left out
    "paper": Settings(preset="paper"),
    # the authors' public code, API default: 200 neurons, no filter, no neurons of layers 0 and 1
    "ref-code": Settings(
        fraction=None, top_k=200, skip_layers=(0, 1), universal=False, double_bos=True, round_means=True,
        preset="ref-code",
    ),
}  # fmt: skip


def settings_from(preset: str | None, **changes) -> Settings:
    """Return the preset (default: paper) with the given changes; a change of None keeps the preset's value.

    Raises:
        InputError: a value is out of range.
    """
    if preset is not None and preset not in PRESETS:
        raise InputError("preset", f"expected one of {', '.join(PRESETS)}, got {preset!r}")
    changes = {name: value for name, value in changes.items() if value is not None}
    if "fraction" in changes and "top_k" not in changes:
        changes["top_k"] = None
    settings = replace(PRESETS[preset or "paper"], **changes)
    if changes:
        settings = replace(settings, preset=f"{preset} (changed)" if preset else None)
    elif preset is None:
        settings = replace(settings, preset="paper")
    if settings.score not in select.SCORES:
        raise InputError("score", f"expected one of {', '.join(select.SCORES)}, got {settings.score!r}")
    if not 0 < settings.universal_threshold <= 1:
        raise InputError("universal_threshold", f"expected above 0 and at most 1, got {settings.universal_threshold}")
    return settings


def discover(
    transformer: Transformer,
    positive: list[TokenPrompt],
    negative: list[TokenPrompt],
    neutral: list[TokenPrompt],
    settings: Settings,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Circuit:
    """Find the circuit; provenance that only the caller knows is added by it.

    Args:
        neutral: the prompts of the universal filter; not read where ``settings.universal`` is False.
    """
    config = transformer.config
    n_layers, n_neurons = config.num_hidden_layers, config.intermediate_size
    k, skipped = _check_size(settings, n_layers, n_neurons)
    neutral = neutral if settings.universal else []
    if settings.score == "cohen-d" and min(len(positive), len(negative)) < 2:
        raise InputError("score", "cohen-d needs at least two prompts in each set")
    n_prompts = len(positive) + len(negative) + len(neutral)

    def offset_progress(start):
        return None if progress is None else lambda done, _: progress(start + done, n_prompts)

    universal = torch.zeros(n_layers, n_neurons, dtype=torch.bool)
    if settings.universal:
        universal = find_universal(
            transformer, neutral, settings.universal_threshold, batch=batch, progress=offset_progress(0)
        )
    device = next(transformer.parameters()).device
    sums = ActivationSums(n_layers, n_neurons, 2, squares=settings.score == "cohen-d", device=device)
    column_weights = torch.zeros(len(positive) + len(negative), 2)
    column_weights[: len(positive), select.POSITIVE] = 1
    column_weights[len(positive) :, select.NEGATIVE] = 1
    collect(
        transformer, [*positive, *negative], column_weights, sums, batch=batch, progress=offset_progress(len(neutral))
    )
    dtype = transformer.embed_tokens.weight.dtype
    delta = select.contrast(sums, rounded_to=dtype if settings.round_means else None)
    chosen = select.top_neurons(select.scores(settings.score, sums, delta), k, skipped | universal)
    return Circuit(
        neurons=tuple((layer, index, delta[layer, index].item()) for layer, index in chosen),
        n_layers=n_layers,
        n_neurons=n_neurons,
        score=settings.score,
        fraction=settings.fraction if settings.top_k is None else None,
        k_rule=select.K_RULE if settings.top_k is None else "given",
        position="last prompt token",
        skipped_layers=tuple(settings.skip_layers),
        universal={
            "prompts": len(neutral),
            "prompts_sha256": sha256(*(repr(prompt.ids) for prompt in neutral)),
            "fraction": UNIVERSAL_FRACTION,
            "threshold": settings.universal_threshold,
            "excluded": universal.nonzero().tolist(),
        }
        if settings.universal
        else None,
        dtype=str(dtype).removeprefix("torch."),
        versions={"cna_kernels": __version__, "torch": torch.__version__},
        preset=settings.preset,
    )


def find_universal(transformer, neutral: list[TokenPrompt], threshold, *, batch=None, progress=None) -> torch.Tensor:
    """Return ``[L, N]`` bool: neurons among the top 0.1% by magnitude on at least ``threshold`` of the prompts."""
    config = transformer.config
    n_layers, n_neurons = config.num_hidden_layers, config.intermediate_size
    k = select.k_from_fraction(UNIVERSAL_FRACTION, n_layers, n_neurons)
    counts = torch.zeros(n_layers, n_neurons, dtype=torch.int64)
    device = next(transformer.parameters()).device
    for start in range(0, len(neutral), UNIVERSAL_COLUMNS):
        group = neutral[start : start + UNIVERSAL_COLUMNS]
        sums = ActivationSums(n_layers, n_neurons, len(group), device=device)
        collect(transformer, group, torch.eye(len(group)), sums, batch=batch)
        counts += select.count_top(sums.total.abs(), k)
        if progress is not None:
            progress(start + len(group), len(neutral))
    return counts >= threshold * len(neutral) - 1e-9  # 0.8 of 35 prompts is 28, in floating point a little more


def _check_size(settings, n_layers, n_neurons):
    """Return k and the mask of skipped layers, before any forward pass."""
    skipped = select.mask_layers(n_layers, n_neurons, settings.skip_layers)
    available = int((~skipped).sum())
    k = settings.top_k
    if k is None:
        k = select.k_from_fraction(settings.fraction, n_layers, n_neurons)
    if not 1 <= k <= available:
        raise InputError("top_k", f"expected 1 to {available}, the neurons that may be chosen, got {k}")
    return k, skipped
