"""Paired tests between variants, recomputed from samples.jsonl by enumeration."""

import itertools
import json

import pytest

from cna_kernels import Circuit, InputError
from cna_kernels.model import load
from cna_kernels.model.evaluation import report
from cna_kernels.model.evaluation.evaluate import evaluate
from cna_kernels.model.evaluation.metrics import Refusals
from cna_kernels.model.evaluation.paired import against_circuit, against_unsteered
from cna_kernels.model.evaluation.report import paired
from cna_kernels.model.evaluation.rows import merged_rows
from cna_kernels.model.evaluation.suite import Suite
from cna_kernels.model.prompts.files import PromptSet
from tiny import write_language_model

pytest.importorskip("transformers")

CIRCUIT = Circuit(((0, 3, 1.0), (1, 40, 0.5), (2, 7, -1.0), (2, 8, 0.25)), 3, 48)
OTHER = Circuit(((0, 3, 1.0), (1, 2, 0.5)), 3, 48)
PROMPTS = [f"{word} {n}" for word in ("open it", "why not", "what is") for n in range(4)]


def sign_test(lost, gained):
    """The exact p of McNemar's test, by going through all ways in which the prompts that change could have changed."""
    as_uneven = [
        ways for ways in itertools.product((0, 1), repeat=lost + gained)
        if abs(2 * sum(ways) - lost - gained) >= abs(lost - gained)
    ]  # fmt: skip
    return len(as_uneven) / 2 ** (lost + gained)


def split(before, after):
    """(lost, gained) of two runs of refusals over the same prompts."""
    return (
        sum(a > b for a, b in zip(before, after, strict=True)),
        sum(a < b for a, b in zip(before, after, strict=True)),
    )


def test_every_test_can_be_recomputed_from_the_samples(tmp_path):
    model = load(write_language_model(tmp_path / "m", max_position_embeddings=512))
    lists = {"broad": Refusals((",", "~", "*")), "strict": Refusals(("^,", "^\x14", "^*"))}  # what random text holds
    suite = Suite(
        methods=("circuit", "random"), harmful=PromptSet.of(PROMPTS, "harmful"), max_new_tokens=8, refusals=lists,
        benign=PromptSet.of(PROMPTS[:5], "benign"), multipliers=(1.0, 0.0, 30.0), random_draws=2, batch=50,
        others={"other": OTHER},
    )  # fmt: skip
    results = evaluate(model, CIRCUIT, suite, out=tmp_path / "out")
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    changed = 0
    for kind, where in itertools.product(lists, ("harmful", "benign")):

        def refusals(method, multiplier, kind=kind, where=where):
            wanted = method, multiplier, where
            return [s["refusal"][kind] for s in samples if (s["method"], s["multiplier"], s["set"]) == wanted]

        for row in results["rows"]:
            lost, gained = split(refusals("unsteered", 1.0), refusals(row["method"], row["multiplier"]))
            expected = {"lost": lost, "gained": gained, "p": pytest.approx(sign_test(lost, gained))}
            assert row[where]["against unsteered"][kind] == expected
        for record in results["circuit against others"]:
            m = record["multiplier"]
            lost, gained = split(refusals(record["method"], m), refusals("circuit", m))
            changed += lost + gained
            expected = {"lost": lost, "gained": gained, "p": pytest.approx(sign_test(lost, gained))}
            assert record[where][kind] == expected
    assert changed > 5, "methods without effect would hide everything"
    assert {(r["method"], r["multiplier"]) for r in results["circuit against others"]} == {
        (name, m) for name in ("other", "random 1", "random 2") for m in (0.0, 30.0)
    }
    assert results["overlap"] == [{"circuits": ["circuit", "other"], "shared": 1, "own": [3, 1], "jaccard": 1 / 5}]


def samples_of(*runs):
    """Samples of variants, each a text of refusals such as "110"."""
    return [
        {"variant": number, "set": "harmful", "refusal": {"broad": hit == "1"}}
        for number, run in enumerate(runs) for hit in run
    ]  # fmt: skip


def rows_of(*methods):
    return [{"method": name, "multiplier": 1.0 if name == "unsteered" else 0.0, "harmful": {}} for name in methods]


def test_a_split_known_by_hand():
    samples = samples_of("1111110", "0000000", "1111111", "1111110")
    rows = rows_of("unsteered", "circuit", "random 1", "random 2")
    against_unsteered(rows, samples)
    assert rows[1]["harmful"]["against unsteered"]["broad"] == {"lost": 6, "gained": 0, "p": 1 / 32}
    assert rows[2]["harmful"]["against unsteered"]["broad"] == {"lost": 0, "gained": 1, "p": 1.0}
    records = against_circuit(rows, samples)
    assert [record["harmful"]["broad"]["lost"] for record in records] == [7, 6]
    merged = merged_rows({"rows": rows, "others": records})
    assert paired(merged[2]["harmful"]["against unsteered"]["broad"]) == "0, 0-1, p 1"
    (merged,) = merged_rows({"rows": rows, "others": records}, "others")
    assert paired(merged["harmful"]["broad"]) == "6-7, 0, p 0.02 to 0.03"


def test_draws_keep_their_multiplier():
    rows = [{"method": f"random {n}", "multiplier": 0.1, "strength": 0.1, "kl": {"mean": n / 10}} for n in range(3)]
    (merged,) = merged_rows({"rows": rows})
    assert merged == {
        "method": "random, 3 draws",
        "multiplier": 0.1,
        "strength": 0.1,
        "kl": {"mean": pytest.approx(0.1)},
    }


STARS = [(0.04, "*"), (0.05, ""), ([0.04, 0.2, 1.0], " 1/3*"), ([6e-8, 2e-6], " 2/2*"), ([0.2, 0.9], "")]


@pytest.mark.parametrize(("p", "star"), STARS, ids=str)
def test_stars_of_the_terminals_table(p, star):
    figures = {"refusal": {"broad": {"share": 0.5, "low": 0.2, "high": 0.8}}, "against unsteered": {"broad": {"p": p}}}
    assert report._starred("harmful", "broad", {"harmful": figures}) == f"50% 20-80{star}"
    assert report._starred("harmful", "broad", {"harmful": {"refusal": figures["refusal"]}}) == "50% 20-80"


def test_without_the_circuit_nothing_is_compared_with_it():
    assert against_circuit(rows_of("unsteered", "caa"), samples_of("11", "10")) == []
    assert against_circuit(rows_of("unsteered", "circuit", "caa"), []) == []


@pytest.mark.parametrize("name", ["circuit", "unsteered", "random 1", "caa", "", "a\nb", "x" * 81])
def test_names_that_a_further_circuit_cannot_have(name):
    with pytest.raises(InputError, match="others: "):
        Suite(harmful=PromptSet.of(PROMPTS, "harmful"), others={name: OTHER})
