"""Results files: ``{"environment": {...}, "rows": [...]}``, one row for each comparison, in ``bench/results/``.

A row has id, shape, m (tokens), dtype, competitor, ratio (ours / competitor, lower is better), noise (ours against
itself: what a ratio of 1 can look like) and target (the ratio not to exceed, or null). Further fields say more.
``python bench/results.py`` prints all files as tables.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import torch

DIRECTORY = Path(os.environ.get("CNA_BENCH_RESULTS") or Path(__file__).resolve().parent / "results")


def cpu_environment() -> dict:
    """What a figure from this machine depends on."""
    from cna_kernels.cpu import library

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    names = ("model name", "cpu family", "model", "cache size")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "cpu": ", ".join(f"{name} {facts[name]}" for name in names if name in facts),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache(),
        "isa": None if library.missing() else library.isa(),
        "isa_levels": None if library.missing() else library.levels(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def last_level_cache() -> int:
    """Bytes of the largest cache that Linux tells of, else 32 MiB."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = [int(text[:-1]) * units[text[-1]] for text in (path.read_text().strip() for path in sizes)]
    return max(found, default=32 * 2**20)


class Results:
    """Rows of one file, written after every row. A row replaces the one it repeats.

    Rows of other settings stay, and so do those of this setting that were measured in the same environment.
    """

    def __init__(self, name: str, setting: str, environment: dict):
        self.path, self.setting = DIRECTORY / f"{name}.json", setting
        old = json.loads(self.path.read_text()) if self.path.exists() else {"environment": {}, "rows": []}
        same = old["environment"].get(setting) == environment
        self.rows = [row for row in old["rows"] if same or row["setting"] != setting]
        self.environment = old["environment"] | {setting: environment}

    def add(self, id, *, shape, m, dtype, competitor, result, target=None, **more) -> dict:
        """Add the row of a result of ``interleave.compare``, print it and write the file."""
        row = dict(id=id, setting=self.setting, shape=shape, m=m, dtype=dtype, competitor=competitor)
        key = row.copy()
        row |= dict(ratio=round(result["ratio"], 4), noise=round(result["noise"], 4), target=target, **more)
        self.rows = [other for other in self.rows if any(other[name] != value for name, value in key.items())] + [row]
        print(f"\n{line(row)}", flush=True)
        DIRECTORY.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"environment": self.environment, "rows": self.rows}, indent=1) + "\n")
        return row


def line(row: dict) -> str:
    """One line of the printed table."""
    target = "" if row["target"] is None else f"  target {row['target']:.2f}"
    missed = "" if row["target"] is None or row["ratio"] <= row["target"] else "  above"
    what = f"{row['id']} {row['shape']} M={row['m']} {row['dtype']} / {row['competitor']}"
    return f"{what:78s} {row['ratio']:6.3f}  noise {row['noise']:.2f}{target}{missed}"


def markdown(rows: list[dict]) -> str:
    """Tables for reading: one for each setting, tokens across, the ratios of all shapes in a cell."""
    out = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        here = [row for row in rows if row["setting"] == setting]
        for whole in (False, True):  # a whole model, or its MLP
            chosen = [row for row in here if ("per_s" in row) == whole]
            tokens = list(dict.fromkeys(str(row["m"]) for row in chosen))
            tokens.sort(key=lambda m: (not m.isdigit(), int(m) if m.isdigit() else 0))
            shapes = list(dict.fromkeys(row["shape"] for row in chosen))
            out += [f"{setting}: {' / '.join(shapes)}", ""]
            out += [
                f"| ours / competitor | {' | '.join(f'{m} tokens' for m in tokens)} |",
                "|---" * (len(tokens) + 1) + "|",
            ]
            for key in dict.fromkeys((row["id"], row["dtype"], row["competitor"]) for row in chosen):
                mine = [row for row in chosen if (row["id"], row["dtype"], row["competitor"]) == key]
                cells = []
                for m in tokens:
                    ratios = [f"{row['ratio']:.2f}" for row in mine if str(row["m"]) == m]
                    target = {row["target"] for row in mine if str(row["m"]) == m} - {None}
                    cells.append(" / ".join(ratios) + (f" (target {target.pop():.2f})" if target else ""))
                out.append(f"| {key[0]}: {key[1]} / {key[2]} | {' | '.join(cells)} |")
            out.append("")
    return "\n".join(out)


if __name__ == "__main__":
    for path in sorted(DIRECTORY.glob("*.json")):
        if not path.name.startswith("gpu-"):  # these have a table beside them
            print(markdown(json.loads(path.read_text())["rows"]))
