"""Paired tests: two variants on the same prompts, compared prompt by prompt, by McNemar's exact test.

All come from the samples of an evaluation, the records of ``samples.jsonl``. A prompt is a hit of a check, which is a
list of refusals or a behaviour, where the model refuses, or shows the behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence

from .metrics import mcnemar

CHANCE = 0.05  # tables mark a p below it
STAR = f"*: p < {CHANCE:g}, McNemar's exact test against unsteered on the same prompts"

Hits = dict[tuple[int, str], dict[str, list[bool]]]  # (variant, set) -> check -> whether each prompt is a hit


def checks_of(sample: dict) -> dict[str, bool]:
    """Of each check of a sample, whether the prompt is a hit."""
    return sample["shown"] if "shown" in sample else sample["refusal"]


def hits_of(samples: Sequence[dict]) -> Hits:
    """The hits of every variant on every prompt set, in the order of the prompts."""
    found: Hits = {}
    for sample in samples:
        checks = found.setdefault((sample["variant"], sample["set"]), {})
        for name, hit in checks_of(sample).items():
            checks.setdefault(name, []).append(hit)
    return found


def against_unsteered(rows: Sequence[dict], samples: Sequence[dict]) -> None:
    """Add to each row, for each prompt set, ``against unsteered``: check -> the test against row 0, which is unsteered.

    ``lost`` are hits of the unsteered model that the row misses, ``gained`` the reverse.
    """
    for (number, where), checks in (found := hits_of(samples)).items():
        plain = found[0, where]
        rows[number][where]["against unsteered"] = {name: mcnemar(plain[name], checks[name]) for name in checks}


def against_circuit(rows: Sequence[dict], samples: Sequence[dict]) -> list[dict]:
    """One record for each row of another method at a multiplier of the circuit's: its ``method`` and ``multiplier``,
    and for each prompt set check -> the test of the circuit against it.

    ``lost`` are hits of the other method that the circuit misses, ``gained`` the reverse.
    """
    if not (found := hits_of(samples)):
        return []
    own = {row["multiplier"]: number for number, row in enumerate(rows) if row["method"] == "circuit"}
    records = []
    for number, row in enumerate(rows):
        if row["method"] in ("unsteered", "circuit") or row["multiplier"] not in own:
            continue
        record = {"method": row["method"], "multiplier": row["multiplier"]}
        for where in dict.fromkeys(where for _, where in found):
            here, mine = found[number, where], found[own[row["multiplier"]], where]
            record[where] = {name: mcnemar(here[name], mine[name]) for name in here}
        records.append(record)
    return records
