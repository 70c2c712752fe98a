"""The figures in the tables of docs/benchmarks.md are those of bench/results/."""

import json
import re

import pytest
from test_architecture import ROOT

RESULTS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "bench" / "results").glob("*.json")}
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
NUMBER = re.compile(r"\d+(?:\.\d+)?")
MIB = 2**20


def tables():
    """(the results file that the text above names, the cells of the table's rows without their first cell)."""
    name, rows = "", []
    for line in [*PAGE.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if rows:
            yield pytest.param(name, rows[2:], id=f"{name}: {rows[0][0] or rows[0][1]}, {len(rows) - 2} rows")
            rows = []
        if found := re.findall(r"bench/results/(\w+)\.json", line):
            name = found[-1]


def figures_of(name):
    """Every number of a results file, in the units of the page."""
    for row in RESULTS[name]["rows"]:
        for key, value in row.items():
            if isinstance(value, (int, float)):
                yield from (value, value / MIB, value / 1e9) if key.endswith("_bytes") else (value,)


@pytest.mark.parametrize(("name", "rows"), tables())
def test_every_figure_is_in_the_results(name, rows):
    found = [float(figure) for figure in figures_of(name)]
    checked = 0
    for label, *cells in rows:
        for text in NUMBER.findall(" ".join(re.sub(r"[A-Z] = \d+", "", cell) for cell in cells)):
            decimals = len(text.partition(".")[2])
            assert any(f"{figure:.{decimals}f}" == text for figure in found), f"{label}: {text} is not in {name}.json"
            checked += 1
    assert checked >= len(rows)


def test_the_dates_are_those_of_the_results():
    for name in ("cpu", "attribution", "eval", "embedding", "host"):
        for environment in RESULTS[name]["environment"].values():
            assert environment["date"] in PAGE and environment["torch"].partition("+")[0] in PAGE
