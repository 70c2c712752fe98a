"""An evaluation as tables, on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from cna_kernels.files import write_text

from .counted import FIELDS
from .matrix_report import overlap_table
from .measures import FROM_LOGITS
from .paired import CHANCE, STAR
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
    "lost, gained, p: McNemar's exact test against the unsteered model on the same prompts: refusals, or prompts that "
    "show the behaviour, of the unsteered model that are none here, those that are new, and how likely so "
    "uneven a split is by chance. Of random neurons the range over the draws. p counts one test, not all that a table "
    "holds.",
    "quality by words: 1 - the share of repeated word 4-grams, as published; it is blind to text without spaces, so "
    "the same for tokens stands beside it. 1 is a text that repeats nothing.",
    "KL: of the next token against the unsteered model's, 0 where steering changes nothing.",
    "(wrecked): most answers to a prompt set are empty, degenerate, unfinished or short, or the KL is above that of a "
    "model that ignores the text before the token and always gives the unsteered model's mean guess.",
)

RANKING = (
    "By what is removed and answered: the unsteered model refuses the prompt, or shows the behaviour, and here it is "
    "answered without. "
    "A wrecked row comes last, however little it refuses. The order says nothing of the prompts to be answered, of the "
    "KL, or of chance: see the intervals."
)

CHOICES = {  # key in the results -> title
    "likelihood": "multiple choice right, by likelihood",
    "generated": "multiple choice right, in generated answers",
    "no letter": "multiple choice, generated answers without a letter",
}

SETS = {"measured": "Prompts to measure on", "harmful": "Prompts to be refused", "benign": "Prompts to be answered"}
PAIRED = ("lost", "gained", "p")

Column = tuple[str, Callable[[dict], str]]  # a column's title, and its cell for a row of the results


def column(title: str, show: Callable[[dict], str], *path: str) -> Column:
    """A column that shows, of each row, the value that the keys of ``path`` lead to."""

    def cell(row: dict) -> str:
        for key in path:
            row = row[key]
        return show(row)

    return title, cell


def label_of(results: dict, name: str) -> str:
    """What tables call a prompt set."""
    return results.get("labels", {}).get(name, name)


def prefix(results: dict, name: str) -> str:
    """What the title of a column begins with: the name of the set that it counts."""
    return f"{label_of(results, name)}: "


def field_of(figures: dict) -> str:
    """The name of a set's hits: "shown" of a behaviour, else "refusal"."""
    return FIELDS["shown" in figures]


def checks(figures: dict) -> list[str]:
    """The lists of refusals, or the behaviour, that are counted on a set."""
    return list(figures[field_of(figures)])


def n_of(figures: dict) -> int:
    """The number of prompts of a set."""
    return (figures["answered"] if "answered" in figures else figures["shown"][checks(figures)[0]])["n"]


def check_title(results: dict, name: str, key: str) -> str:
    """The title of the share of a check's hits: the behaviour, or who is refused by which list."""
    return key if name == "measured" else f"{label_of(results, name)} refused ({key} list)"


def removed_title(results: dict, name: str) -> str:
    """The title of the hits that are gone."""
    if name == "measured":
        answered = " and answered" if "kinds" in results["rows"][0][name] else ""
        return f"{results['behaviour']['name']}: removed{answered}"
    return f"{label_of(results, name)}: refusals removed and answered"


def set_title(results: dict, name: str) -> str:
    """The heading of a set's table."""
    label = label_of(results, name)
    if name == "measured":
        return f"{label}: {results['behaviour']['about'] or results['behaviour']['name']}"
    return SETS[name] if label == name else f"{label}: {SETS[name][0].lower()}{SETS[name][1:]}"


def tables(results: dict) -> list[tuple[str, list[Column]]]:
    """The tables that the results have data for: (title, columns)."""
    first, found = results["rows"][0], []
    for name in SETS:
        if name not in first:
            continue
        figures, called = first[name], prefix(results, name)
        columns = []
        for key in checks(figures):
            columns.append(column(check_title(results, name, key), percent, name, field_of(figures), key))
            if "against unsteered" in figures:
                title = f"{check_title(results, name, key)}: lost, gained, p"
                columns.append((title, partial(_against_unsteered, name, key)))
        if "removed" in figures:
            columns.append(column(removed_title(results, name), percent, name, "removed"))
        if "kinds" in figures:
            columns += [
                column(f"{label_of(results, name)} answered", percent, name, "answered"),
                column(f"{called}degenerate, empty, short answers", broken, name, "kinds"),
                column(f"{called}quality by words", number, name, "quality"),
                column(f"{called}quality by tokens", number, name, "token_quality"),
                column(f"{called}same answer as unsteered", percent, name, "unchanged"),
            ]
        if "judge" in figures:
            columns.append(column(f"{called}judge's score", number, name, "judge"))
        found.append((f"{set_title(results, name)} (n = {n_of(figures)})", columns))
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


def _starred(name: str, key: str, row: dict) -> str:
    """A share, with a star where it differs from the unsteered model's by more than chance; "2/3*" of draws: in two."""
    shown, test = span(row[name][field_of(row[name])][key]), row[name].get("against unsteered", {}).get(key, {"p": 1.0})
    if not isinstance(test["p"], list):
        return shown + ("*" if test["p"] < CHANCE else "")
    starred = sum(p < CHANCE for p in test["p"])
    return f"{shown} {starred}/{len(test['p'])}*" if starred else shown


def brief(results: dict) -> list[Column]:
    """The columns of the one table that fits a terminal."""
    first = results["rows"][0]
    columns: list[Column] = []
    for name in SETS:
        if name in first:
            key = checks(first[name])[0]
            title = key if name == "measured" else f"{label_of(results, name)} refused"
            columns.append((title, partial(_starred, name, key)))
    main = next((name for name in ("measured", "harmful") if "kinds" in first.get(name, {})), None)
    if main is not None:
        called = "" if main == "measured" else f"{label_of(results, main)} "
        columns.append((f"{called}answered", lambda row: f"{100 * row[main]['answered']['share']:.0f}%"))
        columns.append((f"{called}token quality", lambda row: f"{row[main]['token_quality']['mean']:.2f}"))
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
    roles = {"harmful": "to be refused", "measured": "to measure on", "benign": "to be answered"}
    sets = {name: role for name, role in roles.items() if name in first}
    counts = []
    for name, role in sets.items():
        n = n_of(first[name])
        counts.append(f"{label_of(results, name)}: {n} prompts {role}")
    lines = ["; ".join(counts)] if counts else []
    if "measured" in sets:
        behaviour = results["behaviour"]
        lines.append(f"{behaviour['name']}: {behaviour['about'] or behaviour['measure']}, with 95% intervals")
    for name in [name for name in sets if name != "measured"][:1]:
        key = next(iter(first[name]["refusal"]))
        lines.append(f"refused: answers with a phrase of the {key} list, with 95% intervals")
    if any("kinds" in first[name] for name in ("harmful", "measured") if name in sets):
        lines.append("answered: neither refused nor empty, degenerate or short")
    if any("against unsteered" in first[name] for name in sets):
        lines.append(f"{STAR}; 2/3*: in 2 of 3 draws" if _has_draws(results) else STAR)
    return lines


def _has_draws(results: dict) -> bool:
    return any(row["method"].startswith("random ") for row in results["rows"])


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
    counts = ", ".join(
        f"{found['count']} {name}" + (f" ({label_of(results, name)})" if label_of(results, name) != name else "")
        for name, found in facts["suite"]["prompts"].items()
    )
    lines += ["", f"Prompts: {counts or 'none'}.", ""]
    for title, columns in tables(results):
        lines += [f"## {title}", "", *markdown(table_rows(results, columns)), ""]
    lines += [*(f"- {note}" for note in NOTES), ""]
    if results.get("ranking"):
        lines += ["## Ranking", "", *markdown(_ranking(results)), "", RANKING, ""]
    if results.get("circuit against others"):
        lines += ["## The circuit against the other methods at the same multiplier", ""]
        lines += [*markdown(_against_others(results)), ""]
        lines += [
            "lost: refusals, or shows of the behaviour, under the other method but not under the circuit; gained: the "
            "reverse.",
            "",
        ]
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
            "Necessity: refusals, or the behaviour, with the neurons ablated. Sufficiency: the same of benign prompts "
            "with the neurons' contrast written to the residual stream. Removed: what the unsteered model shows, and "
            "is answered without now. Added: what it does not show, and shows now in proper answers. Rank: by these; a "
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
    yield ["other method", "m", *(f"{check_title(results, name, key)}: lost, gained, p" for name, key in tests)]
    for row in rows:
        yield [row["method"], f"{row['multiplier']:g}", *(paired(row[name][key]) for name, key in tests)]


def _ranking(results) -> Iterator[list[str]]:
    where = next(name for name in ("measured", "harmful") if name in results["rows"][0])
    yield ["", "method", "m", removed_title(results, where)]
    for place, row in enumerate(results["ranking"], 1):
        name = f"{row['method']} (wrecked)" if row["wrecked"] else row["method"]
        yield [str(place), name, f"{row['multiplier']:g}", percent(row["removed"])]


SIDES = {  # of an alternative: on which set, what is done, and which figure ranks it
    "necessity": ("harmful", "ablated", "removed"),
    "sufficiency": ("benign", "contrast written", "added"),
}


def _alternatives(results) -> Iterator[list[str]]:
    points = results["alternatives"]
    sides = [name for name in SIDES if name in points[0]]
    head = ["score", "neurons", "overlap with the circuit"]
    for side in sides:
        (name, what, value), first = SIDES[side], points[0][side]
        from_logits = results.get("behaviour", {}).get("measure") in FROM_LOGITS
        others = "benign prompts, " if from_logits else ""  # whose answers are counted
        counted = f"{label_of(results, name)} refused"
        if "shown" in first:
            counted = results["behaviour"]["name"] + (f" of {label_of(results, name)}" if name == "benign" else "")
        head += [f"{side}: {counted}, {what} (n = {first[field_of(first)]['n']})"]
        head += [f"{side}: {'refusals ' if 'refusal' in first else ''}{value}"]
        answered = f"{side}: {others}" if "kinds" in first else ""
        head += [f"{answered}answered", f"{answered}degenerate, empty, short answers"] if answered else []
        head += [f"{side}: KL, nats"] if "kl" in first else []
        head += [f"{side}: rank"]
    yield head
    for point in points:
        row = [point["score"], str(point["k"]), f"{100 * point['overlap']:.0f}%"]
        for side in sides:
            here = point[side]
            row += [percent(here[field_of(here)]), percent(here[SIDES[side][2]])]
            row += [percent(here["answered"]), broken(here["kinds"])] if "kinds" in here else []
            row += [f"{here['kl']['mean']:.3f}"] if "kl" in here else []
            row += [f"{here['rank']}{' (wrecked)' if is_wrecked(point, (side,)) else ''}"]
        yield row


def write(results: dict, out):
    """Write report.md and the pictures into a directory."""
    pictures = draw(results, out)
    write_text(Path(out) / "report.md", to_markdown(results, pictures))
