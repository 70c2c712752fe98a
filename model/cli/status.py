"""What `cna status` does: show how far a run directory is. This module loads no torch, so the answer comes at once."""

from __future__ import annotations

from ..discovery.run_directory import RunDirectory
from .console import Table, cell, print_json, stdout

MOST = 10  # damaged parts that are named


def run_status(args):
    status = RunDirectory.open(args.run).status()
    if args.json:
        print_json(status)
        return
    table = Table(show_header=False)
    for name in ("units", "prompts"):
        table.add_row(name, f"{status[f'{name}_done']:,} of {status[name]:,} done")
    table.add_row("model", cell(status["model"]))
    table.add_row("parts", f"{status['part_bytes'] / 2**20:,.1f} MiB")
    if status["last_part_s"] is not None:
        table.add_row("last part", f"{status['last_part_s']:,.0f} s ago")
    if status["prompts_per_s"] is not None:
        table.add_row("rate of the last parts", f"{status['prompts_per_s']:,.1f} prompts/s")
        if status["prompts_done"] < status["prompts"]:
            table.add_row("the rest, at that rate", f"{status['eta_s']:,.0f} s")
    stdout().print(table)
    for text in status["damaged"][:MOST]:
        print(f"damaged: {text}")
    if len(status["damaged"]) > MOST:
        print(f"and {len(status['damaged']) - MOST:,} more are damaged")
