"""The rows of an evaluation's results: one for each method and multiplier, all draws of random neurons as one."""

from __future__ import annotations

from typing import Any


def merged_rows(results: dict, part: str = "rows") -> list[dict]:
    """The rows of a part of the results, all draws of random neurons merged into one row.

    Figures are the means of the draws, intervals their widest bounds; of a paired test ``lost``, ``gained`` and ``p``
    are lists, one number for each draw.
    """
    rows: list[Any] = []  # each a row, or a list: the rows of all random draws at one multiplier
    draws: dict[float, list[dict]] = {}
    for row in results[part]:
        if not row["method"].startswith("random "):
            rows.append(row)
            continue
        members = draws.setdefault(row["multiplier"], [])
        if not members:
            rows.append(members)
        members.append(row)
    return [_of_draws(row) if isinstance(row, list) else row for row in rows]


def _of_draws(rows: list[dict]) -> dict:
    same = {key: rows[0][key] for key in ("multiplier", "strength") if key in rows[0]}  # whose mean would be rounded
    merged: dict = _merge(rows)
    return merged | same | {"method": f"random, {len(rows)} draws"}


def _merge(values):
    first = values[0]
    if isinstance(first, dict):
        if "p" in first:
            return {key: [value[key] for value in values] for key in first}
        found = {key: _merge([value[key] for value in values]) for key in first}
        if first.get("low") is not None:
            found["low"], found["high"] = (pick(v[key] for v in values) for key, pick in (("low", min), ("high", max)))
        return found
    return first if isinstance(first, str) or first is None else sum(values) / len(values)


def by_method(results) -> dict[str, list[dict]]:
    """Method -> its rows, in the order of the multiplier. The unsteered row is every method's row at m = 1."""
    unsteered, *steered = merged_rows(results)
    curves: dict[str, list[dict]] = {}
    for row in steered:
        curves.setdefault(row["method"], [unsteered]).append(row)
    return {name: sorted(rows, key=lambda row: row["multiplier"]) for name, rows in curves.items()}
