"""What ``bench/gpu/gpu.py`` writes: rows with their targets, as JSON and Markdown, written again after every row."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

from shapes import MODELS

# Row -> the target of its ratio at H <= 2048, at H <= 4096 and above.
TARGETS = {
    "B1 eager": (1.00, 1.00, 1.00),
    "B1 graph": (1.00, 1.00, 1.00),
    "D1": (0.85, 0.90, 0.90),
    "D2": (0.97, 0.97, 0.97),
    "D3": (1.03, 1.03, 1.03),
    "D4": (1.02, 1.02, 1.02),
    "D4 late": (1.02, 1.02, 1.02),
    "D5": (1.33, 1.18, 1.11),
    "N2": (1.10, 1.10, 1.10),
    "P1": (1.01, 1.01, 1.01),
    "P2": (0.96, 0.98, 0.99),
    "P3": (0.85, 0.92, 0.96),
    "P4": (1.03, 1.03, 1.03),
    "P4 copy": (1.11, 1.11, 1.11),
    "P7": (1.05, 1.05, 1.05),
    "P7 steered": (1.00, 1.00, 1.00),
}

WORDS = {
    "A1": "an activation with sums and steering, {T} tokens",
    "B1 eager": "a step of decoding, {T} sequences, steered, transformers model, eager",
    "B1 graph": "a step of decoding, {T} sequences, steered, transformers model, in a CUDA graph",
    "B2 eager": "a step of decoding, {T} sequences, steered, eager",
    "B2 graph": "a step of decoding, {T} sequences, steered, in a CUDA graph",
    "B same": "logits of the steered transformers model, {T} sequences",
    "D1": "decode MLP, {T} token, sums and steering",
    "D2": "decode MLP, {T} tokens, sums and steering",
    "D3": "decode MLP, {T} tokens, sums and steering",
    "D4": "decode MLP, {T} tokens, what sums and steering cost",
    "D4 sums": "decode MLP, {T} tokens, what sums cost",
    "D4 steered": "decode MLP, {T} tokens, what steering costs",
    "D4 late": "decode MLP, {T} tokens, what sums and steering of a late layer cost",
    "D5": "decode MLP, {T} tokens, weights at the read ceiling",
    "N1": "same bits run after run, {T} tokens",
    "N2": "error against fp64, {T} tokens",
    "P1": "prefill MLP, {T} tokens, with sums",
    "P1 fp64": "prefill MLP, {T} tokens, sums and squares in fp64",
    "P1 fp64 last": "prefill MLP, {T} tokens, sums and squares of last tokens in fp64",
    "P2": "prefill MLP, {T} tokens, with sums",
    "P3": "prefill MLP, {T} tokens, sums and steering",
    "P3 late": "prefill MLP, {T} tokens, sums and steering of a late layer",
    "P4": "elementwise kernel, {T} tokens",
    "P4 eager": "elementwise kernel, {T} tokens",
    "P4 copy": "elementwise kernel, {T} tokens, at the copy ceiling",
    "P7": "down-projection, {T} tokens, plain",
    "P7 steered": "down-projection, {T} tokens, sums and steering",
    "P7 cost": "down-projection, {T} tokens, what sums and steering cost",
    "P7 late": "down-projection, {T} tokens, what sums and steering of a late layer cost",
    "PDL": "decode pair with a dependent launch, {T} tokens",
    "ceiling": "ceiling of the card",
    "graph": "graph replay against calls, {T} tokens",
    "host": "host time of a call of the MLP, {T} token",
    "memcheck": "memory faults",
    "ncu": "hardware counters",
    "plan": "candidate plan for {op}, {T} tokens, sums and steering",
    "racecheck": "races in shared memory",
    "table": "down-projection, {T} tokens, layer of a live table of 64 circuits",
    "table bits": "down-projection, {T} tokens, live table with nothing loaded, same bits",
    "tool": "tool of CUDA",
    "tune": "best entry of a launch table, {T} tokens",
}
COMPETITORS = {
    "activation": "the activation by itself, torch.compile",
    "eager": "PyTorch, eager",
    "cublas": "cuBLAS and our elementwise kernel",
    "hooks": "hooks that do the same",
    "linear": "cuBLAS",
    "pass and linear": "a pass over act, then cuBLAS",
    "plain": "plain",
}
SHOWN = ("ceiling", "D4", "D5", "P3", "P7", "P7 steered", "table", "host", "B1 eager", "B1 graph", "plan", "ncu")
CHECKS = ("tests", "memcheck", "N1", "N2", "PDL", "graph", "table bits", "B same")


def target(row):
    """The ratio that a row should not exceed, None if it has no target."""
    name, T, H = row["row"], row.get("T"), MODELS.get(row.get("model"), (0, 0))[0]
    if name not in TARGETS or (name == "D5" and T != 1) or (name == "P7" and T < 2048):
        return None
    if name == "P1" and T == 512:
        return 1.02
    return TARGETS[name][(H > 2048) + (H > 4096)]


def words(row):
    """What a row measures, in words instead of its short name."""
    return (
        WORDS.get(row["row"], row["row"])
        .format(T=row.get("T", ""), op=row.get("op", ""))
        .replace(" 1 tokens", " 1 token")
    )


def is_wrong(row):
    """Whether a row is a failed test, wrong numbers, or a job that did not end. A missed target is not wrong, nor is
    any failure of a candidate plan or a rival."""
    if row["row"] in ("failed", "crashed"):
        return not str(row.get("job")).startswith(("candidate", "compiled"))
    return row["row"] in CHECKS and row.get("ok") is False and row.get("default", True)


class Record:
    """The rows so far, written to disk after every row."""

    def __init__(self, directory: Path, name: str, deadline: float, window: str = ""):
        self.directory, self.name, self.deadline = directory, name, deadline
        self.rows, self.jobs, self.left_out = [], [], []
        self.environment, self.ceilings, self.lock = dict(window=window), {}, threading.RLock()
        directory.mkdir(parents=True, exist_ok=True)
        self.log_file = directory / f"{name}.log"

    def left(self):
        return self.deadline - time.time()

    def log(self, text):
        line = f"[{self.left():4.0f} s left] {text}\n"
        with self.lock:
            print(line, end="", flush=True)
            with self.log_file.open("a") as file:
                file.write(line)

    def keep_output(self, title, output):
        """Append what a test or tool printed to tests.log."""
        with self.lock, (self.directory / "tests.log").open("a") as file:
            file.write(f"==== {title}\n{output[-20000:]}\n")

    def job(self, job, seconds):
        """Record how long a job took, beside its estimate."""
        with self.lock:
            self.jobs.append(dict(job=job.name, estimate=job.seconds, seconds=round(seconds, 2)))

    def leave_out(self, name, why):
        with self.lock:
            self.left_out.append(dict(job=name, why=why))
        self.log(f"left out: {name}: {why}")
        self.write()

    def add(self, event):
        """Add a row, or facts about the device and its ceilings."""
        with self.lock:
            self.environment |= event.get("environment", {})
            self.ceilings |= event.get("ceilings", {})
            if "row" in event:
                event["what"], event["target"] = words(event), target(event)
                if "ratio" in event and event["target"]:
                    event.setdefault("ok", event["ratio"] <= event["target"])
                self.rows.append(event)
                self.log(" | ".join(filter(None, cells(event))))
        self.write()

    def write(self):
        with self.lock:
            everything = dict(environment=self.environment, ceilings=self.ceilings, rows=self.rows)
            everything |= dict(jobs=self.jobs, left_out=self.left_out)
            replace(self.directory / f"{self.name}.json", json.dumps(everything, indent=1) + "\n")
            replace(self.directory / f"{self.name}.md", markdown(everything))

    def summary(self):
        """The last lines of the output: wrong rows, the rows against the best competitor, and the jobs left out."""
        wrong = [row for row in self.rows if is_wrong(row)]
        lines = [f"{len(self.rows)} rows in {self.directory}, {len(wrong)} of them wrong"]
        lines += ["  wrong: " + " | ".join(filter(None, cells(row))) for row in wrong[:20]]
        shown = plain_best(self.rows) + [row for row in self.rows if row["row"] in SHOWN]
        lines += [" | ".join(filter(None, cells(row)[:9])) for row in shown]
        lines += [f"left out {len(self.left_out)} jobs" if self.left_out else "nothing was left out"]
        reasons = {}
        for each in self.left_out:
            reasons.setdefault(each["why"], []).append(each["job"])
        return "\n".join(lines + [f"  {why}: {', '.join(names)}" for why, names in reasons.items()])


def markdown(found) -> str:
    """The results as Markdown. found: what ``Record.write`` puts into the JSON file, or what ``gpu_record`` merged."""
    rows, parts = found["rows"], []
    runs = found.get("runs") or [found["environment"]]
    facts = [", ".join(f"{name} {value}" for name, value in run.items() if name != "ceilings") for run in runs]
    parts.append("# GPU benchmark\n\n" + "\n\n".join(facts) + "\n")
    parts.append(
        "ratio = ours / theirs, below 1 is faster, with 20 and 80% of the pairs; noise: the same graph twice. share:\n"
        "the time at the ceiling measured in the same run over the time it took, by what binds, memory or matrix.\n"
    )
    if best := plain_best(rows):
        parts.append("## Against the fastest of the competitors that ran\n\n" + table(best))
    parts.append("## All rows\n\n" + table([row for row in rows if row["row"] not in ("tune", "plan")]))
    if plans := [row for row in rows if row["row"] == "plan"]:
        parts.append("## Candidate plans against the default\n\n" + table(plans))
    if tuned := [row for row in rows if row["row"] == "tune"]:
        parts.append("## Best entry of each launch table, against the present one\n\n" + table(tuned))
    if gone := [row for row in found.get("gone", ()) if row["row"] == "plan"]:
        parts.append("## Plans that are gone, against the default of their run\n\n" + table(gone))
    if left := found.get("left_out"):
        parts.append("## Left out\n\n" + "".join(f"- {each['job']}: {each['why']}\n" for each in left))
    if jobs := found.get("jobs"):
        lines = [f"| {j['job']} | {j['estimate']} | {j['seconds']} |\n" for j in jobs]
        parts.append("## Seconds of each job\n\n| job | estimate | seconds |\n|---|---|---|\n" + "".join(lines))
    return "\n".join(parts)


def plain_best(rows):
    """For each row name, model and T with several competitors: the last run's row against the fastest of them."""
    best = {}
    for row in rows:
        if not (row.get("best") and "ratio" in row):
            continue
        key = row["row"], row.get("model"), row.get("T")
        before = best.get(key, row)
        if row.get("run") != before.get("run") or row["ratio"] >= before["ratio"]:  # later runs come later
            best[key] = row
    return list(best.values())


COLUMNS = ["what", "model", "ours", "against", "ratio", "20%", "80%", "noise", "target", "met", "us", "theirs us"]
COLUMNS += ["predicted us", "rate", "share", "bound by", "note", "id"]


def cells(row):
    def number(name, digits):
        return "" if row.get(name) is None else f"{row[name]:.{digits}f}"

    theirs = row.get("theirs") or ""
    head = [
        row.get("what") or words(row),
        row.get("model") or "",
        row.get("ours") or "",
        COMPETITORS.get(theirs, theirs),
    ]
    if row.get("default") and row.get("plan"):
        head[2] += f" ({row['plan'].partition('=')[2]})"
    ratios = [number(name, 3) for name in ("ratio", "low", "high", "noise", "target")]
    met = {None: "", True: "yes", False: "NO"}[row.get("ok")]
    times = [number("ours_us", 1), number("theirs_us", 1), number("predicted_us", 1)]
    share = [row.get("rate") or "", number("share", 2), row.get("bound") or ""]
    note = (row.get("note") or "").replace("|", "/").replace("\n", " ")
    return [*head, *ratios, met, *times, *share, note, row["row"]]


def table(rows):
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def replace(path, text):
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    os.replace(partial, path)
