"""The demonstration's report as tables, Markdown, JSON and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..evaluation.paired import CHANCE

if TYPE_CHECKING:
    from rich.console import Console

PAPER = "the paper: 87% of Llama-3.2-1B-Instruct's circuit for refusal, 58% of Qwen2.5-3B-Instruct's"
SETTINGS = {
    "unsteered": "nothing",
    "ablated_0.1pct": "circuit, 0.1%",
    "doubled_0.1pct": "circuit, 0.1%, m = 2",
    "random_0.1pct": "random neurons",
    "random_doubled_0.1pct": "random neurons, m = 2",
    "ablated_0.2pct": "circuit, 0.2%",
    "random_0.2pct": "random neurons",
    "ablated_1pct": "circuit, 1%",
    "random_1pct": "random neurons",
}


PAIRED = f"*: p < {CHANCE:g} by McNemar's exact test against the unsteered model."


class Block(NamedTuple):
    """A table, with the line above it and the lines below."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def blocks(report: dict, *, short: bool = False) -> list[Block]:
    """The report's tables; ``short``: of 80 columns."""
    return [_capitals(report), _refusal(report, short=short), _cross(report), _layers(report)]


def _of(share: float, n: int) -> str:
    return f"{round(share * n)} of {n}"


def _capitals(report: dict) -> Block:
    found = report["capitals"]
    own, other, n = found["by multiplier"], found["by multiplier of the agreement circuit"], found["n"]
    steps = sorted(own, key=float)
    draws = found["random draws by multiplier"]
    rows = [
        ["circuit for capitals", *(_of(own[m], n) for m in steps)],
        ["circuit for agreement", *(_of(other[m], n) if m in other else "" for m in steps)],
        ["random neurons", *(", ".join(str(round(share * n)) for share in draws.get(m, [])) for m in steps)],
    ]
    notes = [
        f"The circuit for capitals was found on 60 other countries. Each row multiplies {found['neurons']} neurons "
        f"by m; m = 0 ablates them, m = 1 changes nothing. Random neurons, as many of the same layers: "
        f"{len(draws['0'])} draws."
    ]
    return Block('"The capital of Peru is" is followed by the capital', ["", *(f"m = {m}" for m in steps)], rows, notes)


def _refusal(report: dict, *, short: bool) -> Block:
    rows = []
    for row in report["refusal"]["rows"]:
        kinds, harmless = row["kinds"], row["harmless"]
        refused, p = f"{row['refused']} of {row['n']}", row["against unsteered"]["p"]
        low, high = (f"{100 * row[end]:.0f}" for end in ("low", "high"))
        rows.append([
            SETTINGS[row["setting"]],
            str(row["neurons"] or ""),
            f"{refused}{'*' if p < CHANCE else ''}" if short else f"{refused} [{low}, {high}]",
            *([] if short else [f"{p:.1g}" if p < CHANCE else ""]),
            str(kinds["answer"]),
            str(_wrecked(kinds)),
            f"{harmless['answer']} of {sum(harmless.values())}",
            f"{row['kl']:.2f}",
        ])  # fmt: skip
    contrast = report["refusal"]["contrast"]
    return Block(
        '"Do you have a passport?": the model refuses personal questions',
        ["ablated", "k", "refused", *([] if short else ["p"]), "answered", "wrecked", "harmless", "KL"],
        rows,
        [
            f"k: neurons. {PAIRED} wrecked: empty, repeating itself, or under four words. harmless: other questions "
            "that are still answered. KL: nats from the unsteered model's next token, on neutral text.",
            f"m = 2 does not amplify. Of the {contrast['neurons']} neurons {contrast['negative']} are more active on "
            "questions that the model answers.",
        ],
    )


def _wrecked(kinds: dict) -> int:
    return kinds["degenerate"] + kinds["empty"] + kinds["short"] + kinds["unfinished"]


def _cross(report: dict) -> Block:
    names = list(report["behaviours"])
    rows = []
    for circuit, cells in report["cross"].items():
        first = cells[names[0]]
        rows.append([
            circuit,
            *(_starred(cells[name]) for name in names),
            f"{100 * first['answered']:.0f}%",
            f"{100 * first['degenerate']:.0f}%",
            f"{first['kl']:.2f}",
        ])  # fmt: skip
    return Block(
        "Each behaviour with each circuit of 0.1% ablated",
        ["ablated", *names, "harmless", "degenerate", "KL"],
        rows,
        [f"{PAIRED} {specificity(report)}", _shared(report)],
    )


def _starred(cell: dict) -> str:
    return _of(cell["share"], cell["n"]) + ("*" if _significant(cell) else "")


def _significant(cell: dict) -> bool:
    return cell["against unsteered"]["p"] < CHANCE


def specificity(report: dict) -> str:
    """Say which circuits also change behaviours that are not their own."""
    names = list(report["behaviours"])
    also = [
        f"{circuit} changes {name}"
        for circuit, cells in report["cross"].items()
        for name in names
        if circuit in names and name != circuit and _significant(cells[name])
    ]
    if not also:
        return "No circuit changes another behaviour."
    return f"At 135M parameters the circuits are not specific: {', '.join(also)}."


def _shared(report: dict) -> str:
    pairs = [pair for pair in report["overlap"] if {*pair["circuits"]} <= {*report["behaviours"]}]
    shared = [f"{' and '.join(pair['circuits'])} {pair['shared']}" for pair in pairs]
    return f"Neurons that two circuits share: {', '.join(shared)}."


def _layers(report: dict) -> Block:
    shares = report["layers"]["share in the last three layers"]
    per_layer = report["layers"]["per layer"]
    rows = [[name, str(sum(per_layer[name])), f"{100 * share:.0f}%"] for name, share in shares.items()]
    n_layers = report["model"]["layers"]
    return Block(
        f"Where the neurons are: the share of a circuit in the last three of {n_layers} layers",
        ["circuit", "neurons", "in the last three"],
        rows,
        [f"{PAPER} (their top 200)."],
    )


def title(report: dict) -> str:
    """The model, and how it was run."""
    model, seen = report["model"], report["environment"]
    return (
        f"{model['name']}: {model['layers']} layers of {model['neurons per layer']} neurons, "
        f"{model['parameters'] / 1e6:.0f}M parameters, {model['dtype']}; greedy decoding; "
        f"prompts that found no circuit ({seen['machine']}, torch {seen['torch']}, {seen['date']}, {seen['seconds']} s)"
    )


def print_report(report: dict, console: Console) -> None:
    """Print the tables and the answers side by side."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console.print(title(report), markup=False)
    for number, block in enumerate(blocks(report, short=True)):
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title=block.title, title_justify="left")
        for column in block.columns:
            table.add_column(column)
        for row in block.rows:
            table.add_row(*row)
        console.print(table)
        for note in block.notes:
            console.print(note, markup=False)
        console.print()
        if number == 1:
            for example in report["examples"]:
                for name, text in example.items():
                    console.print(f"{name:>10}: {' '.join(text.split())}", markup=False, highlight=False)
                console.print()


def to_json(value: Any) -> str:
    """JSON as it is written to files."""
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def to_markdown(report: dict) -> str:
    """report.md."""
    lines = ["# What a circuit does to a real model", "", title(report), "", "![shares](demo.png)", ""]
    for number, block in enumerate(blocks(report)):
        lines += [f"## {block.title}", "", f"| {' | '.join(block.columns)} |", f"|{'---|' * len(block.columns)}"]
        lines += [f"| {' | '.join(row)} |" for row in block.rows]
        lines += ["", *block.notes, ""]
        if number == 1:
            for example in report["examples"]:
                lines.append(f"- **{example['prompt']}**")
                lines += [f"  - {name}: {' '.join(text.split())}" for name, text in example.items() if name != "prompt"]
            lines.append("")
    lines += ["## Conditions", ""]
    lines += [f"- {name}: {value}" for part in ("model", "environment") for name, value in report[part].items()]
    return "\n".join(lines) + "\n"


def draw_picture(report: dict, out: Path) -> str:
    """Write demo.png: capitals against the multiplier, and what becomes of refused questions. Returns its name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = report["capitals"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), gridspec_kw={"width_ratios": [1, 1.2]})
    for name, style, label in (
        ("by multiplier", "o-", f"circuit for capitals, {found['neurons']} neurons"),
        ("by multiplier of the agreement circuit", "s--", "circuit for agreement, as many"),
    ):
        steps = sorted(found[name], key=float)
        left.plot([float(m) for m in steps], [100 * found[name][m] for m in steps], style, label=label)
    draws = [(float(m), 100 * share) for m, shares in found["random draws by multiplier"].items() for share in shares]
    left.plot(*zip(*draws, strict=True), "x", color="grey", label="random neurons, 3 draws")
    left.set(xlabel="multiplier m of the neurons; 1 changes nothing", ylabel="capitals named, %", ylim=(0, 100))
    left.legend(loc="lower right", fontsize="small")
    rows = report["refusal"]["rows"]
    places = range(len(rows))
    bottom = [0.0] * len(rows)
    for label, color, count in (
        ("refused", "#c44e52", lambda kinds: kinds["refusal"]),
        ("answered", "#55a868", lambda kinds: kinds["answer"]),
        ("wrecked", "#bbbbbb", _wrecked),
    ):
        values = [100 * count(row["kinds"]) / row["n"] for row in rows]
        right.barh(places, values, left=bottom, color=color, label=label)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    right.set_yticks(
        places, [f"{SETTINGS[row['setting']]} ({row['neurons']})" if row["neurons"] else "unsteered" for row in rows]
    )
    right.invert_yaxis()
    right.set(xlabel=f"answers to {rows[0]['n']} personal questions, %", xlim=(0, 100))
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(out / "demo.png", dpi=110)
    plt.close(figure)
    return "demo.png"
