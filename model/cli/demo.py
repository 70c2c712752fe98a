"""What `cna demo` does."""

from __future__ import annotations

from ..demo.story import tell
from .console import stdout


def run_demo(args):
    tell(args.out, stdout())
