"""The figures in the tables of docs/benchmarks.md are those of bench/results/."""

import json
import re

import pytest
from test_architecture import ROOT

RESULTS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "bench" / "results").glob("*.json")}
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
NUMBER = re.compile(r"\d+(?:\.\d+)?")
MIB = 2**20


DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def tables():
    """(the results file that the text above names, the table's header, its rows)."""
    name, rows = "", []
    for line in [*PAGE.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if rows:
            header, _, *body = rows
            yield pytest.param(name, header, body, id=f"{name}: {header[0] or header[1]}, {len(body)} rows")
            rows = []
        if found := re.findall(r"bench/results/(\w+)\.json", line):
            name = found[-1]


def figures_of(name, label, column):
    """The numbers, in the units of the page, of the results that a row's label and a column's title may mean: those of
    the dtype, competitor, number of tokens and batch that they name."""
    rows = RESULTS[name]["rows"]
    ours, _, competitor = label.partition(" / ")
    tokens, batch = column.partition(" ")[0], re.search(r"(\d+) rows?\b", ours)
    wanted = {"dtype": (ours, DTYPES.get(column)), "competitor": (competitor,), "m": (tokens,)}
    for key, values in wanted.items():
        rows = [row for row in rows if str(row[key]) in values] or rows
    if batch:
        rows = [row for row in rows if str(row["m"]).startswith(f"{batch[1]} x ")]
    for row in rows:
        for key, value in row.items():
            if isinstance(value, (int, float)):
                yield from (value, value / MIB, value / 1e9) if key.endswith("_bytes") else (float(value),)


@pytest.mark.parametrize(("name", "header", "rows"), tables())
def test_every_figure_is_in_the_results(name, header, rows):
    checked = 0
    for label, *cells in rows:
        for column, cell in zip(header[1:], cells, strict=True):
            found = list(figures_of(name, label, column))
            for text in NUMBER.findall(re.sub(r"[A-Z] = \d+", "", cell)):
                decimals = len(text.partition(".")[2])
                assert any(f"{figure:.{decimals}f}" == text for figure in found), (
                    f"{label}: {text} is not in {name}.json"
                )
                checked += 1
    assert checked >= len(rows)


def test_the_dates_are_those_of_the_results():
    for name in ("cpu", "attribution", "eval", "embedding", "host"):
        for environment in RESULTS[name]["environment"].values():
            assert environment["date"] in PAGE and environment["torch"].partition("+")[0] in PAGE
