"""What ``bench/gpu.py`` writes: rows with their targets, as JSON and Markdown, on disk at all times."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

from shapes import MODELS

# Row -> the ratio aimed for at H <= 2048, H <= 4096 and above.
TARGETS = {
    "D1": (0.85, 0.90, 0.90),
    "D2": (0.97, 0.97, 0.97),
    "D3": (1.03, 1.03, 1.03),
    "D4": (1.02, 1.02, 1.02),
    "D5": (1.33, 1.18, 1.11),
    "D6": (1.02, 1.02, 1.02),
    "N2": (1.10, 1.10, 1.10),
    "P1": (1.01, 1.01, 1.01),
    "P2": (0.96, 0.98, 0.99),
    "P3": (0.85, 0.92, 0.96),
    "P4": (1.03, 1.03, 1.03),
    "P4 copy": (1.11, 1.11, 1.11),
    "P5": (1.03, 1.03, 1.03),
    "P6": (0.96, 0.98, 0.98),
    "P7": (1.05, 1.05, 1.05),
}


def target(row):
    """The ratio that a row should not exceed, None if it has no target."""
    name, T, H = row["row"], row.get("T"), MODELS.get(row.get("model"), (0, 0))[0]
    if name not in TARGETS or (name == "D5" and T != 1) or (name == "P7" and T < 2048):
        return None
    if name == "P5" and row["ours"] == "K=1":
        return 1.01
    if name == "P1" and T == 512:
        return 1.02
    return TARGETS[name][(H > 2048) + (H > 4096)]


class Record:
    """The rows so far, on disk at all times."""

    def __init__(self, directory: Path, name: str, deadline: float):
        self.directory, self.name, self.deadline = directory, name, deadline
        self.rows, self.environment, self.ceilings, self.lock = [], {}, {}, threading.Lock()
        directory.mkdir(parents=True, exist_ok=True)
        self.log_file = directory / f"{name}.log"

    def left(self):
        return self.deadline - time.time()

    def log(self, text):
        line = f"[{self.left():4.0f} s left] {text}\n"
        print(line, end="", flush=True)
        with self.log_file.open("a") as file:
            file.write(line)

    def add(self, event):
        """A row, or facts about the device and its ceilings."""
        with self.lock:
            self.environment |= event.get("environment", {})
            self.ceilings |= event.get("ceilings", {})
            if "row" in event:
                event["target"] = target(event)
                if "ratio" in event and event["target"]:
                    event.setdefault("ok", event["ratio"] <= event["target"])
                self.rows.append(event)
                self.log(" ".join(filter(None, cells(event))))
            everything = dict(environment=self.environment, ceilings=self.ceilings, rows=self.rows)
            replace(self.directory / f"{self.name}.json", json.dumps(everything, indent=1) + "\n")
            replace(self.directory / f"{self.name}.md", self.markdown())

    def markdown(self):
        facts = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        parts = [f"# GPU benchmark\n\n{facts}\n"]
        if best := plain_best(self.rows):
            parts.append("## Against plain-best, the fastest of the competitors that ran\n\n" + table(best))
        parts.append("## All rows\n\nratio = ours / theirs, with 20 and 80%; noise is the same graph twice.\n\n")
        parts[-1] += table([row for row in self.rows if row["row"] != "tune"])
        if tuned := [row for row in self.rows if row["row"] == "tune"]:
            parts.append("## Best entry of each launch table\n\nratio = best / present entry\n\n" + table(tuned))
        return "\n".join(parts)


def plain_best(rows):
    """The row against the fastest competitor, for each row, model and T that has several."""
    best = {}
    for row in rows:
        key = row["row"], row.get("model"), row.get("T")
        if row.get("best") and "ratio" in row and row["ratio"] >= best.get(key, row)["ratio"]:
            best[key] = row
    return list(best.values())


COLUMNS = [
    "row",
    "model",
    "T",
    "ours",
    "theirs",
    "ratio",
    "20%",
    "80%",
    "noise",
    "target",
    "met",
    "us",
    "theirs us",
    "note",
]


def cells(row):
    def number(name, digits):
        return "" if row.get(name) is None else f"{row[name]:.{digits}f}"

    head = [str(row.get(name, "")) for name in ("row", "model", "T", "ours", "theirs")]
    ratios = [number(name, 3) for name in ("ratio", "low", "high", "noise", "target")]
    met = {None: "", True: "yes", False: "NO"}[row.get("ok")]
    note = row.get("note", "").replace("|", "/").replace("\n", " ")
    return [*head, *ratios, met, number("ours_us", 1), number("theirs_us", 1), note]


def table(rows):
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def replace(path, text):
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    os.replace(partial, path)
