"""The table of `docs/serving.md`, from what `make test-engines` found.

python table.py DIRECTORY     writes bench/results/engines.json and the table
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "bench" / "results" / "engines.json", ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- what was run -->", "<!-- end of what was run -->"
# case -> what the table calls it
CASES = {
    "mixed": "34 requests in a batch, 16 circuits", "prefix": "prefix cache, 5 settings in turn",
    "preempted": "preemption", "speculative": "n-gram speculation", "compiled": "`torch.compile`",
    "tensor_parallel": "tensor parallel, 3 ranks", "pipeline_parallel": "pipeline parallel, 2 ranks",
    "runner_v2": "model runner V2, interpreted", "sums": "sums and discovery", "live": "circuits added and replaced",
    "start_refused": "refusals at the start", "server": "OpenAI server, 24 at a time", "lora": "beside LoRA",
    "quantised": "weights of 4 bits, products in bf16", "phases": "prompts or answers alone, beside each other",
    "document": "first program of docs/vllm.md", "document_discovery": "second program of docs/vllm.md",
}  # fmt: skip


def table(rows):
    """The rows as Markdown."""
    lines = ["| engine | case | equal greedy tokens | largest difference | also |", "|---|---|---|---|---|"]
    for row in sorted(rows.values(), key=lambda row: row["engine"].lower()):
        tokens = f"{row['tokens']}" if row.get("tokens") is not None else ""
        if row.get("of_tokens") is not None:
            tokens += f" of {row['of_tokens']}"
        difference = next(
            (f"{row[name]:.1e} {what}" for name, what in DIFFERENCES.items() if row.get(name) is not None), ""
        )
        also = row.get("also") or ", ".join(f"{text.format(row[name])}" for name, text in ALSO.items() if name in row)
        lines.append(f"| {row['engine']} | {CASES.get(row['case'], row['case'])} | {tokens} | {difference} | {also} |")
    dates = sorted({row["date"] for row in rows.values()})
    versions = sorted({f"{name} {number}" for row in rows.values() for name, number in row["versions"].items()})
    return "\n".join([*lines, "", f"{', '.join(versions)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."])


DIFFERENCES = {
    "max_logprob_difference": "of a log-probability", "max_logit_difference": "of a logit", "sums_error": "of a sum",
    "mean_logprob_difference": "of a log-probability, mean",
}  # fmt: skip
ALSO = {
    "preemptions": "{} preemptions", "cached_tokens": "{} tokens from the cache", "refusals": "{} refused with a line",
    "wrong_by_without_salt": "without a salt wrong by {:.2f}", "of_plain": "plain requests {:.1e}",
}  # fmt: skip


def main(directory):
    rows = json.loads((directory / "rows.json").read_text())
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
