"""Results of ``bench/gpu/gpu.py`` as files to commit: one file for each device, with the rows of all its runs.

A row is replaced by a later row of the same name, model, tokens and sides, or by the later rows of its job. Every row
names its run, so that the rows of all windows can lie in one file.
"""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path

from gpu_report import markdown, replace

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
KEY = ("row", "model", "T", "ours", "theirs", "op", "kernel")


def slug(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100"."""
    known = re.search(r"\b[A-Z]{1,2}\d{2,4}\b", device)
    return known[0].lower() if known else re.sub(r"\W+", "-", device.lower()).strip("-")


def key(row):
    return tuple(row.get(name) for name in KEY)


def plan_names() -> dict:
    """op -> names of its plans, from the checkout, since the package may not be installed where this runs."""
    sys.path.insert(0, str(ROOT))
    try:
        return import_module("cna_kernels.plans").NAMES
    finally:
        sys.path.remove(str(ROOT))


def is_gone(row, plans) -> bool:
    """Whether the row is of a plan that the backend no longer has. plans: op -> names."""
    op, _, name = row.get("plan", "").partition("=")
    return bool(name) and name not in plans.get(op, (name,))


def merge(before: dict, new: dict) -> dict:
    """Merge two records: rows of ``new`` replace rows with the same key or of the same job; other rows stay."""
    facts = new["environment"]
    run = f"window {facts.get('window') or '?'}, {facts.get('date', 'no date')}, {facts.get('commit', 'no commit')}"
    rows = [row | dict(run=run) for row in new["rows"]]
    fresh, jobs = set(map(key, rows)), {row["job"] for row in rows if "job" in row}
    kept = [row for row in before.get("rows", ()) if key(row) not in fresh and row.get("job") not in jobs]
    used = {row["run"] for row in kept}
    runs = [each for each in before.get("runs", ()) if each["run"] in used and each["run"] != run]
    runs.append(dict(run=run, **facts, ceilings=new["ceilings"]))
    left_out = new.get("left_out", [])
    return dict(environment=facts, runs=runs, rows=kept + rows, left_out=left_out, gone=before.get("gone", []))


def record(directory: Path, into: Path = RESULTS) -> Path:
    """Merge DIR/gpu.json into ``gpu-<device>.json`` among the results, and write it as Markdown beside that file."""
    new = json.loads((directory / "gpu.json").read_text())
    path = into / f"gpu-{slug(new['environment'].get('device', 'unknown'))}.json"
    merged = merge(json.loads(path.read_text()) if path.exists() else {}, new)
    gone = [row for row in merged["rows"] if is_gone(row, plan_names())]  # kept apart, as a record of what was tried
    merged["rows"] = [row for row in merged["rows"] if row not in gone]
    merged["gone"] = merged.get("gone", []) + gone
    into.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(merged, indent=1) + "\n")
    replace(path.with_suffix(".md"), markdown(merged))
    return path


# Plan -> the launch tables of ``gpu_tune`` to sweep where the plan is far from its ceiling.
TABLES = {
    "gated_mlp=gemv": ("gate_up_gemv", "down_gemv"),
    "gated_mlp=flat": ("gate_up_flat", "down_split"),
    "down_proj=split": ("down_split",),
    "down_proj=tma": ("down_proj",),
    "swiglu": ("swiglu", "swiglu_plain"),
}


def losing(rows, model="Llama-3.1-8B") -> list[tuple[str, int]]:
    """(launch table, T) of the rows of default plans, the row with the smallest share of its ceiling first. The tables
    of the decode pair, which matters most, come last if no row names them."""
    found = [row for row in rows if row.get("share") and row.get("model") == model and row.get("plan") in TABLES]
    found = [row for row in found if row.get("row") != "plan"]  # no candidates
    found.sort(key=lambda row: row["share"])
    named = [(table, row["T"]) for row in found for table in TABLES[row["plan"]]]
    return list(dict.fromkeys([*named, ("gate_up_gemv", 1), ("down_gemv", 1)]))


def last_rows(results: Path | None = None) -> list[dict]:
    """The rows to choose a sweep by: of the file ``results``, or of all committed files."""
    paths = [results] if results else sorted(RESULTS.glob("gpu-*.json"))
    return [row for path in paths for row in json.loads(path.read_text())["rows"]]
