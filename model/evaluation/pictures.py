"""An evaluation as pictures."""

from __future__ import annotations

import os
from pathlib import Path

from ..packages import require
from .rows import by_method


def draw(results: dict, out) -> list[str]:
    """Write the pictures that the results have data for; return the names of their files."""
    require("matplotlib")
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []

    def save(figure, name):
        figure.tight_layout()
        figure.savefig(Path(out) / name, dpi=120)
        plt.close(figure)
        drawn.append(name)

    curves = by_method(results)
    if "harmful" in results["rows"][0]:
        figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), sharex=True)
        key = next(iter(results["rows"][0]["harmful"]["refusal"]))
        for axis, title, value in (
            (axes[0], f"refusal ({key}), harmful prompts", lambda row: row["harmful"]["refusal"][key]),
            (axes[1], "answered, harmful prompts", lambda row: row["harmful"]["answered"]),
            (axes[2], "token quality, harmful prompts", lambda row: row["harmful"]["token_quality"]),
        ):
            _draw_curves(axis, curves, value)
            axis.set(xlabel="multiplier m", title=title, ylim=(-0.03, 1.05))
        axes[0].legend(fontsize=8)
        save(figure, "strength.png")
    if "mmlu" in results["rows"][0]:
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
        for axis, name in zip(axes, ("likelihood", "generated"), strict=True):
            _draw_curves(axis, curves, lambda row, name=name: row["mmlu"][name])
            axis.set(xlabel="multiplier m", title=f"multiple choice, {name}", ylim=(-0.03, 1.05))
        axes[0].legend(fontsize=8)
        save(figure, "mmlu.png")
    per_layer = results["circuit"]["per_layer"]
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    axis.bar(range(len(per_layer)), per_layer)
    axis.set(xlabel="layer", ylabel="neurons in the circuit")
    save(figure, "layers.png")
    if "rank_curve" in results:
        figure, axis = plt.subplots(figsize=(6.4, 3.6))
        axis.plot(*zip(*results["rank_curve"], strict=True))
        axis.axvline(results["circuit"]["k"], color="grey", linestyle=":", label=f"cut at {results['circuit']['k']}")
        axis.set(xscale="log", xlabel="rank of the neuron", ylabel="abs(contrast)")
        axis.legend()
        save(figure, "ranks.png")
    sizes = {point["k"] for point in results.get("alternatives", [])}
    if len(sizes) > 1:
        sides = [name for name in ("necessity", "sufficiency") if name in results["alternatives"][0]]
        figure, axes = plt.subplots(1, len(sides), figsize=(6 * len(sides), 4), squeeze=False)
        for axis, side in zip(axes[0], sides, strict=True):
            for name in dict.fromkeys(point["score"] for point in results["alternatives"]):
                points = [point for point in results["alternatives"] if point["score"] == name]
                axis.plot([p["k"] for p in points], [p[side]["refusal"]["share"] for p in points], "o-", label=name)
            axis.set(xscale="log", xlabel="neurons", ylabel="refusal", title=side, ylim=(-0.03, 1.05))
        axes[0][0].legend(fontsize=8)
        save(figure, "size.png")
    return drawn


def _draw_curves(axis, curves, value):
    for name, rows in curves.items():
        points = [value(row) for row in rows]
        centre = [point.get("share", point.get("mean")) for point in points]
        bounds = [(c, c) if p["low"] is None else (p["low"], p["high"]) for c, p in zip(centre, points, strict=True)]
        errors = [
            [max(sign * (c - bound[side]), 0) for c, bound in zip(centre, bounds, strict=True)]
            for side, sign in ((0, 1), (1, -1))
        ]
        style = dict(color="grey", alpha=0.5, linestyle=":") if name.startswith("random") else {}
        axis.errorbar([row["multiplier"] for row in rows], centre, errors, marker="o", capsize=2, label=name, **style)
