"""What `cna demo` does."""

from __future__ import annotations

from ..demo.checkpoint import demo_checkpoint
from ..packages import require
from .console import stdout


def run_demo(args):
    demo_checkpoint()
    require("tokenizers", "jinja2", "rich", "matplotlib")
    from ..demo.story import tell

    tell(args.out, stdout())
