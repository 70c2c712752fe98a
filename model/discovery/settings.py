"""The settings of a discovery run, and the presets."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from cna_kernels import select
from cna_kernels.errors import InputError

from .units import POSITIONS

SCORES = (*select.SCORES, "norm-weighted", "relp")
POSITION_TEXT = {"last": "last prompt token", "all": "all prompt tokens but the BOS", "answer": "all answer tokens"}


@dataclass(frozen=True)
class Settings:
    """How to select. ``preset`` names the preset that the values came from.

    Attributes:
        fraction: the share of all layers' neurons to select; ``top_k``, where given, is used instead.
        score: one of SCORES. "norm-weighted" asks for the weights of ``down_proj``. "relp" asks for gradients: a whole
            model in memory, one contrast, and position "last"; see ``evaluation/relp.py``.
        skip_layers: layers whose neurons are not candidates.
        universal: whether the universal filter runs.
        universal_threshold: a neuron is universal when it is among the top 0.1% on at least this share of the
            universal prompts and diverse contrasts.
        double_bos: tokenise the rendered chat once more, which puts a second BOS in front for Llama.
        round_means: round both means to the model's dtype before subtracting.
        position: which tokens count: "last" of the prompt, "all" of the prompt but the BOS, or those of the "answer".
            A long prompt counts no more than a short one: its counted tokens share its weight.
        bootstrap: replicates for the stability of the selection; ``seed`` draws them.
        folds: parts for cross-validation.
    """

    fraction: float | None = 0.001
    top_k: int | None = None
    score: str = "abs-delta"
    skip_layers: tuple[int, ...] = ()
    universal: bool = True
    universal_threshold: float = 0.8
    double_bos: bool = False
    round_means: bool = False
    position: str = "last"
    bootstrap: int = 0
    folds: int = 0
    seed: int = 0
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


def settings_from(preset: str | None = None, **changes: Any) -> Settings:
    """Return the preset (default: paper) with the given changes; a change of None keeps the preset's value.

    Raises:
        InputError: a value is out of range.
    """
    if preset is not None and preset not in PRESETS:
        raise InputError("preset", f"expected one of {', '.join(PRESETS)}, got {preset!r}")
    changes = {name: value for name, value in changes.items() if value is not None}
    unknown = set(changes) - {field.name for field in fields(Settings)}
    if unknown:
        raise TypeError(f"unknown settings: {', '.join(sorted(unknown))}")
    if "skip_layers" in changes:
        changes["skip_layers"] = tuple(changes["skip_layers"])
    if "fraction" in changes and "top_k" not in changes:
        changes["top_k"] = None
    settings = replace(PRESETS[preset or "paper"], **changes)
    if changes:
        settings = replace(settings, preset=f"{preset} (changed)" if preset else None)
    elif preset is None:
        settings = replace(settings, preset="paper")
    if settings.score not in SCORES:
        raise InputError("score", f"expected one of {', '.join(SCORES)}, got {settings.score!r}")
    if not 0 < settings.universal_threshold <= 1:
        raise InputError("universal_threshold", f"expected above 0 and at most 1, got {settings.universal_threshold}")
    if settings.position not in POSITIONS:
        raise InputError("position", f"expected one of {', '.join(POSITIONS)}, got {settings.position!r}")
    if settings.bootstrap == 1 or not 0 <= settings.bootstrap <= 10_000:
        raise InputError("bootstrap", f"expected 2 to 10000 replicates, or 0 for none, got {settings.bootstrap}")
    if settings.score == "cohen-d" and settings.position != "last":
        raise InputError("score", "cohen-d compares prompts, and is for position 'last' only")
    if settings.score == "relp" and settings.position != "last":
        raise InputError("score", "relp explains the token after the prompt, and is for position 'last' only")
    if settings.score == "relp" and (settings.bootstrap or settings.folds):
        raise InputError("score", "relp has no sums to draw again from: it is not for bootstrap and folds")
    if settings.folds and not 2 <= settings.folds <= 1000:
        raise InputError("folds", f"expected 2 to 1000, got {settings.folds}")
    if not 0 <= settings.seed < 1 << 63:
        raise InputError("seed", f"expected 0 to 2**63 - 1, got {settings.seed}")
    return settings
