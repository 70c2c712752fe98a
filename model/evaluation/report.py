"""An evaluation as tables in Markdown and as pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cna_kernels.files import write_text

from ..packages import require

NOTES = (
    "Intervals are 95%: Wilson for shares, 1.96 standard errors for means. They say what other prompts of the same "
    "kind would give, not what another model would.",
    "random: as many random neurons of the same layers; the mean of the draws, with the lowest and the highest "
    "bound of their intervals.",
    "m is the multiplier: 1 changes nothing, 0 takes the behaviour away, 2 goes as far the other way. Directions are "
    "added with strength sign x (1 - m).",
    "answered: the share of answers that are neither refusal nor empty, degenerate or under four words. Only these "
    "comply; a method that makes a model stammer has few refusals and few answers.",
    "degenerate, empty, short answers: three counts, of all; unfinished: thoughts that had not ended, as a further "
    "count.",
    "quality by words: 1 - the share of repeated word 4-grams, as published; it is blind to text without spaces, so "
    "the same for tokens stands beside it. 1 is a text that repeats nothing.",
    "KL: of the next token against the unsteered model's, 0 where steering changes nothing.",
)

CHOICES = {  # key in the results -> title
    "likelihood": "multiple choice right, by likelihood",
    "generated": "multiple choice right, in generated answers",
    "no letter": "multiple choice, generated answers without a letter",
}

Column = tuple[str, Callable[[dict], str]]  # a column's title, and its cell for a row of the results


def column(title: str, show: Callable[[dict], str], *path: str) -> Column:
    """A column that shows, of each row, the value that the keys of ``path`` lead to."""

    def cell(row: dict) -> str:
        for key in path:
            row = row[key]
        return show(row)

    return title, cell


def tables(results: dict) -> list[tuple[str, list[Column]]]:
    """The tables that the results have data for: (title, columns)."""
    first, found = results["rows"][0], []
    for name, title in (("harmful", "Prompts to be refused"), ("benign", "Prompts to be answered")):
        if name not in first:
            continue
        columns = [
            column(f"{name} refused ({key} list)", percent, name, "refusal", key) for key in first[name]["refusal"]
        ]
        columns += [
            column(f"{name} answered", percent, name, "answered"),
            column(f"{name}: degenerate, empty, short answers", broken, name, "kinds"),
            column(f"{name}: quality by words", number, name, "quality"),
            column(f"{name}: quality by tokens", number, name, "token_quality"),
            column(f"{name}: same answer as unsteered", percent, name, "unchanged"),
        ]
        if "judge" in first[name]:
            columns.append(column(f"{name}: judge's score", number, name, "judge"))
        found.append((f"{title} (n = {first[name]['answered']['n']})", columns))
    other: list[Column] = []
    if "kl" in first:
        other.append(column("KL to unsteered, nats a token", number, "kl"))
    if "perplexity" in first:
        other.append(column("perplexity of the text", number, "perplexity"))
    if "mmlu" in first:
        other += [column(title, percent, "mmlu", name) for name, title in CHOICES.items()]
    sizes = [
        f"{first[name]['n']} {what}"
        for name, what in (("kl", "neutral texts"), ("perplexity", "tokens of text"))
        if name in first
    ]
    sizes += [f"{first['mmlu']['likelihood']['n']} questions"] if "mmlu" in first else []
    return [*found, (f"Likelihood and multiple choice ({', '.join(sizes)})", other)] if other else found


def brief(results: dict) -> list[Column]:
    """The columns of the one table that fits a terminal."""
    first = results["rows"][0]
    columns: list[Column] = []
    for name in ("harmful", "benign"):
        if name not in first:
            continue
        key = next(iter(first[name]["refusal"]))
        columns.append(column(f"{name} refused", span, name, "refusal", key))
    if "harmful" in first:
        columns.append(("harmful answered", lambda row: f"{100 * row['harmful']['answered']['share']:.0f}%"))
        columns.append(("harmful token quality", lambda row: f"{row['harmful']['token_quality']['mean']:.2f}"))
    if "kl" in first:
        columns.append(("KL to unsteered, nats", lambda row: f"{row['kl']['mean']:.4f}"))
    if "perplexity" in first:
        columns.append(("perplexity of text", lambda row: f"{row['perplexity']['mean']:.4g}"))
    if "mmlu" in first:
        columns.append(("multiple choice right", lambda row: f"{100 * row['mmlu']['generated']['share']:.0f}%"))
    return columns


def legend(results: dict) -> list[str]:
    """The lines under the one table that fits a terminal: how many prompts, and what the columns count."""
    first = results["rows"][0]
    roles = {"harmful": "to be refused", "benign": "to be answered"}
    sets = {name: role for name, role in roles.items() if name in first}
    counts = [f"{name}: {first[name]['answered']['n']} prompts {role}" for name, role in sets.items()]
    lines = ["; ".join(counts)] if counts else []
    for name in list(sets)[:1]:
        key = next(iter(first[name]["refusal"]))
        lines.append(f"refused: answers with a phrase of the {key} list, with 95% intervals")
    if "harmful" in sets:
        lines.append("answered: neither refused nor empty, degenerate or short")
    return lines


def percent(value: dict) -> str:
    """A share and its interval, as in 34% [26, 44]."""
    return f"{100 * value['share']:.0f}% [{100 * value['low']:.0f}, {100 * value['high']:.0f}]"


def span(value: dict) -> str:
    """A share and its interval for narrow columns, as in 34% 26-44."""
    return f"{100 * value['share']:.0f}% {100 * value['low']:.0f}-{100 * value['high']:.0f}"


def number(value: dict) -> str:
    """A mean and its interval, as in 0.981 [0.970, 0.992]. The mean of a single value has no interval."""
    digits = 4 if abs(value["mean"]) < 0.1 else 3
    if value["low"] is None:
        return f"{value['mean']:.{digits}f}"
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def broken(kinds: dict) -> str:
    """Degenerate, empty and short answers; and unfinished thoughts, where there are any."""
    counts = ", ".join(f"{round(kinds[kind], 1):g}" for kind in ("degenerate", "empty", "short"))
    return f"{counts}, {round(kinds['unfinished'], 1):g} unfinished" if kinds.get("unfinished") else counts


def merged_rows(results: dict) -> list[dict]:
    """The rows of the results, all draws of random neurons merged into one row: means, and the widest bounds."""
    rows: list[Any] = []  # each a row, or a list: the rows of all random draws at one multiplier
    draws: dict[float, list[dict]] = {}
    for row in results["rows"]:
        if not row["method"].startswith("random "):
            rows.append(row)
            continue
        members = draws.setdefault(row["multiplier"], [])
        if not members:
            rows.append(members)
        members.append(row)
    return [_merge(row) | {"method": f"random, {len(row)} draws"} if isinstance(row, list) else row for row in rows]


def _merge(values):
    first = values[0]
    if isinstance(first, dict):
        found = {key: _merge([value[key] for value in values]) for key in first}
        if first.get("low") is not None:
            found["low"], found["high"] = (pick(v[key] for v in values) for key, pick in (("low", min), ("high", max)))
        return found
    return first if isinstance(first, str) or first is None else sum(values) / len(values)


def table_rows(results: dict, columns: Sequence[Column]) -> Iterator[list[str]]:
    """The rows of a table as text, its head first."""
    yield ["method", "m", *(title for title, _ in columns)]
    for row in merged_rows(results):
        yield [row["method"], f"{row['multiplier']:g}", *(cell(row) for _, cell in columns)]


def markdown(rows: Iterator[list[str]]) -> list[str]:
    """Rows, the head first, as lines of Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * (lines[0].count("|") - 1), *lines[1:]]


def to_markdown(results: dict, pictures: list[str]) -> str:
    facts = results["facts"]
    lines = ["# Evaluation of a circuit", ""]
    lines += [f"Model {facts['model']['name']}, {facts['dtype']}. Circuit: {results['circuit']['k']} neurons by "
              f"{results['circuit']['score'] or 'an unknown score'}. Greedy decoding, at most "
              f"{facts['suite']['max_new_tokens']} new tokens."]  # fmt: skip
    counts = ", ".join(f"{found['count']} {name}" for name, found in facts["suite"]["prompts"].items())
    lines += ["", f"Prompts: {counts or 'none'}.", ""]
    for title, columns in tables(results):
        lines += [f"## {title}", "", *markdown(table_rows(results, columns)), ""]
    lines += [*(f"- {note}" for note in NOTES), "", "## Methods", ""]
    lines += [f"- **{name}**: {about}" for name, about in results["methods"].items()]
    lines += [f"- Note: {note}" for note in results["notes"]]
    for name, chosen in results["chosen"].items():
        if "layer" in chosen:
            lines.append(
                f"- chosen for {name}: layer {chosen['layer']}, sign {chosen['sign']:+d}, of {len(chosen['tried'])}"
            )
    if "alternatives" in results:
        lines += ["", "## Other ways to choose neurons", ""]
        lines += markdown(_alternatives(results))
        lines += [
            "",
            "Necessity: refusal of harmful prompts with the neurons ablated. Sufficiency: refusal of benign prompts "
            "with the neurons' contrast written to the residual stream.",
        ]
    if pictures:
        lines += ["", "## Pictures", ""]
        lines += [f"![{Path(name).stem}]({name})" for name in pictures]
    lines += ["", "## Conditions", ""]
    lines += [f"- {name}: {value}" for name, value in results["environment"].items()]
    return "\n".join(lines) + "\n"


def _alternatives(results) -> Iterator[list[str]]:
    points = results["alternatives"]
    sides = [name for name in ("necessity", "sufficiency") if name in points[0]]
    sets = {"necessity": "harmful refused, ablated", "sufficiency": "benign refused, contrast written"}
    titles = [f"{name}: {sets[name]} (n = {points[0][name]['refusal']['n']})" for name in sides]
    yield ["score", "neurons", "overlap with the circuit", *titles]
    for point in points:
        refusals = [percent(point[name]["refusal"]) for name in ("necessity", "sufficiency") if name in point]
        yield [point["score"], str(point["k"]), f"{100 * point['overlap']:.0f}%", *refusals]


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

    curves = _by_method(results)
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


def _by_method(results) -> dict[str, list[dict]]:
    """Method -> its rows, in the order of the multiplier. The unsteered row is every method's row at m = 1."""
    unsteered, *steered = merged_rows(results)
    curves: dict[str, list[dict]] = {}
    for row in steered:
        curves.setdefault(row["method"], [unsteered]).append(row)
    return {name: sorted(rows, key=lambda row: row["multiplier"]) for name, rows in curves.items()}


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


def write(results: dict, out):
    """Write report.md and the pictures into a directory."""
    pictures = draw(results, out)
    write_text(Path(out) / "report.md", to_markdown(results, pictures))
