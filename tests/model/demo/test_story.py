"""`cna demo` on a real model: its figures come from the results, and on SmolLM2 they hold."""

import io
import json

import pytest

from cna_kernels import Circuit
from cna_kernels.model.cli import main
from cna_kernels.model.demo import report as demo_report
from cna_kernels.model.demo import story
from cna_kernels.model.evaluation.behaviour import Behaviour
from cna_kernels.model.evaluation.metrics import KINDS, mcnemar, share
from cna_kernels.model.prompts.files import PromptSet, harmless_prompts, neutral_texts


def results_of(hits):
    """Results as of ``measure``, whose cells have so many hits: behaviour -> a number for each variant."""
    variants, names = hits["variants"], [name for name in hits if name != "variants"]
    records, cells = [], {name: [] for name in names}
    for number, (circuit, multiplier, random) in enumerate(variants):
        kinds = dict.fromkeys(KINDS, 0) | {"answer": 11, "degenerate": 1}
        records.append({
            "circuit": circuit, "multiplier": multiplier, "random": random, "k": 0 if circuit is None else 46,
            "kl": {"mean": number / 8}, "kinds": kinds, "answered": share(11, 12),
        })  # fmt: skip
        for name in names:
            n = len(Behaviour.bundled(name).measured)
            plain, mine = ([place < hits[name][column] for place in range(n)] for column in (0, number))
            kinds = dict.fromkeys(KINDS, 0) | {"refusal": sum(mine), "answer": n - sum(mine) - 1, "short": 1}
            cells[name].append({
                **share(sum(mine), n), "against unsteered": mcnemar(plain, mine), "kinds": kinds,
                "hits": [int(hit) for hit in mine],
            })  # fmt: skip
    n_refusal = len(Behaviour.bundled("refusal").measured)
    samples = {
        "refusal": [
            [f"variant {number}, prompt {place}" for place in range(n_refusal)] for number in range(len(variants))
        ]
    }
    behaviours = {name: {"about": name} for name in names}
    return {"variants": records, "cells": cells, "samples": samples, "overlap": [], "behaviours": behaviours}


class FakeModel:
    """As much of a model as the report reads."""

    class config:
        num_hidden_layers, intermediate_size, hidden_size = 8, 100, 16

    class transformer:
        @staticmethod
        def n_weights():
            return 1000


@pytest.fixture
def report():
    names = ["capitals", "agreement", *story.SIZES]
    circuits = {name: Circuit(((7, 1, 1.0), (5, 2, -1.0), (0, 3, 0.5)), 8, 100) for name in names}
    knob = {
        "variants": [
            (None, 1.0, None),
            *(("capitals", m, None) for m in story.STEPS),
            *(("capitals", m, draw) for draw in range(3) for m in story.STEPS),
            *(("agreement", m, None) for m in (0.0, 2.0)),
        ],
        "capitals": [36, 3, 12, 48, 42, 33, 34, 37, 38, 36, 35, 36, 34, 30, 36, 35, 37, 24, 33],
    }
    cross = {
        "variants": [
            (None, 1.0, None), ("capitals", 0.0, None), ("agreement", 0.0, None), ("refusal", 0.0, None),
            ("refusal", 2.0, None), ("refusal", 0.0, 0), ("refusal", 2.0, 0), ("refusal, 0.2%", 0.0, None),
            ("refusal, 0.2%", 0.0, 0), ("refusal, 1%", 0.0, None), ("refusal, 1%", 0.0, 0), ("refusal, 1%", 0.0, 1),
        ],
        "capitals": [36, 3, 20, 35, 36, 36, 36, 36, 36, 36, 36, 36],
        "agreement": [30, 30, 29, 30, 30, 30, 30, 30, 30, 30, 30, 30],
        "refusal": [29, 28, 29, 12, 9, 28, 26, 5, 27, 1, 25, 23],
    }  # fmt: skip
    found = story.summarise(FakeModel, {"circuits": circuits, "knob": results_of(knob), "cross": results_of(cross)})
    found["environment"]["seconds"] = 1.0
    return found


def test_figures_are_those_of_the_results(report):
    capitals, refusal = report["capitals"], report["refusal"]
    assert capitals["unsteered"] == 36 / 60 and capitals["ablated"] == 3 / 60 and round(capitals["random"], 9) == 0.55
    assert capitals["by multiplier"] == {"1": 0.6, "0": 0.05, "0.5": 0.2, "1.5": 0.8, "2": 0.7}
    assert capitals["by multiplier of the agreement circuit"] == {"1": 0.6, "0": 0.4, "2": 0.55}
    assert capitals["against unsteered"]["0"]["lost"] == 33
    assert capitals["random draws by multiplier"]["1.5"] == [37 / 60, 36 / 60, 35 / 60]
    expected = {
        "unsteered": 29, "ablated_0.1pct": 12, "doubled_0.1pct": 9, "random_0.1pct": 28, "random_doubled_0.1pct": 26,
        "ablated_0.2pct": 5, "random_0.2pct": 27, "ablated_1pct": 1, "random_1pct": 24,
    }  # fmt: skip
    rows = refusal.pop("rows")
    assert refusal.pop("contrast") == {"neurons": 3, "negative": 1}
    assert refusal == pytest.approx({name: count / 29 for name, count in expected.items()})
    assert [row["setting"] for row in rows].count("random_1pct") == 2 and len(rows) == 10
    assert report["layers"]["last_three"] == pytest.approx(2 / 3)
    cross = report["cross"]
    assert list(cross) == ["unsteered", "capitals", "agreement", "refusal", "random like refusal"]
    assert (
        cross["agreement"]["capitals"]["share"] == pytest.approx(20 / 60)
        and cross["agreement"]["refusal"]["kl"] == 2 / 8
    )
    for cells in cross.values():
        for cell in cells.values():
            assert cell["answered"] == 11 / 12 and cell["degenerate"] == 1 / 12
    assert report["examples"][0]["ablated"].startswith("variant 7, prompt ")
    assert all(example["prompt"] in story.EXAMPLES for example in report["examples"])


def test_what_the_report_says(report, tmp_path):
    from rich.console import Console

    text = demo_report.to_markdown(report)
    assert "agreement changes capitals" in text and "refusal changes" not in text
    assert "| circuit for capitals | 3 of 60 | 12 of 60 | 36 of 60 | 48 of 60 | 42 of 60 |" in text
    printed = io.StringIO()
    demo_report.print_report(report, Console(file=printed, width=80))
    assert "5 of 29*" in printed.getvalue() and "28 of 29 " in printed.getvalue()
    assert story.EXAMPLES[0] in printed.getvalue() and max(map(len, printed.getvalue().splitlines())) <= 80
    assert "| circuit, 0.2% | 46 | 5 of 29 [8, 35] | 1e-07 |" in text
    assert json.loads(demo_report.to_json(report)) == report
    assert (tmp_path / demo_report.draw_picture(report, tmp_path)).stat().st_size > 5000


def test_a_report_without_side_effects_says_so(report):
    for cells in report["cross"].values():
        for cell in cells.values():
            cell["against unsteered"]["p"] = 0.5
    assert demo_report.specificity(report) == "No circuit changes another behaviour."


def test_harmless_prompts_are_of_no_other_set():
    sets = [
        neutral_texts(),
        *(getattr(Behaviour.bundled("refusal"), side) for side in ("positive", "negative", "prompts")),
    ]
    assert not {*harmless_prompts().texts} & {text for prompts in sets for text in prompts.texts}
    assert len({*harmless_prompts().texts}) == 12


@pytest.mark.rare
def test_the_story_on_a_real_model(tmp_path, monkeypatch):
    """Whole but for a few prompts of what every variant is measured on besides."""
    pytest.importorskip("gguf")
    few = PromptSet.of(neutral_texts().texts[:4], "few"), PromptSet.of(harmless_prompts().texts[:3], "few")
    monkeypatch.setattr(story, "neutral_texts", lambda: few[0])
    monkeypatch.setattr(story, "ANSWER_TOKENS", 20)  # a refusal begins with its phrase
    monkeypatch.setattr(story, "harmless_prompts", lambda: few[1])
    assert main(["demo", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["model"]["name"] == "SmolLM2-135M-Instruct"
    capitals, refusal = report["capitals"], report["refusal"]
    assert capitals["unsteered"] >= 0.55 and capitals["ablated"] <= 0.15 and capitals["random"] >= 0.45
    assert refusal["unsteered"] >= 0.95 and refusal["ablated_1pct"] <= 0.15 and refusal["random_1pct"] >= 0.7
    assert refusal["ablated_0.2pct"] <= 0.5 and refusal["random_0.2pct"] >= 0.7
    assert report["layers"]["last_three"] >= 0.8
    assert all({"kl", "answered"} <= {*cell} for cells in report["cross"].values() for cell in cells.values())
    assert {"demo.png", "report.md", "matrix.json", "circuit-refusal-0.2-percent.json"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert Circuit.load(tmp_path / "circuit-capitals.json").k == 46
