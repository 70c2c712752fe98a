"""An evaluation as pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from ..packages import require
from .ranking import is_wrecked
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
    first = results["rows"][0]
    name = next((name for name in ("measured", "harmful") if name in first), None)
    if name is not None:
        label, answered = results.get("labels", {}).get(name, name), "kinds" in first[name]
        field = "shown" if "shown" in first[name] else "refusal"
        key = next(iter(first[name][field]))
        what = f"{key}, {label}" if field == "shown" else f"refusal ({key}), {label} prompts"
        panels = [(what, lambda row: row[name][field][key])]
        if answered:
            panels.append((f"answered, {label} prompts", lambda row: row[name]["answered"]))
            panels.append((f"token quality, {label} prompts", lambda row: row[name]["token_quality"]))
        figure, axes = plt.subplots(1, len(panels), figsize=(4.7 * len(panels), 4.2), sharex=True, squeeze=False)
        for axis, (title, value) in zip(axes[0], panels, strict=True):
            _draw_curves(axis, curves, value, (name,))
            axis.set(xlabel="multiplier m", title=title, ylim=(-0.03, 1.05))
        axes[0][0].legend(fontsize=8)
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
    if len({point["k"] for point in results.get("alternatives", [])}) > 1:
        save(_draw_sizes(plt, results["alternatives"]), "size.png")
    return drawn


def solid(values: Sequence[float], wrecked: Sequence[bool]) -> list[float]:
    """The values of a line, NaN at wrecks: there the line is broken."""
    return [math.nan if gone else value for value, gone in zip(values, wrecked, strict=True)]


def _mark(axis, places, values, wrecked, colour):
    """Put a cross where there is a wreck."""
    marked = [(x, y) for x, y, gone in zip(places, values, wrecked, strict=True) if gone]
    if marked:
        named = "wrecked" in axis.get_legend_handles_labels()[1]
        label = None if named else "wrecked"
        axis.scatter(*zip(*marked, strict=True), marker="x", s=60, color=colour, label=label, zorder=3)


def _draw_sizes(plt, points: Sequence[dict]):
    """Refusals, and answers, against the number of neurons, a line for each score."""
    sides = [name for name in ("necessity", "sufficiency") if name in points[0]]
    keys = [key for key in ("refusal", "shown", "answered") if key in points[0][sides[0]]]
    size = 6 * len(sides), 3.75 * len(keys)
    figure, axes = plt.subplots(len(keys), len(sides), figsize=size, squeeze=False, sharex=True)
    for column, side in enumerate(sides):
        for axis, key in zip(axes[:, column], keys, strict=True):
            for name in dict.fromkeys(point["score"] for point in points):
                mine = [point for point in points if point["score"] == name]
                sizes, values = [p["k"] for p in mine], [p[side][key]["share"] for p in mine]
                wrecked = [is_wrecked(point, (side,)) for point in mine]
                (line,) = axis.plot(sizes, solid(values, wrecked), "o-", label=name)
                _mark(axis, sizes, values, wrecked, line.get_color())
            axis.set(xscale="log", xlabel="neurons", ylabel=key, title=f"{side}: {key}", ylim=(-0.03, 1.05))
    axes[0][0].legend(fontsize=8)
    return figure


def _draw_curves(axis, curves, value, sets=()):
    """A line for each method. Where a row is wrecked, by the prompt sets ``sets``, it is broken and marked."""
    for name, rows in curves.items():
        points = [value(row) for row in rows]
        places, wrecked = [row["multiplier"] for row in rows], [is_wrecked(row, sets) for row in rows]
        centre = [point.get("share", point.get("mean")) for point in points]
        bounds = [(c, c) if p["low"] is None else (p["low"], p["high"]) for c, p in zip(centre, points, strict=True)]
        errors = [
            [max(sign * (c - bound[side]), 0) for c, bound in zip(centre, bounds, strict=True)]
            for side, sign in ((0, 1), (1, -1))
        ]
        style = dict(color="grey", alpha=0.5, linestyle=":") if name.startswith("random") else {}
        drawn = axis.errorbar(places, solid(centre, wrecked), errors, marker="o", capsize=2, label=name, **style)
        _mark(axis, places, centre, wrecked, drawn[0].get_color())
