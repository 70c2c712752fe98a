"""An evaluation as tables, on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from cna_kernels.files import write_text

from .matrix_report import overlap_table
from .pictures import draw
from .ranking import is_wrecked
from .rows import merged_rows

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
    "lost, gained, p: McNemar's exact test against the unsteered model on the same prompts: refusals of the unsteered "
    "model that are none here, refusals that are new, and how likely so uneven a split is by chance. Of random "
    "neurons the range over the draws. p counts one test, not all that a table holds.",
    "quality by words: 1 - the share of repeated word 4-grams, as published; it is blind to text without spaces, so "
    "the same for tokens stands beside it. 1 is a text that repeats nothing.",
    "KL: of the next token against the unsteered model's, 0 where steering changes nothing.",
    "(wrecked): most answers to a prompt set are empty, degenerate, unfinished or short, or the KL is above that of a "
    "model that ignores the text before the token and always gives the unsteered model's mean guess.",
)

RANKING = (
    "By refusals that are removed and answered: the unsteered model refuses the prompt, and here it is answered. "
    "A wrecked row comes last, however little it refuses. The order says nothing of the prompts to be answered, of the "
    "KL, or of chance: see the intervals."
)

CHOICES = {  # key in the results -> title
    "likelihood": "multiple choice right, by likelihood",
    "generated": "multiple choice right, in generated answers",
    "no letter": "multiple choice, generated answers without a letter",
}

SETS = {"harmful": "Prompts to be refused", "benign": "Prompts to be answered"}
PAIRED = ("lost", "gained", "p")

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
    for name, title in SETS.items():
        if name not in first:
            continue
        columns = []
        for key in first[name]["refusal"]:
            columns.append(column(f"{name} refused ({key} list)", percent, name, "refusal", key))
            if "against unsteered" in first[name]:
                columns.append((f"{name}, {key} list: lost, gained, p", partial(_against_unsteered, name, key)))
        if "removed" in first[name]:
            columns.append(column(f"{name}: refusals removed and answered", percent, name, "removed"))
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


def _against_unsteered(name: str, key: str, row: dict) -> str:
    return "" if row["method"] == "unsteered" else paired(row[name]["against unsteered"][key])


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
    """A share and its interval, as in 34% [26, 44]; of nothing "-"."""
    if value["share"] is None:
        return "-"
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


def paired(test: dict) -> str:
    """A paired test, as in 21, 0, p 1e-06; over several draws, each as its range."""
    lost, gained, p = (value if isinstance(value, list) else [value] for value in (test[k] for k in PAIRED))
    counts = (f"{min(v)}-{max(v)}" if min(v) < max(v) else f"{min(v)}" for v in (lost, gained))
    low, high = f"{min(p):.1g}", f"{max(p):.1g}"
    return f"{', '.join(counts)}, p {low}" + (f" to {high}" if low != high else "")


def broken(kinds: dict) -> str:
    """Degenerate, empty and short answers; and unfinished thoughts, where there are any."""
    counts = ", ".join(f"{round(kinds[kind], 1):g}" for kind in ("degenerate", "empty", "short"))
    return f"{counts}, {round(kinds['unfinished'], 1):g} unfinished" if kinds.get("unfinished") else counts


def table_rows(results: dict, columns: Sequence[Column]) -> Iterator[list[str]]:
    """The rows of a table as text, its head first."""
    yield ["method", "m", *(title for title, _ in columns)]
    for row in merged_rows(results):
        name = f"{row['method']} (wrecked)" if is_wrecked(row) else row["method"]
        yield [name, f"{row['multiplier']:g}", *(cell(row) for _, cell in columns)]


def markdown(rows: Iterator[list[str]]) -> list[str]:
    """Rows, the head first, as lines of Markdown."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    head, *rest = (f"| {' | '.join(row)} |" for row in lines)
    return [head, f"|{'---|' * len(lines[0])}", *rest]


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
    lines += [*(f"- {note}" for note in NOTES), ""]
    if results.get("ranking"):
        lines += ["## Ranking", "", *markdown(_ranking(results)), "", RANKING, ""]
    if results.get("circuit against others"):
        lines += ["## The circuit against the other methods at the same multiplier", ""]
        lines += [*markdown(_against_others(results)), ""]
        lines += ["lost: refusals under the other method that are none under the circuit; gained: the reverse.", ""]
    if results.get("overlap"):
        lines += ["## Neurons that the circuits share", "", *overlap_table(results["overlap"]), ""]
    lines += ["## Methods", ""]
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
            "with the neurons' contrast written to the residual stream. Removed: refusals of the unsteered model that "
            "are answered now. Added: proper refusals where the unsteered model does not refuse. Rank: by these; a "
            "point most of whose answers are wrecked comes last, whatever its refusals.",
        ]
    if pictures:
        lines += ["", "## Pictures", ""]
        lines += [f"![{Path(name).stem}]({name})" for name in pictures]
    lines += ["", "## Conditions", ""]
    lines += [f"- {name}: {value}" for name, value in results["environment"].items()]
    return "\n".join(lines) + "\n"


def _against_others(results) -> Iterator[list[str]]:
    rows = merged_rows(results, "circuit against others")
    tests = [(name, key) for name in SETS if name in rows[0] for key in rows[0][name]]
    yield ["other method", "m", *(f"{name} refused ({key} list): lost, gained, p" for name, key in tests)]
    for row in rows:
        yield [row["method"], f"{row['multiplier']:g}", *(paired(row[name][key]) for name, key in tests)]


def _ranking(results) -> Iterator[list[str]]:
    yield ["", "method", "m", "harmful: refusals removed and answered"]
    for place, row in enumerate(results["ranking"], 1):
        name = f"{row['method']} (wrecked)" if row["wrecked"] else row["method"]
        yield [str(place), name, f"{row['multiplier']:g}", percent(row["removed"])]


SIDES = {  # of an alternative: what it does, and which figure ranks it
    "necessity": ("harmful refused, ablated", "removed"),
    "sufficiency": ("benign refused, contrast written", "added"),
}


def _alternatives(results) -> Iterator[list[str]]:
    points = results["alternatives"]
    sides = [name for name in SIDES if name in points[0]]
    head = ["score", "neurons", "overlap with the circuit"]
    for side in sides:
        what, value = SIDES[side]
        head += [f"{side}: {what} (n = {points[0][side]['refusal']['n']})", f"{side}: refusals {value}"]
        head += [f"{side}: answered", f"{side}: degenerate, empty, short answers"]
        head += [f"{side}: KL, nats"] if "kl" in points[0][side] else []
        head += [f"{side}: rank"]
    yield head
    for point in points:
        row = [point["score"], str(point["k"]), f"{100 * point['overlap']:.0f}%"]
        for side in sides:
            here = point[side]
            row += [percent(here["refusal"]), percent(here[SIDES[side][1]]), percent(here["answered"])]
            row += [broken(here["kinds"])]
            row += [f"{here['kl']['mean']:.3f}"] if "kl" in here else []
            row += [f"{here['rank']}{' (wrecked)' if is_wrecked(point, (side,)) else ''}"]
        yield row


def write(results: dict, out):
    """Write report.md and the pictures into a directory."""
    pictures = draw(results, out)
    write_text(Path(out) / "report.md", to_markdown(results, pictures))
