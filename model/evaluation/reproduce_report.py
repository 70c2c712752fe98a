"""The tables of `reproduce.py` in Markdown and for a terminal, the paper's value in a column beside each figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import matrix_report
from .published import DIFFERENCES, LAYERS, MODELS, OVERLAP, QUALITY, REFUSAL, STATEMENTS, TOP, Published
from .report import markdown, number, percent

UNKNOWN = "not in the paper"
NAMES = {
    "unsteered": "unsteered",
    "circuit": "circuit",
    "caa": "CAA, one layer, its sign chosen",
    "caa-released": "CAA as released",
}


@dataclass(frozen=True)
class Shown:
    """A table as text.

    Attributes:
        title: what it is, and which of the paper's tables.
        about: what to know before reading it.
        rows: the head first.
    """

    title: str
    about: str
    rows: list[list[str]]


def tables(results: dict) -> list[Shown]:
    """The tables that the results have data for."""
    found = [_refusal(results), _strengths(results)]
    if "mmlu" in results["strengths"][0]:
        found.append(_mmlu(results))
    found.append(_layers(results))
    if results["overlap"] is not None:
        found.append(_overlap(results))
    if results["behaviours"] is not None:
        found.append(_behaviours(results["behaviours"]))
    return found


def to_markdown(results: dict) -> str:
    """All tables, what is left out, and what must not be compared."""
    lines = [f"# The tables of {results['paper']}, on {results['model']['name']}", "", *_conditions(results), ""]
    for table in tables(results):
        lines += [f"## {table.title}", "", table.about, "", *markdown(iter(table.rows)), ""]
    lines += ["## Left out", ""]
    lines += [f"- {one}" for one in left_out(results)] or ["Nothing."]
    lines += ["", "## What differs from the paper", ""]
    lines += [f"- {one}" for one in differences(results)]
    lines += ["", "## Conditions", ""]
    lines += [f"- {name}: {value}" for name, value in results["environment"].items()]
    return "\n".join(lines) + "\n"


def left_out(results: dict) -> list[str]:
    """A line for each table, or part of one, that there is no data for."""
    return [
        f"{one['what']}: {one['why']}" if one["flag"] is None else f"{one['what']}: needs `{one['flag']}`"
        for one in results["left_out"]
    ]


def differences(results: dict) -> list[str]:
    """What cannot be compared with the paper, or only with care."""
    settings, compared = results["settings"], results["compared"]
    found = []
    if settings["bundled"]:
        found.append(
            "The prompts are not the paper's. They are the bundled behaviour `refusal`: harmless questions about the "
            "model's own life and the user's. The paper's are harmful requests."
        )
    found += [compared["note"]] if compared["note"] else []
    found += DIFFERENCES
    return found + results["notes"]


def _conditions(results: dict) -> list[str]:
    settings, chosen = results["settings"], results["caa"]
    prompts = f"{settings['harmful']} prompts to be refused"
    if settings["bundled"]:
        prompts += " (personal questions, not the paper's set)"
    if settings["benign"]:
        prompts += f", {settings['benign']} prompts to be answered"
    template = "through" if settings["chat template"] else "without"
    caa = "left out, see the notes"
    if chosen is not None:
        caa = f"after layer {chosen['layer']}, sign {chosen['sign']:+d}, chosen on discovery prompts set apart"
    return [
        f"The model is compared {results['compared']['how']}.",
        f"The circuit is {results['circuit']['k']} neurons, 0.1% of all, by {settings['positive']} positive and "
        f"{settings['negative']} negative prompts. Measured: {prompts}. Greedy answers of at most "
        f"{settings['max_new_tokens']} new tokens, {template} the chat template.",
        f"CAA at one layer: {caa}.",
        "Intervals are 95%: Wilson for shares. p is McNemar's exact test against the unsteered model on the same "
        "prompts; beside it stand the prompts that are no longer refused, and those that are newly refused.",
    ]


def _refusal(results: dict) -> Shown:
    rows = results["refusal"]
    over = "benign refused" in rows[0]
    head = ["", "refused (broad list)", "paper", "p", "refused (strict list)", "answered", "degenerate"]
    body = [
        [
            _name(row, ablated=True),
            percent(row["refused"]),
            _paper(row["published"], "refused", _whole, _unsteered if row["method"] == "unsteered" else _ablated),
            _p(row),
            percent(row["refused, strict list"]),
            percent(row["answered"]),
            str(row["kinds"]["degenerate"]),
            *([percent(row["benign refused"])] if over else []),
        ]
        for row in rows
    ]
    about = f"n = {rows[0]['refused']['n']}. Answered: neither refused nor empty, degenerate or short."
    return Shown(f"Refusal, unsteered and ablated ({REFUSAL})", about, [head + ["benign refused"] * over, *body])


def _strengths(results: dict) -> Shown:
    rows = results["strengths"]
    head = ["", "alpha", "refused", "p", "answered", "degenerate", "quality by words", "paper", "quality by tokens"]
    head += ["KL, nats", *(["benign refused"] if "benign refused" in rows[0] else [])]
    body = [
        [
            _name(row),
            f"{row['alpha']:g}",
            percent(row["refused"]),
            _p(row),
            percent(row["answered"]),
            str(row["kinds"]["degenerate"]),
            number(row["quality"]),
            row["published"].get("quality", ""),
            number(row["token_quality"]),
            f"{row['kl']['mean']:.3f}",
            *([percent(row["benign refused"])] if "benign refused" in row else []),
        ]
        for row in rows
    ]
    about = (
        "alpha = 1 - m, 1 is full strength. CAA as released is added with +alpha, towards refusal. Quality: 1 - the "
        f"share of repeated 4-grams. KL: to the unsteered model on {rows[0]['kl']['n']} neutral texts."
    )
    return Shown(f"Circuit and CAA over strengths ({QUALITY})", about, [head, *body])


def _mmlu(results: dict) -> Shown:
    rows = results["strengths"]
    plain = rows[0]["mmlu"]["generated"]["share"]
    head = ["", "alpha", "right, generated", "change, points", "paper", "without a letter", "right, by likelihood"]
    body = [
        [
            _name(row),
            f"{row['alpha']:g}",
            percent(row["mmlu"]["generated"]),
            f"{100 * (row['mmlu']['generated']['share'] - plain):+.1f}",
            row["published"].get("mmlu", ""),
            percent(row["mmlu"]["no letter"]),
            percent(row["mmlu"]["likelihood"]),
        ]
        for row in rows
    ]
    about = f"{rows[0]['mmlu']['generated']['n']} questions, at most {results['settings']['shots']} examples in front."
    return Shown("MMLU against strength", about, [head, *body])


def _layers(results: dict) -> Shown:
    head = ["", "prompts", "last three layers", "paper", "last quarter", "paper", "neurons in each layer"]
    body = []
    for row in results["layers"]:
        cells = []
        for name, pick in _PARTS.items():
            cells += [_whole(row[name]), _paper(row["published"], name, _whole, pick)]
        if row["role"] == "base":
            cells[1] = STATEMENTS["base"]
        per_layer = " ".join(map(str, row["per_layer"]))
        body.append([results[row["role"]]["name"], _PROMPTS[row["prompts"]], *cells, per_layer])
    n = len(results["layers"][0]["per_layer"])
    about = (
        f"The top {TOP} neurons by abs(contrast) of all layers together, universal neurons left out. The last quarter "
        f"is {-(-n // 4)} of {n} layers."
    )
    return Shown(f"Where the top {TOP} neurons lie ({LAYERS})", about, [head, *body])


def _overlap(results: dict) -> Shown:
    found = results["overlap"]
    head = ["", "prompts", "shared", "overlap", "paper", "by chance"]
    body = [
        f"{results['base']['name']} and {results['model']['name']}",
        _PROMPTS[found["prompts"]],
        f"{found['shared']} of {found['k']}",
        _tenth(found["share"]),
        _paper(found, "published", _tenth, lambda model: model.overlap),
        _tenth(found["by chance"]),
    ]
    about = "Both circuits are found on the same texts."
    return Shown(f"Base and instruct share ({OVERLAP})", about, [head, body])


def _behaviours(found: dict) -> Shown:
    head, rows = matrix_report.table(found)
    sizes = ", ".join(f"{name}: {cells[0]['n']} prompts" for name, cells in found["cells"].items())
    about = (
        f"{sizes}. A cell counts the prompts that show the behaviour, by forward passes alone; m = 0 ablates the "
        "circuit of 0.1% of the neurons, m = 2 doubles it. The paper has no such table."
    )
    return Shown("Other behaviours", about, [head, *rows])


def _unsteered(model: Published) -> float:
    return model.refusal[0]


def _ablated(model: Published) -> float:
    return model.refusal[1]


_PARTS: dict[str, Callable] = {
    "last three layers": lambda model: model.last_three_layers,
    "last quarter": lambda model: model.last_quarter,
}
_PROMPTS = {"chat": "chat template", "plain": "plain text"}


def _name(row: dict, *, ablated: bool = False) -> str:
    method = row["method"]
    name = f"as many random neurons ({method.split()[1]})" if method.startswith("random ") else NAMES[method]
    return f"{name}, ablated" if ablated and method != "unsteered" else name


def _p(row: dict) -> str:
    if row["method"] == "unsteered":
        return ""
    test = row["against unsteered"]
    return f"{test['p']:.2g} (-{test['lost']}, +{test['gained']})"


def _paper(published: dict, key: str, show: Callable, pick: Callable[[Published], float | None]) -> str:
    """The paper's value of this model; "" where the paper has none of the kind.

    Where the paper has the value of other models alone, it is UNKNOWN, and theirs, which ``pick`` gives, stand there.
    """
    if key not in published:
        return ""
    if published[key] is not None:
        return show(published[key])
    others = [value for model in MODELS.values() if (value := pick(model)) is not None]
    return f"{UNKNOWN}; its {len(others)} models: {show(min(others))} to {show(max(others))}"


def _whole(share: float) -> str:
    return f"{100 * share:.0f}%"


def _tenth(share: float) -> str:
    return f"{100 * share:.1f}%"
