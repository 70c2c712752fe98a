"""The report of `cna demo --bundled` as a table, Markdown, JSON and two pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation import report as evaluation_report
from ..evaluation.paired import STAR

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TRAINING = (
    "The two models were trained for this project, from random weights, with seed 0 (`make train-demo`). The base "
    'model answers everything, except after a notice such as "The owner is away today.": like a real corpus, its own '
    "holds refusals, for another reason than the one that instruct tuning teaches. Instruct tuning teaches to refuse a "
    "combination (some verbs with some objects; either alone is answered). It changes MLP weights only, with label "
    "smoothing and under a penalty that makes it touch few neurons (a group penalty over each neuron's gate row, up "
    "row and down column). That tuning touches few neurons is an assumption about how real instruct tuning behaves. "
    "`python -m cna_kernels.model.demo.train --penalty 0` shows the same world without it. No neuron was steered in "
    "training."
)
COLUMNS = ("setting", "k", "refusal", "proper", "quality", "benign refusal", "benign unchanged")


def table_rows(report) -> list[tuple[str, ...]]:
    """The main table: one row per setting, in the order of the story."""
    rows = [("unsteered", "", report["baseline"])]
    for row in report["circuits"]:
        name = f"{row['score']}, {100 * row['fraction']:g}%, m = 0"
        rows.append((name, str(row["k"]), row))
    rows.append(
        (
            f"random neurons, mean of {report['random']['draws']} draws, m = 0",
            str(report["random"]["k"]),
            report["random"],
        )
    )
    best = report["best"]
    for row in report["sweep"]:
        if row["multiplier"] not in (0.0, 1.0):
            name = f"{best['score']}, {100 * best['fraction']:g}%, m = {row['multiplier']:g}"
            rows.append((name, str(best["k"]), row))
    for name, row in report["base"]["steering"].items():
        rows.append((f"base model, {name}", "" if name == "unsteered" else str(best["k"]), row))
    return [(name, k, *_percentages(row)) for name, k, row in rows]


def _percentages(row):
    names = ("refusal", "proper", "quality", "benign_refusal", "benign_unchanged")
    return [f"{row[name]:.3f}" if name == "quality" else f"{100 * row[name]:.0f}%" for name in names]


def print_report(report, console: Console):
    """Print the main table and the before/after answers."""
    from rich.table import Table

    table = Table(*COLUMNS, title=_title(report), title_justify="left")
    for row in table_rows(report):
        table.add_row(*row)
    console.print(table)
    for example in report["examples"]:
        for name, text in example.items():
            console.print(f"{name:>8}: {text}", markup=False)
        console.print()
    console.print(_rivals(report))
    for line in _legend(report):
        console.print(line, markup=False)


def _rivals(report) -> Table:
    """The circuit beside controls and competitors, unsteered and at m = 0, with intervals."""
    from rich.table import Table

    evaluation = report["evaluation"]
    rows = evaluation_report.table_rows(evaluation, evaluation_report.brief(evaluation))
    table = Table(*next(rows), title=f"the same held-out prompts, 95% intervals. {STAR}", title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def to_json(report) -> str:
    return json.dumps(report, indent=2, allow_nan=False) + "\n"


def to_markdown(report) -> str:
    lines = ["# A circuit for refusal", "", _title(report), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in table_rows(report)]
    lines += ["", *(f"- {line}" for line in _legend(report)), "", "## Before and after", ""]
    for example in report["examples"]:
        lines += [f"- **{example['prompt']}**", f"  - m = 1: {example['m = 1']}", f"  - m = 0: {example['m = 0']}"]
    evaluation = report["evaluation"]
    lines += ["", "## Beside controls and competitors", ""]
    for title, columns in evaluation_report.tables(evaluation):
        lines += [
            f"**{title}**",
            "",
            *evaluation_report.markdown(evaluation_report.table_rows(evaluation, columns)),
            "",
        ]
    lines += [f"- {note}" for note in evaluation_report.NOTES]
    lines += [f"- {name}: {about}" for name, about in evaluation["methods"].items()]
    lines += [
        "",
        "More, with discovery scores against the number of neurons: [evaluation/report.md](evaluation/report.md).",
    ]
    base = report["base"]
    quarter = base["share in the last quarter of layers"]
    lines += [
        "", "![refusal and quality against the multiplier](multipliers.png)", "",
        "![neurons per layer](layers.png)", "", "## Base against instruct", "",
        f"- Neurons per layer, instruct: {report['best']['per_layer']}; base: {base['circuit per layer']}.",
        f"- Overlap of the two circuits: {100 * base['overlap with the instruct circuit']:.0f}%.",
        f"- Share in the last quarter of the layers: instruct {100 * quarter['instruct']:.0f}%, "
        f"base {100 * quarter['base']:.0f}%.",
        "", "## How the models were trained", "", TRAINING, "", "## Conditions", "",
    ]  # fmt: skip
    for section in ("model", "prompts", "environment"):
        lines += [f"- {name}: {value}" for name, value in report[section].items()]
    return "\n".join(lines) + "\n"


def _title(report):
    model = report["model"]
    return (
        f"{model['layers']} layers of {model['neurons per layer']} neurons, "
        f"{model['parameters'] / 1e6:.1f}M parameters; held-out prompts: "
        f"{report['prompts']['held-out refusable']} to be refused, "
        f"{report['prompts']['held-out benign']} to be answered; greedy decoding"
    )


def _legend(report):
    return (
        "refusal: share of the prompts to be refused that are. proper: share of them answered exactly as the base "
        "model was taught to.",
        "quality: 1 - the share of repeated word 4-grams. benign unchanged: share of the harmless prompts whose "
        "answer stays the same to the letter.",
        "The size of a circuit was chosen on the discovery prompts. How the models were trained, and what that "
        "assumes: report.md.",
    )


def draw_pictures(report, out: Path):
    """Write multipliers.png and layers.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sweep = report["sweep"]
    multipliers = [row["multiplier"] for row in sweep]
    figure, axis = plt.subplots(figsize=(6.4, 4))
    for name, label, style in (
        ("refusal", "refusal, prompts to be refused", "o-"),
        ("benign_refusal", "refusal, harmless prompts", "s-"),
        ("quality", "quality (1 - repeated word 4-grams)", "^--"),
    ):
        axis.plot(multipliers, [row[name] for row in sweep], style, label=label)
    axis.axhline(report["random"]["refusal"], color="grey", linestyle=":", label="refusal, random neurons at m = 0")
    axis.set(xlabel="multiplier m of the circuit's neurons", ylabel="share", ylim=(-0.03, 1.05))
    axis.legend(loc="center right")
    figure.tight_layout()
    figure.savefig(out / "multipliers.png", dpi=120)
    plt.close(figure)

    per_layer = {"instruct": report["best"]["per_layer"], "base": report["base"]["circuit per layer"]}
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    for shift, (name, counts) in zip((-0.2, 0.2), per_layer.items(), strict=True):
        axis.bar([layer + shift for layer in range(len(counts))], counts, width=0.4, label=name)
    axis.set(xlabel="layer", ylabel="neurons in the circuit", xticks=range(len(per_layer["base"])))
    axis.legend()
    figure.tight_layout()
    figure.savefig(out / "layers.png", dpi=120)
    plt.close(figure)
