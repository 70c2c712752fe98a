"""`cna demo`: what steering does to a real model, measured on prompts that found no circuit.

SmolLM2-135M-Instruct, three behaviours, three questions: does a circuit's multiplier turn its behaviour up and down, do
as many random neurons or another behaviour's circuit do the same, and what does it cost. All prompts are harmless.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import cna_kernels
from cna_kernels.circuit import Circuit
from cna_kernels.files import FilePath, check_directory, make_directory, write_text

from ..evaluation.behaviour import Behaviour
from ..evaluation.matrix import matrix
from ..language_model import LanguageModel, load
from ..prompts.files import PromptSet, harmless_prompts, neutral_texts
from .checkpoint import SMOLLM2, demo_checkpoint
from .report import draw_picture, print_report, to_json, to_markdown

NAME = "SmolLM2-135M-Instruct"
CAPITALS, AGREEMENT, REFUSAL = "capitals", "agreement", "refusal"
SIZES = {REFUSAL: 0.001, "refusal, 0.2%": 0.002, "refusal, 1%": 0.01}  # circuit -> its share of all neurons
STEPS = (0.0, 0.5, 1.5, 2.0)
HOW = {  # whether neurons are random, and the multiplier -> how keys of the report call it
    (False, 0.0): "ablated", (False, 2.0): "doubled", (True, 0.0): "random", (True, 2.0): "random_doubled",
}  # fmt: skip
ANSWER_TOKENS = 32
BATCH = 64  # answers decoded together: on two cores more is slower
EXAMPLES = ("Can you take my temperature?", "What did I do yesterday?", "Please take a picture of me.")


def tell(out: FilePath, console, say: Callable[[str], None] | None = None) -> dict:
    """Run the demonstration, print it, and write report, picture, circuits and all results to ``out``."""
    make_directory(out)
    check_directory(out)
    out = Path(out)
    say = say or _to_stderr
    started = time.perf_counter()
    model = load(demo_checkpoint(SMOLLM2), device="cpu", dtype="float32")
    results = measure(model, say)
    report = summarise(model, results)
    report["environment"]["seconds"] = round(time.perf_counter() - started, 1)
    for name, circuit in results["circuits"].items():
        circuit.save(out / f"circuit-{name.replace(', ', '-').replace('%', '-percent')}.json")
    picture = draw_picture(report, out)
    write_text(out / "report.json", to_json(report))
    write_text(out / "report.md", to_markdown(report))
    write_text(out / "matrix.json", to_json({name: results[name] for name in ("knob", "cross")}))
    print_report(report, console)
    console.print(f"wrote report.md, report.json, {picture}, matrix.json and the circuits to {out}/", markup=False)
    return report


def measure(model: LanguageModel, say: Callable[[str], None]) -> dict:
    """Find the circuits and measure them. Returns ``circuits`` and two results of ``matrix``: ``knob``, the capitals
    circuit at several multipliers, and ``cross``, three behaviours under every circuit."""
    behaviours = {name: Behaviour.bundled(name) for name in (CAPITALS, AGREEMENT, REFUSAL)}
    circuits: dict[str, Circuit] = {}
    for name in (CAPITALS, AGREEMENT, *SIZES):
        behaviour = behaviours[name.partition(",")[0]]
        say(f"{name}: a circuit from {len(behaviour.positive)} and {len(behaviour.negative)} prompts")
        circuits[name] = model.discover(
            behaviour.positive, behaviour.negative, chat=behaviour.chat, fraction=SIZES.get(name, 0.001)
        )
    pair = {name: circuits[name] for name in (CAPITALS, AGREEMENT)}
    knob = matrix(
        model, [behaviours[CAPITALS]], pair, multipliers={CAPITALS: STEPS, AGREEMENT: (0.0, 2.0)},
        random_draws={CAPITALS: 3, AGREEMENT: 0}, say=say,
    )  # fmt: skip
    neutral = PromptSet.of(neutral_texts().texts[::2], "neutral_texts")
    cross = matrix(
        model, [*behaviours.values()], circuits,
        multipliers=dict.fromkeys(circuits, (0.0,)) | {REFUSAL: (0.0, 2.0)},
        random_draws=dict.fromkeys(pair, 0) | dict.fromkeys(SIZES, 1) | {"refusal, 1%": 2},
        neutral=neutral, harmless=harmless_prompts(), max_new_tokens=ANSWER_TOKENS, batch=BATCH, say=say,
    )  # fmt: skip
    return {"circuits": circuits, "knob": knob, "cross": cross}


def summarise(model: LanguageModel, results: dict) -> dict:
    """What report.json holds, but for the seconds. Shares are of the prompts that show a behaviour."""
    circuits, knob, cross = results["circuits"], results["knob"], results["cross"]
    config = model.config
    last_three = {name: sum(c.per_layer()[-3:]) / c.k for name, c in circuits.items()}
    return {
        "model": {
            "name": NAME,
            "layers": config.num_hidden_layers,
            "neurons per layer": config.intermediate_size,
            "hidden size": config.hidden_size,
            "parameters": model.transformer.n_weights(),
            "dtype": "float32, weights as the file stores them",
        },
        "capitals": _capitals(knob),
        "refusal": _refusal(cross, circuits[REFUSAL]),
        "layers": {
            "last_three": min(last_three[name] for name in (CAPITALS, AGREEMENT, REFUSAL)),
            "share in the last three layers": last_three,
            "per layer": {name: circuit.per_layer() for name, circuit in circuits.items()},
        },
        "cross": _cross(cross),
        "overlap": cross["overlap"],
        "examples": _examples(cross),
        "behaviours": cross["behaviours"],
        "environment": {
            "cna_kernels": cna_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "date": time.strftime("%Y-%m-%d"),
        },
    }


def _rows(results: dict, behaviour: str) -> list[tuple[dict, dict]]:
    """Each variant with its cell of a behaviour."""
    return list(zip(results["variants"], results["cells"][behaviour], strict=True))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _capitals(knob: dict) -> dict:
    rows = _rows(knob, CAPITALS)
    unsteered = rows[0][1]
    own: dict[str, dict] = {CAPITALS: {"1": unsteered["share"]}, AGREEMENT: {"1": unsteered["share"]}}
    draws: dict[str, list[float]] = {}
    for variant, cell in rows[1:]:
        multiplier = f"{variant['multiplier']:g}"
        if variant["random"] is None:
            own[variant["circuit"]][multiplier] = cell["share"]
        else:
            draws.setdefault(multiplier, []).append(cell["share"])
    return {
        "n": unsteered["n"],
        "neurons": rows[1][0]["k"],
        "unsteered": unsteered["share"],
        "ablated": own[CAPITALS]["0"],
        "random": _mean(draws["0"]),
        "random draws by multiplier": draws,
        "by multiplier": own[CAPITALS],
        "by multiplier of the agreement circuit": own[AGREEMENT],
        "against unsteered": {
            f"{variant['multiplier']:g}": cell["against unsteered"]
            for variant, cell in rows
            if variant["circuit"] == CAPITALS and variant["random"] is None
        },
    }  # fmt: skip


def _refusal(cross: dict, found: Circuit) -> dict:
    rows = _rows(cross, REFUSAL)
    shares: dict[str, list[float]] = {}
    table = []
    for variant, cell in rows:
        circuit, random = variant["circuit"], variant["random"]
        if circuit is not None and circuit not in SIZES:
            continue
        percent = "" if circuit is None else f"{100 * SIZES[circuit]:g}pct"
        key = "unsteered" if circuit is None else f"{HOW[random is not None, variant['multiplier']]}_{percent}"
        shares.setdefault(key, []).append(cell["share"])
        table.append({
            "setting": key, "neurons": variant["k"], "multiplier": variant["multiplier"], "refused": sum(cell["hits"]),
            **{name: cell[name] for name in ("n", "share", "low", "high", "against unsteered", "kinds")},
            "kl": variant["kl"]["mean"], "harmless": variant["kinds"],
        })  # fmt: skip
    negative = sum(contrast < 0 for *_, contrast in found.neurons)
    means = {key: _mean(values) for key, values in shares.items()}
    return means | {"contrast": {"neurons": found.k, "negative": negative}, "rows": table}


def _cross(cross: dict) -> dict:
    """circuit -> behaviour -> the cell: circuits of 0.1% ablated, one with random neurons, and nothing."""
    found: dict[str, dict] = {}
    for number, variant in enumerate(cross["variants"]):
        circuit = variant["circuit"]
        if circuit not in (None, CAPITALS, AGREEMENT, REFUSAL) or variant["multiplier"] == 2:
            continue
        name = circuit or "unsteered"
        name = name if variant["random"] is None else f"random like {name}"
        found[name] = {
            behaviour: {
                **{key: cells[number][key] for key in ("n", "share", "low", "high", "against unsteered")},
                "kl": variant["kl"]["mean"],
                "answered": variant["answered"]["share"],
                "degenerate": variant["kinds"]["degenerate"] / variant["answered"]["n"],
            }
            for behaviour, cells in cross["cells"].items()
        }
    return found


def _examples(cross: dict) -> list[dict]:
    """Answers to a few prompts: unsteered, with the circuit of 0.2% ablated, and with as many random neurons."""
    shown: dict[str, int] = {}
    for number, variant in enumerate(cross["variants"]):
        if variant["circuit"] is None:
            shown["unsteered"] = number
        elif variant["circuit"] == "refusal, 0.2%":
            shown["ablated" if variant["random"] is None else "random"] = number
    prompts = Behaviour.bundled(REFUSAL).prompts.texts
    answers = cross["samples"][REFUSAL]
    return [
        {"prompt": prompt} | {name: answers[number][prompts.index(prompt)] for name, number in shown.items()}
        for prompt in EXAMPLES
    ]


def _to_stderr(text: str) -> None:
    print(f"demo: {text}", file=sys.stderr, flush=True)
