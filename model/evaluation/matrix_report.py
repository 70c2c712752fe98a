"""The results of ``matrix`` as a table and as Markdown."""

from __future__ import annotations

from .paired import CHANCE


def table(results: dict, *, short: bool = False) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: a row for each variant; for each behaviour "38 of 60", with the p of the paired test against the
    unsteered model where it is below 0.05, and with wrecked answers. ``short``: a star for such a p, nothing else."""
    names = list(results["cells"])
    titles = ["steered by", "m", "neurons", *names]
    titles += ["KL, nats"] if "kl" in results["variants"][0] else []
    titles += ["harmless answered"] if "answered" in results["variants"][0] else []
    rows = []
    for number, variant in enumerate(results["variants"]):
        mirrored = variant.get("mirrored")  # of an aligned circuit
        size = str(variant["k"] or "") + ("" if mirrored is None else f", {mirrored} at 2 - m")
        row = [_who(variant), f"{variant['multiplier']:g}", size]
        row += [_cell(results["cells"][name][number], short) for name in names]
        if "kl" in variant:
            row.append(f"{variant['kl']['mean']:.3f}")
        if "answered" in variant:
            row.append(f"{100 * variant['answered']['share']:.0f}%")
        rows.append(row)
    return titles, rows


def _who(variant: dict) -> str:
    if variant["circuit"] is None:
        return "nothing"
    if variant["random"] is None:
        return variant["circuit"]
    return f"random like {variant['circuit']} ({variant['random'] + 1})"


def _cell(cell: dict, short: bool) -> str:
    p, kinds = cell["against unsteered"]["p"], cell["kinds"]
    text = f"{sum(cell['hits'])} of {cell['n']}"
    if short:
        return text + ("*" if p < CHANCE else " ")
    text += f" (p {p:.1g})" if p < CHANCE else ""
    wrecked = 0 if kinds is None else kinds["degenerate"] + kinds["empty"] + kinds["unfinished"]
    return text + (f", {wrecked} wrecked" if wrecked else "")


def markdown(results: dict) -> str:
    """The table, what its columns are, and the neurons that pairs of circuits share."""
    titles, rows = table(results)
    lines = ["# Behaviours against circuits", ""]
    lines += [f"- **{name}**: {about['about']}" for name, about in results["behaviours"].items()]
    lines += [
        "",
        "A cell counts the prompts that show the behaviour. p: McNemar's exact test against the unsteered model on the "
        f"same prompts, where below {CHANCE:g}. Wrecked: answers that are empty, repeat themselves or are a thought "
        "that does not end. KL: from the unsteered model, of the next token on neutral text.",
        "",
        f"| {' | '.join(titles)} |",
        f"|{'---|' * len(titles)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    if results["overlap"]:
        lines += [*overlap_table(results["overlap"]), ""]
    return "\n".join(lines)


def overlap_table(overlap: list[dict]) -> list[str]:
    """The neurons that each pair of circuits shares, as lines of Markdown; see ``matrix.overlaps``."""
    lines = ["| circuits | shared neurons | only in the first | only in the second |", "|---|---|---|---|"]
    for pair in overlap:
        names = " and ".join(name.replace("|", "\\|") for name in pair["circuits"])
        lines.append(f"| {names} | {pair['shared']} | {pair['own'][0]} | {pair['own'][1]} |")
    return lines
