"""What `cna show` does."""

from __future__ import annotations

from cna_kernels.circuit import Circuit

from .console import show_circuit


def run_show(args):
    show_circuit(Circuit.load(args.circuit), as_json=args.json)
